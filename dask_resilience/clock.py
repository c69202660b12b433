"""The clocks of this process, behind an interface that tests replace."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """What timed code may ask about time."""

    def boot_seconds(self) -> float:
        """Seconds since the machine started, counting the time it was suspended."""

    def wall_seconds(self) -> float:
        """Seconds since 1970, for people to read; never for deciding."""


class SystemClock:
    """The clocks of the operating system.

    Leases count by ``CLOCK_BOOTTIME``: it never jumps as the wall clock does, and unlike ``CLOCK_MONOTONIC`` it goes
    on while the machine sleeps, so a laptop that wakes up does not believe in a lease that ran out hours ago.

    Examples
    --------
    >>> clock = SystemClock()
    >>> clock.boot_seconds() <= clock.boot_seconds()
    True
    """

    def boot_seconds(self) -> float:
        """Seconds since the machine started, counting the time it was suspended."""
        return time.clock_gettime(_BOOT)

    def wall_seconds(self) -> float:
        """Seconds since 1970, for people to read; never for deciding."""
        return time.time()


#: Darwin has no CLOCK_BOOTTIME; its CLOCK_MONOTONIC counts sleep already.
_BOOT: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
