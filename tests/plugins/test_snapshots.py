"""A week of graphs, hour by hour: the journal stays bounded, and what is recovered from it is the state."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest
from journals import described, graph, replayed

from dask_resilience.errors import SnapshotRefused, StoreError
from dask_resilience.journal import records
from dask_resilience.plugins.snapshot_process import take_snapshot
from dask_resilience.plugins.snapshots import Snapshots
from dask_resilience.storage.local_store import LocalStore
from dask_resilience.storage.retention import retain
from dask_resilience.storage.snapshots import open_journal, read_snapshot
from tests.storage.acting import Ruler

_HOURS = 7 * 24
_AFTER_BYTES = 64 << 10
#: So many graphs are wanted at any time.
_WANTED = 3


def hour(number, client="Client"):
    """What is written in an hour: a graph comes, and an old one is let go of."""
    tasks = {f"h{number}-{n}": [f"h{number}-{n - 1}"] if n else [] for n in range(100)}
    yield graph(client, number + 1, tasks, first_run=number)
    if number >= _WANTED:
        keys = tuple(f"h{number - _WANTED}-{n}" for n in range(100))
        yield records.KeysReleased(client=client, keys=keys)


def size(path):
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def recovered(store):
    snapshot, reader = open_journal(store)
    state = list(read_snapshot(store, snapshot)) if snapshot else []
    return replayed([logged.record for logged in reader.read()], snapshot=state)


def test_a_week_of_graphs_leaves_a_journal_as_long_as_the_state(store):
    async def main():
        local = LocalStore(store)
        ruler = Ruler(local, segment_bytes=_AFTER_BYTES)
        whole = replayed([ruler.start])
        snapshots = Snapshots(
            local,
            epoch=1,
            after_bytes=_AFTER_BYTES,
            grown_bytes=0,
            durable=lambda: (ruler.writer.durable_lsn, ruler.writer.durable_bytes),
            tell=lambda event: None,
        )
        taken = largest = 0
        for number in range(_HOURS):
            for record in hour(number):
                ruler.records[ruler.writer.append(record)] = record
                whole.apply(record)
            ruler.settled()
            if snapshots.due():
                done = await take_snapshot(local, lsn=ruler.writer.durable_lsn, epoch=1)
                snapshots.took(done, ruler.writer.durable_bytes)
                retain(local)
                taken += 1
            largest = max(largest, size(store))
        assert taken > 10
        # Two snapshots of the graphs that are wanted, the log between and behind them, and half a segment more.
        assert largest < 5 * _AFTER_BYTES < ruler.writer.durable_bytes / 3
        assert described(recovered(local)) == described(whole)
        ruler.release()

    asyncio.run(main())


@pytest.fixture
def written(store):
    local = LocalStore(store)
    ruler = Ruler(local)
    for record in hour(0):
        ruler.records[ruler.writer.append(record)] = record
    ruler.settled().release()
    return local


def taken(store, lsn):
    return asyncio.run(take_snapshot(store, lsn=lsn, epoch=1))


def test_what_was_acked_must_be_there(written):
    with pytest.raises(StoreError, match="the log ends at 2"):
        taken(written, 3)


def test_a_snapshot_that_is_newer_is_not_replaced(written):
    assert taken(written, 2)["tasks"] == 100
    with pytest.raises(StoreError, match="newer than LSN 1"):
        taken(written, 1)


def test_a_graph_that_cannot_be_read_refuses_the_snapshot(store):
    local = LocalStore(store)
    ruler = Ruler(local)
    [record] = hour(0)
    unreadable = replace(record, frames=(b"not a pickle",))
    ruler.records[ruler.writer.append(unreadable)] = unreadable
    ruler.settled().release()
    with pytest.raises(SnapshotRefused, match="cannot be read here"):
        taken(local, 2)


def test_tasks_of_a_snapshot_that_cannot_be_read_fail_with_what_depends_on_them(written):
    """The rest of the state is there, and once the module is there so are they."""
    taken(written, 2)
    snapshot, _ = open_journal(written)
    state = list(read_snapshot(written, snapshot))
    broken = [replace(r, specs=b"broken") if isinstance(r, records.SnapshotTasks) else r for r in state]

    async def main():
        replay = replayed([], snapshot=broken)
        [problem] = replay.read_again()
        assert "broken" in str(problem) or "Unpickling" in str(problem)
        tasks = replay.scheduler.tasks
        assert {ts.state for ts in tasks.values()} == {"erred"}
        assert {ts.exception_blame.key for ts in tasks.values()} <= set(tasks)
        assert len(replay.scheduler.clients["Client"].wants_what) == 100

    asyncio.run(main())


def test_who_ends_snapshots_finds_neither_a_process_nor_a_thread_at_work(written, monkeypatch):
    """What follows is that the store is closed, and a private one removed."""
    removing, go_on, ended = threading.Event(), threading.Event(), []

    def slow(store):
        removing.set()
        go_on.wait(20)
        ended.append("removal")
        return retain(store)

    monkeypatch.setattr("dask_resilience.plugins.snapshots.retain", slow)

    async def main():
        snapshots = Snapshots(
            written, epoch=1, after_bytes=1, grown_bytes=9, durable=lambda: (2, 9), tell=lambda event: None
        )
        running = asyncio.create_task(snapshots.run())
        await asyncio.to_thread(removing.wait, 20)
        running.cancel()
        asyncio.get_running_loop().call_later(0.2, go_on.set)
        await asyncio.wait({running})
        assert ended == ["removal"]
        # And in the middle of the process.
        snapshots = Snapshots(
            written, epoch=2, after_bytes=1, grown_bytes=9, durable=lambda: (2, 9), tell=lambda event: None
        )
        running = asyncio.create_task(snapshots.run())
        while snapshots._process is None:  # noqa: ASYNC110 - nothing else tells
            await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.wait({running})
        assert snapshots._process.returncode is not None

    asyncio.run(main())
