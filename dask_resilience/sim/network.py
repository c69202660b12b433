"""Links between processes: ordered, late, sometimes repeating themselves, and broken when a message is lost.

Dask's links are TCP streams. On one link messages keep their order and none is lost between two that arrive; a loss
shows as the end of the link, which each side notices in its own time, or not before a time-out when the network
between them is cut. What a side sent shortly before the end may have arrived or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from dask_resilience.sim.loop import Loop, Process

#: A message: its operation under "op", and what that needs.
Message: TypeAlias = Mapping[str, Any]


class Endpoint(Protocol):
    """What owns one end of a link."""

    process: Process

    def accept(self, link: Link) -> bool:
        """Take an incoming link, or refuse it."""

    def receive(self, link: Link, message: Message) -> None:
        """Take a message."""

    def link_broken(self, link: Link) -> None:
        """Notice that a link ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkTerms:
    """How bad the network is.

    Parameters
    ----------
    latency_seconds
        Each message takes up to this long.
    loss
        Probability that a message is lost, and its link with it.
    repetition
        Probability that a message arrives twice.
    timeout_seconds
        How long a side takes to notice that the other is silent.
    """

    latency_seconds: float = 0.02
    loss: float = 0.0
    repetition: float = 0.0
    timeout_seconds: float = 3.0


@dataclass(eq=False, slots=True)
class Link:
    """One connection. Either end sends; `peer` tells the other."""

    network: Network
    ends: tuple[Endpoint, Endpoint]
    broken: bool = False
    #: When the last message to each end arrives.
    _arrival: list[float] = field(default_factory=lambda: [0.0, 0.0])
    _noticed: list[bool] = field(default_factory=lambda: [False, False])

    def peer(self, end: Endpoint) -> Endpoint:
        """Tell who is at the other end."""
        return self.ends[1 - self._index(end)]

    def usable_by(self, end: Endpoint) -> bool:
        """Tell whether this end believes that the link works."""
        return not self._noticed[self._index(end)]

    def send(self, sender: Endpoint, message: Message, *, repeatable: bool = False) -> None:
        """Send to the other end. On a broken link messages vanish."""
        self.network.carry(self, 1 - self._index(sender), message, repeatable=repeatable)

    def close(self) -> None:
        """End the link. What is under way is lost."""
        self.network.break_link(self)

    def notice(self, index: int) -> None:
        """Let one end know, once, that the link ended."""
        if not self._noticed[index]:
            self._noticed[index] = True
            self.ends[index].link_broken(self)

    def delay(self, index: int, seconds: float) -> float:
        """Tell when something sent to an end now arrives, after all that was sent before."""
        now = self.network.loop.now_seconds
        self._arrival[index] = max(self._arrival[index], now + seconds)
        return self._arrival[index] - now

    def _index(self, end: Endpoint) -> int:
        return 0 if self.ends[0] is end else 1


class Network:
    """All links, and what separates hosts.

    Parameters
    ----------
    loop
        Where time passes.
    terms
        How bad it is.
    """

    def __init__(self, loop: Loop, terms: NetworkTerms) -> None:
        self.loop = loop
        self.terms = terms
        self._cut: set[frozenset[str]] = set()
        self._listening: dict[str, Endpoint] = {}
        self._links: list[Link] = []

    def cut(self, one: str, other: str) -> None:
        """Separate two hosts."""
        self._cut.add(frozenset((one, other)))

    def join(self, one: str, other: str) -> None:
        """End one separation."""
        self._cut.discard(frozenset((one, other)))

    def heal(self) -> None:
        """End every separation."""
        self._cut.clear()

    def reaches(self, one: Process | str, other: Process | str) -> bool:
        """Tell whether messages pass between two hosts."""
        hosts = [end.host if isinstance(end, Process) else end for end in (one, other)]
        return hosts[0] == hosts[1] or frozenset(hosts) not in self._cut

    def listen(self, endpoint: Endpoint) -> None:
        """Make an endpoint reachable under the name of its process."""
        self._listening[endpoint.process.name] = endpoint
        endpoint.process.on_death.append(lambda: self._died(endpoint))

    def refuses(self, caller: Process, address: str) -> bool:
        """Tell whether a connection to an address is refused, which proves that its process is gone."""
        there = self._listening.get(address)
        return there is not None and not there.process.alive and self.reaches(caller, there.process)

    def connect(self, caller: Endpoint, address: str) -> Link | None:
        """Ask for a link. It is there at once; whether anybody is at its other end shows later."""
        there = self._listening.get(address)
        if there is None:
            return None
        link = Link(self, (caller, there))
        self._links.append(link)
        if not self.reaches(caller.process, there.process):
            caller.process.later(self.terms.timeout_seconds, link.notice, 0)
            link.broken = True
        else:
            there.process.later(link.delay(1, self._latency()), self._accept, link)
            if not there.process.alive:
                self.break_link(link)
        return link

    def carry(self, link: Link, to: int, message: Message, *, repeatable: bool) -> None:
        """Take a message from one end of a link to the other, or lose it with the link."""
        if link.broken:
            return
        sender, receiver = link.ends[1 - to], link.ends[to]
        if not self.reaches(sender.process, receiver.process) or self.loop.chance(self.terms.loss):
            self.break_link(link)
            return
        for _ in range(2 if repeatable and self.loop.chance(self.terms.repetition) else 1):
            receiver.process.later(link.delay(to, self._latency()), self._deliver, link, receiver, message)

    def break_link(self, link: Link) -> None:
        """End a link: each side notices soon, or after the time-out when the hosts are separated."""
        if link.broken:
            return
        link.broken = True
        together = self.reaches(link.ends[0].process, link.ends[1].process)
        for index, end in enumerate(link.ends):
            seconds = self._latency() if together else self.terms.timeout_seconds * self.loop.between(0.5, 1.0)
            end.process.later(link.delay(index, seconds), link.notice, index)
        self._links.remove(link)

    def _accept(self, link: Link) -> None:
        if not link.broken and not link.ends[1].accept(link):
            self.break_link(link)

    @staticmethod
    def _deliver(link: Link, receiver: Endpoint, message: Message) -> None:
        # A link that breaks loses what is under way.
        if not link.broken:
            receiver.receive(link, message)

    def _died(self, endpoint: Endpoint) -> None:
        for link in [link for link in self._links if endpoint in link.ends]:
            self.break_link(link)

    def _latency(self) -> float:
        return self.terms.latency_seconds * self.loop.rng.random()
