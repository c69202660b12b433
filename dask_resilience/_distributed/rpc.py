"""Calls to a scheduler that may be replaced while they are under way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from distributed.comm import CommClosedError, connect
from distributed.core import ConnectionPool, PooledRPCCall, send_recv

from dask_resilience._distributed.client_calls import Numbers
from dask_resilience.errors import CallInterrupted

#: Calls that run user code or change the cluster in a way that a second run would change again. When the connection
#: breaks after they were sent, nobody knows whether they ran: the caller is told instead of guessing.
NOT_REPEATABLE = frozenset(
    {"run_function", "broadcast", "proxy", "restart", "restart_workers", "retry", "publish_put", "publish_delete"}
)

#: Calls that count once however often they are made: each has a number, by which the scheduler knows it again.
COUNTED = frozenset({"queue_create", "queue_put", "queue_get", "log_event"})

#: Calls that say when they are made again, since what they ask for may be so already.
_SAY_AGAIN = frozenset({"multi_lock_acquire", "multi_lock_release"})

#: Calls that end whoever is asked: the link that breaks is the answer.
_ENDS_THE_LINK = frozenset({"terminate"})


def drop_connections(pool: ConnectionPool, address: str) -> None:
    """Let go of all connections to a server that is gone, also where that was done a moment ago."""
    # Dask cancels an attempt to connect by moving its timeout, and fails at one that is cancelled already.
    with contextlib.suppress(RuntimeError):
        pool.remove(address)


class Link(Protocol):
    """The connection of a member to whichever scheduler rules."""

    @property
    def address(self) -> str:
        """Address of the ruling scheduler, as far as this member knows."""

    @property
    def numbers(self) -> Numbers | None:
        """Numbers of calls that count once; None where the scheduler would not know what they are."""

    async def up(self) -> None:
        """Return once connected; raise `SchedulerGone` after the member's patience."""

    def suspect(self, address: str) -> None:
        """A call to `address` failed although the link counts as up."""


class FollowingRPC(PooledRPCCall):
    """A `PooledRPCCall` that follows the leader and repeats calls which a failover cut.

    Subclassing matters: Dask accepts a `PooledRPCCall` wherever a scheduler's address may stand.
    """

    def __init__(self, pool: Any, link: Link, serializers: Any = None, deserializers: Any = None) -> None:
        self._link = link
        super().__init__(link.address, pool, serializers, deserializers)

    @property
    def address(self) -> str:
        return self._link.address

    @property
    def addr(self) -> str:
        return self._link.address

    @addr.setter
    def addr(self, value: str) -> None:
        """The base class sets what the link knows better."""

    def __getattr__(self, key: str) -> Callable[..., Awaitable[Any]]:
        async def call(**kwargs: Any) -> Any:
            if self.serializers is not None and kwargs.get("serializers") is None:
                kwargs["serializers"] = self.serializers
            if self.deserializers is not None and kwargs.get("deserializers") is None:
                kwargs["deserializers"] = self.deserializers
            await self._link.up()
            numbers = self._link.numbers
            if numbers is None or key not in COUNTED:
                return await self._follow(key, kwargs, dict)
            with numbers.next() as number:
                return await self._follow(key, kwargs, lambda: {"request": numbers.request(number)})

        return call

    async def _follow(self, key: str, kwargs: dict[str, Any], extra: Callable[[], dict[str, Any]]) -> Any:
        """Make a call until it is answered. `extra` is what it says of itself, anew each time that it is made."""
        while True:
            await self._link.up()
            address = self._link.address
            comm = None
            try:
                comm = await self.pool.connect(address)
                previous_name, comm.name = comm.name, f"FollowingRPC.{key}"
                try:
                    return await send_recv(comm=comm, op=key, **kwargs, **extra())
                finally:
                    self.pool.reuse(address, comm)
                    comm.name = previous_name
            except OSError as error:
                if comm is not None:
                    # An error that the handler raised is an answer, whatever its type.
                    if not comm.closed() or key in _ENDS_THE_LINK:
                        raise
                    if key in NOT_REPEATABLE:
                        raise CallInterrupted(key) from error
                    if key in _SAY_AGAIN and self._link.numbers is not None:
                        kwargs["again"] = True
                elif isinstance(error, TimeoutError):
                    raise
                self._link.suspect(address)
                await asyncio.sleep(0.05)

    def __repr__(self) -> str:
        return f"<following rpc to {self.address!r}>"


async def call_once(
    address: str,
    op: str,
    *,
    connection_args: dict[str, Any],
    timeout_seconds: float,
    answer_seconds: float,
    **kwargs: Any,
) -> Any:
    """Make one call on a connection of its own, with bounds that a dead address cannot stretch.

    `distributed.comm.connect` retries a refused address for its whole timeout, so that timeout is kept short here and
    the waiting for an answer is bounded apart.
    """
    comm = await connect(address, timeout=timeout_seconds, **connection_args)
    try:
        return await asyncio.wait_for(send_recv(comm, op=op, **kwargs), answer_seconds)
    finally:
        comm.abort()


async def is_refused(address: str, *, connection_args: dict[str, Any], timeout_seconds: float = 0.5) -> bool:
    """Whether `address` refuses connections: its process is gone although its host answers."""
    try:
        comm = await connect(address, timeout=timeout_seconds, **connection_args)
    except (OSError, CommClosedError) as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ConnectionRefusedError) or "refused" in str(cause).lower():
                return True
            cause = cause.__cause__ or cause.__context__
        return False
    comm.abort()
    return False
