"""Snapshots of a simulated scheduler: a process beside it takes them, and it removes what they stand for.

Writing, reading back, marking, finding and removing are the real ones. The state is the simplest there can be: all the
records that the log had.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from dask_resilience.errors import ResilienceError
from dask_resilience.journal.records import Record, SnapshotBegun
from dask_resilience.sim.loop import Process
from dask_resilience.sim.strand import Strand
from dask_resilience.storage import retention, snapshots
from dask_resilience.storage.leadership import Leadership
from dask_resilience.storage.object_store import ConditionalStore

if TYPE_CHECKING:
    from dask_resilience.sim.cluster import Cluster


def read_all(store: ConditionalStore, leadership: Leadership) -> Iterator[tuple[int, Record]]:
    """Read what a scheduler that took over recovers: the newest snapshot, and the log behind it."""
    snapshot, reader = snapshots.open_journal(store)
    lsn = 0
    if snapshot is not None:
        for lsn, record in enumerate(snapshots.read_snapshot(store, snapshot)):
            if lsn:
                yield lsn, record
    for logged in reader.read_to(leadership.sealed):
        yield logged.lsn, logged.record


class Snapshots:
    """Takes one snapshot after the other, as long as a scheduler lives.

    Parameters
    ----------
    cluster
        Where it belongs.
    process
        The scheduler's.
    leadership
        Its right to rule.
    durable_lsn
        Tells the last LSN that is acked.
    """

    def __init__(
        self, cluster: Cluster, process: Process, leadership: Leadership, durable_lsn: Callable[[], int]
    ) -> None:
        self._cluster = cluster
        self._process = process
        self._leadership = leadership
        self._durable_lsn = durable_lsn
        self._store = cluster.view(process)
        self._last_lsn = 0
        self._again()

    def _again(self) -> None:
        every = self._cluster.terms.snapshot_seconds
        if every is not None:
            self._process.later(self._process.loop.between(0.5, 1.5) * every, self._begin)

    def _begin(self) -> None:
        lsn = self._durable_lsn()
        if lsn <= self._last_lsn:
            self._again()
            return
        self._last_lsn = lsn
        child = self._cluster.start_helper(f"snapshot of {self._process.name}", self._process)
        done: list[bool] = []
        strand = Strand(child, lambda: self._take(child, lsn, done))
        # Dead or done, the scheduler goes on. It removes something only when the snapshot is there.
        child.on_death.append(lambda: self._process.later(0.0, self._taken, done))
        strand.on_done.append(child.kill)
        strand.start()

    def _take(self, child: Process, lsn: int, done: list[bool]) -> None:
        store = self._cluster.view(child)
        try:
            snapshot, reader = snapshots.open_journal(store)
            if snapshot is not None and snapshot.taken.lsn >= lsn:
                return  # by a newer reign
            state = [] if snapshot is None else list(snapshots.read_snapshot(store, snapshot))[1:]
            for logged in reader.read():
                state.append(logged.record)
                if logged.lsn == lsn:
                    break
            if reader.place is None or len(state) != lsn:
                self._cluster.breach(
                    "snapshot_of_what_was_acked", f"LSN {lsn} was acked, {len(state)} records are there"
                )
                return
            _, chain, epoch, seq = reader.place
            begun = SnapshotBegun(lsn=lsn, chain=chain, epoch=epoch, seq=seq, rest=b"")
            cluster = uuid.UUID(self._leadership.cluster_id).bytes
            snapshots.write_snapshot(store, cluster=cluster, epoch=self._leadership.epoch, begun=begun, state=state)
            done.append(True)
        except ResilienceError as error:
            # The store had trouble; or nobody rules any more for whom this would be, and what it read was removed.
            child.loop.note(child, "takes no snapshot:", type(error).__name__)

    def _taken(self, done: list[bool]) -> None:
        if done:
            self._cluster.history.reached["snapshot"] += 1
            Strand(self._process, self._remove).start()
        self._again()

    def _remove(self) -> None:
        try:
            removed = retention.retain(self._store)
        except ResilienceError as error:
            self._process.loop.note(self._process, "could not remove:", type(error).__name__)
        else:
            self._cluster.history.reached["segment removed"] += removed.segments
