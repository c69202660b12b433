"""The barrier of one takeover, driven by real members: who is back, who is provably gone, when to open."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from time import monotonic
from typing import Any

from dask_resilience._distributed.rpc import is_refused
from dask_resilience.failover.barrier import (
    Barrier,
    BarrierTerms,
    Event,
    KeepWaiting,
    MemberExpected,
    MemberKind,
    MemberProvenGone,
    MemberReturned,
    Open,
    TimePassed,
)
from dask_resilience.types import Address

logger = logging.getLogger("distributed.resilience")

#: How often missing workers are probed; a refused connection proves that the process is gone.
_PROBE_SECONDS = 0.3
#: No probe before this: a worker that is alive comes by itself, and usually sooner.
_FIRST_PROBE_SECONDS = 0.15


class Gathering:
    """Waits for the members that the journal expects.

    Parameters
    ----------
    terms
        The graces.
    workers
        Expected workers: address to (name, nanny).
    clients
        Expected clients: id to the worker with which it dies, if there is one.
    connection_args
        For probing workers.
    """

    def __init__(
        self,
        terms: BarrierTerms,
        *,
        workers: Mapping[Address, tuple[Any, Address | None]],
        clients: Mapping[str, Address | None],
        connection_args: dict[str, Any],
    ) -> None:
        self._barrier = Barrier(terms)
        self._workers = dict(workers)
        self._clients = dict(clients)
        self._connection_args = connection_args
        self._changed = asyncio.Event()
        self._opened: Open | None = None
        self.waiting: KeepWaiting | None = None
        for address in workers:
            self._step(MemberExpected(kind=MemberKind.WORKER, member=address))
        for client, worker in clients.items():
            self._step(MemberExpected(kind=MemberKind.CLIENT, member=client))
            if worker and worker not in workers:
                self._step(MemberProvenGone(kind=MemberKind.CLIENT, member=client))

    def worker_returned(self, address: Address, *, nanny: Address | None = None, name: Any = None) -> None:
        """A worker is back, or a new one came in the place of an old one."""
        self._step(MemberReturned(kind=MemberKind.WORKER, member=address))
        for other, (other_name, other_nanny) in self._workers.items():
            replaced = (nanny and other_nanny == nanny) or (name is not None and other_name == name)
            if other != address and replaced:
                self._worker_gone(other)

    def _worker_gone(self, address: Address) -> None:
        self._step(MemberProvenGone(kind=MemberKind.WORKER, member=address))
        for client, worker in self._clients.items():
            if worker == address:
                self._step(MemberProvenGone(kind=MemberKind.CLIENT, member=client))

    def client_returned(self, client: str) -> None:
        """A client joined."""
        self._step(MemberReturned(kind=MemberKind.CLIENT, member=client))

    def _step(self, event: Event) -> None:
        if self._opened is not None:
            return
        for action in self._barrier.step(event):
            if isinstance(action, Open):
                self._opened = action
            else:
                self.waiting = action
        self._changed.set()

    async def wait(self) -> Open:
        """Return when the scheduler may open."""
        self._step(TimePassed(now_seconds=monotonic()))
        probing = asyncio.create_task(self._probe())
        told = False
        try:
            while self._opened is None:
                self._changed.clear()
                left = 0.2 if self.waiting is None else max(0.01, self.waiting.until_seconds - monotonic())
                try:
                    await asyncio.wait_for(self._changed.wait(), min(left, 1.0))
                except TimeoutError:
                    if not told and self.waiting is not None:
                        told = True
                        logger.info("Waiting for workers %s and clients %s", self.waiting.workers, self.waiting.clients)
                self._step(TimePassed(now_seconds=monotonic()))
        finally:
            probing.cancel()
        return self._opened

    async def _probe(self) -> None:
        await asyncio.sleep(_FIRST_PROBE_SECONDS)
        while True:
            missing = self.waiting.workers if self.waiting is not None else ()
            refused = await asyncio.gather(
                *(is_refused(address, connection_args=self._connection_args) for address in missing)
            )
            for address, gone in zip(missing, refused, strict=True):
                if gone:
                    logger.info("Worker %s is gone: its address refuses connections", address)
                    self._worker_gone(address)
            await asyncio.sleep(_PROBE_SECONDS)
