"""Takes one snapshot, in a process of its own: ``python -m dask_resilience.plugins.snapshot_process STORE LSN EPOCH``.

A snapshot is a function of the journal. This process replays the journal as a standby does, from the last snapshot on
and up to a record that is acked, writes what is there, and reads it back. The scheduler that serves neither stops for
it nor holds anything twice. It prints what it did as one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import time
import uuid
from collections.abc import Iterator
from typing import Any

from dask_resilience._distributed.headless import HeadlessScheduler
from dask_resilience._distributed.scheduler_replay import Replay
from dask_resilience._distributed.scheduler_snapshot import scheduler_rest, state_records
from dask_resilience.errors import ResilienceError, SnapshotRefused, StoreError
from dask_resilience.journal.records import Record, SnapshotBegun
from dask_resilience.plugins.collector import collecting_rarely
from dask_resilience.settings import Settings
from dask_resilience.storage import open_store
from dask_resilience.storage.cluster_object import read_cluster
from dask_resilience.storage.object_store import ConditionalStore
from dask_resilience.storage.snapshots import Snapshot, open_journal, read_snapshot, write_snapshot

#: A process of background work: whatever the cluster does goes first.
_NICE = 10


async def take_snapshot(store: ConditionalStore, *, lsn: int, epoch: int) -> dict[str, Any]:
    """Take a snapshot of the state behind a record.

    Parameters
    ----------
    store
        Where the journal is.
    lsn
        Number of a record that is acked.
    epoch
        The reign that takes it.

    Returns
    -------
    dict
        What was done, for people: ``tasks``, ``bytes``, ``seconds_to_replay``, ``seconds_to_write``, and
        ``peak_rss_bytes`` of this process.

    Raises
    ------
    SnapshotRefused
        If some of the state cannot be read or written here.
    StoreError, JournalCorrupt
        If the store fails, or the journal is damaged.
    """
    parent = os.getppid()
    cluster = read_cluster(store)
    if cluster is None:
        raise StoreError(store.url, "there is no journal here")
    started = time.monotonic()
    with collecting_rarely():
        replay, place = _replayed(store, lsn)
        for problem in replay.read_again():
            raise SnapshotRefused(f"a graph cannot be read here, so its tasks would be missing: {problem}")
        replayed = time.monotonic()
        begun = SnapshotBegun(**place, rest=scheduler_rest(replay.scheduler))
        snapshot = write_snapshot(
            store,
            cluster=uuid.UUID(cluster.cluster_id).bytes,
            epoch=epoch,
            begun=begun,
            state=_while_wanted(state_records(replay), parent),
        )
    return {
        "name": snapshot.name,
        "lsn": lsn,
        "tasks": len(replay.scheduler.tasks),
        "bytes": snapshot.taken.nbytes,
        "seconds_to_replay": round(replayed - started, 4),
        "seconds_to_write": round(time.monotonic() - replayed, 4),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _replayed(store: ConditionalStore, lsn: int) -> tuple[Replay, dict[str, int]]:
    replay = Replay(HeadlessScheduler())
    snapshot, reader = open_journal(store)
    if snapshot is not None:
        _check_older(store, snapshot, lsn)
        replay.load(read_snapshot(store, snapshot))
    for logged in reader.read():
        if logged.lsn > lsn:
            break
        replay.apply(logged.record)
        if logged.lsn == lsn:
            break
    if reader.place is None or reader.next_lsn != lsn + 1:
        raise StoreError(store.url, f"LSN {lsn} was acked, but the log ends at {reader.next_lsn - 1}")
    _, chain, epoch, seq = reader.place
    return replay, {"lsn": lsn, "chain": chain, "epoch": epoch, "seq": seq}


def _check_older(store: ConditionalStore, snapshot: Snapshot, lsn: int) -> None:
    if snapshot.taken.lsn >= lsn:
        raise StoreError(store.url, f"a snapshot of LSN {snapshot.taken.lsn} is there, newer than LSN {lsn}")


def _while_wanted(state: Iterator[Record], parent: int) -> Iterator[Record]:
    """The scheduler that started this process may be gone, and whoever follows it starts its own."""
    for record in state:
        if os.getppid() != parent:
            raise SnapshotRefused("the scheduler that wanted this snapshot is gone")
        yield record


async def _main(url: str, lsn: int, epoch: int) -> dict[str, Any]:
    store = open_store(url, storage_options=Settings.load().storage_options)
    try:
        return await take_snapshot(store, lsn=lsn, epoch=epoch)
    finally:
        store.close()


if __name__ == "__main__":
    os.nice(_NICE)
    try:
        done = asyncio.run(_main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
    except ResilienceError as refused:
        print(refused, file=sys.stderr, flush=True)  # noqa: T201 - what it is for
        os._exit(1)
    print(json.dumps(done), flush=True)  # noqa: T201 - what it is for
    # Modules of users were imported: neither their threads nor what they do at exit belong here.
    os._exit(0)
