"""Clients come, go and come back.

While a scheduler recovers, a client that joins is heard and held: what it wants, and what it had sent, is what the plan
is made for. Once it serves, a client that returns is taken in at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from time import time
from typing import Any

from distributed.comm import Comm
from distributed.core import Status
from distributed.protocol.pickle import dumps
from distributed.scheduler import Scheduler

from dask_resilience._distributed.scheduler_gate import Gate
from dask_resilience._distributed.scheduler_ledger import Ledger
from dask_resilience.failpoints import failpoint
from dask_resilience.journal import records
from dask_resilience.types import Address, Key

logger = logging.getLogger("distributed.resilience")

PLAIN_CLIENT_NOTICE = (
    "This scheduler survives its own death, but a plain distributed.Client does not keep its futures when that "
    "happens: use dask_resilience.Client, a drop-in, to keep them."
)


@dataclass(slots=True)
class Joining:
    """A client that came during recovery."""

    wants: list[Key]
    outbox: list[dict[str, Any]]
    answer: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


#: How long a scheduler that ends waits until its clients were told.
_GOODBYE_SECONDS = 0.5


class Clients:
    """Registration of clients on one scheduler.

    Parameters
    ----------
    scheduler
        A live scheduler; some of its handlers and bound attributes are replaced.
    gate
        Tells when it serves, and for whom.
    grace_seconds
        How long the keys of a client that vanished are kept.
    """

    ledger: Ledger

    def __init__(self, scheduler: Scheduler, gate: Gate, *, grace_seconds: float) -> None:
        self.scheduler: Any = scheduler
        self.gate = gate
        self.grace_seconds = grace_seconds
        self.joining: dict[str, Joining] = {}
        #: Clients that keep their futures, and the worker in whose process each lives, if it does.
        self.resilient: dict[str, Address] = {}
        self._returning: dict[str, Any] = {}
        self._goodbyes: set[str] = set()
        self._stock_remove_client = scheduler.remove_client

    def attach(self, ledger: Ledger) -> None:
        """Hang in front of the scheduler's handlers."""
        self.ledger = ledger
        s = self.scheduler
        s.handlers["register-client"] = self._register_client(s.handlers["register-client"])
        s.handlers["resilience-join"] = self.join
        s.remove_client = self._remove_client
        s.stream_handlers["close-client"] = self._close_client
        s.stream_handlers["subscribe-topic"] = self._subscribe_topic(s.stream_handlers["subscribe-topic"])

    async def join(
        self, client: str, wants: list[Key], outbox: list[dict[str, Any]], worker: Address = ""
    ) -> dict[str, Any]:
        """A resilient client comes, or comes back: apply what we had not yet seen, and compare what it wants."""
        self.resilient[client] = worker
        if not self.gate.serving.is_set():
            if (before := self.joining.get(client)) is not None and not before.answer.done():
                before.answer.set_result(None)  # its connection broke, or it would not ask again
            joining = self.joining[client] = Joining(wants=list(wants), outbox=list(outbox))
            self.gate.reign.member_returned(client)
            await joining.answer
        else:
            await self.gate.open()
            await self._end_old_stream(client)
            await self._apply_outbox(client, list(outbox))
            self.restate(client, wants)
        if client not in self.scheduler.client_comms:
            self._forget_later(client)
        return {"status": "OK", "epoch": self.gate.reign.epoch, **self._compare(wants)}

    def answer_joining(self) -> None:
        """The scheduler serves: let those that joined before go on."""
        for joining in self.joining.values():
            if not joining.answer.done():
                joining.answer.set_result(None)

    async def say_goodbye(self) -> None:
        """The cluster ends in order: nobody needs to look for a successor."""
        streams = [self.scheduler.client_comms[c] for c in self.resilient if c in self.scheduler.client_comms]
        for stream in streams:
            stream.send({"op": "resilience-closed"})
        deadline = time() + _GOODBYE_SECONDS
        while any(stream.buffer for stream in streams if not stream.closed()) and time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.002)

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
        out: dict[str, list[Key]] = {"known": [], "pending": [], "erred": [], "unknown": []}
        for key in wants:
            ts = self.scheduler.tasks.get(key)
            if ts is None:
                out["unknown"].append(key)
                continue
            out["known"].append(key)
            if ts.state == "erred":
                out["erred"].append(key)
            elif ts.state != "memory":
                out["pending"].append(key)
        return out

    def _register_client(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        async def register_client(comm: Comm, client: str, versions: dict[str, Any]) -> Any:
            await self.gate.open()
            failpoint("client.before-registration")
            if comm.closed():
                return Status.dont_reply
            self._returning[client] = self.scheduler.clients.get(client)
            self._goodbyes.discard(client)
            return await stock(comm, client=client, versions=versions)

        return register_client

    def added(self, client: str) -> None:
        """Called by the scheduler's plugin hook right after it made a new, empty state for `client`."""
        old = self._returning.pop(client, None)
        if old is not None and client in self.resilient:
            self.scheduler.clients[client].wants_what.update(old.wants_what)
        worker = self.resilient.get(client)
        self.ledger.record_at_once(
            records.ClientJoined(client=client, resilient=worker is not None, worker=worker or "")
        )
        # The stream is there as soon as stock has returned to the event loop.
        asyncio.get_running_loop().call_soon(self.ledger.send_ack, client)

    def _subscribe_topic(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def subscribe_topic(topic: str, client: str) -> Any:
            result = stock(topic=topic, client=client)
            if topic == "warn" and client not in self.resilient:
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
            client in self.resilient
            and client not in self._goodbyes
            and client in self.scheduler.clients
            and self.scheduler.status == Status.running
        )
        if vanished:
            logger.info("Client %s is gone; its keys are kept for %g s", client, self.grace_seconds)
            self._forget_later(client)
            return
        self.forget(client, stimulus_id)

    def _forget_later(self, client: str) -> None:
        self.scheduler.loop.call_later(self.grace_seconds, self._forget_if_gone, client)

    def _forget_if_gone(self, client: str) -> None:
        if client not in self.scheduler.client_comms and client in self.scheduler.clients:
            logger.info("Client %s did not come back", client)
            self.forget(client, None)

    def forget(self, client: str, stimulus_id: str | None = None) -> None:
        """Let go of all that `client` wants, for good."""
        if client in self.scheduler.clients:
            self.ledger.record(records.ClientLeft(client=client))
            self.ledger.forget_client(client)
        self._goodbyes.discard(client)
        self.resilient.pop(client, None)
        self._stock_remove_client(client=client, stimulus_id=stimulus_id)
