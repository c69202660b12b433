"""Journals made of whatever tasks and clients do, and a description of what a replay makes of one."""

from __future__ import annotations

from dask._expr import LLGExpr
from dask._task_spec import Task, TaskRef
from distributed.protocol import Serialized, serialize
from distributed.protocol.pickle import dumps, loads
from hypothesis import strategies as st

from dask_resilience._distributed.headless import HeadlessScheduler
from dask_resilience._distributed.scheduler_replay import Replay
from dask_resilience._distributed.scheduler_tap import graph_record
from dask_resilience.journal import records

CLIENTS = ("Client-a", "Client-b")
OWNERS = ("variable-v", "fire-and-forget")


def add(*values):
    return sum(values)


def graph(client, seq, dependencies, *, keys=None, again=(), first_run=None, **options):
    """The record of a graph, given the dependencies of each of its tasks."""
    tasks = {key: Task(key, add, 1, *map(TaskRef, below)) for key, below in dependencies.items()}
    expr = LLGExpr(tasks)
    msg = {
        "expr_ser": Serialized(*serialize(expr)),
        "keys": list(keys if keys is not None else tasks),
        "span_metadata": {},
        "internal_priority": None,
        "submitting_task": None,
        "user_priority": 0,
        "actors": None,
        "fifo_timeout": 0,
        "code": (),
        "annotations": None,
        **({"again": list(again)} if again else {}),
        **options,
    }
    return graph_record(client, seq, msg, first_run)


_NAMES = [f"t-{n}" for n in range(8)]
_KEY = st.sampled_from(_NAMES)
_KEYS = st.lists(_KEY, min_size=1, max_size=4, unique=True).map(tuple)
_CLIENT = st.sampled_from(CLIENTS)
_SEQ = st.integers(1, 20)
_RUN = st.integers(1, 90)
_ADDRESS = st.sampled_from(["tcp://1", "tcp://2"])
_ERROR = dumps((1, 2, "e", "t", ["w"]))


def _counts(low, high):
    return st.dictionaries(_KEY, st.integers(low, high), min_size=1, max_size=3)


def _constant(*values):
    return st.sampled_from(values)


_CALL = {"client": _CLIENT, "number": st.integers(0, 6), "settled": st.integers(0, 4)}

_FACTS = st.one_of(
    st.builds(records.KeysReleased, client=_constant(*CLIENTS, *OWNERS), keys=_KEYS),
    st.builds(records.KeysWanted, client=_constant(*OWNERS), seq=_SEQ, keys=_KEYS, origin=_CLIENT),
    st.builds(records.KeysCancelled, client=_CLIENT, seq=_SEQ, keys=_KEYS, force=st.booleans()),
    st.builds(records.DataScattered, client=_CLIENT, nbytes=_counts(-1, 9)),
    _KEY.map(lambda key: records.TaskErred(key=key, blame=key, error=_ERROR)),
    st.builds(records.TaskErred, key=_KEY, blame=_KEY, error=st.none()).filter(lambda r: r.key != r.blame),
    st.builds(records.ErrorsCleared, keys=_KEYS),
    st.builds(records.TasksSuspected, counts=_counts(1, 3)),
    st.builds(records.RetriesLeft, counts=_counts(0, 2), runs=st.dictionaries(_KEY, _RUN, max_size=2)),
    st.builds(records.RestrictionsSet, workers=_KEYS.map(lambda keys: dict.fromkeys(keys, ("tcp://1",)))),
    st.builds(records.ActorsMade, keys=_KEYS),
    st.builds(records.ClientJoined, client=_CLIENT, resilient=st.booleans(), worker=_constant("", "tcp://1")),
    st.builds(records.ClientLeft, client=_CLIENT),
    st.builds(records.WorkerJoined, address=_ADDRESS, name=_constant("one", "two"), nanny=st.none()),
    st.builds(records.WorkerLeft, address=_ADDRESS),
    st.builds(records.SharedChanged, kind=st.just("variable"), name=_constant("v", "w"),
              value=_constant(None, dumps(1), dumps(2))),
    st.builds(records.QueueChanged, name=_constant("q", "r"), change=st.just("users"), count=st.integers(0, 2)),
    st.builds(records.QueueChanged, name=_constant("q", "r"), change=st.just("put"), keys=_constant((), ("t-1",)),
              items=st.binary(max_size=2).map(lambda item: (item,)), **_CALL),
    st.builds(records.QueueChanged, name=_constant("q", "r"), change=st.just("taken"), **_CALL),
    st.builds(records.QueueChanged, name=_constant("q", "r"), change=st.just("received"), keys=st.just(("t-1",))),
    st.builds(records.EventLogged, topics=_constant(("a",), ("a", "b")), event=st.binary(max_size=2), **_CALL),
    _constant(
        records.SharedChanged(kind="metadata", name=("t-1",), value=dumps((4,))),
        records.SharedChanged(kind="metadata", name=("t-2", "deep"), value=dumps((5,))),
        records.PluginRegistered(kind="worker", name="p", plugin=dumps(1)),
        records.PluginRegistered(kind="scheduler", name="q", plugin=dumps(2)),
        records.PluginUnregistered(kind="worker", name="p"),
        records.ClusterClosed(reason="end"),
        records.EpochStarted(epoch=2, cluster="c", holder="h", versions={}, sealed=None),
    ),
)  # fmt: skip

_ANNOTATIONS = (
    None,
    {"retries": 2},
    {"priority": 3},
    {"workers": ["w"]},
    {"span": {"name": ("s", "u"), "ids": ("1", "2")}},
)


@st.composite
def _graphs(draw, shape):
    new = draw(_KEYS)
    return graph(
        draw(_CLIENT),
        draw(_SEQ),
        {key: shape[key] for key in sorted(new)},
        again=draw(st.lists(st.sampled_from(new), unique=True)),
        first_run=draw(_RUN),
        annotations=draw(st.sampled_from(_ANNOTATIONS)),
        actors=draw(_constant(None, None, True)),
        code=draw(_constant((), ("line",))),
        span_metadata=draw(_constant({}, {"collections": [{"type": "Bag"}]})),
    )


@st.composite
def journals(draw):
    """Records as a scheduler might write them; what they tell of need not exist, as after a race."""
    # A key stands for one thing.
    shape = {
        key: draw(st.lists(st.sampled_from(_NAMES[:n]), unique=True, max_size=3)) if n else []
        for n, key in enumerate(_NAMES)
    }
    opening = records.EpochStarted(epoch=1, cluster="c", holder="h", versions={}, sealed=None)
    return [opening, *draw(st.lists(st.one_of(_graphs(shape), _graphs(shape), _FACTS), min_size=2, max_size=14))]


def replayed(journal, *, snapshot=()):
    """A replay of `journal` on a scheduler that never serves, behind a snapshot where there is one."""
    replay = Replay(HeadlessScheduler())
    if snapshot:
        replay.load(snapshot)
    for record in journal:
        replay.apply(record)
    return replay


def described(replay):
    """All that a recovery goes by."""
    s = replay.scheduler
    spans = s.extensions["spans"]
    notes = {
        name: {ts.key: number for ts, number in getattr(replay, name).items()}
        for name in ("retried", "first_runs", "born")
    }
    return {
        "tasks": {key: _task(ts, spans) for key, ts in s.tasks.items()},
        "groups": {
            name: {state: group.states[state] for state in ("released", "erred")}
            for name, group in s.task_groups.items()
        },
        "wants": {client: sorted(ts.key for ts in cs.wants_what) for client, cs in s.clients.items() if cs.wants_what},
        "metadata": dict(s.task_metadata),
        "generation": s.generation,
        "worker plugins": list(s.worker_plugins.items()),
        "scheduler plugins": list(replay.scheduler_plugins.items()),
        "clients": replay.clients,
        "client workers": replay.client_workers,
        "last_seq": replay.last_seq,
        "workers": replay.workers,
        "shared": list(replay.shared.items()),
        "actors": sorted(replay.actors_made),
        "queues": {name: (q.maxsize, q.users, list(q.items)) for name, q in replay.queues.queues.items()},
        "held by queues": {name: count for name, count in replay.queues.held.items() if count > 0},
        "topics": {topic: list(events) for topic, events in replay.topics.events.items()},
        "events": replay.topics.counts,
        "calls": sorted([*replay.calls, *((call, ()) for call in replay.calls.all_over())]),
        "closed": replay.closed,
        "computations": [
            (sorted(living), list(c.code), c.annotations)
            for c in s.computations
            if (living := [tg.name for tg in c.groups if s.task_groups.get(tg.name) is tg])
        ],
        "notes": notes,
    }


def _task(ts, spans):
    span = spans.spans.get(ts.group.span_id)
    return {
        "runs": None if ts.run_spec is None else loads(dumps(ts.run_spec)),
        "below": sorted(dts.key for dts in ts.dependencies),
        "above": sorted(dts.key for dts in ts.dependents),
        "wanted": sorted(cs.client_key for cs in ts.who_wants or ()),
        "blame": ts.exception_blame and ts.exception_blame.key,
        # Not what earlier graphs told of it: with their tasks that is gone.
        "span": span and (span.name, ts.group in span.groups),
        **{
            name: getattr(ts, name)
            for name in (
                "state",
                "priority",
                "retries",
                "worker_restrictions",
                "host_restrictions",
                "resource_restrictions",
                "loose_restrictions",
                "actor",
                "annotations",
                "nbytes",
                "suspicious",
                "exception",
                "traceback",
                "exception_text",
                "traceback_text",
                "erred_on",
                "has_lost_dependencies",
            )
        },
    }
