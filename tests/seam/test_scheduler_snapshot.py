"""A snapshot and what came after it give the same state as the whole journal."""

from __future__ import annotations

import asyncio

from hypothesis import example, given
from hypothesis import strategies as st
from journals import described, graph, journals, replayed

from dask_resilience._distributed.scheduler_snapshot import scheduler_rest, state_records
from dask_resilience.journal import records
from dask_resilience.journal.codec import decode_frame, encode_frame


def snapshot_of(replay):
    """Its records, through their frames."""
    begun = records.SnapshotBegun(lsn=1, chain=0, epoch=1, seq=0, rest=scheduler_rest(replay.scheduler))
    for record in [begun, *state_records(replay)]:
        buffers, _ = encode_frame(record, lsn=1, chain=0)
        yield decode_frame(b"".join(buffers), 0, lsn=1, chain=0, name="snapshot").record


@given(journal=journals(), cut=st.integers(0, 14))
def test_a_snapshot_and_the_rest_are_the_whole(journal, cut):
    async def main():
        whole = replayed(journal)
        from_snapshot = replayed(journal[cut:], snapshot=list(snapshot_of(replayed(journal[:cut]))))
        assert described(from_snapshot) == described(whole)

    asyncio.run(main())


@example(journal=[records.PluginRegistered(kind=kind, name="p", plugin=b"p") for kind in ("worker", "nanny")])
@given(journal=journals())
def test_behind_the_end_of_a_cluster_nothing_of_it_is_left(journal):
    async def main():
        ended = described(replayed([*journal, records.ClusterClosed(reason="end")]))
        empty = described(replayed([records.ClusterClosed(reason="end")]))
        del ended["generation"], empty["generation"]
        assert ended == empty

    asyncio.run(main())


def test_a_span_of_which_tasks_are_left_keeps_what_was_told_of_it():
    told = {"collections": [{"type": "Bag"}]}
    annotations = {"span": {"name": ("s", "u"), "ids": ("1", "2")}}
    journal = [graph("Client-a", 1, {"t-0": []}, annotations=annotations, span_metadata=told, code=("line",))]

    async def main():
        replay = replayed([], snapshot=list(snapshot_of(replayed(journal))))
        span = replay.scheduler.extensions["spans"].spans["2"]
        assert (span.name, span.parent.name) == (("s", "u"), ("s",))
        assert span._metadata == told
        assert list(span._code) == [("line",)]

    asyncio.run(main())
