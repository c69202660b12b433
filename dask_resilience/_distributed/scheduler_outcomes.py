"""Records what a replay of the inputs cannot work out: failures, retries that were used up, suspicion, actors made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

from distributed.protocol.pickle import dumps
from distributed.scheduler import Scheduler, TaskState

from dask_resilience._distributed.task_notes import TaskNotes
from dask_resilience.journal import records
from dask_resilience.types import Key


class Outcomes:
    """Hangs on the rare transitions of a scheduler, and on none that a task passes which runs and succeeds.

    Parameters
    ----------
    scheduler
        A live scheduler; rows of its transition table and a handler are replaced.
    record
        Takes records for the journal.
    retried
        The last run of a task whose failure was answered with a retry, from the replay.
    """

    def __init__(self, scheduler: Scheduler, record: Callable[[records.Record], Any], retried: TaskNotes) -> None:
        self.scheduler: Any = scheduler
        self.record = record
        self.retried = retried
        self._expects_actors = False

    def attach(self) -> None:
        """Failures are rare, so only their rows of the table are replaced; all other transitions cost what they did."""
        s = self.scheduler
        s.stream_handlers["task-erred"] = self._task_erred(s.stream_handlers["task-erred"])
        table = dict(s._TRANSITIONS_TABLE)
        for start, finish in list(table):
            if finish == "erred":
                table[start, finish] = self._into_erred(table[start, finish])
            elif start == "erred" and finish == "released":
                table[start, finish] = self._out_of_erred(table[start, finish])
        s._TRANSITIONS_TABLE = table
        if any(ts.actor for ts in s.tasks.values()):
            self.expect_actors()

    def expect_actors(self) -> None:
        """Record from now on which actors come to be. Clusters without actors do not pay for it."""
        if self._expects_actors:
            return
        self._expects_actors = True
        s = self.scheduler
        rows = s._TRANSITIONS_TABLE.items()
        s._TRANSITIONS_TABLE = {
            row: self._into_memory(transition) if row[1] == "memory" else transition for row, transition in rows
        }

    def _task_erred(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def handle_task_erred(key: Key, stimulus_id: str, **msg: Any) -> None:
            ts = self.scheduler.tasks.get(key)
            before = ts.retries if ts is not None else 0
            stock(key=key, stimulus_id=stimulus_id, **msg)
            if ts is not None and ts.retries != before:
                self.will_retry(ts, msg["run_id"])

        return handle_task_erred

    def will_retry(self, ts: TaskState, run_id: int) -> None:
        """The failure of a run was answered with a retry. Its worker may bring the same failure once more."""
        self.retried[ts] = run_id
        self.record(records.RetriesLeft(counts={ts.key: ts.retries}, runs={ts.key: run_id}))

    def suspected(self, tasks: Iterable[TaskState]) -> None:
        """Record how often `tasks` were on a worker that died."""
        counts: dict[Any, int] = {ts.key: ts.suspicious for ts in tasks if ts.suspicious}
        if counts:
            self.record(records.TasksSuspected(counts=counts))

    def _into_erred(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        def transition(state: Any, key: Key, stimulus_id: str, **kwargs: Any) -> Any:
            out = stock(state, key, stimulus_id, **kwargs)
            ts = state.tasks.get(key)
            if ts is not None and ts.state == "erred":
                self.record(error_record(ts))
            return out

        return transition

    def _into_memory(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        def transition(state: Any, key: Key, stimulus_id: str, **kwargs: Any) -> Any:
            out = stock(state, key, stimulus_id, **kwargs)
            ts = state.tasks.get(key)
            if ts is not None and ts.actor and ts.state == "memory":
                self.record(records.ActorsMade(keys=(key,)))
            return out

        return transition

    def _out_of_erred(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        def transition(state: Any, key: Key, stimulus_id: str, **kwargs: Any) -> Any:
            self.record(records.ErrorsCleared(keys=(key,)))
            return stock(state, key, stimulus_id, **kwargs)

        return transition


def error_record(ts: TaskState) -> records.TaskErred:
    """The record of a task that failed; the error itself goes with the task that is to blame."""
    blame = ts.exception_blame
    error = None
    if blame is None or blame is ts:
        error = dumps((ts.exception, ts.traceback, ts.exception_text, ts.traceback_text, sorted(ts.erred_on or ())))
    return records.TaskErred(key=ts.key, blame=blame.key if blame is not None else ts.key, error=error)
