"""What the queues hold, by the journal.

A queue is first in, first out, so its journal says what was put in and how often something was taken, and not what:
that follows. What was taken is kept with the call that took it until that call is settled (`calls`).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from dask_resilience.errors import ChangeTooNew
from dask_resilience.journal import records
from dask_resilience.journal.calls import Calls, call_of
from dask_resilience.types import Key


@dataclass(slots=True)
class QueueState:
    """One queue.

    Parameters
    ----------
    maxsize
        How many items it takes; 0 for any number.
    users
        How many have opened it and not closed it.
    items
        What is in it, oldest first: the pickled item, and the key of the future that it stands for, if it is one.
    """

    maxsize: int = 0
    users: int = 0
    items: deque[tuple[bytes, tuple[Key, ...]]] = field(default_factory=deque)


class QueueStates:
    """All queues, by the records so far.

    Parameters
    ----------
    calls
        Takes what was handed to whom.

    Attributes
    ----------
    queues : dict
        Name to `QueueState`.
    held : Counter
        How often each future, by the names of queue and key, was put in without anyone saying that it was received.
    """

    def __init__(self, calls: Calls[bytes]) -> None:
        self._calls = calls
        self.queues: dict[Key, QueueState] = {}
        self.held: Counter[tuple[Key, Key]] = Counter()

    def apply(self, record: records.QueueChanged) -> None:
        """Apply a change.

        Raises
        ------
        ChangeTooNew
            A newer release recorded a change that this one does not know.
        """
        handed: tuple[bytes, ...] = ()
        queue = self.queues.get(record.name)
        if record.change == "users":
            self._users(record)
        elif record.change == "put":
            if queue is not None:
                queue.items.extend((item, record.keys) for item in record.items)
                self.held.update((record.name, key) for key in record.keys)
        elif record.change == "taken":
            if queue is not None and queue.items:
                handed = (queue.items.popleft()[0],)
        elif record.change == "received":
            for key in record.keys:
                self._let_go(record.name, key)
        else:
            raise ChangeTooNew("QueueChanged", record.change)
        if (call := call_of(record)) is not None:
            self._calls.note(call, *handed)

    def _users(self, record: records.QueueChanged) -> None:
        if record.count > 0:
            self.queues.setdefault(record.name, QueueState(maxsize=record.maxsize)).users = record.count
            return
        gone = self.queues.pop(record.name, None)
        if gone is not None:
            for _, keys in gone.items:
                for key in keys:
                    self._let_go(record.name, key)

    def _let_go(self, name: Key, key: Key) -> None:
        self.held[name, key] -= 1
        if self.held[name, key] <= 0:
            del self.held[name, key]

    def clear(self) -> None:
        """Forget all queues."""
        self.queues.clear()
        self.held.clear()

    def as_records(self) -> Iterator[records.QueueChanged]:
        """Records that lead to the same state, apart from that of the calls."""
        out = self.held.copy()
        for name, queue in self.queues.items():
            out.subtract((name, key) for _, keys in queue.items for key in keys)
        for (name, key), count in (+out).items():
            # Handed out, and not said to be received: it went through the queue.
            users = self.queues[name].users if name in self.queues else 0
            maxsize = self.queues[name].maxsize if name in self.queues else 0
            yield records.QueueChanged(name=name, change="users", count=max(users, 1), maxsize=maxsize)
            for _ in range(count):
                yield records.QueueChanged(name=name, change="put", items=(b"",), keys=(key,))
                yield records.QueueChanged(name=name, change="taken")
            if not users:
                yield records.QueueChanged(name=name, change="users", count=0)
        for name, queue in self.queues.items():
            yield records.QueueChanged(name=name, change="users", count=queue.users, maxsize=queue.maxsize)
            for item, keys in queue.items:
                yield records.QueueChanged(name=name, change="put", items=(item,), keys=keys)
