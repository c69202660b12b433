"""Blocking code in virtual time: real threads of which exactly one runs at any moment.

The code under simulation (writer, lease keeper, takeover) blocks: it waits for events and for the store. Each of its
threads is a *strand* here. A strand runs until it blocks, then hands the baton back to the loop, which gives it back
when its virtual time has come. Nothing runs side by side, so the order is the loop's alone and a seed repeats it.

`VirtualThreading` and `VirtualTime` stand in for the modules `threading` and `time`, as far as that code uses them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

from dask_resilience.sim.loop import Loop, Process

_STACK_BYTES: Final = 512 * 1024


class StrandKilled(BaseException):  # not an Exception, as no `except Exception` survives a SIGKILL
    """The process of this strand died. Unwinds the strand and is never seen outside of it."""


class Strand:
    """One blocking call in virtual time.

    Parameters
    ----------
    process
        Whose it is.
    target
        What to run.
    """

    _current: Strand | None = None

    def __init__(self, process: Process, target: Callable[[], None]) -> None:
        self.process = process
        self.done = False
        self._target = target
        self._error: BaseException | None = None
        self._killed = False
        self._turn = 0
        # Locks as binary semaphores: each is released by one side and acquired by the other.
        self._go, self._back = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._back.acquire()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.on_done: list[Callable[[], None]] = []

    @classmethod
    def current(cls) -> Strand | None:
        """Tell which strand has the baton; None for the loop itself."""
        return cls._current

    def start(self) -> None:
        """Begin, at the present moment, behind what is due already."""
        self.process.on_death.append(self.kill)
        previous = threading.stack_size(_STACK_BYTES)
        self._thread.start()
        threading.stack_size(previous)
        self.process.later(0.0, self._give, self._turn)

    def kill(self) -> None:
        """Unwind it where it is blocked."""
        if not self.done:
            self._killed = True
            self._give(self._turn)
            self._thread.join()

    def block(self, seconds: float | None) -> None:
        """Hand the baton back until `wake`, or for a time. Called by the strand itself."""
        if self._killed:
            raise StrandKilled  # a `finally` on the way out wants to do more
        self._turn += 1
        if seconds is not None:
            self.process.later(seconds, self._give, self._turn)
        self._back.release()
        self._go.acquire()
        if self._killed:
            raise StrandKilled

    def wake(self) -> None:
        """Let it go on, at the present moment, if it is still blocked where it is now."""
        self.process.later(0.0, self._give, self._turn)

    def _give(self, turn: int) -> None:
        if self.done or turn != self._turn:
            return  # it was woken by something else meanwhile
        Strand._current = self
        self._go.release()
        self._back.acquire()
        Strand._current = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._killed:
                self._target()
        except StrandKilled:
            pass
        except BaseException as error:  # noqa: BLE001 -- handed to the loop, which raises it
            self._error = error
        self.done = True
        if not self._killed:
            for act in self.on_done:
                self.process.later(0.0, act)
        self._back.release()


def pause(seconds: float) -> None:
    """Let virtual time pass in a strand. In the loop itself nothing can wait, so nothing does."""
    strand = Strand.current()
    if strand is not None:
        strand.block(seconds)


def die_if_killed() -> None:
    """End the present strand if its process died by its own doing, as at a failpoint."""
    strand = Strand.current()
    if strand is not None and not strand.process.alive:
        strand._killed = True  # noqa: SLF001 -- its own class's business, told by a function beside it
        raise StrandKilled


class VirtualEvent:
    """`threading.Event` in virtual time."""

    def __init__(self) -> None:
        self._set = False
        self._waiting: list[Strand] = []

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        waiting, self._waiting = self._waiting, []
        for strand in waiting:
            strand.wake()

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        strand = Strand.current()
        assert strand is not None, "only a strand can wait"
        if not self._set:
            self._waiting.append(strand)
            strand.block(timeout)
            if strand in self._waiting:
                self._waiting.remove(strand)
        return self._set


class VirtualRLock:
    """`threading.RLock` in virtual time."""

    def __init__(self) -> None:
        self._owner: Strand | None = None
        self._depth = 0
        self._waiting: list[Strand] = []

    def __enter__(self) -> bool:
        strand = Strand.current()
        while self._depth and self._owner is not strand:
            assert strand is not None, "the loop itself cannot wait for a lock"
            self._waiting.append(strand)
            strand.block(None)
        self._owner = strand
        self._depth += 1
        return True

    def __exit__(self, *exc_info: object) -> None:
        self._depth -= 1
        if not self._depth and self._waiting:
            self._waiting.pop(0).wake()


class VirtualThreading:
    """Stands in for the module `threading` in the code under simulation.

    Parameters
    ----------
    owner
        Tells whose thread is being started.
    """

    Event = VirtualEvent
    RLock = VirtualRLock

    def __init__(self, owner: Callable[[], Process]) -> None:
        self._owner = owner

    def Thread(self, *, target: Callable[[], None], name: str = "", daemon: bool = True) -> VirtualThread:  # noqa: ARG002, N802 -- the signature of `threading.Thread`
        return VirtualThread(self._owner(), target)

    @staticmethod
    def current_thread() -> Any:
        return Strand.current()


class VirtualThread:
    """`threading.Thread` in virtual time; see `VirtualThreading`."""

    def __init__(self, process: Process, target: Callable[[], None]) -> None:
        self._strand = Strand(process, target)
        self._finished = VirtualEvent()
        self._strand.on_done.append(self._finished.set)

    def __eq__(self, other: object) -> bool:
        return other in (self._strand, id(self))

    def __hash__(self) -> int:
        return hash(self._strand)

    def start(self) -> None:
        self._strand.start()

    def is_alive(self) -> bool:
        return not self._strand.done

    def join(self, timeout: float | None = None) -> None:
        self._finished.wait(timeout)


class VirtualTime:
    """Stands in for the module `time`, and for the clock of leases.

    Parameters
    ----------
    loop
        Whose time it tells.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def monotonic(self) -> float:
        return self._loop.now_seconds

    def boot_seconds(self) -> float:
        return self._loop.now_seconds

    def wall_seconds(self) -> float:
        return self._loop.now_seconds

    @staticmethod
    def sleep(seconds: float) -> None:
        pause(seconds)
