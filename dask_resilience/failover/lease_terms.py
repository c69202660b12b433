"""The durations of a lease."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseTerms:
    """The durations of a lease, and how they relate.

    Parameters
    ----------
    ttl_seconds
        How long a holder may act after it sent a renewal.
    drift
        Largest relative difference in speed between two clocks; quartz is below 0.0002, virtual machines are worse.
    """

    ttl_seconds: float
    drift: float = 0.02

    #: A reply later than this after the holder's last look at its clock is the operating system's fault.
    MARGIN_SHARE: ClassVar[float] = 0.1

    def __post_init__(self) -> None:
        if not self.ttl_seconds > 0 or not 0 <= self.drift < 1:
            raise ValueError(f"a lease needs a positive TTL and a drift below one, not {self}")

    @property
    def margin_seconds(self) -> float:
        """Time between the last moment of acting and the TTL, at most a second."""
        return min(1.0, self.ttl_seconds * self.MARGIN_SHARE)

    @property
    def act_seconds(self) -> float:
        """How long after sending a renewal its holder may act: ``TTL - margin``."""
        return self.ttl_seconds - self.margin_seconds

    @property
    def renew_seconds(self) -> float:
        """Time between renewals: ``TTL / 3``, so that two may fail."""
        return self.ttl_seconds / 3

    @property
    def look_seconds(self) -> float:
        """Time between two looks of a standby; what it adds to the detection of a dead local holder."""
        return min(0.5, self.ttl_seconds / 10)

    @property
    def wait_seconds(self) -> float:
        """How long a standby sees an unchanged record before it takes over: ``TTL x (1 + drift) + margin``."""
        return self.ttl_seconds * (1 + self.drift) + self.margin_seconds
