"""The lease: who may try to rule the cluster.

Theory of operation
-------------------
The lease is one small record in the store, replaced by compare-and-swap only. It says who may *try*; the epoch says
who may *ack*. A wrong lease therefore costs time and never data, and everything here is about not waiting too long
and not ruling too long.

No two clocks are ever compared. Each side measures a duration on its own boot clock:

* The holder counts from a moment *before* it sent the write that the store accepted, and stops acting
  ``TTL - margin`` later. Whatever the network did, the store had the record no earlier than that moment.
* The standby counts from the moment it first *saw* a record, and may take over once its own clock measured
  ``TTL x (1 + drift) + margin`` without seeing another. It saw the record no earlier than the store had it.

So the holder has stopped at least ``2 x margin`` before the standby starts, as long as the two clocks differ in speed
by less than ``drift``. (The argument of Gray and Cheriton, "Leases", SOSP 1989, with both errors on the safe side.)
A record that names a process of this host which is provably dead needs no waiting.

::

    OBSERVING --free, expired, or its holder dead--> ACQUIRING --written--> HOLDING
    ACQUIRING --refused, or outcome unknown--> OBSERVING
    HOLDING --TTL - margin passed--> DOUBTFUL --renewed--> HOLDING
    HOLDING, DOUBTFUL --another holds, or a newer epoch--> LOST
    HOLDING, DOUBTFUL --asked to--> RELEASED

DOUBTFUL is a holder that could not renew in time, or that was stopped or suspended: it must not act, looks at the
store, and returns to HOLDING only if a compare-and-swap proves that nobody took the lease meanwhile.

Events come in, actions go out; the caller does the reading and writing and tells the outcome. While a write is under
way the only event is its outcome. A write whose outcome stays unknown (a lost reply) is settled by reading the record
back.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from dask_resilience.failover.lease_record import HolderIdentity, LeaseRecord
from dask_resilience.failover.lease_terms import LeaseTerms

#: How many events the story of a machine keeps.
STORY_LENGTH = 32


class LeaseState(enum.Enum):
    """Where one process stands towards the lease."""

    OBSERVING = "observing"
    ACQUIRING = "acquiring"
    HOLDING = "holding"
    DOUBTFUL = "doubtful"
    LOST = "lost"
    RELEASED = "released"


# Events. Each carries the boot clock of the process at which it happened.


@dataclass(frozen=True, slots=True, kw_only=True)
class TimePassed:
    """A look at the clock."""

    now_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseSeen:
    """The record was read; None when there is none. ``holder_dead``: its holder is provably dead."""

    now_seconds: float
    record: LeaseRecord | None
    holder_dead: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseWritten:
    """The store accepted the last write."""

    now_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteRefused:
    """The record changed since it was read, so the last write was not done."""

    now_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteUncertain:
    """The last write failed, and may have been done all the same."""

    now_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceSeen:
    """A newer epoch exists."""

    now_seconds: float
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DetailsChanged:
    """The holder has another epoch or address to tell."""

    now_seconds: float
    epoch: int
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseAsked:
    """The holder ends cleanly."""

    now_seconds: float


# Actions.


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLease:
    """Read the record after a delay and report `LeaseSeen`."""

    after_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteLease:
    """Swap the record that was read last for this one and report the outcome."""

    record: LeaseRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class AllowActing:
    """Acting is allowed until this moment of the boot clock."""

    until_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ForbidActing:
    """Acting is not allowed for now."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StopForGood:
    """Another process rules; ``epoch`` is what it rules or is about to create."""

    epoch: int


Event: TypeAlias = (
    TimePassed | LeaseSeen | LeaseWritten | WriteRefused | WriteUncertain | FenceSeen | DetailsChanged | ReleaseAsked
)
Action: TypeAlias = ReadLease | WriteLease | AllowActing | ForbidActing | StopForGood


class InvalidLeaseTransition(RuntimeError):
    """An event came in a state that does not expect it: a defect of the caller.

    Parameters
    ----------
    state, event
        What met.
    story
        The events before, oldest first.
    """

    def __init__(self, state: LeaseState, event: Event, story: Sequence[str]) -> None:
        told = "\n".join(f"  {line}" for line in story)
        super().__init__(f"the lease is {state.value} and does not expect {event}; its story:\n{told}")
        self.state = state
        self.event = event
        self.story = tuple(story)


class LeaseMachine:
    """One process's side of the lease.

    Parameters
    ----------
    cluster
        Identity of the cluster.
    holder
        This process.
    address
        Where it listens, or will.
    terms
        The durations.

    Examples
    --------
    >>> me = HolderIdentity(host="a", boot_id="b", pid_namespace="p", pid=1, started_ticks=1)
    >>> machine = LeaseMachine(cluster="c", holder=me, address="tcp://a:1", terms=LeaseTerms(ttl_seconds=10))
    >>> [action] = machine.step(LeaseSeen(now_seconds=0.0, record=None))
    >>> action.record.generation
    1
    >>> machine.step(LeaseWritten(now_seconds=0.1))
    [AllowActing(until_seconds=9.0)]
    >>> machine.state
    <LeaseState.HOLDING: 'holding'>
    """

    __slots__ = (
        "_cluster",
        "_held",
        "_holder",
        "_seen",
        "_since",
        "_until",
        "_wanted",
        "_written",
        "state",
        "story",
        "terms",
    )

    def __init__(self, *, cluster: str, holder: HolderIdentity, address: str, terms: LeaseTerms) -> None:
        self.state = LeaseState.OBSERVING
        self.story: deque[str] = deque(maxlen=STORY_LENGTH)
        self.terms = terms
        self._cluster = cluster
        self._holder = holder
        self._wanted = (0, address)
        #: The record that was read last, and since when it looks like that.
        self._seen: LeaseRecord | None = None
        self._since = 0.0
        #: Our write in flight and the moment before it was sent.
        self._written: tuple[LeaseRecord, float] | None = None
        #: Our last accepted record.
        self._held: LeaseRecord | None = None
        self._until = 0.0

    def step(self, event: Event) -> list[Action]:
        """Take one event and tell what to do.

        Parameters
        ----------
        event
            What happened.

        Returns
        -------
        list of Action
            To be done in order.

        Raises
        ------
        InvalidLeaseTransition
            If the event is not expected in the present state.
        """
        take = _TRANSITIONS.get((self.state, type(event)))
        if take is None:
            raise InvalidLeaseTransition(self.state, event, self.story)
        before = self.state
        actions = take(self, event)
        self.story.append(f"{before.value} -> {self.state.value}: {event} => {actions}")
        return actions

    # Transitions. Each is named after what it means, not after the event.

    def _ignore(self, _event: Event) -> list[Action]:
        return []

    def _adopt_details(self, event: DetailsChanged) -> list[Action]:
        self._wanted = (event.epoch, event.address)
        return []

    def _tell_details(self, event: DetailsChanged) -> list[Action]:
        known, self._wanted = self._wanted, (event.epoch, event.address)
        if self._wanted == known or self._written is not None:
            return []
        return self._write(self._held, event.now_seconds)

    def _judge(self, event: LeaseSeen) -> list[Action]:
        """A standby looks: take over, or go on waiting."""
        if event.record is not None and self._written is not None and event.record == self._written[0]:
            # The reply to our write was lost, the write was not.
            return self._hold(event.now_seconds)
        self._written = None
        if event.record != self._seen or event.record is None:
            self._seen, self._since = event.record, event.now_seconds
        record = event.record
        if record is None or record.holder is None or event.holder_dead or self._outwaited(record, event.now_seconds):
            self.state = LeaseState.ACQUIRING
            return self._write(record, event.now_seconds)
        return [ReadLease(after_seconds=self.terms.look_seconds)]

    def _outwaited(self, record: LeaseRecord, now_seconds: float) -> bool:
        # The holder promised by its own TTL, which may differ from the one that is configured here.
        promised = replace(self.terms, ttl_seconds=record.ttl_seconds)
        return now_seconds - self._since >= promised.wait_seconds

    def _write(self, previous: LeaseRecord | None, now_seconds: float) -> list[Action]:
        epoch, address = self._wanted
        record = LeaseRecord(
            cluster=self._cluster,
            epoch=epoch,
            generation=1 if previous is None else previous.generation + 1,
            holder=self._holder,
            address=address,
            ttl_seconds=self.terms.ttl_seconds,
        )
        # The caller sends after this step returned, hence this moment is before the sending.
        self._written = (record, now_seconds)
        return [WriteLease(record=record)]

    def _hold(self, now_seconds: float) -> list[Action]:
        """Our write is in the store: acting is allowed for a time counted from before it was sent."""
        assert self._written is not None, "a reply without a write"
        record, sent_seconds = self._written
        self._held, self._written = record, None
        self._until = sent_seconds + self.terms.act_seconds
        if now_seconds < self._until:
            self.state = LeaseState.HOLDING
            return [AllowActing(until_seconds=self._until)]
        # The reply took so long that the time is over already; only a fresh write helps.
        return self._doubt()

    def _doubt(self) -> list[Action]:
        self.state = LeaseState.DOUBTFUL
        return [ForbidActing(reason="the lease was not renewed in time"), ReadLease(after_seconds=0.0)]

    def _accepted(self, event: LeaseWritten) -> list[Action]:
        return self._hold(event.now_seconds)

    def _beaten(self, event: WriteRefused | WriteUncertain) -> list[Action]:
        """Not ours, or unknown: look again. An unknown write is kept, so that the look can recognise it."""
        self.state = LeaseState.OBSERVING
        if isinstance(event, WriteRefused):
            self._written = None
            return [ReadLease(after_seconds=0.0)]
        return [ReadLease(after_seconds=self.terms.look_seconds)]

    def _recheck(self, event: WriteRefused | WriteUncertain) -> list[Action]:
        """A renewal was not accepted: another holder, or our own earlier write whose reply was lost."""
        soon = 0.0 if isinstance(event, WriteRefused) else self.terms.look_seconds
        return [ReadLease(after_seconds=soon)]

    def _keep(self, event: TimePassed) -> list[Action]:
        if event.now_seconds >= self._until:
            return self._doubt()
        if self._written is not None:
            # No event comes while a write is under way, so this one ended without a known outcome.
            return [ReadLease(after_seconds=0.0)]
        sent_seconds = self._until - self.terms.act_seconds
        if event.now_seconds - sent_seconds >= self.terms.renew_seconds:
            return self._write(self._held, event.now_seconds)
        return []

    def _look_again(self, _event: TimePassed) -> list[Action]:
        return [ReadLease(after_seconds=0.0)]

    def _settle(self, event: LeaseSeen) -> list[Action]:
        """A holder looks at the store: still ours, or taken."""
        if event.record is not None and self._written is not None and event.record == self._written[0]:
            return self._hold(event.now_seconds)
        if event.record is not None and event.record.holder == self._holder:
            # Ours, so nobody took it: send a fresh write. It counts from now, whatever became of the one before.
            self._held = event.record
            return self._write(self._held, event.now_seconds)
        self.state = LeaseState.LOST
        self._written = None
        return [StopForGood(epoch=0 if event.record is None else event.record.epoch)]

    def _fenced(self, event: FenceSeen) -> list[Action]:
        self.state = LeaseState.LOST
        self._written = None
        return [StopForGood(epoch=event.epoch)]

    def _release(self, _event: ReleaseAsked) -> list[Action]:
        """Leave a record without a holder; the generation goes on, so it is never mistaken for an older one."""
        assert self._held is not None, "a holder without a record"
        self.state = LeaseState.RELEASED
        freed = replace(self._held, holder=None, generation=self._held.generation + 1)
        self._written = None
        return [ForbidActing(reason="the lease was released"), WriteLease(record=freed)]


_S = LeaseState
_OUTCOMES = (LeaseWritten, WriteRefused, WriteUncertain)

_TRANSITIONS: dict[tuple[LeaseState, type[Event]], Callable[[LeaseMachine, Any], list[Action]]] = {
    (_S.OBSERVING, LeaseSeen): LeaseMachine._judge,
    (_S.OBSERVING, TimePassed): LeaseMachine._ignore,
    (_S.OBSERVING, DetailsChanged): LeaseMachine._adopt_details,
    (_S.ACQUIRING, LeaseWritten): LeaseMachine._accepted,
    (_S.ACQUIRING, WriteRefused): LeaseMachine._beaten,
    (_S.ACQUIRING, WriteUncertain): LeaseMachine._beaten,
    (_S.HOLDING, TimePassed): LeaseMachine._keep,
    (_S.HOLDING, LeaseWritten): LeaseMachine._accepted,
    (_S.HOLDING, WriteRefused): LeaseMachine._recheck,
    (_S.HOLDING, WriteUncertain): LeaseMachine._recheck,
    (_S.HOLDING, LeaseSeen): LeaseMachine._settle,
    (_S.HOLDING, FenceSeen): LeaseMachine._fenced,
    (_S.HOLDING, DetailsChanged): LeaseMachine._tell_details,
    (_S.HOLDING, ReleaseAsked): LeaseMachine._release,
    (_S.DOUBTFUL, TimePassed): LeaseMachine._look_again,
    (_S.DOUBTFUL, LeaseSeen): LeaseMachine._settle,
    (_S.DOUBTFUL, LeaseWritten): LeaseMachine._accepted,
    (_S.DOUBTFUL, WriteRefused): LeaseMachine._recheck,
    (_S.DOUBTFUL, WriteUncertain): LeaseMachine._recheck,
    (_S.DOUBTFUL, FenceSeen): LeaseMachine._fenced,
    (_S.DOUBTFUL, DetailsChanged): LeaseMachine._adopt_details,
    (_S.DOUBTFUL, ReleaseAsked): LeaseMachine._release,
    # The end states take whatever was still on its way.
    **{
        (state, event): LeaseMachine._ignore
        for state in (_S.LOST, _S.RELEASED)
        for event in (TimePassed, LeaseSeen, *_OUTCOMES, FenceSeen, DetailsChanged, ReleaseAsked)
    },
}
