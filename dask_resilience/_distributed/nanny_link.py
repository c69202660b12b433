"""A nanny whose scheduler dies while it starts its worker, or is another one by the time it has something to say.

A stock nanny keeps one connection open from its introduction until its worker runs, which takes seconds, and ends with
it. Afterwards it only has calls to make, to the address that it was given.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from time import monotonic
from typing import Any

from distributed import Nanny
from distributed.comm import Comm, connect

from dask_resilience._distributed.leader import Compass
from dask_resilience._distributed.rpc import FollowingRPC
from dask_resilience.errors import SchedulerGone

logger = logging.getLogger("distributed.resilience")


class NannyLink:
    """Lets one nanny introduce itself to whichever scheduler rules, and call that one.

    Parameters
    ----------
    nanny
        A nanny that has not yet introduced itself.
    store_url
        Where the leader record is; None to learn it from the scheduler.
    patience_seconds
        How long the introduction looks for a scheduler.
    storage_options
        For `open_store`.
    """

    def __init__(
        self,
        nanny: Nanny,
        *,
        store_url: str | None,
        patience_seconds: float,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.nanny: Any = nanny
        self.patience_seconds = patience_seconds
        self.compass = Compass(
            nanny.scheduler.address,
            connection_args=nanny.connection_args,
            store_url=store_url,
            storage_options=storage_options,
        )
        self._suspected = False

    def attach(self) -> None:
        """Take the place of the nanny's first connection, which is the introduction's, and of its calls."""
        self.nanny.scheduler = FollowingRPC(self.nanny.rpc, self)
        self.nanny.rpc.connect = self._first_connection

    async def _first_connection(self, address: str, timeout: float | None = None) -> Introduction:
        del self.nanny.rpc.connect
        return Introduction(self)

    # The link, as FollowingRPC sees it

    #: It makes no calls that count once.
    numbers = None

    @property
    def address(self) -> str:
        return self.compass.address

    async def up(self) -> None:
        if self._suspected and (ruler := await self.compass.find()) is not None:
            self._suspected = False
            self.compass.follow(ruler)

    def suspect(self, address: str) -> None:
        self._suspected = True


class Introduction:
    """The connection on which a nanny introduces itself, as stock uses it: write, read, write, close.

    Parameters
    ----------
    link
        The nanny's link.
    """

    def __init__(self, link: NannyLink) -> None:
        self.name = ""
        self._link = link
        self._words: dict[str, Any] = {}
        self._comm: Comm | None = None

    async def write(self, msg: dict[str, Any]) -> None:
        """Keep the introduction for `read`. What follows tells how it went, and nobody asks that of a new scheduler."""
        if self._comm is None:
            self._words = msg
            return
        try:
            await self._comm.write(msg)
        except OSError:
            logger.info("The scheduler that this nanny introduced itself to is gone; its worker finds the next one")

    async def read(self) -> Any:
        """Introduce the nanny to whoever rules, and return the answer."""
        compass, patience = self._link.compass, self._link.patience_seconds
        deadline = monotonic() + patience
        while True:
            try:
                ruler = await compass.find()
                if ruler is not None:
                    answer = await self._introduce(ruler.address)
                    compass.follow(ruler)
                    return answer
            except OSError as error:
                logger.debug("Not introduced yet: %s", error)
            if monotonic() >= deadline:
                raise SchedulerGone(f"no scheduler at {compass.address} or in the leader record within {patience:g} s")
            await asyncio.sleep(0.1)

    async def _introduce(self, address: str) -> Any:
        comm = await connect(address, timeout=5, **self._link.nanny.connection_args)
        try:
            comm.name = self.name
            await comm.write(self._words)
            answer = await comm.read()
        except BaseException:
            comm.abort()
            raise
        self._comm = comm
        return answer

    async def close(self) -> None:
        """End the connection."""
        if self._comm is not None:
            await self._comm.close()
