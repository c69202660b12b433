"""Hypothesis strategies that several parts share."""

from __future__ import annotations

from hypothesis import strategies as st

from dask_resilience.journal import records

names = st.text(max_size=20)
numbers = st.integers(min_value=-(2**63), max_value=2**64 - 1)
counts = st.integers(min_value=0, max_value=2**63)
scalars = names | st.binary(max_size=20) | numbers | st.floats(allow_nan=False)
#: What Dask allows as a key: a scalar or nested tuples of them.
keys = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4).map(tuple), max_leaves=6)
key_tuples = st.lists(keys, max_size=5).map(tuple)
raw = st.binary(max_size=100) | st.integers(4000, 5000).map(bytes)
addresses = st.integers(0, 2**16).map("tcp://10.0.0.1:{}".format)
places = st.tuples(counts, counts, counts, counts)
kinds = st.sampled_from(["scheduler", "worker", "nanny"])


def maps(values):
    """Build maps from keys to `values`."""
    return st.dictionaries(keys, values, max_size=5)


#: For each class of record, a strategy of its instances.
by_class = {
    records.EpochStarted: st.builds(
        records.EpochStarted,
        epoch=counts,
        cluster=names,
        holder=names,
        versions=st.dictionaries(names, names, max_size=3),
        sealed=st.none() | places,
    ),
    records.GraphSubmitted: st.builds(
        records.GraphSubmitted,
        client=names,
        seq=counts,
        stimulus_id=names,
        keys=key_tuples,
        frames=st.lists(raw, max_size=20).map(tuple),
        rest=raw,
    ),
    records.KeysWanted: st.builds(records.KeysWanted, client=names, seq=counts, keys=key_tuples, origin=names),
    records.KeysReleased: st.builds(records.KeysReleased, client=names, keys=key_tuples),
    records.KeysCancelled: st.builds(
        records.KeysCancelled, client=names, seq=counts, keys=key_tuples, force=st.booleans()
    ),
    records.DataScattered: st.builds(records.DataScattered, client=names, nbytes=maps(counts)),
    records.TaskErred: st.builds(records.TaskErred, key=keys, blame=keys, error=st.none() | raw),
    records.ErrorsCleared: st.builds(records.ErrorsCleared, keys=key_tuples),
    records.TasksSuspected: st.builds(records.TasksSuspected, counts=maps(counts)),
    records.RetriesLeft: st.builds(records.RetriesLeft, counts=maps(counts), runs=maps(counts)),
    records.RestrictionsSet: st.builds(
        records.RestrictionsSet, workers=maps(st.lists(addresses, max_size=3).map(tuple))
    ),
    records.ClientJoined: st.builds(
        records.ClientJoined, client=names, resilient=st.booleans(), worker=st.just("") | addresses
    ),
    records.ClientLeft: st.builds(records.ClientLeft, client=names),
    records.WorkerJoined: st.builds(
        records.WorkerJoined, address=addresses, name=names | counts, nanny=st.none() | addresses
    ),
    records.WorkerLeft: st.builds(records.WorkerLeft, address=addresses),
    records.PluginRegistered: st.builds(records.PluginRegistered, kind=kinds, name=names, plugin=raw),
    records.PluginUnregistered: st.builds(records.PluginUnregistered, kind=kinds, name=names),
    records.ClusterClosed: st.builds(records.ClusterClosed, reason=names),
    records.SharedChanged: st.builds(
        records.SharedChanged, kind=st.text(max_size=9), name=keys, value=st.none() | st.binary(max_size=99)
    ),
    records.QueueChanged: st.builds(
        records.QueueChanged,
        name=keys,
        change=st.text(max_size=9),
        items=st.lists(raw, max_size=3).map(tuple),
        keys=key_tuples,
        count=counts,
        maxsize=counts,
        client=names,
        number=counts,
        settled=counts,
        seq=counts,
    ),
    records.EventLogged: st.builds(
        records.EventLogged,
        topics=key_tuples,
        event=raw,
        count=counts,
        client=names,
        number=counts,
        settled=counts,
    ),
    records.CallAnswered: st.builds(
        records.CallAnswered, client=names, number=counts, settled=counts, items=st.lists(raw, max_size=3).map(tuple)
    ),
    records.ActorsMade: st.builds(records.ActorsMade, keys=key_tuples),
    records.SnapshotBegun: st.builds(
        records.SnapshotBegun, lsn=counts, chain=counts, epoch=counts, seq=counts, rest=raw
    ),
    records.SnapshotTasks: st.builds(records.SnapshotTasks, keys=key_tuples, specs=raw, rest=raw),
    records.SnapshotLinks: st.builds(records.SnapshotLinks, first=counts, counts=raw, targets=raw),
    records.SnapshotTaken: st.builds(
        records.SnapshotTaken,
        lsn=counts,
        chain=counts,
        epoch=counts,
        seq=counts,
        frames=counts,
        nbytes=counts,
        end_chain=counts,
    ),
}
any_record = st.one_of(*by_class.values())
