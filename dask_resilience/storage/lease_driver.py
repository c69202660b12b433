"""Doing what the lease machine decides: reading and swapping the record."""

from __future__ import annotations

import threading
from collections import deque

from dask_resilience.clock import Clock
from dask_resilience.errors import StoreError
from dask_resilience.failover.lease import (
    Action,
    AllowActing,
    DetailsChanged,
    Event,
    FenceSeen,
    ForbidActing,
    LeaseMachine,
    LeaseSeen,
    LeaseState,
    LeaseWritten,
    ReadLease,
    ReleaseAsked,
    StopForGood,
    TimePassed,
    WriteLease,
    WriteRefused,
    WriteUncertain,
)
from dask_resilience.failover.lease_record import LeaseRecord, provably_dead
from dask_resilience.storage import names
from dask_resilience.storage.identity import look_up
from dask_resilience.storage.object_store import ConditionalStore, Outcome
from dask_resilience.storage.trouble import store_error

#: How many reads and writes one tick may cause; a rival can force no more than that.
_STEPS = 8

#: Refused by every store, so that the next write reads the record again first.
_UNMATCHED = "unmatched"


class LeaseDriver:
    """One process's side of the lease, with its hands.

    Any thread may call any method. `valid` takes no lock and does no I/O.

    Parameters
    ----------
    store
        Where the record is.
    machine
        What decides; nobody else steps it from now on.
    clock
        Its boot clock is what the machine counts by.
    """

    def __init__(self, store: ConditionalStore, *, machine: LeaseMachine, clock: Clock) -> None:
        self._store = store
        self._machine = machine
        self._clock = clock
        self._lock = threading.RLock()
        self._until = float("-inf")
        self._token: str | None = None
        self._look_at = float("-inf")
        #: What one tick had no room for.
        self._waiting: deque[Action] = deque()
        #: The record that was read last.
        self.seen: LeaseRecord | None = None
        #: Why the last reading or writing failed; None when it did not.
        self.trouble: StoreError | None = None
        #: The epoch for which this process had to stop, once it had.
        self.stopped_for: int | None = None

    @property
    def state(self) -> LeaseState:
        """Where this process stands."""
        return self._machine.state

    def valid(self) -> bool:
        """Tell whether this process may act right now."""
        return self._clock.boot_seconds() < self._until

    def pause_seconds(self) -> float:
        """How long to wait before the next `tick`."""
        return self._machine.terms.look_seconds

    def tick(self) -> None:
        """Do what is due: renew, or look at the record."""
        with self._lock:
            now = self._clock.boot_seconds()
            if self._waiting:
                self._drain()
            elif self.state is not LeaseState.OBSERVING:
                self._feed(TimePassed(now_seconds=now))
            elif now >= self._look_at:
                self._waiting.extend(self._read())
                self._drain()

    def tell(self, *, epoch: int, address: str) -> None:
        """Put other details into the record, at once when this process holds it."""
        with self._lock:
            self._feed(DetailsChanged(now_seconds=self._clock.boot_seconds(), epoch=epoch, address=address))

    def fence_seen(self, epoch: int) -> None:
        """Stop for good: a newer epoch exists."""
        with self._lock:
            self._feed(FenceSeen(now_seconds=self._clock.boot_seconds(), epoch=epoch))

    def release(self) -> None:
        """Give the lease back, so that nobody waits for it to run out."""
        with self._lock:
            self._feed(ReleaseAsked(now_seconds=self._clock.boot_seconds()))

    def _feed(self, event: Event) -> None:
        self._waiting.extend(self._machine.step(event))
        self._drain()

    def _drain(self) -> None:
        for _ in range(_STEPS):
            if not self._waiting:
                return
            self._waiting.extend(self._do(self._waiting.popleft()))

    def _do(self, action: Action) -> list[Action]:
        match action:
            case AllowActing(until_seconds=until):
                self._until = until
            case ForbidActing():
                self._until = float("-inf")
            case StopForGood(epoch=epoch):
                self._until = float("-inf")
                self.stopped_for = epoch
            case ReadLease(after_seconds=after):
                self._look_at = self._clock.boot_seconds() + after
                if after <= 0:
                    return self._read()
            case WriteLease(record=record):
                return self._write(record)
        return []

    def _read(self) -> list[Action]:
        try:
            stored = self._store.get(names.LEASE)
        except StoreError as error:
            # Nothing was seen, so nothing is told; the next tick looks again.
            self.trouble = error
            return []
        self.trouble = None
        record = None if stored is None else self._decode(stored.data)
        self._token = None if stored is None else stored.token
        self.seen = record
        holder = None if record is None else record.holder
        dead = holder is not None and provably_dead(holder, look_up(holder.pid))
        return self._machine.step(LeaseSeen(now_seconds=self._clock.boot_seconds(), record=record, holder_dead=dead))

    def _decode(self, data: bytes) -> LeaseRecord:
        try:
            return LeaseRecord.decode(data)
        except ValueError as error:
            problem = (
                f"the object {names.LEASE!r} cannot be read: {error}. End all schedulers of the cluster and delete it"
            )
            raise StoreError(self._store.url, problem) from error

    def _write(self, record: LeaseRecord) -> list[Action]:
        data = record.encode()
        try:
            if self._token is None:
                outcome = self._store.create(names.LEASE, data)
            else:
                outcome = self._store.compare_and_swap(names.LEASE, data, self._token)
        except StoreError as error:
            self.trouble, outcome = error, Outcome.AMBIGUOUS
        else:
            self.trouble = None
        if outcome is Outcome.OK:
            self._token, self.seen = self._token_of(data), record
            return self._machine.step(LeaseWritten(now_seconds=self._clock.boot_seconds()))
        if outcome in (Outcome.EXISTS, Outcome.CONFLICT):
            return self._machine.step(WriteRefused(now_seconds=self._clock.boot_seconds()))
        if self.trouble is None:
            self.trouble = store_error(self._store.url, f"written ({names.LEASE})", outcome)
        return self._machine.step(WriteUncertain(now_seconds=self._clock.boot_seconds()))

    def _token_of(self, data: bytes) -> str:
        """Token of what was just written. If another's record is there already, one that no swap accepts."""
        try:
            stored = self._store.get(names.LEASE)
        except StoreError:
            return _UNMATCHED
        return stored.token if stored is not None and stored.data == data else _UNMATCHED
