"""Who rules, as a member sees it: the store's leader record first, then the addresses that it was given."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dask_resilience._distributed.rpc import call_once
from dask_resilience.errors import ResilienceError
from dask_resilience.storage import open_store
from dask_resilience.storage.object_store import ConditionalStore
from dask_resilience.storage.takeover import leader

logger = logging.getLogger("distributed.resilience")

#: How long a look into the store may take. Libraries of clouds search for credentials for minutes where there are none.
_STORE_SECONDS = 3.0

#: Where a resilient scheduler describes itself in its identity.
FIELD = "resilience"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruler:
    """A scheduler that answered.

    Parameters
    ----------
    address
        Where.
    resilient
        Whether it keeps a journal.
    cluster, epoch, store
        What it said of itself.
    """

    address: str
    resilient: bool
    cluster: str = ""
    epoch: int = 0
    store: str | None = None


class Compass:
    """Finds the ruling scheduler and never goes back to an older one."""

    def __init__(
        self,
        address: str,
        *,
        connection_args: dict[str, Any],
        store_url: str | None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.address = address
        self.cluster = ""
        self.epoch = 0
        self._addresses = [address]
        self._connection_args = connection_args
        self._store_url = store_url
        self._storage_options = storage_options
        self._store: ConditionalStore | None = None
        self._store_refused: str | None = None
        self._reading: asyncio.Future[Any] | None = None
        self._closed = False

    async def find(self, *, answer_seconds: float = 5.0) -> Ruler | None:
        """The ruling scheduler, or None if nobody who may rule answers now."""
        recorded = await self.recorded()
        candidates = [recorded] if recorded else []
        candidates += [address for address in reversed(self._addresses) if address not in candidates]
        for address in candidates:
            try:
                ruler = await ask(address, connection_args=self._connection_args, answer_seconds=answer_seconds)
            except (OSError, TimeoutError):
                continue
            if self.cluster and ruler.cluster == self.cluster and ruler.epoch < self.epoch:
                logger.warning("Scheduler at %s has epoch %d, but %d rules; refused", address, ruler.epoch, self.epoch)
                continue
            return ruler
        return None

    def follow(self, ruler: Ruler) -> None:
        """From now on `ruler` is the scheduler, and nothing older."""
        self.address = ruler.address
        if ruler.address in self._addresses:
            self._addresses.remove(ruler.address)
        self._addresses.append(ruler.address)
        del self._addresses[:-4]
        if ruler.resilient:
            self.cluster, self.epoch = ruler.cluster, ruler.epoch
            if self._store_url is None:
                self._store_url = ruler.store

    async def close(self) -> None:
        """Let go of the store. May be called twice."""
        self._closed = True
        if self._reading is not None:
            await asyncio.wait({self._reading}, timeout=_STORE_SECONDS)
        store, self._store = self._store, None
        if store is not None:
            # Here and not in a thread, which an interpreter that ends does not start any more: nothing is sent.
            store.close()

    async def recorded(self) -> str | None:
        """Address in the store's leader record, where the store can be read from here."""
        record = await self._record()
        if record is None or (self.cluster and record.cluster_id != self.cluster) or record.epoch < self.epoch:
            return None
        return record.address or None

    async def overtaken(self) -> bool:
        """Whether the store names a newer epoch than the one that we follow."""
        record = await self._record()
        return record is not None and record.cluster_id == self.cluster and record.epoch > self.epoch

    async def _record(self) -> Any:
        """The leader record, or None when it takes long: there are other ways to find a scheduler."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(asyncio.to_thread(self._read))
        # Not cancelled: a thread cannot be, and a second one must not wait for the same store.
        reading = self._reading
        done, _ = await asyncio.wait({reading}, timeout=_STORE_SECONDS)
        if not done:
            return None
        if self._reading is reading:
            self._reading = None
        return reading.result()

    def _read(self) -> Any:
        if self._closed or self._store_url is None or self._store_url == self._store_refused:
            return None
        try:
            if self._store is None:
                self._store = open_store(self._store_url, existing=True, storage_options=self._storage_options)
            return leader(self._store)
        except ResilienceError as error:
            if self._store is None:
                self._store_refused = self._store_url
                logger.info("The leader record is out of reach from here, known addresses are used: %s", error)
            return None


async def ask(address: str, *, connection_args: dict[str, Any], answer_seconds: float) -> Ruler:
    """Ask the scheduler at `address` who it is."""
    identity = await call_once(
        address,
        "identity",
        connection_args=connection_args,
        timeout_seconds=0.5,
        answer_seconds=answer_seconds,
        n_workers=0,
    )
    described = identity.get(FIELD)
    if described is None:
        return Ruler(address=address, resilient=False)
    return Ruler(
        address=address,
        resilient=True,
        cluster=described["cluster"],
        epoch=described["epoch"],
        store=described["store"],
    )
