"""Brings a recovery plan into a live scheduler.

The order within one turn of the event loop matters. `WorkerState.add_to_processing` asserts that dependencies are in
memory, and a task in memory must list exactly those dependents as waiters that are waiting, queued or processing. So
results come first, then runs, and only when every worker is in does anything become *waiting*.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from time import time
from typing import Any, TypeAlias

from distributed.protocol import Serialized, serialize
from distributed.protocol.pickle import dumps
from distributed.scheduler import Scheduler, TaskState, WorkerState
from distributed.shuffle._core import ShuffleRunSpec, id_from_key

from dask_resilience._distributed.inventory import Holdings
from dask_resilience._distributed.scheduler_outcomes import error_record
from dask_resilience._distributed.scheduler_tap import Tap
from dask_resilience._distributed.task_notes import TaskNotes
from dask_resilience.failover.recovery import LatePlan, RecoveryPlan, plan_late, plan_recovery
from dask_resilience.failover.retries import answered_failures
from dask_resilience.journal import records
from dask_resilience.types import Address, Key
from dask_resilience.views import Inventory, TaskView

logger = logging.getLogger("distributed.resilience")

#: Takes a record for the journal.
Recorder: TypeAlias = Callable[[records.Record], Any]

#: States of a task that no worker was given.
_UNASSIGNED = frozenset({"released", "waiting", "queued", "no-worker"})
#: Room for run ids of one epoch. A run id is how the scheduler tells the answer of a run it believes in from others.
_RUN_IDS_AN_EPOCH = 1 << 32
#: The same for P2P shuffles, whose counter can only be advanced step by step.
_SHUFFLES_AN_EPOCH = 1 << 12
#: How long scattered data that the scheduler does not know stays on its worker.
_CLAIM_SECONDS = 30.0


def view(scheduler: Any, retried: TaskNotes) -> dict[Key, TaskView]:
    """Every task as the plan sees it."""
    return {key: task_view(ts, bool(ts.who_wants), retried) for key, ts in scheduler.tasks.items()}


def task_view(ts: TaskState, wanted: bool, retried: TaskNotes) -> TaskView:
    return TaskView(
        dependencies=tuple(dts.key for dts in ts.dependencies),
        wanted=wanted,
        computable=ts.run_spec is not None,
        erred=ts.state == "erred",
        retried_run=retried.get(ts, -1) if retried else -1,
    )


def in_flight_shuffles(scheduler: Any, holdings: Iterable[Holdings]) -> set[Key]:
    """Keys of P2P shuffles whose results stand for shards that died with the old scheduler's run.

    Outputs that are in memory are whole and stay. Transfers and barriers are not, and neither is an output that is
    only running.
    """
    whole: set[Key] = set()
    for held in holdings:
        whole.update(held.memory)
    distrust: set[Key] = set()
    for key, ts in scheduler.tasks.items():
        if id_from_key(key) is not None:
            distrust.add(key)
            distrust.update(dts.key for dts in ts.dependencies)
            distrust.update(dts.key for dts in ts.dependents if dts.key not in whole)
    return distrust


def plan(scheduler: Any, holdings: Mapping[Address, Holdings], tap: Tap, born: TaskNotes) -> RecoveryPlan:
    """The plan for everything that the returned workers hold."""
    first_runs = {ts.key: run_id for ts, run_id in tap.first_runs.items() if scheduler.tasks.get(ts.key) is ts}
    inventories = [held.view(address, first_runs) for address, held in holdings.items()]
    use_up_retries(scheduler, inventories, tap, born)
    return plan_recovery(
        view(scheduler, tap.outcomes.retried),
        inventories,
        distrust=in_flight_shuffles(scheduler, holdings.values()),
    )


def fence_run_ids(epoch: int) -> None:
    """Make run ids of tasks larger than any of an older epoch.

    The counter belongs to a class of Dask and only ever advances, which is harmless to other schedulers in the process.
    """
    floor = epoch * _RUN_IDS_AN_EPOCH
    if next(TaskState._run_id_iterator) < floor:
        TaskState._run_id_iterator = itertools.count(floor)


def fence_shuffles(epoch: int, holdings: Iterable[Holdings]) -> None:
    """Make run ids of P2P shuffles larger than any of an older epoch; as with those of tasks, they only advance."""
    shuffle_floor = max([epoch * _SHUFFLES_AN_EPOCH, *(held.shuffle_run for held in holdings)])
    counter = next(f for f in fields(ShuffleRunSpec) if f.name == "run_id").default_factory.args[0]  # type: ignore[union-attr]
    while next(counter) < shuffle_floor:
        pass


def use_up_retries(scheduler: Any, inventories: Sequence[Inventory], tap: Tap, born: TaskNotes) -> None:
    """Count failures that were answered with a retry, although the journal does not say so yet."""
    counted: dict[Key, int] = {}
    for inventory in inventories:
        for key in inventory.failed:
            ts = scheduler.tasks.get(key)
            if ts is not None and ts.retries:
                older = max(tap.first_runs.get(ts, 0), born.get(ts, 0)) - 1
                counted[key] = max(tap.outcomes.retried.get(ts, -1), older)
    for key, runs in answered_failures(inventories, counted=counted).items():
        ts = scheduler.tasks[key]
        ts.retries = max(0, ts.retries - len(runs))
        tap.outcomes.will_retry(ts, runs[-1])


def err_lost_actors(
    scheduler: Any, made: Mapping[Key, TaskState], holdings: Iterable[Holdings], record: Recorder
) -> None:
    """Let actors err that were made and whose worker did not come back, as `Scheduler` does when it loses one."""
    here: set[Key] = set()
    for held in holdings:
        here.update(held.actors)
    for key, ts in made.items():
        if key in here or scheduler.tasks.get(key) is not ts or ts.state != "released" or not ts.who_wants:
            continue
        error = RuntimeError("Worker holding Actor was lost")
        ts.exception, ts.exception_text, ts.traceback_text = Serialized(*serialize(error)), repr(error), ""
        ts.exception_blame, ts.erred_on = ts, set()
        ts.state = "erred"
        record(error_record(ts))


class Adoption:
    """Enacts one plan, worker by worker, and then lets go.

    Parameters
    ----------
    scheduler
        The scheduler, filled by the replay and muted.
    holdings
        What the returned workers hold.
    plan
        The decision.
    tap
        Takes what the journal must hear of it.
    """

    def __init__(
        self, scheduler: Scheduler, holdings: Mapping[Address, Holdings], plan: RecoveryPlan, tap: Tap
    ) -> None:
        self.scheduler: Any = scheduler
        self.tap = tap
        self.holdings = holdings
        self.plan = plan
        self._memory_of: dict[Address, list[Key]] = {}
        for key, addresses in plan.adopt_memory.items():
            for address in addresses:
                self._memory_of.setdefault(address, []).append(key)
        self._running_of: dict[Address, list[tuple[Key, int]]] = {}
        for key, (address, run_id) in plan.adopt_running.items():
            self._running_of.setdefault(address, []).append((key, run_id))

    def worker_added(self, ws: WorkerState) -> None:
        """Give the new member what the plan says that it holds. Called while it is being added, before any await."""
        held = self.holdings[ws.address]
        for key in self._memory_of.get(ws.address, ()):
            adopt_memory(self.scheduler, ws, key, held)
        for key, run_id in self._running_of.get(ws.address, ()):
            adopt_running(self.scheduler, ws, key, run_id, held)
        record_actors(ws, self.tap.ledger.record)
        self.scheduler.check_idle_saturated(ws)
        let_go(self.scheduler, ws, self.plan.forget.get(ws.address, ()), held)

    def finish(self) -> None:
        """Every worker is in: report failures, name losses, and let the rest be computed."""
        scheduler = self.scheduler
        stimulus_id = f"resilience-recovery-{time()}"
        lost = {key: "forgotten" for key in self.plan.lost if key in scheduler.tasks}
        if lost:
            logger.error("Scattered data is lost with its workers: %s", sorted(map(str, lost)))
            scheduler.transitions(lost, stimulus_id)
        for key, (address, _) in self.plan.report_erred.items():
            report_erred(scheduler, address, key, self.holdings[address], stimulus_id, self.tap)
        resume(scheduler, stimulus_id)


def resume(scheduler: Any, stimulus_id: str) -> None:
    """Schedule what is wanted and not there."""
    recommendations: dict[Key, str] = {}
    wanted = [ts for ts in scheduler.tasks.values() if ts.state == "released" and ts.who_wants and ts.run_spec]
    # Recommendations are taken from the end, so the first to run comes last.
    wanted.sort(key=lambda ts: ts.priority, reverse=True)
    for ts in wanted:
        recommendations[ts.key] = "waiting"
    for ts in scheduler.tasks.values():
        if ts.state != "released":
            continue
        for dts in ts.dependencies:
            if dts.exception_blame is not None:
                ts.exception_blame = dts.exception_blame
                recommendations[ts.key] = "erred"
                break
    scheduler.transitions(recommendations, stimulus_id)
    scheduler.stimulus_queue_slots_maybe_opened(stimulus_id=stimulus_id)


def adopt_memory(scheduler: Any, ws: WorkerState, key: Key, held: Holdings) -> None:
    """The result of `key` is on `ws`; the scheduler holds it as released or in memory."""
    ts = scheduler.tasks.get(key)
    if ts is None:
        return
    nbytes, typename, _ = held.memory[key]
    if ts.state != "memory":
        ts.set_nbytes(nbytes)
        ts.type = typename
        ts.group.add_type(typename)
        ts.state = "memory"
    if ts not in ws.has_what:
        scheduler.add_replica(ts, ws)
    if ts.actor and key in held.actors:
        ws.actors.add(ts)


def record_actors(ws: WorkerState, record: Recorder) -> None:
    """Whoever made the actors of `ws` may have died before it could say so."""
    made = tuple(ts.key for ts in ws.actors if ts.state == "memory")
    if made:
        record(records.ActorsMade(keys=made))


def adopt_running(scheduler: Any, ws: WorkerState, key: Key, run_id: int, held: Holdings) -> None:
    """The run of `key` on `ws` goes on; the scheduler has given the task to nobody."""
    ts = scheduler.tasks.get(key)
    if ts is None or ts.state not in _UNASSIGNED or not all(ws in (dts.who_has or ()) for dts in ts.dependencies):
        return
    _leave_queues(scheduler, ts)
    ts.run_id = run_id
    ts.processing_on = ws
    ws.add_to_processing(ts)
    ts.state = "processing"
    for dts in ts.dependencies:
        if dts.waiters is None:
            dts.waiters = set()
        dts.waiters.add(ts)
    if ts.waiters is None:
        ts.waiters = set()
    scheduler.acquire_resources(ts, ws)
    scheduler.n_tasks += 1
    if ts.actor:
        ws.actors.add(ts)
    if key in held.long_running:
        ws.add_to_long_running(ts)


def _leave_queues(scheduler: Any, ts: TaskState) -> None:
    scheduler.queued.discard(ts)
    scheduler.unrunnable.pop(ts, None)
    ts.waiting_on = None


def report_erred(scheduler: Any, address: Address, key: Key, held: Holdings, stimulus_id: str, tap: Tap) -> None:
    """A failure whose message did not arrive: as `Scheduler.stimulus_task_erred` would treat it."""
    ts = scheduler.tasks.get(key)
    if ts is None or ts.state not in _UNASSIGNED:
        return
    if ts.retries:
        ts.retries -= 1
        tap.outcomes.will_retry(ts, held.erred[key][0])
        free(scheduler, address, (key,))
        return
    _, exception, traceback, exception_text, traceback_text = held.erred[key]
    ts.exception, ts.traceback = exception, traceback
    ts.exception_text, ts.traceback_text = exception_text, traceback_text
    ts.exception_blame = ts
    ts.erred_on = {address}
    scheduler.transitions({key: "erred"}, stimulus_id)
    if ts in scheduler.clients["fire-and-forget"].wants_what:
        # Its end lets it go, as `Scheduler._transition_processing_erred` would have done.
        scheduler.client_releases_keys(keys=[key], client="fire-and-forget", stimulus_id=stimulus_id)


def free(scheduler: Any, address: Address, keys: Iterable[Key]) -> None:
    """Tell a worker to let go of `keys`."""
    keys = list(keys)
    stream = scheduler.stream_comms.get(address)
    if keys and stream is not None:
        stream.send({"op": "free-keys", "keys": keys, "stimulus_id": f"resilience-forget-{time()}"})


def let_go(scheduler: Any, ws: WorkerState, keys: Iterable[Key], held: Holdings) -> None:
    """Free what the plan forgets, but give data that was scattered time to be claimed.

    Data reaches a worker before the scheduler is told of it. The call that tells may be the one that the failover cut,
    and is repeated now.
    """
    keys = dict.fromkeys(keys)
    unclaimed = [key for key in keys if key in held.scattered and key not in scheduler.tasks]
    for key in unclaimed:
        del keys[key]
    free(scheduler, ws.address, keys)
    if unclaimed:
        scheduler.loop.call_later(_CLAIM_SECONDS, _free_unclaimed, scheduler, ws, unclaimed)


def _free_unclaimed(scheduler: Any, ws: WorkerState, keys: list[Key]) -> None:
    if scheduler.workers.get(ws.address) is ws:
        free(scheduler, ws.address, [key for key in keys if key not in scheduler.tasks])


def late(scheduler: Any, ws: WorkerState, held: Holdings, tap: Tap) -> None:
    """Take in a worker that comes while the scheduler serves. Called while it is being added, before any await."""
    tasks = scheduler.tasks
    keys = {*held.memory, *held.running, *held.erred} & tasks.keys()
    looked_at = set(keys)
    for key in keys & held.running.keys():
        looked_at.update(dts.key for dts in tasks[key].dependencies)
    views = {
        key: task_view(ts, bool(ts.who_wants or ts.waiters), tap.outcomes.retried)
        for key, ts in ((key, tasks[key]) for key in looked_at)
    }
    # A shuffle that is under way belongs to a run that this worker left; one that is over needs nothing of it.
    distrust = in_flight_shuffles(scheduler, [held])
    first_runs = {key: run_id for key in keys if (run_id := tap.first_runs.get(tasks[key], 0))}
    inventory = held.view(ws.address, first_runs)
    decided = plan_late(views, {key: tasks[key].state for key in looked_at}, inventory, distrust=distrust)
    _enact_late(scheduler, ws, held, decided, tap)


def _enact_late(scheduler: Any, ws: WorkerState, held: Holdings, decided: LatePlan, tap: Tap) -> None:
    stimulus_id = f"resilience-late-{time()}"
    recommendations: dict[Key, str] = {}
    client_msgs: dict[str, list[Any]] = {}
    for key in decided.add_replica:
        adopt_memory(scheduler, ws, key, held)
    for key in decided.adopt_memory:
        # As if the worker had just finished it: dependents, dependencies and clients learn of it by Dask's own code.
        ts = scheduler.tasks[key]
        nbytes, typename, _ = held.memory[key]
        _leave_queues(scheduler, ts)
        ts.set_nbytes(nbytes)
        # It replaces what a client was to be told before, so each result has a mail of its own.
        told: dict[str, list[Any]] = {}
        scheduler._add_to_memory(ts, ws, recommendations, told, type=dumps(typename), typename=typename)
        for client, msgs in told.items():
            client_msgs.setdefault(client, []).extend(msgs)
        if ts.actor and key in held.actors:
            ws.actors.add(ts)
    for key, run_id in decided.adopt_running.items():
        adopt_running(scheduler, ws, key, run_id, held)
    # One result may have made another task ready that is itself among what this worker brought, and a run that goes on
    # here needs results that nobody else needed.
    ready = {
        key: finish
        for key, finish in recommendations.items()
        if (finish != "processing" or scheduler.tasks[key].state == "waiting")
        and (finish != "released" or not (scheduler.tasks[key].waiters or scheduler.tasks[key].who_wants))
    }
    worker_msgs: dict[Address, list[Any]] = {}
    scheduler._transitions(ready, client_msgs, worker_msgs, stimulus_id)
    scheduler.send_all(client_msgs, worker_msgs)
    for key in decided.report_erred:
        report_erred(scheduler, ws.address, key, held, stimulus_id, tap)
    record_actors(ws, tap.ledger.record)
    let_go(scheduler, ws, decided.forget, held)
    scheduler.check_idle_saturated(ws)
