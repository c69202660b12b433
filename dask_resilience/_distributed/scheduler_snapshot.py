"""The state of a replay as records, and back.

A graph is not written as it came but as the tasks that are left of it, each with what it runs: building it again needs
no materializing, culling and ordering, and what was let go of costs nothing. Everything else becomes the records that
the journal has for it anyway.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from operator import attrgetter
from sys import byteorder
from typing import Any, Final

from distributed.protocol.pickle import dumps, loads
from distributed.scheduler import Computation, Scheduler, TaskState

from dask_resilience._distributed.scheduler_outcomes import error_record
from dask_resilience._distributed.task_errors import fail_with_dependents, packed
from dask_resilience._distributed.task_notes import TaskNotes
from dask_resilience.errors import GraphUnreadable, SnapshotRefused
from dask_resilience.journal import records
from dask_resilience.journal.calls import call_records
from dask_resilience.types import Key

logger = logging.getLogger("distributed.resilience")

#: So many tasks are pickled together, at most: what they share is written once.
_BATCH: Final = 1000
#: A task that takes more than this by itself: look whether its neighbours share what is large.
_LARGE_BYTES: Final = 64 << 10
#: If they do not, so much is pickled together; and if they do, so many tasks.
_BATCH_BYTES: Final = 8 << 20
_SHARING_BATCH: Final = 100_000

#: Attributes of a task that a replay sets, and what they are before.
_DEFAULTS: Final[dict[str, Any]] = {
    "priority": None,
    "retries": 0,
    "host_restrictions": None,
    "worker_restrictions": None,
    "resource_restrictions": None,
    "loose_restrictions": False,
    "actor": False,
    "annotations": None,
    "metadata": None,
    "has_lost_dependencies": False,
    "nbytes": -1,
    "suspicious": 0,
}


class _NotRead:
    """Stands for what a task runs as long as that could not be unpickled."""


_NOT_READ: Final[Any] = _NotRead()


class TaskBooks:
    """What a replay notes of tasks.

    Parameters
    ----------
    retried, first_runs, born
        Numbers of runs, see `Replay`.
    actors_made
        Actors that came to be, by key.
    """

    def __init__(self, retried: TaskNotes, first_runs: TaskNotes, born: TaskNotes, actors_made: Any) -> None:
        self._notes = {"retried": retried, "first_runs": first_runs, "born": born}
        self._actors_made = actors_made

    def columns(self, tasks: Sequence[TaskState]) -> dict[str, list[Any]]:
        """Tell what is noted of some tasks, by kind of note; kinds that none of them has are left out."""
        found = {name: [notes.get(ts, -1) for ts in tasks] for name, notes in self._notes.items() if len(notes)}
        if self._actors_made:
            found["actors_made"] = [1 if self._actors_made.get(ts.key) is ts else -1 for ts in tasks]
        return {name: column for name, column in found.items() if any(value >= 0 for value in column)}

    def restore(self, name: str, tasks: Sequence[TaskState], column: Sequence[int]) -> None:
        """Note again what `columns` told."""
        for ts, value in zip(tasks, column, strict=True):
            if value < 0:
                continue
            if name == "actors_made":
                self._actors_made[ts.key] = ts
            else:
                self._notes[name][ts] = value


# Writing


def state_records(replay: Any) -> Iterator[records.Record]:
    """The state of a replay as the records that build it again, behind `SnapshotBegun`.

    Parameters
    ----------
    replay
        A `Replay` that read everything, on a scheduler that never served.

    Yields
    ------
    Record
        In the order in which they are to be applied.

    Raises
    ------
    SnapshotRefused
        If what a task runs cannot be pickled.
    """
    scheduler = replay.scheduler
    if replay.closed:
        yield records.ClusterClosed(reason="closed")
    # Modules that clients brought come before what refers to them.
    for name, plugin in replay.scheduler_plugins.items():
        yield records.PluginRegistered(kind="scheduler", name=name, plugin=plugin)
    yield from _task_records(scheduler, replay.books)
    for client, cs in scheduler.clients.items():
        rest = iter([ts.key for ts in cs.wants_what])
        while keys := tuple(islice(rest, _BATCH)):
            yield records.KeysWanted(client=client, seq=0, keys=keys)
    for client, resilient in replay.clients.items():
        worker = replay.client_workers.get(client, "")
        yield records.ClientJoined(client=client, resilient=resilient, worker=worker)
    for client, seq in replay.last_seq.items():
        yield records.KeysWanted(client=client, seq=seq, keys=(), origin=client)
    for address, (name, nanny) in replay.workers.items():
        yield records.WorkerJoined(address=address, name=name, nanny=nanny)
    plugins: dict[records.PluginKind, Any] = {
        "worker": scheduler.worker_plugins,
        "nanny": scheduler.nanny_plugins,
    }
    for kind, registered in plugins.items():
        for name, plugin in registered.items():
            yield records.PluginRegistered(kind=kind, name=name, plugin=plugin)
    for name, value in scheduler.task_metadata.items():
        yield records.SharedChanged(kind="metadata", name=(name,), value=dumps((value,)))
    for (shared, name), value in replay.shared.items():
        yield records.SharedChanged(kind=shared, name=name, value=value)
    yield from replay.queues.as_records()
    yield from replay.topics.as_records()
    yield from call_records(replay.calls)


def _task_records(scheduler: Any, books: TaskBooks) -> Iterator[records.Record]:
    by_prefix: dict[str, list[TaskState]] = {}
    for ts in scheduler.tasks.values():
        by_prefix.setdefault(ts.prefix.name, []).append(ts)
    # Tasks that run the same are neighbours: what they share is together, and what cannot be read is by itself.
    tasks = [ts for alike in by_prefix.values() for ts in alike]
    numbers = {ts.key: number for number, ts in enumerate(tasks)}
    for alike in by_prefix.values():
        for batch in _batches_to_pickle(alike):
            yield records.SnapshotTasks(
                keys=tuple(ts.key for ts in batch), specs=_pickled_specs(batch), rest=_packed(_columns(batch, books))
            )
    first = 0
    for batch in _batched(tasks):
        counts = array("I", (len(ts.dependencies) for ts in batch))
        if any(counts):
            targets = array("I", (numbers[dts.key] for ts in batch for dts in ts.dependencies))
            yield records.SnapshotLinks(first=first, counts=_little(counts), targets=_little(targets))
        first += len(batch)
    # Behind the errors that are their own, those that others are to blame for.
    for ts in sorted((ts for ts in tasks if ts.state == "erred"), key=lambda ts: ts.exception_blame not in (None, ts)):
        yield error_record(ts)


def _batched(tasks: Iterable[TaskState]) -> Iterator[list[TaskState]]:
    rest = iter(tasks)
    while batch := list(islice(rest, _BATCH)):
        yield batch


def _batches_to_pickle(alike: list[TaskState]) -> Iterator[list[TaskState]]:
    start = 0
    while start < len(alike):
        count = _BATCH
        alone = len(_pickled_specs(alike[start : start + 1]))
        if alone > _LARGE_BYTES:
            # Where all share one large thing, each batch would hold a copy, and the scheduler after it so many.
            together = len(_pickled_specs(alike[start : start + 4]))
            count = _SHARING_BATCH if together < 2 * alone else max(1, _BATCH_BYTES // alone)
        yield alike[start : start + count]
        start += count


def _pickled_specs(batch: list[TaskState]) -> bytes:
    try:
        return dumps([ts.run_spec for ts in batch])
    except Exception as error:
        raise SnapshotRefused(f"what {batch[0].key!r} or one of {len(batch)} tasks runs cannot be pickled") from error


def _packed(parts: Mapping[str, Any]) -> bytes:
    """Each part by itself, since one that cannot be read must not take the others with it."""
    return dumps({name: dumps(part) for name, part in parts.items()})


def _unpacked(raw: bytes) -> Iterator[tuple[str, Any]]:
    for name, packed_part in loads(raw).items():
        try:
            part = loads(packed_part)
        except Exception as error:  # noqa: BLE001 - annotations may be of any class, and unpickling runs its code
            logger.error("A snapshot's %s cannot be read here and are left out: %r", name, error)  # noqa: TRY400
        else:
            yield name, part


def _columns(batch: list[TaskState], books: TaskBooks) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    for name, default in _DEFAULTS.items():
        column = list(map(attrgetter(name), batch))
        if any(value != default for value in column):
            columns[name] = column
    # A failure that its own record tells is not here; one that a dependent learnt of without failing itself is.
    blamed = [ts.exception_blame.key if ts.exception_blame and ts.state != "erred" else None for ts in batch]
    if any(key is not None for key in blamed):
        columns["blamed"] = blamed
    return columns | books.columns(batch)


def _little(numbers: array[int]) -> bytes:
    if byteorder != "little":
        numbers.byteswap()
    return numbers.tobytes()


def scheduler_rest(scheduler: Any) -> bytes:
    """What is of no single task, pickled: counters, and spans and computations of which tasks are left."""
    groups = scheduler.task_groups
    spans_ext = scheduler.extensions.get("spans")
    spans: dict[str, Any] = {}
    for group in groups.values() if spans_ext else ():
        span = spans_ext.spans.get(group.span_id)
        while span is not None and span.id not in spans:
            name_and_ids = span.annotation or {"name": span.name, "ids": (span.id,)}
            spans[span.id] = (name_and_ids, span.enqueued, span._metadata, list(span._code))
            span = span.parent
    computations = [
        (computation.start, list(computation.code), computation.annotations, [tg.name for tg in living])
        for computation in scheduler.computations
        if (living := [tg for tg in computation.groups if groups.get(tg.name) is tg])
    ]
    return _packed(
        {
            "generation": scheduler.generation,
            "last_time": scheduler._last_time,
            "spans": list(spans.values()),
            "span_of_group": {name: group.span_id for name, group in groups.items()},
            "computations": computations,
        }
    )


# Reading


class SnapshotLoad:
    """Builds tasks again, record by record.

    Parameters
    ----------
    scheduler
        An empty scheduler.
    books
        Where the replay notes things of tasks.
    """

    def __init__(self, scheduler: Scheduler, books: TaskBooks) -> None:
        self._scheduler: Any = scheduler
        self._books = books
        self._tasks: list[TaskState] = []
        self._blamed: list[tuple[TaskState, Key]] = []
        self._span_of_group: dict[str, str] = {}
        self._computation_of_group: dict[str, Computation] = {}
        self._unread: list[tuple[bytes, list[TaskState]]] = []
        self._begun: records.SnapshotBegun | None = None

    def begun(self, record: records.SnapshotBegun) -> None:
        """Keep what is of no single task until modules of clients are there, which it may refer to."""
        self._begun = record

    def _restore_rest(self, record: records.SnapshotBegun) -> None:
        s = self._scheduler
        rest = {"spans": (), "computations": ()} | dict(_unpacked(record.rest))
        s.generation, s._last_time = rest["generation"], rest["last_time"]
        self._span_of_group = rest["span_of_group"]
        if (spans_ext := s.extensions.get("spans")) is not None:
            # Parents were seen first by the scheduler, so the oldest come first.
            for name_and_ids, enqueued, metadata, code in sorted(rest["spans"], key=lambda span: span[1]):
                span = spans_ext._ensure_span(name_and_ids["name"], name_and_ids["ids"])
                span.enqueued, span._metadata = enqueued, metadata
                span._code.update(dict.fromkeys(code))
        for start, code, annotated, groups in rest["computations"]:
            computation = Computation()
            computation.start, computation.annotations = start, annotated
            computation.code.update(code)
            s.computations.append(computation)
            self._computation_of_group |= dict.fromkeys(groups, computation)

    def tasks(self, record: records.SnapshotTasks) -> None:
        """Create tasks, as yet without dependencies."""
        s = self._scheduler
        specs: Sequence[Any]
        try:
            specs, unread = loads(record.specs), False
        except Exception:  # noqa: BLE001 - unpickling runs foreign code, which raises what it likes
            specs, unread = [_NOT_READ] * len(record.keys), True
        new_task: Callable[..., TaskState] = s.new_task
        batch = [new_task(key, spec, "released") for key, spec in zip(record.keys, specs, strict=True)]
        if unread:
            self._unread.append((record.specs, batch))
        for name, column in _unpacked(record.rest):
            self._restore(name, batch, column)
        self._tasks += batch

    def _restore(self, name: str, batch: list[TaskState], column: list[Any]) -> None:
        if name == "nbytes":
            for ts, nbytes in zip(batch, column, strict=True):
                if nbytes >= 0:
                    ts.set_nbytes(nbytes)
        elif name == "suspicious":
            for ts, count in zip(batch, column, strict=True):
                ts.suspicious = count
                ts.prefix.suspicious += count
        elif name == "blamed":
            self._blamed += [(ts, key) for ts, key in zip(batch, column, strict=True) if key is not None]
        elif name in _DEFAULTS:
            for ts, value in zip(batch, column, strict=True):
                setattr(ts, name, value)
        else:
            self._books.restore(name, batch, column)

    def links(self, record: records.SnapshotLinks) -> None:
        """Create dependencies."""
        tasks = self._tasks
        targets = iter(_numbers(record.targets))
        for number, count in enumerate(_numbers(record.counts), record.first):
            add_dependency = tasks[number].add_dependency
            for target in islice(targets, count):
                add_dependency(tasks[target])

    def finish(self) -> None:
        """All tasks are there: tie their groups to spans and computations, and let go of what was needed for it."""
        s = self._scheduler
        if self._begun is not None:
            self._restore_rest(self._begun)
            self._begun = None
        spans = s.extensions["spans"].spans if "spans" in s.extensions else {}
        for name, group in s.task_groups.items():
            if (span := spans.get(self._span_of_group.get(name))) is not None:
                group.span_id = span.id
                span.groups.add(group)
            if (computation := self._computation_of_group.get(name)) is not None:
                computation.groups.add(group)
        for ts, key in self._blamed:
            ts.exception_blame = s.tasks[key]
        self._tasks, self._blamed = [], []

    def read_again(self) -> list[GraphUnreadable]:
        """What could not be unpickled may be by now: plugins of clients bring modules.

        Returns
        -------
        list
            Why some of it still cannot. These tasks have failed.
        """
        problems: list[GraphUnreadable] = []
        unread, self._unread = self._unread, []
        for pickled, batch in unread:
            waiting = {ts.key: ts for ts in batch if ts.run_spec is _NOT_READ}
            if not waiting:
                continue
            try:
                specs = loads(pickled)
            except Exception as error:  # noqa: BLE001 - as above
                problem = GraphUnreadable(tuple(waiting), f"{type(error).__name__}: {error}")
                problems.append(problem)
                exception = packed(problem)
                for ts in waiting.values():
                    fail_with_dependents(ts, exception, str(problem))
            else:
                for ts, spec in zip(batch, specs, strict=True):
                    if ts.run_spec is _NOT_READ:
                        ts.run_spec = spec
        return problems


def _numbers(raw: bytes) -> array[int]:
    numbers = array("I")
    numbers.frombytes(raw)
    if byteorder != "little":
        numbers.byteswap()
    return numbers
