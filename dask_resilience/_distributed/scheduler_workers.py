"""Workers come, go and come back.

While a scheduler recovers, registrations are heard and held: a worker's inventory is what the plan is made of. Once it
serves, a worker that returns is taken in at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import wraps
from time import time
from typing import Any

from distributed.comm import Comm
from distributed.core import Status
from distributed.scheduler import Scheduler

from dask_resilience._distributed import inventory, scheduler_adopt
from dask_resilience._distributed.inventory import Holdings
from dask_resilience._distributed.scheduler_adopt import Adoption
from dask_resilience._distributed.scheduler_gate import Gate
from dask_resilience._distributed.scheduler_links import Handover, Links
from dask_resilience._distributed.scheduler_tap import Tap
from dask_resilience.journal import records
from dask_resilience.types import Address

logger = logging.getLogger("distributed.resilience")

#: Name of the worker plugin by which `install` makes workers resilient.
_INSTALLED = "resilience-install"


class Workers:
    """Registration of workers on one scheduler.

    Parameters
    ----------
    scheduler
        A live scheduler; some of its handlers and bound attributes are replaced.
    gate
        Tells when it serves, and for whom.
    link_grace_seconds
        How long a worker whose link broke is waited for.
    """

    tap: Tap

    def __init__(self, scheduler: Scheduler, gate: Gate, *, link_grace_seconds: float) -> None:
        self.scheduler: Any = scheduler
        self.gate = gate
        #: Workers that wait for the plan, and what they hold.
        self.parked: dict[Address, tuple[Comm, Holdings]] = {}
        self.nannies: dict[Address, Address] = {}
        self.adoption: Adoption | None = None
        self.links = Links(scheduler, grace_seconds=link_grace_seconds)
        self._planned = asyncio.Event()
        self._admitted: dict[Address, Comm] = {}
        self._unsettled: set[Address] = set()
        self._on_settled: Callable[[], None] | None = None
        self._late: dict[Address, Holdings] = {}
        self._handovers: dict[Address, Handover] = {}
        #: The connection of each worker's present registration.
        self._entered: dict[Address, Comm] = {}
        self._processing_before: dict[Address, list[Any]] = {}
        self._told_of_stock = False

    def attach(self, tap: Tap) -> None:
        """Hang in front of the scheduler's handlers."""
        self.tap = tap
        s = self.scheduler
        s.handlers["register-worker"] = self._register_worker(s.handlers["register-worker"])
        s.handle_worker = self._handle_worker(s.handle_worker)
        s.remove_worker = self._remove_worker(s.remove_worker)
        s.handlers["unregister"] = s.remove_worker

    def _handle_worker(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """Read what a worker says only when all are in: until then nothing waits for the result that it tells of."""

        @wraps(stock)
        async def handle_worker(comm: Comm, worker: Address) -> None:
            await self.gate.serving.wait()
            if worker in self.scheduler.stream_comms:
                await stock(comm, worker)

        return handle_worker

    def _register_worker(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        async def register_worker(comm: Comm, *, address: str, extra: dict[str, Any], **kwargs: Any) -> Any:
            packed = extra.pop(inventory.FIELD, None)
            held = Holdings.unpack(packed) if packed else Holdings()
            if not await self._worker_may_enter(comm, address, held, kwargs):
                await comm.close()
                return Status.dont_reply
            if packed:
                self.links.returning.add(address)
            else:
                self._tell_of_stock(address)
            self._entered[address] = comm
            try:
                return await stock(comm, address=address, extra=extra, **kwargs)
            except OSError:
                # The worker left between the answer and its stream; stock would keep it until its TTL.
                if self._entered.get(address) is comm and address in self.scheduler.workers and comm.closed():
                    await self.scheduler.remove_worker(address, stimulus_id=f"resilience-lost-on-entry-{time()}")
                raise
            finally:
                self._late.pop(address, None)
                self._handovers.pop(address, None)
                if self._entered.get(address) is comm:
                    del self._entered[address]
                self._settled(address)

        return register_worker

    def _tell_of_stock(self, address: Address) -> None:
        """Once: it is the same for all workers that were started in the same way."""
        # With `install` a worker is a stock one until its plugins are set up.
        if not self._told_of_stock and _INSTALLED not in self.scheduler.worker_plugins:
            self._told_of_stock = True
            logger.warning(
                "Worker %s was started without the preload: what it holds and runs is lost when this scheduler dies. "
                "Start workers with --preload dask_resilience.preload, or set distributed.worker.preload",
                address,
            )

    async def _worker_may_enter(self, comm: Comm, address: Address, held: Holdings, info: dict[str, Any]) -> bool:
        if held.epoch > self.gate.reign.epoch and held.cluster == self.gate.reign.cluster:
            logger.error("Worker %s serves epoch %d already; refused", address, held.epoch)
            await comm.write({"status": "error", "message": f"epoch {held.epoch} rules", "time": time()})
            return False
        if held.cluster and held.cluster != self.gate.reign.cluster:
            await comm.write({"status": "error", "message": f"this is not cluster {held.cluster}", "time": time()})
            return False
        if not self._planned.is_set():
            # A worker whose connection broke while it waited registers again: its last word counts.
            self.parked[address] = (comm, held)
            self.nannies[address] = info.get("nanny") or ""
            self.gate.reign.member_returned(address)
            logger.info("Worker %s is back with %d results, %d running", address, len(held.memory), len(held.running))
            await self._planned.wait()
            if self._admitted.get(address) is not comm:
                return False
            if comm.closed():
                self._settled(address)
                return False
            return True
        await self.gate.serving.wait()
        while address in self.scheduler.workers:
            # Its link dropped: the old membership ends, and in the same turn the new one begins.
            self.scheduler.stream_comms[address].abort()
            handover = self._handovers[address] = Handover(self.scheduler, held)
            with handover.set_aside():
                await self.scheduler.remove_worker(
                    address, stimulus_id=f"resilience-replaced-{time()}", expected=True, close=False
                )
        self._late[address] = held
        return True

    def returned(self) -> dict[Address, Holdings]:
        """Workers whose registration still holds, with what they brought."""
        return {address: held for address, (comm, held) in self.parked.items() if not comm.closed()}

    def let_in(self, adoption: Adoption, on_settled: Callable[[], None]) -> None:
        """The plan is made: add the parked workers, then call `on_settled` in the turn in which the last one is in."""
        self.adoption = adoption
        self._unsettled = set(adoption.holdings)
        self._admitted = {address: self.parked[address][0] for address in adoption.holdings}
        self._on_settled = on_settled
        self.parked.clear()
        self._planned.set()
        self._settled(None)

    def _settled(self, address: Address | None) -> None:
        self._unsettled.discard(address or "")
        if self._on_settled is not None and not self._unsettled:
            done, self._on_settled = self._on_settled, None
            self.adoption = None
            done()

    def added(self, address: Address) -> None:
        """Called by the scheduler's plugin hook while a worker is being added, before anything is scheduled on it."""
        ws = self.scheduler.workers[address]
        self.tap.ledger.record_at_once(records.WorkerJoined(address=address, name=ws.name, nanny=ws.nanny or None))
        if self.adoption is not None and address in self._unsettled:
            self.adoption.worker_added(ws)
            self._settled(address)
        elif (held := self._late.pop(address, None)) is not None:
            scheduler_adopt.late(self.scheduler, ws, held, self.tap)
            if (handover := self._handovers.pop(address, None)) is not None:
                handover.settle()

    def _remove_worker(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        async def remove_worker(address: str, *, stimulus_id: str, **kwargs: Any) -> Any:
            if await self.links.keeps(address, stimulus_id):
                return "already-removed"
            ws = self.scheduler.workers.get(address)
            if ws is not None:
                self._processing_before[address] = list(ws.processing)
            try:
                return await stock(address=address, stimulus_id=stimulus_id, **kwargs)
            finally:
                self._processing_before.pop(address, None)

        return remove_worker

    def removed(self, address: Address) -> None:
        """Called by the scheduler's plugin hook when a worker was removed."""
        self.tap.outcomes.suspected(self._processing_before.pop(address, ()))
        self.tap.ledger.record(records.WorkerLeft(address=address))
        self.links.returning.discard(address)
