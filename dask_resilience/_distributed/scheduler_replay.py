"""Rebuilds a scheduler's state by sending the journalled messages through its own code.

Scheduling is muted meanwhile: every task stays *released*, as if no worker had come yet. What is forgotten is forgotten
by the scheduler's own rule, nobody wants it and nothing depends on it, which does not ask what was computed; so the
replay needs no completions, and a key that was let go and used again means what it meant then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import time
from typing import Any
from weakref import WeakValueDictionary

import dask.config
import dask.order
from dask._expr import LLGExpr
from distributed.diagnostics.plugin import SchedulerUploadFile
from distributed.protocol import Serialized, deserialize
from distributed.protocol.pickle import dumps, loads
from distributed.scheduler import Scheduler, TaskState, _cull, _materialize_graph
from distributed.spans import Span
from distributed.utils import import_file

from dask_resilience._distributed.scheduler_snapshot import SnapshotLoad, TaskBooks
from dask_resilience._distributed.scheduler_tap import note_first_run
from dask_resilience._distributed.task_errors import clear_error, packed, set_error
from dask_resilience._distributed.task_notes import TaskNotes
from dask_resilience.errors import ChangeTooNew, GraphUnreadable
from dask_resilience.journal import records
from dask_resilience.journal.calls import Calls, call_of
from dask_resilience.journal.queues import QueueStates
from dask_resilience.journal.topics import TopicStates
from dask_resilience.types import Address, Key

logger = logging.getLogger("distributed.resilience")


class Replay:
    """Applies records to a scheduler that does not serve yet.

    Parameters
    ----------
    scheduler
        The scheduler to fill.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler: Any = scheduler
        self.last_seq: dict[str, int] = {}
        #: Workers that were there: address to (name, nanny).
        self.workers: dict[Address, tuple[Any, Address | None]] = {}
        self._aliases: dict[Any, Address] = {}
        #: Clients that were there: id to whether they come back.
        self.clients: dict[str, bool] = {}
        #: Clients that live in the process of a worker: id to its address.
        self.client_workers: dict[str, Address] = {}
        self.closed = True
        self.graphs = 0
        self.scheduler_plugins: dict[str, bytes] = {}
        #: Of these, the modules that were loaded at their place: what is to be started in their stead.
        self.loaded_modules: dict[str, bytes] = {}
        #: Actors that came to be. A task that was forgotten and submitted again is another task with the same key.
        self.actors_made: WeakValueDictionary[Key, TaskState] = WeakValueDictionary()
        #: What is shared by name: (kind, name) to its value, the last to change last.
        self.shared: dict[tuple[str, Key], bytes] = {}
        #: The last run of each task whose failure was answered with a retry.
        self.retried = TaskNotes()
        #: Calls that may be made again, and what they were handed.
        self.calls: Calls[bytes] = Calls()
        self.queues = QueueStates(self.calls)
        self.topics = TopicStates(self.calls, dask.config.get("distributed.admin.low-level-log-length"))
        #: The first run that counts of each task whose key had another meaning before.
        self.first_runs = TaskNotes()
        #: The same of each task that may be retried: older failures are of another task with its key.
        self.born = TaskNotes()
        self.books = TaskBooks(self.retried, self.first_runs, self.born, self.actors_made)
        self._snapshot = SnapshotLoad(scheduler, self.books)
        #: Graphs that could not be unpickled, by stimulus, and what their keys were told.
        self._unread: dict[str, tuple[records.GraphSubmitted, Serialized]] = {}
        self._handlers: dict[type[records.Record], Callable[[Any], None]] = {
            records.EpochStarted: self._epoch_started,
            records.GraphSubmitted: self._graph_submitted,
            records.KeysWanted: self._keys_wanted,
            records.KeysReleased: self._keys_released,
            records.KeysCancelled: self._keys_cancelled,
            records.DataScattered: self._data_scattered,
            records.TaskErred: self._task_erred,
            records.ErrorsCleared: self._errors_cleared,
            records.TasksSuspected: self._tasks_suspected,
            records.RetriesLeft: self._retries_left,
            records.RestrictionsSet: self._restrictions_set,
            records.ActorsMade: self._actors_made,
            records.SharedChanged: self._shared_changed,
            records.QueueChanged: self._queue_changed,
            records.EventLogged: self.topics.apply,
            records.CallAnswered: self._call_answered,
            records.ClientJoined: self._client_joined,
            records.ClientLeft: self._client_left,
            records.WorkerJoined: self._worker_joined,
            records.WorkerLeft: self._worker_left,
            records.PluginRegistered: self._plugin_registered,
            records.PluginUnregistered: self._plugin_unregistered,
            records.ClusterClosed: self._cluster_closed,
            records.SnapshotBegun: self._snapshot_begun,
            records.SnapshotTasks: self._snapshot.tasks,
            records.SnapshotLinks: self._snapshot.links,
        }

    def apply(self, record: records.Record) -> None:
        """Apply one record. An unreadable graph errs its own keys and nothing else."""
        self._handlers[type(record)](record)

    def load(self, snapshot: Iterable[records.Record]) -> None:
        """Apply a whole snapshot, before anything else."""
        for record in snapshot:
            self.apply(record)
        self.loaded()

    def loaded(self) -> None:
        """All records of a snapshot were applied."""
        self._snapshot.finish()

    def ended(self, record: records.Record) -> None:
        """Only note whether the cluster ended, without applying anything."""
        if isinstance(record, records.EpochStarted | records.SnapshotBegun | records.ClusterClosed):
            self.closed = isinstance(record, records.ClusterClosed)

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Submissions create tasks and schedule nothing, and know the workers of then by their names."""
        scheduler = self.scheduler
        scheduler.transitions = lambda recommendations, stimulus_id: None
        aliases, scheduler.aliases = scheduler.aliases, self._aliases
        try:
            yield
        finally:
            del scheduler.transitions
            scheduler.aliases = aliases

    def _number(self, client: str, seq: int) -> None:
        if seq:
            self.last_seq[client] = seq

    def _epoch_started(self, record: records.EpochStarted) -> None:
        self.closed = False

    def _snapshot_begun(self, record: records.SnapshotBegun) -> None:
        self.closed = False
        self._snapshot.begun(record)

    def _cluster_closed(self, record: records.ClusterClosed) -> None:
        """The cluster ended cleanly: what follows starts from nothing."""
        scheduler = self.scheduler
        for client in list(scheduler.clients):
            if client != "fire-and-forget":
                Scheduler.remove_client(scheduler, client, stimulus_id="resilience-replay")
        fire_and_forget = scheduler.clients["fire-and-forget"]
        keys = [ts.key for ts in fire_and_forget.wants_what]
        Scheduler.client_releases_keys(scheduler, keys, "fire-and-forget", stimulus_id="resilience-replay")
        self.last_seq.clear()
        self.workers.clear()
        self._aliases.clear()
        self.clients.clear()
        self.client_workers.clear()
        self.scheduler_plugins.clear()
        self.loaded_modules.clear()
        scheduler.worker_plugins.clear()
        scheduler.nanny_plugins.clear()
        self.actors_made.clear()
        self.shared.clear()
        self.calls.clear()
        self.queues.clear()
        self.topics.clear()
        self._unread.clear()
        scheduler.task_metadata.clear()
        self.closed = True

    # Graphs and what is wanted

    def _graph_submitted(self, record: records.GraphSubmitted) -> None:
        self._number(record.client, record.seq)
        self.graphs += 1
        try:
            rest, expr = _unpacked(record)
        except Exception as error:  # noqa: BLE001 - unpickling runs foreign code, which raises what it likes
            self._unreadable(record, error)
            return
        again = rest.pop("again", ())
        if again:
            self._release(record.client, again)
        reborn = [key for key in again if key not in self.scheduler.tasks]
        self._submit(record, expr, rest, set(record.keys))
        if reborn:
            note_first_run(self.scheduler, reborn, rest["first_run"], self.first_runs)

    def read_again(self) -> list[GraphUnreadable]:
        """What was not readable may be, now that the plugins of clients run: they bring modules.

        Returns
        -------
        list
            Why some of it still is not. Its tasks have failed.
        """
        problems = self._snapshot.read_again()
        unread, self._unread = self._unread, {}
        tasks = self.scheduler.tasks
        for record, exception in unread.values():
            keys = {key for key in record.keys if (ts := tasks.get(key)) is not None and ts.exception is exception}
            if not keys:
                continue
            try:
                rest, expr = _unpacked(record)
            except Exception as error:  # noqa: BLE001 - as above
                problems.append(GraphUnreadable(record.keys, f"{type(error).__name__}: {error}"))
                continue
            for key in keys:
                ts = tasks[key]
                _unblame(ts)
                ts.priority = None
            self._submit(record, expr, rest, keys)
        for problem in problems:
            logger.error("%s", problem)
        return problems

    def _submit(self, record: records.GraphSubmitted, expr: Any, rest: dict[str, Any], keys: set[Key]) -> None:
        try:
            self._create(record, expr, rest, keys)
        except Exception:
            # The scheduler refused it then as well, and told the client.
            logger.info("Graph %s could not be materialized", record.stimulus_id, exc_info=True)

    def _create(self, record: records.GraphSubmitted, expr: Any, rest: dict[str, Any], keys: set[Key]) -> None:
        scheduler = self.scheduler
        dsk, annotations_by_type = _materialize_graph(expr=expr, validate=scheduler.validate)
        if isinstance(expr, LLGExpr):
            dsk = _cull(dsk, keys)  # type: ignore[arg-type]
        ordered = rest.get("internal_priority") or dask.order.order(dsk=dsk)
        if scheduler._find_lost_dependencies(dsk, keys):
            return
        known = scheduler.tasks.keys() & dsk.keys()
        # Stood for by an error until now: as new as the others, which Dask cannot know.
        stood_for = [ts for key in known if (ts := scheduler.tasks[key]).priority is None and ts.run_spec is None]
        # distributed 2026.7 tells the metadata of graphs apart by the ids of objects, which repeat in a replay.
        getattr(Span, "_metadata_seen", set()).clear()
        with self.muted(), self._annotating(stood_for):
            scheduler._create_taskstate_from_graph(
                dsk=dsk,
                client=record.client,
                keys=keys,
                ordered=ordered,
                submitting_task=rest.get("submitting_task"),
                user_priority=rest.get("user_priority", 0),
                actors=rest.get("actors"),
                fifo_timeout=rest.get("fifo_timeout", 0),
                code=rest.get("code", ()),
                span_metadata=rest.get("span_metadata", {}),
                annotations_by_type=annotations_by_type,
                global_annotations=rest.get("annotations"),
                start=rest.get("received") or time(),
                stimulus_id=record.stimulus_id,
            )
        if (first_run := rest.get("first_run")) is not None:
            for key in dsk.keys() - known | {ts.key for ts in stood_for}:
                if (ts := scheduler.tasks.get(key)) is not None and ts.retries:
                    self.born[ts] = first_run

    @contextmanager
    def _annotating(self, more: list[TaskState]) -> Iterator[None]:
        stock = self.scheduler._apply_annotations
        self.scheduler._apply_annotations = lambda tasks, **kwargs: stock(tasks=[*tasks, *more], **kwargs)
        try:
            yield
        finally:
            del self.scheduler._apply_annotations

    def _unreadable(self, record: records.GraphSubmitted, error: Exception) -> None:
        problem = GraphUnreadable(record.keys, f"{type(error).__name__}: {error}")
        exception = packed(problem)
        self._unread[record.stimulus_id] = record, exception
        for key in record.keys:
            ts = self.scheduler.tasks.get(key)
            if ts is None:
                ts = self.scheduler.new_task(key, None, "released")
            elif ts.run_spec is not None:
                continue
            ts.priority = (0, 0, 0)
            set_error(ts, ts, exception, None, str(problem), "", ())
        self.scheduler.client_desires_keys(keys=list(record.keys), client=record.client)

    def _keys_wanted(self, record: records.KeysWanted) -> None:
        self._number(record.origin, record.seq)
        if record.keys:
            known = [key for key in record.keys if key in self.scheduler.tasks]
            self.scheduler.client_desires_keys(keys=known, client=record.client)

    def _keys_released(self, record: records.KeysReleased) -> None:
        self._release(record.client, record.keys)

    def _release(self, client: str, keys: Iterable[Key]) -> None:
        if client in self.scheduler.clients:
            self.scheduler.client_releases_keys(keys=list(keys), client=client, stimulus_id="resilience-replay")

    def _keys_cancelled(self, record: records.KeysCancelled) -> None:
        self._number(record.client, record.seq)
        keys = [key for key in record.keys if (ts := self.scheduler.tasks.get(key)) is not None and ts.who_wants]
        self.scheduler.stimulus_cancel(keys, record.client, force=record.force, reason="", msg="")

    def _data_scattered(self, record: records.DataScattered) -> None:
        scheduler = self.scheduler
        for key, nbytes in record.nbytes.items():
            ts = scheduler.tasks.get(key)
            if ts is None:
                ts = scheduler.new_task(key, None, "released")
            if nbytes >= 0:
                ts.set_nbytes(nbytes)
        if record.client:
            scheduler.client_desires_keys(keys=list(record.nbytes), client=record.client)

    # Failures

    def _task_erred(self, record: records.TaskErred) -> None:
        ts = self.scheduler.tasks.get(record.key)
        blame = self.scheduler.tasks.get(record.blame)
        if ts is None or blame is None:
            return
        if record.error is None:
            ts.exception_blame = blame
            ts.state = "erred"
        else:
            exception, traceback, exception_text, traceback_text, erred_on = loads(record.error)
            set_error(ts, blame, exception, traceback, exception_text, traceback_text, erred_on)
        self._completed(ts)

    def _completed(self, ts: TaskState) -> None:
        """A failure lets go of what was fired and forgotten; its release is a record of its own, which may be lost."""
        fire_and_forget = self.scheduler.clients["fire-and-forget"]
        if ts in fire_and_forget.wants_what:
            self.scheduler.client_releases_keys(
                keys=[ts.key], client="fire-and-forget", stimulus_id="resilience-replay"
            )

    def _errors_cleared(self, record: records.ErrorsCleared) -> None:
        for key in record.keys:
            ts = self.scheduler.tasks.get(key)
            if ts is not None and ts.state == "erred":
                clear_error(ts)
                self.actors_made.pop(key, None)

    def _tasks_suspected(self, record: records.TasksSuspected) -> None:
        for key, count in record.counts.items():
            ts = self.scheduler.tasks.get(key)
            if ts is not None:
                ts.prefix.suspicious += count - ts.suspicious
                ts.suspicious = count

    def _retries_left(self, record: records.RetriesLeft) -> None:
        for key, count in record.counts.items():
            ts = self.scheduler.tasks.get(key)
            if ts is not None:
                ts.retries = count
                if key in record.runs:
                    self.retried[ts] = record.runs[key]

    def _restrictions_set(self, record: records.RestrictionsSet) -> None:
        for key, workers in record.workers.items():
            ts = self.scheduler.tasks.get(key)
            if ts is not None:
                ts.worker_restrictions = set(workers) or None

    def _actors_made(self, record: records.ActorsMade) -> None:
        for key in record.keys:
            ts = self.scheduler.tasks.get(key)
            if ts is not None:
                self.actors_made[key] = ts

    def _shared_changed(self, record: records.SharedChanged) -> None:
        if record.kind not in records.SHARED_KINDS:
            raise ChangeTooNew("SharedChanged", record.kind)
        if record.kind == "metadata":
            # At its place: it goes with the task that it belongs to.
            if record.value is not None and isinstance(record.name, tuple):
                self.scheduler.set_metadata(list(record.name), loads(record.value)[0])
            return
        self.shared.pop((record.kind, record.name), None)
        if record.value is not None:
            self.shared[record.kind, record.name] = record.value

    def _queue_changed(self, record: records.QueueChanged) -> None:
        self._number(record.client, record.seq)
        self.queues.apply(record)

    def _call_answered(self, record: records.CallAnswered) -> None:
        if (call := call_of(record)) is not None:
            self.calls.note(call, *record.items)

    # Members and plugins

    def _client_joined(self, record: records.ClientJoined) -> None:
        self.clients[record.client] = record.resilient
        if record.worker:
            self.client_workers[record.client] = record.worker

    def _client_left(self, record: records.ClientLeft) -> None:
        self.clients.pop(record.client, None)
        self.client_workers.pop(record.client, None)
        self.last_seq.pop(record.client, None)
        self.calls.forget(record.client)
        if record.client in self.scheduler.clients:
            Scheduler.remove_client(self.scheduler, record.client, stimulus_id="resilience-replay")

    def _worker_joined(self, record: records.WorkerJoined) -> None:
        self.workers[record.address] = (record.name, record.nanny)
        self._aliases[record.name] = record.address

    def _worker_left(self, record: records.WorkerLeft) -> None:
        name, _ = self.workers.pop(record.address, (None, None))
        if self._aliases.get(name) == record.address:
            del self._aliases[name]

    def _plugin_registered(self, record: records.PluginRegistered) -> None:
        if record.kind == "worker":
            self.scheduler.worker_plugins[record.name] = record.plugin
        elif record.kind == "nanny":
            self.scheduler.nanny_plugins[record.name] = record.plugin
        else:
            self.scheduler_plugins[record.name] = record.plugin
            self._load_module(record)

    def _load_module(self, record: records.PluginRegistered) -> None:
        """A module that was uploaded is there from here on, as it was: graphs that need it are read at their place."""
        try:
            plugin = loads(record.plugin)
            if not isinstance(plugin, SchedulerUploadFile):
                return
            path = Path(self.scheduler.local_directory, plugin.filename)
            path.write_bytes(plugin.data)
            if plugin.load:
                import_file(str(path))
                # Not to be loaded again when plugins are started: what was unpickled refers to this one.
                plugin.load = False
                self.loaded_modules[record.name] = dumps(plugin)
        except Exception:
            logger.exception("Scheduler plugin %s could not be loaded", record.name)

    def _plugin_unregistered(self, record: records.PluginUnregistered) -> None:
        plugins = {
            "worker": self.scheduler.worker_plugins,
            "nanny": self.scheduler.nanny_plugins,
            "scheduler": self.scheduler_plugins,
        }
        plugins[record.kind].pop(record.name, None)


def _unblame(ts: TaskState) -> None:
    """It has not failed after all, nor has what depends on it."""
    clear_error(ts)
    reached, stack = {ts}, [ts]
    while stack:
        for dts in stack.pop().dependents - reached:
            reached.add(dts)
            stack.append(dts)
            if dts.exception_blame is ts:
                clear_error(dts)


def _unpacked(record: records.GraphSubmitted) -> tuple[dict[str, Any], Any]:
    rest = loads(record.rest)
    return rest, deserialize(rest.pop("header"), list(record.frames))
