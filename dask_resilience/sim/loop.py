"""Virtual time: a queue of events in order of time, processes that own them, and a digest of all that happened."""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import deque
from collections.abc import Callable
from typing import Any, Final

#: Lines of the trace that are kept for the report of a failure.
TRACE_LENGTH: Final = 4000
#: A run that needs more events than this hangs in virtual time.
EVENT_LIMIT: Final = 2_000_000


class Process:
    """Something that can be killed and stopped. Its events happen only while it is alive and runs.

    Parameters
    ----------
    loop
        Where its events happen.
    name
        For the trace; also its address.
    host
        Where it runs. Hosts are what a partition separates.
    """

    def __init__(self, loop: Loop, *, name: str, host: str) -> None:
        self.loop = loop
        self.name = name
        self.host = host
        self.alive = True
        self.stopped = False
        #: Called once when it dies.
        self.on_death: list[Callable[[], None]] = []
        self._held: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()

    def __repr__(self) -> str:
        return self.name

    def later(self, seconds: float, act: Callable[..., None], *args: Any) -> None:
        """Do something after a delay, if this process lives and runs then."""
        self.loop.later(seconds, act, *args, owner=self)

    def kill(self) -> None:
        """Die as by SIGKILL: nothing of this process happens any more."""
        if not self.alive:
            return
        self.loop.note("killed", self)
        self.alive = False
        self._held.clear()
        for act in self.on_death:
            self.loop.later(0.0, act)

    def stop(self, seconds: float) -> None:
        """Be stopped as by SIGSTOP, and go on after a time."""
        if self.alive and not self.stopped:
            self.loop.note("stopped", self)
            self.stopped = True
            self.loop.later(seconds, self.proceed)

    def proceed(self) -> None:
        """Go on, with what came meanwhile in its order."""
        if not self.stopped:
            return
        self.loop.note("continued", self)
        self.stopped = False
        held, self._held = self._held, deque()
        for act, args in held:
            self.later(0.0, act, *args)

    def take(self, act: Callable[..., None], args: tuple[Any, ...]) -> None:
        """Do one event, keep it for later, or drop it."""
        if not self.alive:
            return
        if self.stopped:
            self._held.append((act, args))
            return
        self.loop.acting = self
        act(*args)


class Loop:
    """Virtual time.

    Parameters
    ----------
    seed
        Decides everything that is drawn.

    Examples
    --------
    >>> loop = Loop(1)
    >>> loop.later(5.0, print, "five")
    >>> loop.later(2.0, print, "two")
    >>> loop.run(until_seconds=10.0)
    two
    five
    >>> loop.now_seconds
    10.0
    """

    def __init__(self, seed: int) -> None:
        self.now_seconds = 0.0
        self.rng = random.Random(seed)  # noqa: S311 -- a seed that repeats a run is the point
        self.events = 0
        #: Whose event happens, or happened last.
        self.acting: Process | None = None
        self.trace: deque[str] = deque(maxlen=TRACE_LENGTH)
        self._digest = hashlib.blake2b(digest_size=12)
        self._queue: list[tuple[float, int, Process | None, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def later(self, seconds: float, act: Callable[..., None], *args: Any, owner: Process | None = None) -> None:
        """Do something after a delay; events of one moment happen in the order in which they were asked for."""
        self._count += 1
        heapq.heappush(self._queue, (self.now_seconds + seconds, self._count, owner, act, args))

    def run(self, *, until_seconds: float) -> None:
        """Let time pass up to a moment."""
        while self._queue and self._queue[0][0] <= until_seconds:
            self.now_seconds, _, owner, act, args = heapq.heappop(self._queue)
            self.events += 1
            if self.events > EVENT_LIMIT:
                raise RuntimeError(f"more than {EVENT_LIMIT} events by {self.now_seconds:.3f} s: {self.trace[-1]}")
            if owner is None:
                act(*args)
            else:
                owner.take(act, args)
        self.now_seconds = until_seconds

    def note(self, *words: object) -> None:
        """Write a line of the trace."""
        line = f"{self.now_seconds:10.4f} {' '.join(map(str, words))}"
        self._digest.update(line.encode())
        self.trace.append(line)

    def digest(self) -> str:
        """Stand for everything that was noted: equal for equal runs."""
        return self._digest.hexdigest()

    def between(self, low: float, high: float) -> float:
        """Draw a number from a range."""
        return self.rng.uniform(low, high)

    def chance(self, probability: float) -> bool:
        """Draw whether something happens."""
        return self.rng.random() < probability
