"""What happened in one run, as far as the invariants ask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from dask_resilience.journal.records import Record, SealedEnd


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """A scheduler replayed the log.

    Parameters
    ----------
    epoch
        Its epoch.
    sealed
        Where it found the older log to end.
    records
        What it read, by LSN.
    """

    epoch: int
    sealed: SealedEnd | None
    records: tuple[tuple[int, Record], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """A scheduler told a client that its message is durable.

    Parameters
    ----------
    epoch
        Of the scheduler.
    client, seq
        Whose message.
    lsn
        Where it is in the log; None when a replay had it already.
    """

    epoch: int
    client: str
    seq: int
    lsn: int | None


@dataclass(slots=True, kw_only=True)
class History:
    """All that the invariants look at.

    Parameters
    ----------
    gentle
        Whether only schedulers and the store failed in this run.
    """

    gentle: bool
    recoveries: list[Recovery] = field(default_factory=list)
    acks: list[Ack] = field(default_factory=list)
    #: How often the function of a key began to run.
    runs: Counter[str] = field(default_factory=Counter)
    #: Descriptions of what is wrong by itself, by the name of the invariant.
    breaches: list[tuple[str, str]] = field(default_factory=list)
    #: What clients wanted at the end: (client, key, state, whether the result is there).
    endings: list[tuple[str, str, str, bool]] = field(default_factory=list)
    #: (client, sequence numbers not acked at the end)
    unacked: list[tuple[str, Sequence[int]]] = field(default_factory=list)
    #: How often each kind of event occurred, to see that a simulation reaches what it is meant to reach.
    reached: Counter[str] = field(default_factory=Counter)
