"""A scheduler's life with a journal: rule, replay, gather, plan, serve, and stop when another one rules."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from time import time
from typing import Any

import dask
import distributed
from distributed.core import Status
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.scheduler import Scheduler

from dask_resilience import __version__
from dask_resilience._distributed.pinned import check_supported
from dask_resilience._distributed.refusal import end_process, owns_process, refuse_scheduler
from dask_resilience._distributed.scheduler_clients import Clients
from dask_resilience._distributed.scheduler_gate import Gate, listening_port
from dask_resilience._distributed.scheduler_ledger import Ledger
from dask_resilience._distributed.scheduler_once import Once
from dask_resilience._distributed.scheduler_queues import Queues
from dask_resilience._distributed.scheduler_replay import Replay
from dask_resilience._distributed.scheduler_shared import Shared
from dask_resilience._distributed.scheduler_tap import Tap
from dask_resilience._distributed.scheduler_topics import Topics
from dask_resilience._distributed.scheduler_workers import Workers
from dask_resilience.errors import Fenced, NotRecovered, StoreError
from dask_resilience.failover.barrier import BarrierTerms
from dask_resilience.failpoints import failpoint
from dask_resilience.journal import records
from dask_resilience.plugins.collector import collecting_rarely
from dask_resilience.plugins.recovery import Recovery
from dask_resilience.plugins.snapshots import Snapshots
from dask_resilience.settings import Settings, default_store
from dask_resilience.storage import open_store
from dask_resilience.storage.journal_writer import JournalWriter
from dask_resilience.storage.leadership import Leadership, LeaseKeeper
from dask_resilience.storage.object_store import ConditionalStore
from dask_resilience.storage.snapshots import open_journal, read_snapshot
from dask_resilience.storage.takeover import TakeoverStopped, rule
from dask_resilience.types import Address

logger = logging.getLogger("distributed.resilience")

#: Topic of the events that tell what happened to the journal and the rule.
TOPIC = "resilience"
#: How often a standby reads on.
_FOLLOW_SECONDS = 0.5


class SchedulerResilience(SchedulerPlugin):
    """Lets a scheduler be replaced without losing its work.

    Parameters
    ----------
    scheduler
        The scheduler, started but not yet serving.
    settings
        All settings.

    Attributes
    ----------
    ready : bool
        Whether it serves.
    phase : str
        ``standby``, ``replaying``, ``gathering``, ``serving`` or ``stopped``.
    """

    name = "resilience"

    def __init__(self, scheduler: Scheduler, settings: Settings) -> None:
        self.scheduler: Any = scheduler
        self.settings = settings
        self.phase = "standby"
        self.journal_error: str | None = None
        self.recovered: dict[str, Any] = {}
        port = listening_port(scheduler)
        self.store_url = settings.store or default_store(port)
        #: A store that no other scheduler can be told of goes with this one.
        self._private_store = None if settings.store or port else Path(self.store_url)
        self._store: ConditionalStore | None = None
        self._keeper: LeaseKeeper | None = None
        self.leadership: Leadership | None = None
        self.writer: JournalWriter | None = None
        self.replay = Replay(scheduler)
        self.gate = Gate(scheduler, self)
        self.workers = Workers(scheduler, self.gate, link_grace_seconds=settings.failover.link_grace_seconds)
        self.shared = Shared(scheduler)
        self.once = Once()
        self.queues = Queues(scheduler, self.once)
        self.topics = Topics(scheduler, self.once)
        self.clients = Clients(scheduler, self.gate, grace_seconds=settings.failover.client_grace_seconds)
        self.tap: Tap | None = None
        self.snapshots: Snapshots | None = None
        self._taking_snapshots: asyncio.Task[None] | None = None
        self._recovery: Recovery | None = None
        #: What lasts from the replay until this scheduler serves.
        self._rebuilding = contextlib.ExitStack()
        self._stopping = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._owns_process = owns_process()

    # The reign, as the seam sees it

    @property
    def ready(self) -> bool:
        """Whether this scheduler has recovered and serves."""
        return self.phase == "serving"

    @property
    def cluster(self) -> str:
        """Identity of the cluster that the store belongs to."""
        return self.leadership.cluster_id if self.leadership is not None else ""

    @property
    def epoch(self) -> int:
        """Number of this reign."""
        return self.leadership.epoch if self.leadership is not None else 0

    def valid(self) -> bool:
        """Whether the lease is surely ours now."""
        return self.leadership is not None and self.leadership.valid()

    def member_returned(self, member: str) -> None:
        """A worker or client is back while we recover."""
        if self._recovery is not None:
            self._recovery.member_returned(member)

    def status(self) -> dict[str, Any]:
        """What the readiness route and the command line show."""
        out: dict[str, Any] = {
            "phase": self.phase,
            "epoch": self.epoch,
            "store": str(self.store_url),
            "address": self.scheduler.address,
            "workers": sorted(str(ws.name) for ws in self.scheduler.workers.values()),
        }
        if self.writer is not None:
            out["journal_pending_bytes"] = self.writer.pending_bytes
        if self.journal_error is not None:
            out["journal_error"] = self.journal_error
        if self.snapshots is not None and self.snapshots.last is not None:
            out["snapshot"] = self.snapshots.last
        return out | self.recovered

    # Taking over

    async def take_over(self) -> None:
        """Wait for the rule, rebuild the state, and begin to gather. Returns when registrations may come in."""
        started = time()
        await self._rule(self.replay.apply)
        ruled = time()
        self.phase = "replaying"
        self._rebuilding.enter_context(collecting_rarely())
        self._read_to_end()
        failpoint("recovery.after-replay")
        self._begin_journal()
        self.shared.restore(self.replay.shared)
        self.once.restore(self.replay.calls)
        self.queues.restore(self.replay.queues)
        self.topics.restore(self.replay.topics)
        tap = self._attach()
        self.recovered = {
            "seconds_to_rule": round(ruled - started, 4),
            "seconds_to_replay": round(time() - ruled, 4),
            "graphs_replayed": self.replay.graphs,
            "tasks_replayed": len(self.scheduler.tasks),
        }
        self._recovery = Recovery(
            self.scheduler,
            replay=self.replay,
            tap=tap,
            workers=self.workers,
            clients=self.clients,
            owners=frozenset([*self.shared.owners(), *self.queues.owners()]),
            epoch=self.epoch,
            terms=BarrierTerms(
                worker_grace_seconds=self.settings.failover.grace_seconds,
                client_grace_seconds=self.settings.failover.client_grace_seconds,
            ),
        )
        self.phase = "gathering"
        await asyncio.to_thread(self._leadership().publish, self.scheduler.address)
        self._recovering = asyncio.create_task(self._recover(), name="resilience-recovery")

    @collecting_rarely()
    def _follow(self) -> None:
        """On standby: replay what the ruling scheduler wrote, so that a takeover has only the rest to read."""
        for logged in self._reader.read():
            self._apply(logged.record)

    def _read_to_end(self) -> None:
        for logged in self._reader.read_to(self._leadership().sealed):
            self._apply(logged.record)

    @collecting_rarely()
    def _begin_reading(self, store: ConditionalStore) -> None:
        snapshot, self._reader = open_journal(store)
        if snapshot is not None:
            for record in read_snapshot(store, snapshot):
                self._apply(record)
            self.replay.loaded()
            logger.info("Read the snapshot at LSN %d", snapshot.taken.lsn)

    async def _rule(self, apply: Callable[[records.Record], None]) -> None:
        """Become the scheduler that rules, and until then `apply` what the one that does writes."""
        self._apply = apply
        store = await asyncio.to_thread(open_store, str(self.store_url), storage_options=self.settings.storage_options)
        self.store_url = store.url
        logger.info("Journal in %s", store.url)
        self._store = store
        self._begin_reading(store)
        ruling = asyncio.create_task(
            asyncio.to_thread(
                rule,
                store,
                address=self.scheduler.address,
                cluster=self.settings.cluster,
                ttl_seconds=self.settings.failover.lease_ttl_seconds,
                stop=self._stopping,
                on_wait=lambda line: logger.info("Standing by: %s", line),
            )
        )
        try:
            while not (await asyncio.wait({ruling}, timeout=_FOLLOW_SECONDS))[0]:
                if self.scheduler.status in (Status.closing, Status.closed):
                    self._stopping.set()
                else:
                    self._follow()
        except BaseException:
            # Cancelled with the process, or the journal cannot be read. The thread must neither keep the process from
            # its end nor win a rule that nobody would exercise.
            self._stopping.set()
            ruling.add_done_callback(_give_back)
            raise
        self.leadership = ruling.result()
        self._keeper = LeaseKeeper(self.leadership, on_lost=self.stop)
        self._keeper.start()
        logger.info("Epoch %d begins in cluster %s", self.epoch, self.cluster)

    def _leadership(self) -> Leadership:
        assert self.leadership is not None
        return self.leadership

    def _begin_journal(self) -> None:
        assert self._store is not None
        self.writer = JournalWriter(
            self._store,
            self._leadership(),
            commit_interval_seconds=self.settings.journal.commit_interval_seconds,
            segment_bytes=self.settings.journal.segment_size_bytes,
            on_durable=self._durable_from_thread,
            on_failure=self._failure_from_thread,
            on_recovered=self._recovered_from_thread,
        )

    def _attach(self) -> Tap:
        assert self.leadership is not None
        assert self.writer is not None
        ledger = Ledger(
            self.scheduler,
            self.writer,
            pending_limit_bytes=self.settings.journal.pending_limit_bytes,
            commit_interval_seconds=self.settings.journal.commit_interval_seconds,
            last_seq=self.replay.last_seq,
        )
        self.tap = Tap(self.scheduler, ledger, retried=self.replay.retried, first_runs=self.replay.first_runs)
        self.tap.ledger.record(
            records.EpochStarted(
                epoch=self.epoch,
                cluster=self.cluster,
                holder=f"{self.scheduler.address} pid {os.getpid()}",
                versions={
                    "dask_resilience": __version__,
                    "distributed": distributed.__version__,
                    "dask": dask.__version__,
                    "python": ".".join(map(str, sys.version_info[:3])),
                },
                sealed=self.leadership.sealed,
            )
        )
        self.tap.attach()
        self.workers.attach(self.tap)
        self.clients.attach(self.tap.ledger)
        self.shared.attach(self.tap.ledger)
        self.queues.attach(self.tap.ledger)
        self.topics.attach(self.tap.ledger)
        self.gate.attach()
        self.scheduler.add_plugin(self, name=self.name, idempotent=True)
        return self.tap

    async def install(self) -> None:
        """Begin to keep a journal on a scheduler that serves already: nothing is replayed, nothing is interrupted."""
        await self._rule(self.replay.ended)
        self._read_to_end()
        if not self.replay.closed:
            raise StoreError(
                str(self.store_url),
                "holds the journal of a cluster that did not end. Start its scheduler with the preload to recover it, "
                "or point resilience.store at an empty directory",
            )
        self._begin_journal()
        self._attach()
        for address in self.scheduler.workers:
            self.workers.added(address)
        for client in self.scheduler.client_comms:
            self.clients.added(client)
        await asyncio.to_thread(self._leadership().publish, self.scheduler.address)
        self.gate.serving.set()
        self.phase = "serving"
        self._begin_snapshots()

    async def _recover(self) -> None:
        assert self._recovery is not None
        try:
            await self._recovery.run(self._serve)
        except Exception as error:
            logger.exception("Recovery failed; this scheduler does not serve an empty cluster instead")
            self.stop(NotRecovered(str(error)))

    def _serve(self) -> None:
        """Called in the turn of the event loop in which the last worker is in."""
        assert self._recovery is not None
        self.phase = "serving"
        self.recovered |= self._recovery.outcome
        self.gate.serving.set()
        self.clients.answer_joining()
        self._recovery = None
        self._rebuilding.close()
        self._begin_snapshots()
        self.scheduler.log_event(TOPIC, {"action": "serving", "epoch": self.epoch, **self.recovered})
        logger.info("Epoch %d serves: %s", self.epoch, self.recovered)
        retiring = [ws for ws in self.scheduler.workers.values() if ws.status == Status.closing_gracefully]
        if retiring:
            self._retiring = asyncio.create_task(self._retire(retiring), name="resilience-retire")

    async def _retire(self, workers: list[Any]) -> None:
        """Go on retiring workers where the scheduler before was cut off: nobody else would end it."""
        logger.info("Going on to retire %s", [ws.address for ws in workers])
        for ws in workers:
            # Where it cannot be retired, because nobody could take its data, it goes on as it was.
            self.scheduler.handle_worker_status_change("running", ws, "resilience-retire")
        try:
            await self.scheduler.retire_workers(
                workers=[ws.address for ws in workers], close_workers=True, stimulus_id="resilience-retire"
            )
        except Exception:
            logger.exception("Could not go on to retire workers")

    def _begin_snapshots(self) -> None:
        after_bytes, writer, store = self.settings.snapshot.after_bytes, self.writer, self._store
        assert writer is not None
        assert store is not None
        if after_bytes is None or store.of_this_process:
            return
        self.snapshots = Snapshots(
            store,
            epoch=self.epoch,
            after_bytes=after_bytes,
            grown_bytes=self._reader.read_bytes,
            durable=lambda: (writer.durable_lsn, writer.durable_bytes),
            tell=lambda event: self.scheduler.log_event(TOPIC, event),
        )
        self._taking_snapshots = asyncio.create_task(self.snapshots.run(), name="resilience-snapshots")

    # The scheduler's hooks

    def add_worker(self, scheduler: Scheduler, worker: Address) -> None:
        """Adopt what a worker holds."""
        # Not a coroutine: the adoption must happen before the scheduler looks for work for this worker.
        self.workers.added(worker)

    def remove_worker(self, scheduler: Scheduler, worker: Address, *, stimulus_id: str, **kwargs: Any) -> None:
        """Record that a worker left."""
        self.workers.removed(worker)

    def add_client(self, scheduler: Scheduler, client: str) -> None:
        """Give a client that came back what it wanted."""
        self.clients.added(client)

    async def before_close(self) -> None:
        """A clean end: the next start is empty."""
        self._stopping.set()
        self._end_waits()
        if self.phase == "stopped":
            return
        self.phase = "stopped"
        if self.tap is not None and self.writer is not None:
            self.tap.ledger.record(records.ClusterClosed(reason="closed"))
            self.tap.ledger.detach()
            await self.clients.say_goodbye()
        await self.let_go()

    def _end_waits(self) -> None:
        self.once.close()
        self.shared.multi_locks.close()

    async def let_go(self) -> None:
        """End the journal, give the lease back, and keep nothing open: this process may live on."""
        self._stopping.set()
        self._rebuilding.close()
        if self._taking_snapshots is not None:
            self._taking_snapshots.cancel()
            await asyncio.wait({self._taking_snapshots})
        await asyncio.to_thread(self._let_go)

    def _let_go(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self._keeper is not None:
            self._keeper.close()
        if self.leadership is not None:
            self.leadership.release()
        if self._store is not None:
            self._store.close()
        if self._private_store is not None:
            shutil.rmtree(self._private_store, ignore_errors=True)

    # From the I/O thread and the lease's keeper

    def _durable_from_thread(self, lsn: int) -> None:
        if self.tap is not None:
            self._loop.call_soon_threadsafe(self.tap.ledger.durable, lsn)

    def _failure_from_thread(self, error: Exception) -> None:
        if isinstance(error, Fenced):
            self.stop(error)
        else:
            self._loop.call_soon_threadsafe(self._journal_failed, error)

    def _recovered_from_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._journal_recovered)

    def _journal_failed(self, error: Exception) -> None:
        self.journal_error = str(error)
        logger.error("The journal cannot be written, so nothing is acked: %s", error)
        self.scheduler.log_event(["all", TOPIC], {"action": "journal-failed", "error": str(error)})
        if self.settings.journal.on_failure == "stop-scheduler":
            self.stop(error)

    def _journal_recovered(self) -> None:
        self.journal_error = None
        logger.warning("The journal can be written again")
        self.scheduler.log_event(["all", TOPIC], {"action": "journal-recovered"})

    def stop(self, error: Exception) -> None:
        """End this scheduler without touching the workers: they belong to whoever rules now.

        Any thread may call it: the event loop may be what is stuck, so it is not asked.
        """
        if self.phase == "stopped":
            return
        self.phase = "stopped"
        self._stopping.set()
        logger.critical("This scheduler stops: %s", error)
        if self._owns_process:
            end_process()
        self._loop.call_soon_threadsafe(self._abandon)

    def _abandon(self) -> None:
        """In somebody else's process: drop every connection, so that no message of ours reaches a member again."""
        self._rebuilding.close()
        if self._taking_snapshots is not None:
            self._taking_snapshots.cancel()
        self._end_waits()
        if self.tap is not None:
            self.tap.ledger.detach()
        for stream in [*self.scheduler.stream_comms.values(), *self.scheduler.client_comms.values()]:
            stream.abort()
        self.scheduler.stream_comms.clear()
        self._closing = asyncio.create_task(self.scheduler.close(reason="resilience-stopped"))


async def setup_scheduler(scheduler: Scheduler) -> None:
    """What the preload does on a scheduler. A failure ends the process with code 3, or fails the cluster's start."""
    resilience = None
    try:
        resilience = _new(scheduler)
        await resilience.take_over()
    except TakeoverStopped as error:
        # It was closed while it stood by, which is nothing to complain of; its start must not go on, though.
        logger.info("%s", error)
        if resilience is not None:
            await resilience.let_go()
        await scheduler.finished()
        raise asyncio.CancelledError from error
    except Exception as error:  # noqa: BLE001 - whatever it is, nobody else would tell
        if resilience is not None and not owns_process():
            await resilience.let_go()
        refuse_scheduler(scheduler, error)


def _give_back(ruling: asyncio.Task[Leadership]) -> None:
    if not ruling.cancelled() and ruling.exception() is None:
        ruling.result().release()


async def install_on_scheduler(scheduler: Scheduler) -> None:
    """What `install` does on a scheduler that serves already; nothing where resilience is there."""
    if getattr(scheduler, "resilience", None) is not None:
        return
    resilience = None
    try:
        resilience = _new(scheduler)
        await resilience.install()
    except BaseException:
        if resilience is not None:
            await resilience.let_go()
        scheduler.resilience = None  # type: ignore[attr-defined]
        raise


def _new(scheduler: Scheduler) -> SchedulerResilience:
    check_supported()
    resilience = SchedulerResilience(scheduler, Settings.load())
    scheduler.resilience = resilience  # type: ignore[attr-defined]
    return resilience
