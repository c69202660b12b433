"""The promises, as plain predicates over the history of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Final, TypeAlias

from dask_resilience.journal.records import GraphSubmitted, KeysWanted
from dask_resilience.sim.history import History

#: Yields a description of each breach.
Promise: TypeAlias = Callable[[History], Iterator[str]]


def acked_is_recovered(history: History) -> Iterator[str]:
    """What one epoch acked, every later epoch finds in the log, under the same LSN."""
    for recovery in history.recoveries:
        found = {
            (record.client, record.seq): lsn
            for lsn, record in recovery.records
            if isinstance(record, GraphSubmitted | KeysWanted)
        }
        for ack in history.acks:
            place = found.get((ack.client, ack.seq))
            if ack.epoch < recovery.epoch and (place is None or ack.lsn not in (None, place)):
                yield f"epoch {ack.epoch} acked {ack.client}/{ack.seq} at {ack.lsn}, epoch {recovery.epoch} has {place}"


def recovered_is_a_prefix(history: History) -> Iterator[str]:
    """The log of a later epoch begins with what each older one, that started, recovered."""
    ordered = sorted(history.recoveries, key=lambda recovery: recovery.epoch)
    for older, newer in pairwise(ordered):
        if newer.records[: len(older.records)] != older.records:
            yield f"epoch {newer.epoch} does not go on from what epoch {older.epoch} recovered"
    for recovery in ordered:
        if [lsn for lsn, _ in recovery.records] != list(range(1, len(recovery.records) + 1)):
            yield f"epoch {recovery.epoch} recovered a log with gaps"


def each_message_is_applied_once(history: History) -> Iterator[str]:
    """Each client's messages are in the log in order, each once, none left out."""
    for recovery in history.recoveries:
        seqs: dict[str, int] = {}
        for _, record in recovery.records:
            if isinstance(record, GraphSubmitted | KeysWanted):
                if record.seq != seqs.get(record.client, 0) + 1:
                    yield f"epoch {recovery.epoch}: {record.client}/{record.seq} after {seqs.get(record.client)}"
                seqs[record.client] = record.seq


def one_epoch_acks(history: History) -> Iterator[str]:
    """An epoch acks nothing behind the end at which a later one sealed it."""
    for recovery in history.recoveries:
        last = recovery.sealed[3] if recovery.sealed else 0
        for ack in history.acks:
            if ack.epoch < recovery.epoch and ack.lsn is not None and ack.lsn > last:
                yield f"epoch {ack.epoch} acked LSN {ack.lsn} behind {last}, where epoch {recovery.epoch} sealed it"


def nothing_else_went_wrong(history: History) -> Iterator[str]:
    """No plan broke an invariant of plans, and no registered worker's result was computed again."""
    for name, what in history.breaches:
        yield f"{name}: {what}"


def a_task_runs_once(history: History) -> Iterator[str]:
    """Where only schedulers and the store fail, each task runs exactly once."""
    if history.gentle:
        for key, count in history.runs.items():
            if count > 1:
                yield f"{key} ran {count} times"


def every_want_is_answered(history: History) -> Iterator[str]:
    """In the end each wanted key has a result that is there, or a failure or loss that was told."""
    for client, key, state, there in history.endings:
        if state not in ("finished", "erred", "lost") or (state == "finished" and not there):
            yield f"{client} wants {key}, which is {state}{'' if there else ' and nowhere'}"


def everything_is_acked(history: History) -> Iterator[str]:
    """In the end no message of a living client waits for its ack."""
    for client, seqs in history.unacked:
        if seqs:
            yield f"{client} still waits for the acks of {list(seqs)}"


#: Everything that is promised.
PROMISES: Final[tuple[Promise, ...]] = (
    acked_is_recovered,
    recovered_is_a_prefix,
    each_message_is_applied_once,
    one_epoch_acks,
    nothing_else_went_wrong,
    a_task_runs_once,
    every_want_is_answered,
    everything_is_acked,
)


def broken_promises(history: History) -> list[str]:
    """Describe each breach, with the promise that it breaks."""
    return [f"{promise.__name__}: {what}" for promise in PROMISES for what in promise(history)]
