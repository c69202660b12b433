"""Queues are recorded by difference: what came in, and that something was taken.

Dask's own code runs for each call. The queues that it works on tell of each item as it comes and goes, in the turn of
the event loop in which that happens, and know for which call it happens (`scheduler_once`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from distributed.protocol.pickle import dumps, loads
from distributed.scheduler import Scheduler

from dask_resilience._distributed.scheduler_ledger import Ledger
from dask_resilience._distributed.scheduler_once import Once, fields_of_turn, turn
from dask_resilience.journal import records
from dask_resilience.journal.queues import QueueStates
from dask_resilience.types import Key

#: Messages of clients that change queues. They are numbered, and kept until they are acked.
QUEUE_MESSAGES = frozenset({"queue_release", "queue-future-release"})


class _ToldQueue(asyncio.Queue[Any]):
    """A queue that tells of its items, and gives to a call that is made again first what it was handed before."""

    tell: Callable[[str, Any], None]

    async def get(self) -> Any:
        mine = turn.get()
        if mine is not None and mine.left:
            return mine.left.popleft()
        return await super().get()

    def empty(self) -> bool:
        mine = turn.get()
        return not (mine is not None and mine.left) and super().empty()

    def _put(self, item: Any) -> None:
        self.tell("put", item)
        super()._put(item)

    def _get(self) -> Any:
        item = super()._get()
        self.tell("taken", item)
        return item


class Queues:
    """Records the queues of one scheduler, and brings them back.

    Parameters
    ----------
    scheduler
        A live scheduler; queues of its extension and some handlers are replaced.
    once
        Its numbered calls.
    """

    ledger: Ledger

    def __init__(self, scheduler: Scheduler, once: Once) -> None:
        self.scheduler: Any = scheduler
        self._once = once
        self._extension = self.scheduler.extensions["queues"]
        self._restored: set[Key] = set()

    def restore(self, states: QueueStates) -> None:
        """Bring back what the journal holds."""
        for name, state in states.queues.items():
            queue: asyncio.Queue[Any] = asyncio.Queue(state.maxsize)
            for item, _ in state.items:
                queue.put_nowait(loads(item))
            self._extension.queues[name] = queue
            self._extension.client_refcount[name] = state.users
            self._restored.add(name)
        self._extension.future_refcount.update(states.held)

    def owners(self) -> Iterator[str]:
        """Names under which the queues that were brought back hold keys, as Dask makes them."""
        for name in {*self._extension.queues, *(name for name, _ in self._extension.future_refcount)}:
            yield f"queue-{name}"

    def attach(self, ledger: Ledger) -> None:
        """Record changes from now on."""
        self.ledger = ledger
        ledger.forgetting.append(self._once.forget)
        for name, queue in self._extension.queues.items():
            self._tell_of(name, queue)
            if name not in self._restored:
                # It was there before there was a journal.
                self._record_users(name)
                for item in queue._queue:
                    self._record("put", name, item)
        handlers = self.scheduler.handlers
        handlers["queue_create"] = ledger.durable_call(self._create(handlers["queue_create"]))
        handlers["queue_put"] = ledger.durable_call(self._counted(handlers["queue_put"]))
        handlers["queue_get"] = ledger.durable_call(self._counted(handlers["queue_get"], collects=True))
        stream = self.scheduler.stream_handlers
        stream["queue_release"] = self._release(stream["queue_release"])
        stream["queue-future-release"] = self._received(stream["queue-future-release"])

    def _tell_of(self, name: Key, queue: Any) -> None:
        # In place: someone may be waiting at it.
        queue.__class__ = _ToldQueue
        queue.tell = lambda change, item: self._changed(change, name, queue, item)

    def _changed(self, change: str, name: Key, queue: Any, item: Any) -> None:
        if self._extension.queues.get(name) is not queue:
            return  # it was closed, and whoever waits at it is not told
        self._record(change, name, item)
        if change == "taken":
            self._once.note(item)
        else:
            self._once.note()

    def _record(self, change: str, name: Key, item: Any) -> None:
        put = change == "put"
        keys = (item["value"],) if put and item["type"] == "Future" else ()
        items = (dumps(item),) if put else ()
        self.ledger.record(records.QueueChanged(name=name, change=change, items=items, keys=keys, **fields_of_turn()))

    def _record_users(self, name: Key, **fields: Any) -> None:
        queue = self._extension.queues.get(name)
        record = records.QueueChanged(
            name=name,
            change="users",
            count=self._extension.client_refcount.get(name, 0),
            maxsize=queue.maxsize if queue is not None else 0,
            **fields,
        )
        self.ledger.record(record, client=record.client, seq=record.seq)

    # Calls

    def _create(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        async def create(name: Any = None, client: Any = None, maxsize: int = 0, request: Any = None) -> None:
            def run() -> None:
                stock(name=name, client=client, maxsize=maxsize)
                queue = self._extension.queues[name]
                if not isinstance(queue, _ToldQueue):
                    self._tell_of(name, queue)
                self._record_users(name, **fields_of_turn())
                self._once.note()

            await self._once.run(request, run)

        return create

    def _counted(self, stock: Callable[..., Any], *, collects: bool = False) -> Callable[..., Any]:
        @wraps(stock)
        async def counted(*args: Any, request: Any = None, **kwargs: Any) -> Any:
            return await self._once.run(request, lambda: stock(*args, **kwargs), collects=collects)

        return counted

    # Stream messages of clients

    def _release(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def release(name: Any = None, client: str = "", seq: int = 0, origin: str = "") -> None:
            if self.ledger.seen(client, seq):
                self.ledger.ack_again(client, seq)
                return
            stock(name=name, client=client)
            self._record_users(name, client=client, seq=seq)

        return release

    def _received(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def future_release(name: Any = None, key: Any = None, client: str = "", seq: int = 0, origin: str = "") -> None:
            if self.ledger.seen(client, seq):
                self.ledger.ack_again(client, seq)
                return
            # What the queue lets go of by it is recorded first: it may be let go twice, but not never.
            stock(name=name, key=key, client=client)
            self.ledger.record(
                records.QueueChanged(name=name, change="received", keys=(key,), client=client, seq=seq),
                client=client,
                seq=seq,
            )

        return future_release
