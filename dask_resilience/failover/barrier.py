"""When a new scheduler opens: once it has heard everyone that it can expect to hear.

Theory of operation
===================
A scheduler that serves before its workers are back computes again what they hold. One that waits for a dead worker
waits for nothing. So it waits for exactly those members that the journal expects and that are neither back nor
provably gone, and for those no longer than a grace period: one for workers, whose absence costs work, and one for
clients, whose absence costs nothing but the chance to hear first what they still want.

::

    LISTING --(first TimePassed)--> GATHERING --(nobody left to wait for, or grace over)--> OPEN

- LISTING: the journal is being read. It names whom to expect. A member that knocks early is noted.
- GATHERING: members can reach this scheduler. Both graces count from the first `TimePassed`.
- OPEN: decided, once and for ever. Whoever comes now is late, and is no concern of the barrier.

A side (workers, clients) is *done* when nobody is left to wait for on it, or when its grace is over. The barrier opens
as soon as both are. That holds when every worker is provably gone, too: nothing is left to be adopted, so nothing is
gained by waiting, and what has to run queues until a worker comes.

A proof can be refuted: a member that was found gone and comes back has come back. Equally, one that came back and is
then found gone is gone, and is not waited for again. One whose link broke is neither back nor gone: it is waited for
again if it was expected.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final, TypeAlias

#: How many events the story of a barrier keeps.
STORY_LENGTH: Final = 32


class MemberKind(enum.Enum):
    """Whose absence costs what."""

    WORKER = "worker"
    CLIENT = "client"


class BarrierPhase(enum.Enum):
    """How far a scheduler is on its way to serve."""

    LISTING = "listing"
    GATHERING = "gathering"
    OPEN = "open"


@dataclass(frozen=True, slots=True, kw_only=True)
class BarrierTerms:
    """How long to wait for members that may still come.

    Parameters
    ----------
    worker_grace_seconds
        For expected workers. Longer than the time that a worker takes to find the new scheduler.
    client_grace_seconds
        For expected clients.
    """

    worker_grace_seconds: float
    client_grace_seconds: float

    def __post_init__(self) -> None:
        if not (self.worker_grace_seconds >= 0 and self.client_grace_seconds >= 0):
            raise ValueError(f"a grace period must not be negative: {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberExpected:
    """The journal says that this member was there and had not left. `member` is an address or a client id."""

    kind: MemberKind
    member: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberReturned:
    """A member is back, expected or not."""

    kind: MemberKind
    member: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberDropped:
    """The link to a member that was back broke, and nothing is known of its process."""

    kind: MemberKind
    member: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberProvenGone:
    """A member's process no longer exists: connection refused, or its nanny or name came with another worker."""

    kind: MemberKind
    member: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TimePassed:
    """A look at the monotonic clock. The first one says that the journal is read and members can come."""

    now_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepWaiting:
    """Stay closed.

    Parameters
    ----------
    workers, clients
        Whom for, sorted.
    until_seconds
        When the barrier opens at the latest. `TimePassed` is due then.
    """

    workers: tuple[str, ...]
    clients: tuple[str, ...]
    until_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """Plan, enact and serve.

    Parameters
    ----------
    given_up_workers, given_up_clients
        Expected, not back and not provably gone, sorted: they may come late.
    """

    given_up_workers: tuple[str, ...]
    given_up_clients: tuple[str, ...]


Event: TypeAlias = MemberExpected | MemberReturned | MemberDropped | MemberProvenGone | TimePassed
Action: TypeAlias = KeepWaiting | Open


class InvalidBarrierTransition(RuntimeError):
    """An event came in a phase that does not expect it: a defect of the caller.

    Parameters
    ----------
    phase, event
        What met.
    story
        The events before, oldest first.
    """

    def __init__(self, phase: BarrierPhase, event: Event, story: Sequence[str]) -> None:
        told = "\n".join(f"  {line}" for line in story)
        super().__init__(f"the barrier is {phase.value} and does not expect {event}; its story:\n{told}")
        self.phase = phase
        self.event = event
        self.story = tuple(story)


@dataclass(slots=True, kw_only=True)
class _Side:
    """Members of one kind."""

    grace_seconds: float
    expected: set[str] = field(default_factory=set)
    returned: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)

    def awaited(self) -> tuple[str, ...]:
        return tuple(sorted(self.expected - self.returned - self.gone))


class Barrier:
    """Decides when a scheduler that took over opens.

    Parameters
    ----------
    terms
        The graces.

    Examples
    --------
    >>> barrier = Barrier(BarrierTerms(worker_grace_seconds=30, client_grace_seconds=10))
    >>> barrier.step(MemberExpected(kind=MemberKind.WORKER, member="tcp://a:1"))
    []
    >>> barrier.step(TimePassed(now_seconds=100))
    [KeepWaiting(workers=('tcp://a:1',), clients=(), until_seconds=130)]
    >>> barrier.step(MemberReturned(kind=MemberKind.WORKER, member="tcp://a:1"))
    [Open(given_up_workers=(), given_up_clients=())]
    """

    __slots__ = ("_now", "_sides", "_started", "phase", "story")

    def __init__(self, terms: BarrierTerms) -> None:
        self.phase = BarrierPhase.LISTING
        self.story: deque[str] = deque(maxlen=STORY_LENGTH)
        self._sides = {
            MemberKind.WORKER: _Side(grace_seconds=terms.worker_grace_seconds),
            MemberKind.CLIENT: _Side(grace_seconds=terms.client_grace_seconds),
        }
        self._started = 0.0
        self._now = 0.0

    def step(self, event: Event) -> list[Action]:
        """Take one event and tell what to do.

        Parameters
        ----------
        event
            What happened.

        Returns
        -------
        list of Action
            Empty while the journal is read; afterwards exactly one. Nothing may be stepped after `Open`.

        Raises
        ------
        InvalidBarrierTransition
            If the event is not expected in the present phase.
        """
        take = self._TABLE.get((self.phase, type(event)))
        if take is None:
            raise InvalidBarrierTransition(self.phase, event, self.story)
        before = self.phase
        take(self, event)
        actions = [] if self.phase is BarrierPhase.LISTING else [self._decide()]
        self.story.append(f"{before.value} -> {self.phase.value}: {event} => {actions}")
        return actions

    def _expect(self, event: MemberExpected) -> None:
        self._sides[event.kind].expected.add(event.member)

    def _welcome(self, event: MemberReturned) -> None:
        side = self._sides[event.kind]
        side.returned.add(event.member)
        side.gone.discard(event.member)

    def _miss(self, event: MemberDropped) -> None:
        self._sides[event.kind].returned.discard(event.member)

    def _write_off(self, event: MemberProvenGone) -> None:
        self._sides[event.kind].gone.add(event.member)

    def _begin(self, event: TimePassed) -> None:
        self.phase = BarrierPhase.GATHERING
        self._started = self._now = event.now_seconds

    def _look(self, event: TimePassed) -> None:
        self._now = event.now_seconds

    def _decide(self) -> Action:
        workers, clients = self._sides[MemberKind.WORKER], self._sides[MemberKind.CLIENT]
        ends = [self._started + side.grace_seconds for side in (workers, clients) if side.awaited()]
        latest = max(ends, default=self._now)
        if latest > self._now:
            return KeepWaiting(workers=workers.awaited(), clients=clients.awaited(), until_seconds=latest)
        self.phase = BarrierPhase.OPEN
        return Open(given_up_workers=workers.awaited(), given_up_clients=clients.awaited())

    #: Placed after the methods that it names.
    _TABLE: ClassVar[Mapping[tuple[BarrierPhase, type], Callable[..., None]]] = {
        (BarrierPhase.LISTING, MemberExpected): _expect,
        (BarrierPhase.LISTING, MemberReturned): _welcome,
        (BarrierPhase.LISTING, MemberDropped): _miss,
        (BarrierPhase.LISTING, MemberProvenGone): _write_off,
        (BarrierPhase.LISTING, TimePassed): _begin,
        (BarrierPhase.GATHERING, MemberReturned): _welcome,
        (BarrierPhase.GATHERING, MemberDropped): _miss,
        (BarrierPhase.GATHERING, MemberProvenGone): _write_off,
        (BarrierPhase.GATHERING, TimePassed): _look,
    }
