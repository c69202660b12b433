"""Blocking code in virtual time: real threads of which exactly one runs at any moment.

The code under simulation (writer, lease keeper, takeover) blocks: it waits for events and for the store. Each of its
threads is a *strand* here. A strand runs until it blocks, then hands the baton back to the loop, which gives it back
when its virtual time has come. Nothing runs side by side, so the order is the loop's alone and a seed repeats it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from dask_resilience.sim.loop import Process

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
