"""One run of the job while its cluster is being hurt, and what came of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dask_resilience.chaos.owned_process import wait_until
from dask_resilience.chaos.pipeline import Job, differences
from dask_resilience.chaos.progress import Snapshot
from dask_resilience.chaos.queries import QUERIES
from dask_resilience.chaos.run_log import RunLog, find_repeats, twice_because_of_the_scheduler

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dask_resilience.chaos.flights import FlightFiles
    from dask_resilience.chaos.processes import Cluster
    from dask_resilience.chaos.progress import Board

_TICK_SECONDS = 0.02
_LEAVING_SECONDS = 5.0
_BOUND = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A process to kill at a point of the work.

    Parameters
    ----------
    after
        Fraction of all tasks that must be done first.
    victim
        Which process is killed, with SIGKILL.
    """

    after: float
    victim: Literal["scheduler", "worker"]


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of a run.

    Parameters
    ----------
    total, done
        Tasks of the job, and how many were finished at the best moment.
    differing
        Results that are not the expected ones, one line each; None when there were no results to compare.
    error
        Why the run could not finish.
    failover_seconds
        For each kill of the scheduler: from the SIGKILL until the first task result that reached the client after
        the replacement had reported ready (until that report, if nothing was left to arrive).
    ready_seconds
        For each kill of the scheduler: from the SIGKILL until the replacement reported ready.
    kills
        Number of kills, by victim.
    repeated
        Tasks that ran twice because of the scheduler, as `run_log` defines it.
    repeated_for_worker
        Runs repeated because their worker was killed.
    workers
        Living worker processes at the end.
    seconds
        Duration of the work.
    """

    total: int = 0
    done: int = 0
    differing: list[str] | None = None
    error: str | None = None
    failover_seconds: list[float] = field(default_factory=list)
    ready_seconds: list[float] = field(default_factory=list)
    kills: dict[str, int] = field(default_factory=lambda: {"scheduler": 0, "worker": 0})
    repeated: int = 0
    repeated_for_worker: int = 0
    workers: int = 0
    seconds: float = 0.0

    @property
    def result_equal(self) -> bool:
        """Whether every result is there and is the expected one."""
        return self.error is None and self.differing == []


class Run:
    """Submits the job, kills at the points of the plan, and watches until the end.

    The second half of the job is submitted right after the first kill, while there is no scheduler.

    Parameters
    ----------
    cluster, client
        Where it runs; the cluster is supervised.
    files
        The data.
    log
        Where tasks and kills are noted.
    board
        Where it shows itself.
    faults
        The plan, in order.
    patience_seconds
        The run is given up when nothing moves for this time, or after `_BOUND` times as long altogether.
    """

    def __init__(
        self,
        *,
        cluster: Cluster,
        client: Any,
        files: FlightFiles,
        log: RunLog,
        board: Board,
        faults: Sequence[Fault],
        patience_seconds: float,
    ) -> None:
        self._cluster = cluster
        self._board = board
        self._log = log
        self._faults = list(faults)
        self._patience_seconds = patience_seconds
        self._job = Job(client=client, files=files, log=log)
        self._outcome = Outcome(total=self._job.total)
        half = len(files.weeks) // 2
        self._weeks_later = files.weeks[half:]
        self._weeks_now = files.weeks[:half]
        self._queries_now = list(QUERIES)[:3]
        self._submitted_all = False
        self._killed_at_seconds: float | None = None
        self._ready_at_seconds: float | None = None
        self._finished_when_ready: set[str] = set()

    def carry_out(self, expected: Mapping[str, Any]) -> Outcome:
        """Run the job to its end, good or bad, and compare its results with the expected ones."""
        outcome = self._outcome
        started_at = time.monotonic()
        try:
            self._job.submit_queries(self._queries_now)
            self._job.submit_weeks(self._weeks_now)
            outcome.error = self._watch(started_at)
            if outcome.error is None:
                outcome.differing = differences(self._job.results(), expected)
        except Exception as error:  # noqa: BLE001 - whatever ends the run is its outcome, and is shown
            outcome.error = f"{type(error).__name__}: {error}"
        outcome.seconds = time.monotonic() - started_at
        if outcome.error is not None:  # do workers that lost their scheduler leave too?
            wait_until(lambda: not self._cluster.alive_workers(), timeout_seconds=_LEAVING_SECONDS)
        outcome.workers = self._cluster.alive_workers()
        lines = self._log.lines()
        outcome.repeated = twice_because_of_the_scheduler(lines)
        outcome.repeated_for_worker = sum(repeat.because_of == "worker" for repeat in find_repeats(lines))
        return outcome

    # ------------------------------------------------------------------------------------------------------ watching

    def _watch(self, started_at: float) -> str | None:
        moved_at, moved_to = started_at, 0
        while True:
            now = time.monotonic()
            done = self._job.done()
            if done != moved_to:  # also less: what a killed worker held is computed again
                moved_at, moved_to = now, done
            self._outcome.done = max(done, self._outcome.done)
            self._board.update(
                Snapshot(
                    done=done,
                    total=self._outcome.total,
                    workers=self._cluster.alive_workers(),
                    scheduler=self._scheduler_state(),
                )
            )
            self._follow_failover()
            if done == self._outcome.total and self._killed_at_seconds is None:
                return None
            if failed := self._job.failed():
                return self._why_failed(failed)
            if self._cluster.alive_workers() == 0:
                return f"all workers left: {done} of {self._outcome.total} tasks are done"
            if now - moved_at > self._patience_seconds or now - started_at > _BOUND * self._patience_seconds:
                return (
                    f"{done} of {self._outcome.total} tasks are done after {now - started_at:.0f} seconds, "
                    f"and nothing moved for {now - moved_at:.0f} seconds"
                )
            if self._faults and self._killed_at_seconds is None and done >= self._faults[0].after * self._outcome.total:
                self._carry_out_fault(self._faults.pop(0))
            time.sleep(_TICK_SECONDS)

    def _why_failed(self, failed: Sequence[str]) -> str:
        future = self._job.futures[failed[0]]
        try:
            future.result(timeout=5)
        except Exception as error:  # noqa: BLE001 - the error of the task is what is asked for
            message = " ".join(str(error).split())
            return f"{len(failed)} futures failed, the first with {type(error).__name__}: {message[:150]}"
        return f"{len(failed)} futures failed"

    def _scheduler_state(self) -> str:
        if self._killed_at_seconds is None:
            return "running"
        return "recovering" if self._cluster.scheduler.alive else "dead"

    # --------------------------------------------------------------------------------------------- kills and failover

    def _carry_out_fault(self, fault: Fault) -> None:
        self._outcome.kills[fault.victim] += 1
        if fault.victim == "worker":
            self._kill_worker()
        else:
            self._kill_scheduler()

    def _kill_worker(self) -> None:
        index = max(number for number, worker in enumerate(self._cluster.workers) if worker.alive)
        worker = self._cluster.workers[index]
        pids = worker.pids()
        for pid in pids:
            self._log.append("worker-killed", pid=pid)
        self._cluster.kill_worker(index)
        self._board.say(f"killed {worker.name} and its nanny (processes {', '.join(map(str, pids))}) with SIGKILL")

    def _kill_scheduler(self) -> None:
        self._cluster.park_replacement()
        victim = self._cluster.scheduler
        pending = sorted((QUERIES.keys() & self._job.futures.keys()) - self._job.finished())
        self._log.append("scheduler-killed", pid=victim.pid)
        self._killed_at_seconds = self._cluster.kill_scheduler()
        in_flight = f", {' and '.join(pending)} in flight" if pending else ""
        self._board.say(f"killed the scheduler (process {victim.pid}) with SIGKILL{in_flight}")
        if not self._submitted_all:
            self._submit_rest()

    def _submit_rest(self) -> None:
        before = len(self._job.futures)
        self._job.submit_queries([name for name in QUERIES if name not in self._queries_now])
        self._job.submit_weeks(self._weeks_later)
        self._submitted_all = True
        self._board.say(f"submitted {len(self._job.futures) - before} more futures to the dead scheduler")

    def _follow_failover(self) -> None:
        if self._killed_at_seconds is None:
            return
        if self._ready_at_seconds is None:
            if not self._cluster.scheduler.is_ready():
                return
            self._ready_at_seconds = time.monotonic()
            self._finished_when_ready = self._job.finished()
            self._outcome.ready_seconds.append(round(self._ready_at_seconds - self._killed_at_seconds, 2))
            self._board.say(f"a new scheduler (process {self._cluster.scheduler.pid}) is ready")
        arrived = self._job.finished() - self._finished_when_ready
        if not arrived and self._job.done() < self._outcome.total:
            return
        resumed_at = time.monotonic() if arrived else self._ready_at_seconds
        seconds = round(resumed_at - self._killed_at_seconds, 2)
        self._outcome.failover_seconds.append(seconds)
        self._board.say(f"results arrive again, {seconds} seconds after the kill")
        self._killed_at_seconds = self._ready_at_seconds = None
        self._cluster.park_replacement(wait=False)
