"""What the journal can say.

A record is one input of the scheduler, or one fact that a replay cannot work out again. How it is stored is specified
in ``docs/reference/journal-format.md``. A field that is added later must have a default, which stands in for it in
journals that lack it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from dask_resilience.types import Address, Key

#: Where an older log ends: epoch, segment, length in bytes, LSN of the last record before that end.
SealedEnd: TypeAlias = tuple[int, int, int, int]
PluginKind: TypeAlias = Literal["scheduler", "worker", "nanny"]


class Record:
    """Base of all records. The classes below are what the journal holds."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochStarted(Record):
    """A scheduler won the lease: the first record of its epoch.

    Parameters
    ----------
    epoch
        Number of the epoch, larger than every older one.
    cluster
        Name of the cluster.
    holder
        Who rules, for people to read.
    versions
        Versions of the software that wrote the epoch, by name.
    sealed
        Where the log before ends, or None where there was no log.
    """

    epoch: int
    cluster: str
    holder: str
    versions: Mapping[str, str]
    sealed: SealedEnd | None

    def __post_init__(self) -> None:
        if self.sealed is not None and [type(part) for part in self.sealed] != [int] * 4:
            raise ValueError(f"sealed must be (epoch, segment, length, lsn), not {self.sealed!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSubmitted(Record):
    """A client sent a graph.

    Parameters
    ----------
    client
        Its id.
    seq
        The client's number of this message.
    stimulus_id
        The stimulus under which the scheduler applied it.
    keys
        What the client asked for.
    frames
        The serialized graph as it came.
    rest
        The other arguments of the message, pickled.
    """

    client: str
    seq: int
    stimulus_id: str
    keys: tuple[Key, ...]
    frames: tuple[bytes, ...]
    rest: bytes

    def __post_init__(self) -> None:
        if not all(isinstance(frame, bytes | bytearray | memoryview) for frame in self.frames):
            raise ValueError("each of frames must be bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysWanted(Record):
    """`client` holds `keys`; `seq` is the number of this message, of the client `origin` that sent it.

    The two differ where a client speaks for an owner that is none, such as ``fire-and-forget``.
    """

    client: str
    seq: int
    keys: tuple[Key, ...]
    origin: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysReleased(Record):
    """A client let go of `keys`."""

    client: str
    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysCancelled(Record):
    """A client cancelled `keys`; with `force`, for every other client too."""

    client: str
    seq: int
    keys: tuple[Key, ...]
    force: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DataScattered(Record):
    """A client put data on workers; `nbytes` are sizes in bytes by key. The data itself is not in the journal."""

    client: str
    nbytes: Mapping[Key, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskErred(Record):
    """A task failed for good.

    Parameters
    ----------
    key
        The task.
    blame
        The task whose function raised: `key` itself or a dependency.
    error
        The pickled error, or None where the record of `blame` has it.
    """

    key: Key
    blame: Key
    error: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorsCleared(Record):
    """Failed tasks `keys` are to run again."""

    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TasksSuspected(Record):
    """How often each task was on a worker that died: absolute counts, so that applying twice does no harm."""

    counts: Mapping[Key, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RetriesLeft(Record):
    """How often each task may still fail: absolute counts, and the run whose failure was counted last."""

    counts: Mapping[Key, int]
    runs: Mapping[Key, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RestrictionsSet(Record):
    """The scheduler itself tied tasks to `workers`: addresses by key."""

    workers: Mapping[Key, tuple[Address, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorsMade(Record):
    """Actors came to be: if their worker is gone, their state is lost and must not be made anew unnoticed."""

    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientJoined(Record):
    """A client connected.

    Parameters
    ----------
    client
        Its id.
    resilient
        Whether it numbers its messages and comes back.
    worker
        Address of the worker in whose process it lives, and with which it dies; empty for any other.
    """

    client: str
    resilient: bool
    worker: Address = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLeft(Record):
    """A client left for good."""

    client: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerJoined(Record):
    """A worker joined; `nanny` is the address of the process that watches it, if there is one."""

    address: Address
    name: Key
    nanny: Address | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLeft(Record):
    """A worker left or was declared dead."""

    address: Address


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginRegistered(Record):
    """Someone registered a plugin, given pickled."""

    kind: PluginKind
    name: str
    plugin: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginUnregistered(Record):
    """Someone removed a plugin."""

    kind: PluginKind
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterClosed(Record):
    """The cluster ended cleanly: the next start is empty."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedChanged(Record):
    """What is shared by `name` has a new value, given pickled; None: it is gone. `kind` is one of `SHARED_KINDS`."""

    kind: str
    name: Key
    value: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueChanged(Record):
    """A queue has another item or another user.

    Parameters
    ----------
    name
        The queue.
    change
        ``users``: `count` have it open, of a queue for `maxsize` items; with none it is gone. ``put``: `items`, one
        pickled item, came in at its end. ``taken``: the item at its front was handed out. ``received``: whoever got
        the future `keys` has it, so that the queue need not hold it.
    items, keys, count, maxsize
        As said. `keys` is also the key of the future that an item stands for.
    client, number, settled
        The call that this answers, if it can be repeated: see `dask_resilience.journal.calls`.
    seq
        The number of the message of `client` that this applies, if it is one.
    """

    name: Key
    change: str
    items: tuple[bytes, ...] = ()
    keys: tuple[Key, ...] = ()
    count: int = 0
    maxsize: int = 0
    client: str = ""
    number: int = 0
    settled: int = 0
    seq: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EventLogged(Record):
    """Someone logged an event, given as pickled time and message.

    Parameters
    ----------
    topics
        Under which it was logged.
    event
        What was logged.
    count
        How many events this stands for: itself, and those before it that are no longer kept.
    client, number, settled
        As in `QueueChanged`.
    """

    topics: tuple[Key, ...]
    event: bytes
    count: int = 1
    client: str = ""
    number: int = 0
    settled: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CallAnswered(Record):
    """A call counted and was handed the pickled `items`; where nothing else says so any more, as in a snapshot."""

    client: str
    number: int
    settled: int
    items: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotBegun(Record):
    """The first record of a snapshot: what follows is the state after a record of the log.

    Parameters
    ----------
    lsn, chain
        Number of that record, and the chain value behind it.
    epoch, seq
        The segment from which the log goes on: the one that holds that record.
    rest
        What the scheduler keeps that is of no single task, pickled.
    """

    lsn: int
    chain: int
    epoch: int
    seq: int
    rest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotTasks(Record):
    """Tasks of a snapshot. They are numbered from zero, through all records of this type.

    Parameters
    ----------
    keys
        Their keys.
    specs
        What they run, pickled as one list; None stands for data.
    rest
        What else is known of them, pickled: by the name of an attribute a list of values, pickled by itself.
    """

    keys: tuple[Key, ...]
    specs: bytes
    rest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotLinks(Record):
    """Dependencies of the tasks of a snapshot, from task `first` on.

    Parameters
    ----------
    first
        Number of a task.
    counts
        How many dependencies it and each following task has, as unsigned 32-bit numbers, little-endian.
    targets
        The numbers of these dependencies one after the other, in the same form.
    """

    first: int
    counts: bytes
    targets: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotTaken(Record):
    """A snapshot was written and read back: the only record of its marker, without which it does not count.

    Parameters
    ----------
    lsn, chain, epoch, seq
        As in its `SnapshotBegun`.
    frames, nbytes, end_chain
        How many records it has, its length in bytes, and the chain value at its end.
    """

    lsn: int
    chain: int
    epoch: int
    seq: int
    frames: int
    nbytes: int
    end_chain: int


#: What `SharedChanged` may be about. A newer release may know more.
SHARED_KINDS: Final = frozenset({"variable", "event", "semaphore", "lease", "dataset", "metadata", "multi-lock"})

#: Type numbers on disk. They are for ever: add at the end, never renumber, never use one again.
REGISTRY: Final[Mapping[int, type[Record]]] = {
    1: EpochStarted,
    2: GraphSubmitted,
    3: KeysWanted,
    4: KeysReleased,
    5: KeysCancelled,
    6: DataScattered,
    7: TaskErred,
    8: ErrorsCleared,
    9: TasksSuspected,
    10: RetriesLeft,
    11: RestrictionsSet,
    12: ClientJoined,
    13: ClientLeft,
    14: WorkerJoined,
    15: WorkerLeft,
    16: PluginRegistered,
    17: PluginUnregistered,
    18: ClusterClosed,
    19: ActorsMade,
    20: SharedChanged,
    21: QueueChanged,
    22: EventLogged,
    23: CallAnswered,
    24: SnapshotBegun,
    25: SnapshotTasks,
    26: SnapshotLinks,
    27: SnapshotTaken,
}
