"""What is recorded, what of it is durable, and who is told."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, Protocol

from distributed.scheduler import Scheduler

from dask_resilience.journal import records
from dask_resilience.types import Key


class Log(Protocol):
    """What the tap needs of a journal writer."""

    @property
    def pending_bytes(self) -> int:
        """What waits for the disk."""

    def append(self, record: records.Record) -> int:
        """Queue `record`; its LSN is durable some time later."""

    def hurry(self) -> None:
        """Make it durable without gathering more."""


class Ledger:
    """Passes records to the journal in order, acks the messages of clients, and lets calls wait.

    Parameters
    ----------
    scheduler
        A live scheduler, whose clients are told.
    log
        Where records go.
    pending_limit_bytes
        More than this waiting for the disk, and clients' streams wait too.
    commit_interval_seconds
        How long releases may be gathered into one record.
    last_seq
        The last message of each client that the journal holds, from the replay.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        log: Log,
        *,
        pending_limit_bytes: int,
        commit_interval_seconds: float,
        last_seq: dict[str, int],
    ) -> None:
        self.scheduler: Any = scheduler
        self.log = log
        self.last_seq = last_seq
        #: Whoever else keeps something for a client until it is gone for good.
        self.forgetting: list[Callable[[str], None]] = []
        self._pending_limit_bytes = pending_limit_bytes
        self._commit_interval_seconds = max(commit_interval_seconds, 0.001)
        self._acks: deque[tuple[int, str, int]] = deque()
        self._acked: dict[str, int] = {}
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._releases: dict[str, list[Key]] = {}
        self._release_timer: asyncio.TimerHandle | None = None
        self._last_lsn = 0
        self._durable_lsn = 0
        self._room = asyncio.Event()
        self._detached = False

    def detach(self) -> None:
        """Record and ack nothing any more; what the scheduler does from now on is its end."""
        self._detached = True

    def record(self, record: records.Record, *, client: str = "", seq: int = 0) -> int:
        """Append `record`, and once it is durable ack message `seq` of `client`."""
        if self._detached:
            return self._last_lsn
        if self._releases:
            self.flush_releases()
        lsn = self.log.append(record)
        self._last_lsn = lsn
        if seq:
            self.last_seq[client] = seq
            self._acks.append((lsn, client, seq))
        return lsn

    def record_at_once(self, record: records.Record) -> None:
        """Append what a successor should know although this scheduler may die in the next moment."""
        self.record(record)
        self.log.hurry()

    def ack_again(self, client: str, seq: int) -> None:
        """A message came twice: its ack may have been lost."""
        self._acks.append((self._last_lsn, client, seq))
        self.durable(self._durable_lsn)

    def durable(self, lsn: int) -> None:
        """Everything up to `lsn` is durable and was so before any fence."""
        self._durable_lsn = max(self._durable_lsn, lsn)
        acked: dict[str, int] = {}
        while self._acks and self._acks[0][0] <= self._durable_lsn:
            _, client, seq = self._acks.popleft()
            acked[client] = seq
        self._acked |= acked
        for client in acked:
            self.send_ack(client)
        while self._waiters and self._waiters[0][0] <= self._durable_lsn:
            waiter = self._waiters.popleft()[1]
            if not waiter.done():
                waiter.set_result(None)
        self._room.set()

    def send_ack(self, client: str) -> None:
        """Tell `client` what is durable. Without a stream it is told when it has one."""
        if (seq := self._acked.get(client)) is not None:
            self.scheduler.client_send(client, {"op": "resilience-ack", "seq": seq})

    def forget_client(self, client: str) -> None:
        """`client` is gone for good."""
        self.last_seq.pop(client, None)
        self._acked.pop(client, None)
        for forget in self.forgetting:
            forget(client)

    async def committed(self) -> None:
        """Return when all that was recorded so far is durable."""
        self.flush_releases()
        if self._last_lsn <= self._durable_lsn or self._detached:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((self._last_lsn, waiter))
        self.log.hurry()
        await waiter

    async def room(self) -> None:
        """Back-pressure: return when the journal has caught up far enough."""
        while self.log.pending_bytes > self._pending_limit_bytes:
            self._room.clear()
            await self._room.wait()

    def seen(self, client: str, seq: int) -> bool:
        """Whether message `seq` of `client` was applied before."""
        return bool(seq) and seq <= self.last_seq.get(client, 0)

    def durable_call(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """Answer only when what the call recorded is durable."""

        @wraps(stock)
        async def call(*args: Any, **kwargs: Any) -> Any:
            result = stock(*args, **kwargs)
            if asyncio.iscoroutine(result):
                result = await result
            await self.committed()
            return result

        return call

    # Releases come one key at a time, so they are gathered; any other record puts them down first, to keep the order.

    def release(self, client: str, keys: Iterable[Key]) -> None:
        self._releases.setdefault(client, []).extend(keys)
        if self._release_timer is None:
            loop = asyncio.get_running_loop()
            self._release_timer = loop.call_later(self._commit_interval_seconds, self.flush_releases)

    def flush_releases(self) -> None:
        """Record the releases gathered so far."""
        if self._release_timer is not None:
            self._release_timer.cancel()
            self._release_timer = None
        gathered, self._releases = self._releases, {}
        if self._detached:
            return
        for client, keys in gathered.items():
            self._last_lsn = self.log.append(records.KeysReleased(client=client, keys=tuple(keys)))
