"""What tasks and clients share by name: variables, events, all kinds of locks, published datasets and metadata.

Dask keeps them in dictionaries of its extensions. These are replaced by ones that tell of each change, so that whatever
changes a value is recorded, and nothing has to know which calls do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from time import time
from typing import Any

from dask.utils import stringify
from distributed.protocol import Serialized
from distributed.protocol.pickle import dumps, loads
from distributed.scheduler import Scheduler

from dask_resilience._distributed.scheduler_ledger import Ledger
from dask_resilience._distributed.scheduler_multilock import MultiLocks
from dask_resilience.journal import records
from dask_resilience.types import Key

#: Calls whose answer promises that a value is there.
_PROMISES = ("variable_set", "event_set", "event_clear", "publish_put", "publish_delete", "semaphore_acquire")


class _Observed(dict[Any, Any]):
    """A dictionary that tells of each change after it happened; None stands for a value that is gone."""

    def __init__(self, values: Mapping[Any, Any], changed: Callable[[Any, Any], None]) -> None:
        super().__init__(values)
        self._changed = changed

    def __setitem__(self, name: Any, value: Any) -> None:
        super().__setitem__(name, value)
        self._changed(name, value)

    def __delitem__(self, name: Any) -> None:
        super().__delitem__(name)
        self._changed(name, None)

    def pop(self, name: Any, *default: Any) -> Any:
        there = name in self
        value = super().pop(name, *default)
        if there:
            self._changed(name, None)
        return value


class _LeasesOfOne(_Observed):
    """Lease to the time at which it was heard of last, which changes often and says nothing new."""

    def __setitem__(self, lease: Any, seen: Any) -> None:
        if lease in self:
            dict.__setitem__(self, lease, seen)
        else:
            super().__setitem__(lease, seen)


class _Leases(defaultdict[Any, Any]):
    """Semaphore to its leases, each an observed dictionary."""

    def __init__(self, changed: Callable[[Any, Any, Any], None]) -> None:
        super().__init__()
        self._changed = changed

    def __missing__(self, name: Any) -> _LeasesOfOne:
        found = self[name] = _LeasesOfOne({}, lambda lease, value: self._changed(name, lease, value))
        return found

    def __delitem__(self, name: Any) -> None:
        for lease in super().pop(name):
            self._changed(name, lease, None)


class Shared:
    """Records what is shared on one scheduler, and brings it back.

    Parameters
    ----------
    scheduler
        A live scheduler; dictionaries of its extensions and some handlers are replaced.
    """

    ledger: Ledger

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler: Any = scheduler
        extensions = self.scheduler.extensions
        self._variables = extensions["variables"]
        self._events = extensions["events"]
        self._semaphores = extensions["semaphores"]
        self._datasets = extensions["publish"]
        self.multi_locks = MultiLocks(scheduler)

    def restore(self, values: Mapping[tuple[str, Key], bytes]) -> None:
        """Bring back what the journal holds, oldest first."""
        name: Any
        for (kind, name), packed in values.items():
            value = loads(packed)
            if kind == "variable":
                self._variables.variables[name] = value
            elif kind == "event":
                self._events._events[name].set()
            elif kind == "semaphore":
                self._semaphores.max_leases[name], self._semaphores.lease_timeouts[name] = value
            elif kind == "lease":
                # Its holder has as long to be heard as if it had just taken it.
                semaphore, lease = name
                self._semaphores.leases[semaphore][lease] = time()
            elif kind == "multi-lock":
                self.multi_locks.restore(name, value)
            elif kind == "dataset":
                header, frames, keys = value
                self._datasets.datasets[name] = {"data": Serialized(header, frames), "keys": keys}

    def owners(self) -> Iterator[str]:
        """Names under which the objects that were brought back hold keys, as Dask makes them."""
        for name in self._variables.variables:
            yield f"variable-{name}"
        for name in self._datasets.datasets:
            yield f"published-{stringify(name)}"

    def attach(self, ledger: Ledger) -> None:
        """Record changes from now on."""
        self.ledger = ledger
        self._variables.variables = _Observed(self._variables.variables, self._of("variable"))
        self.multi_locks.attach(ledger, self._of("multi-lock"))
        self._datasets.datasets = _Observed(self._datasets.datasets, self._dataset_changed)
        semaphores = self._semaphores
        # A semaphore is there when its timeout is, which Dask sets last, and gone when its limit is.
        semaphores.lease_timeouts = _Observed(semaphores.lease_timeouts, self._semaphore_made)
        semaphores.max_leases = _Observed(semaphores.max_leases, self._semaphore_gone)
        held, semaphores.leases = semaphores.leases, _Leases(self._lease_changed)
        for name, leases in held.items():
            dict.update(semaphores.leases[name], leases)
        handlers = self.scheduler.handlers
        handlers["event_set"] = self._event_set(handlers["event_set"])
        handlers["event_clear"] = self._event_clear(handlers["event_clear"])
        handlers["set_metadata"] = ledger.durable_call(self._set_metadata(handlers["set_metadata"]))
        for op in _PROMISES:
            handlers[op] = ledger.durable_call(handlers[op])
        stream = self.scheduler.stream_handlers
        stream["variable-future-received-confirm"] = self._confirmed(stream["variable-future-received-confirm"])

    def _record(self, kind: str, name: Key, value: Any) -> None:
        self.ledger.record(records.SharedChanged(kind=kind, name=name, value=None if value is None else dumps(value)))

    def _of(self, kind: str) -> Callable[[Any, Any], None]:
        return lambda name, value: self._record(kind, name, value)

    def _dataset_changed(self, name: Key, value: Any) -> None:
        if value is not None:
            data = value["data"]
            value = data.header, [bytes(frame) for frame in data.frames], value["keys"]
        self._record("dataset", name, value)

    def _semaphore_made(self, name: Key, timeout: Any) -> None:
        if name in self._semaphores.max_leases:
            self._record("semaphore", name, (self._semaphores.max_leases[name], timeout))

    def _semaphore_gone(self, name: Key, limit: Any) -> None:
        if limit is None:
            self._record("semaphore", name, None)

    def _lease_changed(self, semaphore: Key, lease: str, taken: Any) -> None:
        self._record("lease", (semaphore, lease), None if taken is None else True)

    def _event_set(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def event_set(name: Any = None) -> Any:
            result = stock(name=name)
            self._record("event", self._events._normalize_name(name), True)
            return result

        return event_set

    def _event_clear(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def event_clear(name: Any = None) -> Any:
            result = stock(name=name)
            self._record("event", self._events._normalize_name(name), None)
            return result

        return event_clear

    def _set_metadata(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def set_metadata(keys: list[Key], value: Any = None) -> Any:
            result = stock(keys=keys, value=value)
            self._record("metadata", tuple(keys), (value,))  # a tuple, since None is a value too
            return result

        return set_metadata

    def _confirmed(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """A client confirms that it got a future out of a variable, from a scheduler that is gone."""

        @wraps(stock)
        async def future_received_confirm(
            name: Any = None, key: Any = None, token: Any = None, client: Any = None
        ) -> None:
            if token in self._variables.waiting[key, name]:
                await stock(name=name, key=key, token=token, client=client)
            else:
                self.scheduler.client_desires_keys(keys=[key], client=client)

        return future_received_confirm
