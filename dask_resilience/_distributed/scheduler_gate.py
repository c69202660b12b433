"""The gate of a scheduler: who must wait until it has recovered, and while its lease is not sure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import wraps
from time import time
from typing import Any, Protocol

from distributed.scheduler import Scheduler

from dask_resilience._distributed import leader

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


class Reign(Protocol):
    """What the seam needs to know of the rule of this scheduler."""

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


class Gate:
    """Stands in front of a scheduler's handlers.

    Parameters
    ----------
    scheduler
        A live scheduler.
    reign
        Whose word counts on epoch and lease.
    """

    def __init__(self, scheduler: Scheduler, reign: Reign) -> None:
        self.scheduler: Any = scheduler
        self.reign = reign
        self.serving = asyncio.Event()

    def attach(self) -> None:
        """Let every call wait that need not be answered while this scheduler recovers. To be attached last."""
        s = self.scheduler
        s.handlers["identity"] = self._identity(s.handlers["identity"])
        s.handlers["heartbeat_worker"] = self._heartbeat(s.handlers["heartbeat_worker"])
        for op, handler in list(s.handlers.items()):
            if op not in _OPEN_DURING_RECOVERY:
                s.handlers[op] = self._gated(handler)
        spans = s.extensions.get("spans")
        if spans is not None:
            spans.heartbeat = self._tolerant_spans(spans, spans.heartbeat)

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


def listening_port(scheduler: Any) -> int:
    """The port that the scheduler was told to listen on; 0 if any."""
    tail = str(scheduler._start_address[0]).rpartition(":")[2]
    return int(tail) if tail.isdigit() else 0
