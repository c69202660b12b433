"""Who holds a multi-lock is recorded; who waits for one asks again.

An acquisition counts when its user is the first in line at as many locks as it needs. That is when the scheduler
answers, and all that has to survive: one that waits when its scheduler dies is made again, and waits again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import wraps
from typing import Any

from distributed.scheduler import Scheduler

from dask_resilience._distributed.scheduler_ledger import Ledger


class _Events(dict[str, asyncio.Event]):
    """User to the event that it waits for; one that does not wait is told in vain, which stock takes for an error."""

    def __missing__(self, user: str) -> asyncio.Event:
        return asyncio.Event()


class MultiLocks:
    """The multi-locks of one scheduler.

    Parameters
    ----------
    scheduler
        A live scheduler; methods and handlers of its extension are replaced.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._handlers: dict[str, Callable[..., Any]] = scheduler.handlers
        self._extension: Any = scheduler.extensions["multi_locks"]
        #: User to the locks that it was last recorded to hold.
        self._held: dict[str, tuple[str, ...]] = {}
        self._waiting: dict[str, asyncio.Task[bool]] = {}

    def restore(self, user: str, locks: tuple[str, ...]) -> None:
        """Bring back that `user` holds `locks`."""
        for lock in locks:
            self._extension.locks[lock].append(user)
        self._extension.requests[user] = set(locks)
        self._extension.requests_left[user] = 0
        self._held[user] = locks

    def attach(self, ledger: Ledger, changed: Callable[[Any, Any], None]) -> None:
        """Tell `changed` of each user that holds locks and what it holds, or None, from now on."""
        extension = self._extension
        extension.events = _Events(extension.events)
        self._changed = changed
        extension._request_locks = self._request_locks(extension._request_locks)
        extension._retain_locks = self._retain_locks(extension._retain_locks)
        handlers = self._handlers
        handlers["multi_lock_acquire"] = ledger.durable_call(self._acquire(handlers["multi_lock_acquire"]))
        handlers["multi_lock_release"] = ledger.durable_call(self._release(handlers["multi_lock_release"]))

    def close(self) -> None:
        """End all that is waiting."""
        for waiting in list(self._waiting.values()):
            waiting.cancel()

    def _note(self, user: str) -> None:
        """Record what `user` holds, if that is enough for it and news."""
        extension = self._extension
        held: tuple[str, ...] = ()
        if extension.requests_left.get(user) == 0:
            held = tuple(sorted(lock for lock in extension.requests[user] if extension.locks[lock][:1] == [user]))
        if held != self._held.get(user, ()):
            self._changed(user, held or None)
            if held:
                self._held[user] = held
            else:
                del self._held[user]

    def _request_locks(self, stock: Callable[..., bool]) -> Callable[..., bool]:
        @wraps(stock)
        def request_locks(locks: list[str], id: str, num_locks: int) -> bool:  # noqa: A002 - Dask's name
            got = stock(locks, id=id, num_locks=num_locks)
            self._note(id)
            return got

        return request_locks

    def _retain_locks(self, stock: Callable[..., None]) -> Callable[..., None]:
        @wraps(stock)
        def retain_locks(locks: Any, id: str) -> None:  # noqa: A002 - Dask's name
            locks = list(locks)
            stock(locks, id=id)
            self._note(id)
            for lock in locks:
                for user in self._extension.locks[lock][:1]:
                    self._note(user)

        return retain_locks

    def _acquire(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        async def acquire(*, id: str, again: bool = False, **kwargs: Any) -> bool:  # noqa: A002 - Dask's name
            waiting = self._waiting.get(id) if again else None
            if waiting is None:
                if again and self._extension.requests_left.get(id) == 0:
                    return True
                waiting = self._waiting[id] = asyncio.create_task(stock(id=id, **kwargs))
                waiting.add_done_callback(lambda _: self._waiting.pop(id, None))
            # If this copy of the call is cut off, the next one waits for the same.
            await asyncio.wait({waiting})
            return not waiting.cancelled() and waiting.result()

        return acquire

    def _release(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def release(*, id: str, again: bool = False) -> None:  # noqa: A002 - Dask's name
            if not again or id in self._extension.requests:
                stock(id=id)

        return release
