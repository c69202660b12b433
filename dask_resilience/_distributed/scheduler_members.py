"""Workers and clients come, go and come back.

While a scheduler recovers, registrations are heard and held: a worker's inventory and a client's wishes are what the
plan is made of. Every other call waits at the gate. Once it serves, a returning member is taken in at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from time import time
from typing import Any, Protocol

from distributed.comm import Comm
from distributed.core import Status
from distributed.protocol.pickle import dumps
from distributed.scheduler import Scheduler

from dask_resilience._distributed import inventory, leader, scheduler_adopt
from dask_resilience._distributed.inventory import Holdings
from dask_resilience._distributed.scheduler_adopt import Adoption
from dask_resilience._distributed.scheduler_links import Handover, Links
from dask_resilience._distributed.scheduler_tap import Tap
from dask_resilience.failpoints import failpoint
from dask_resilience.journal import records
from dask_resilience.types import Address, Key

logger = logging.getLogger("distributed.resilience")

#: Calls that must be answered while the scheduler recovers.
_OPEN_DURING_RECOVERY = frozenset(
    {
        "identity",
        "register-worker",
        "register_nanny",
        "resilience-join",
        "heartbeat_worker",
        "connection_stream",
        "unregister",
        "versions",
        "ping",
        "echo",
    }
)

PLAIN_CLIENT_NOTICE = (
    "This scheduler survives its own death, but a plain distributed.Client does not keep its futures when that "
    "happens: use dask_resilience.Client, a drop-in, to keep them."
)


class Reign(Protocol):
    """What members need to know of the rule of this scheduler."""

    @property
    def cluster(self) -> str:
        """Identity of the cluster."""

    @property
    def epoch(self) -> int:
        """Number of this reign."""

    @property
    def store_url(self) -> str:
        """Where the journal is."""

    def valid(self) -> bool:
        """Whether the lease is surely ours now."""

    def member_returned(self, member: str) -> None:
        """A worker's address or a client's id is back."""


@dataclass(slots=True)
class Joining:
    """A client that came during recovery."""

    wants: list[Key]
    outbox: list[dict[str, Any]]
    answer: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Members:
    """Registration of workers and clients on one scheduler.

    Parameters
    ----------
    scheduler
        A live scheduler; some of its handlers and bound attributes are replaced.
    reign
        Whose word counts on epoch and lease.
    client_grace_seconds
        How long the keys of a client that vanished are kept.
    """

    def __init__(self, scheduler: Scheduler, reign: Reign, *, client_grace_seconds: float) -> None:
        self.scheduler: Any = scheduler
        self.reign = reign
        self.client_grace_seconds = client_grace_seconds
        self.tap: Tap | None = None
        self.serving = asyncio.Event()
        #: Workers that wait for the plan, and what they hold.
        self.parked: dict[Address, tuple[Comm, Holdings]] = {}
        self.nannies: dict[Address, Address] = {}
        self.joining: dict[str, Joining] = {}
        #: Resilient clients, and the worker in whose process each lives, if it does.
        self.resilient_clients: dict[str, Address] = {}
        self.adoption: Adoption | None = None
        self.links = Links(scheduler)
        self._planned = asyncio.Event()
        self._admitted: dict[Address, Comm] = {}
        self._unsettled: set[Address] = set()
        self._on_settled: Callable[[], None] | None = None
        self._returning: dict[str, Any] = {}
        self._late: dict[Address, Holdings] = {}
        self._handovers: dict[Address, Handover] = {}
        #: The connection of each worker's present registration.
        self._entered: dict[Address, Comm] = {}
        self._goodbyes: set[str] = set()
        self._stock_remove_client = scheduler.remove_client
        self._processing_before: dict[Address, list[Any]] = {}

    def attach(self) -> None:
        """Hang in front of the scheduler's handlers."""
        s = self.scheduler
        s.handlers["register-worker"] = self._register_worker(s.handlers["register-worker"])
        s.handlers["register-client"] = self._register_client(s.handlers["register-client"])
        s.handlers["identity"] = self._identity(s.handlers["identity"])
        s.handlers["heartbeat_worker"] = self._heartbeat(s.handlers["heartbeat_worker"])
        s.handlers["resilience-join"] = self.join
        for op, handler in list(s.handlers.items()):
            if op not in _OPEN_DURING_RECOVERY:
                s.handlers[op] = self._gated(handler)
        s.handle_worker = self._handle_worker(s.handle_worker)
        s.remove_client = self._remove_client
        s.stream_handlers["close-client"] = self._close_client
        s.stream_handlers["subscribe-topic"] = self._subscribe_topic(s.stream_handlers["subscribe-topic"])
        s.remove_worker = self._remove_worker(s.remove_worker)
        s.handlers["unregister"] = s.remove_worker
        spans = s.extensions.get("spans")
        if spans is not None:
            spans.heartbeat = self._tolerant_spans(spans, spans.heartbeat)

    # The gate

    def _gated(self, handler: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(handler)
        async def gated(*args: Any, **kwargs: Any) -> Any:
            await self.open()
            result = handler(*args, **kwargs)
            if asyncio.iscoroutine(result):
                result = await result
            return result

        return gated

    async def open(self) -> None:
        """Return when this scheduler serves and surely rules."""
        if not self.serving.is_set():
            await self.serving.wait()
        await self._rule_is_sure()

    async def _rule_is_sure(self) -> None:
        # A look at the clock decides, so there is nothing to be notified of.
        while not self.reign.valid():  # noqa: ASYNC110
            await asyncio.sleep(0.02)

    def _identity(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def identity(*args: Any, **kwargs: Any) -> Any:
            out = stock(*args, **kwargs)
            out[leader.FIELD] = {
                "cluster": self.reign.cluster,
                "epoch": self.reign.epoch,
                "store": self.reign.store_url,
                "ready": self.serving.is_set(),
            }
            return out

        return identity

    def _heartbeat(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        async def heartbeat_worker(*args: Any, address: str, **kwargs: Any) -> Any:
            while not self.reign.valid():
                # Only the answer waits: a worker that was heard must not be restarted for its silence. A store that
                # is full or out of reach lets this last longer than worker-ttl.
                ws = self.scheduler.workers.get(address)
                if ws is not None:
                    ws.last_seen = time()
                await asyncio.sleep(0.02)
            return stock(*args, address=address, **kwargs)

        return heartbeat_worker

    @staticmethod
    def _tolerant_spans(spans: Any, stock: Callable[..., Any]) -> Callable[..., Any]:
        """A worker that comes back may still report on spans of the scheduler before; stock closes it for that."""

        @wraps(stock)
        def heartbeat(ws: Any, data: dict[tuple[Any, ...], float]) -> None:
            stock(ws, {context: value for context, value in data.items() if context[1] in spans.spans})

        return heartbeat

    # Workers

    def _handle_worker(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """Read what a worker says only when all are in: until then nothing waits for the result that it tells of."""

        @wraps(stock)
        async def handle_worker(comm: Comm, worker: Address) -> None:
            await self.serving.wait()
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

    async def _worker_may_enter(self, comm: Comm, address: Address, held: Holdings, info: dict[str, Any]) -> bool:
        if held.epoch > self.reign.epoch and held.cluster == self.reign.cluster:
            logger.error("Worker %s serves epoch %d already; refused", address, held.epoch)
            await comm.write({"status": "error", "message": f"epoch {held.epoch} rules", "time": time()})
            return False
        if held.cluster and held.cluster != self.reign.cluster:
            await comm.write({"status": "error", "message": f"this is not cluster {held.cluster}", "time": time()})
            return False
        if not self._planned.is_set():
            # A worker whose connection broke while it waited registers again: its last word counts.
            self.parked[address] = (comm, held)
            self.nannies[address] = info.get("nanny") or ""
            self.reign.member_returned(address)
            logger.info("Worker %s is back with %d results, %d running", address, len(held.memory), len(held.running))
            await self._planned.wait()
            if self._admitted.get(address) is not comm:
                return False
            if comm.closed():
                self._settled(address)
                return False
            return True
        await self.serving.wait()
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

    def worker_added(self, address: Address) -> None:
        """Called by the scheduler's plugin hook while a worker is being added, before anything is scheduled on it."""
        ws = self.scheduler.workers[address]
        if self.tap is not None:
            self.tap.record(records.WorkerJoined(address=address, name=ws.name, nanny=ws.nanny or None))
        if self.adoption is not None and address in self._unsettled:
            self.adoption.worker_added(ws)
            self._settled(address)
        elif (held := self._late.pop(address, None)) is not None:
            assert self.tap is not None
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

    def worker_removed(self, address: Address) -> None:
        """Called by the scheduler's plugin hook when a worker was removed."""
        if self.tap is not None:
            self.tap.suspected(self._processing_before.pop(address, ()))
            self.tap.record(records.WorkerLeft(address=address))
        self.links.returning.discard(address)

    # Clients

    async def join(
        self, client: str, wants: list[Key], outbox: list[dict[str, Any]], worker: Address = ""
    ) -> dict[str, Any]:
        """A resilient client comes, or comes back: apply what we had not yet seen, and compare what it wants."""
        self.resilient_clients[client] = worker
        if not self.serving.is_set():
            if (before := self.joining.get(client)) is not None and not before.answer.done():
                before.answer.set_result(None)  # its connection broke, or it would not ask again
            joining = self.joining[client] = Joining(wants=list(wants), outbox=list(outbox))
            self.reign.member_returned(client)
            await joining.answer
        else:
            await self.open()
            await self._end_old_stream(client)
            await self._apply_outbox(client, list(outbox))
            self.restate(client, wants)
        if client not in self.scheduler.client_comms:
            self._remove_later(client)
        return {"status": "OK", "epoch": self.reign.epoch, **self._compare(wants)}

    async def _end_old_stream(self, client: str) -> None:
        """The client left its old stream; stock would take the new one down when it notices."""
        deadline = time() + 10
        while client in self.scheduler.client_comms and time() < deadline:
            self.scheduler.client_comms[client].abort()
            await asyncio.sleep(0.005)

    async def _apply_outbox(self, client: str, outbox: list[dict[str, Any]]) -> None:
        for sent in outbox:
            msg = dict(sent)
            handler = self.scheduler.stream_handlers[msg.pop("op")]
            result = handler(**{"client": client, **msg})
            if asyncio.iscoroutine(result):
                await result

    def restate(self, client: str, wants: list[Key]) -> None:
        """Make what `client` holds here what it says that it wants."""
        s = self.scheduler
        wanted = set(wants)
        cs = s.clients.get(client)
        held = {ts.key for ts in cs.wants_what} if cs is not None else set()
        added = [key for key in wants if key not in held and key in s.tasks]
        if added or cs is None:
            s.client_desires_keys(keys=added, client=client)
        dropped = [key for key in held if key not in wanted]
        if dropped:
            s.client_releases_keys(keys=dropped, client=client)

    def _compare(self, wants: list[Key]) -> dict[str, list[Key]]:
        out: dict[str, list[Key]] = {"known": [], "pending": [], "unknown": []}
        for key in wants:
            ts = self.scheduler.tasks.get(key)
            if ts is None:
                out["unknown"].append(key)
                continue
            out["known"].append(key)
            if ts.state not in ("memory", "erred"):
                out["pending"].append(key)
        return out

    def _register_client(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        async def register_client(comm: Comm, client: str, versions: dict[str, Any]) -> Any:
            await self.open()
            failpoint("client.before-registration")
            if comm.closed():
                return Status.dont_reply
            self._returning[client] = self.scheduler.clients.get(client)
            self._goodbyes.discard(client)
            return await stock(comm, client=client, versions=versions)

        return register_client

    def client_added(self, client: str) -> None:
        """Called by the scheduler's plugin hook right after it made a new, empty state for `client`."""
        old = self._returning.pop(client, None)
        if old is not None and client in self.resilient_clients:
            self.scheduler.clients[client].wants_what.update(old.wants_what)
        if self.tap is not None:
            worker = self.resilient_clients.get(client)
            self.tap.record(records.ClientJoined(client=client, resilient=worker is not None, worker=worker or ""))
            # The stream is there as soon as stock has returned to the event loop.
            asyncio.get_running_loop().call_soon(self.tap.send_ack, client)

    def _subscribe_topic(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def subscribe_topic(topic: str, client: str) -> Any:
            result = stock(topic=topic, client=client)
            if topic == "warn" and client not in self.resilient_clients:
                notice = {"message": dumps(PLAIN_CLIENT_NOTICE), "category": dumps(UserWarning)}
                self.scheduler.client_send(client, {"op": "event", "topic": "warn", "event": (time(), notice)})
            return result

        return subscribe_topic

    def _close_client(self, client: str) -> None:
        self._goodbyes.add(client)
        self.scheduler.remove_client(client=client)

    def _remove_client(self, client: str, stimulus_id: str | None = None) -> None:
        """Stock removes a client with its connection; one that may come back keeps its keys for a while."""
        vanished = (
            client in self.resilient_clients
            and client not in self._goodbyes
            and client in self.scheduler.clients
            and self.scheduler.status == Status.running
        )
        if vanished:
            logger.info("Client %s is gone; its keys are kept for %g s", client, self.client_grace_seconds)
            self._remove_later(client)
            return
        self.forget_client(client, stimulus_id)

    def _remove_later(self, client: str) -> None:
        self.scheduler.loop.call_later(self.client_grace_seconds, self._remove_if_gone, client)

    def _remove_if_gone(self, client: str) -> None:
        if client not in self.scheduler.client_comms and client in self.scheduler.clients:
            logger.info("Client %s did not come back", client)
            self.forget_client(client, None)

    def forget_client(self, client: str, stimulus_id: str | None = None) -> None:
        """Let go of all that `client` wants, for good."""
        if client in self.scheduler.clients and self.tap is not None:
            self.tap.record(records.ClientLeft(client=client))
            self.tap.forget_client(client)
        self._goodbyes.discard(client)
        self.resilient_clients.pop(client, None)
        self._stock_remove_client(client=client, stimulus_id=stimulus_id)


def listening_port(scheduler: Any) -> int:
    """The port that the scheduler was told to listen on; 0 if any."""
    tail = str(scheduler._start_address[0]).rpartition(":")[2]
    return int(tail) if tail.isdigit() else 0
