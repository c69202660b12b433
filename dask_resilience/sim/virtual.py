"""Stand-ins for `threading` and `time`, as far as the code under simulation uses them, in virtual time."""
# ruff: noqa: D102 -- each method is the one of the standard library that it stands in for

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dask_resilience.sim.loop import Loop, Process
from dask_resilience.sim.strand import Strand, pause


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
