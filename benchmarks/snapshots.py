"""How long a snapshot takes, and a recovery from one, by the number of tasks; and what the event loop notices of it.

*Journal*: graphs of 10,000 tasks each, half of them a layer and half depending on it, through a real writer to a local
store. *Replay* rebuilds the scheduler's state from the journal, *load* from a snapshot of it, each in a process of its
own. *Write* is what the process that the scheduler starts does behind its replay; its memory is compared with what the
same state takes in a process that only loaded it.

*Lag*: how late a callback of the event loop of a real scheduler comes, every 5 ms, while a snapshot of all that it
holds is taken, beside that without one.
"""

from __future__ import annotations

import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks._common import arguments, await_true, connect, count_tasks, percentile, save, table
from dask_resilience.chaos.processes import Cluster
from dask_resilience.storage import open_store

_GRAPH = 10_000
GOAL_LOAD_TASKS_PER_SECOND = 100_000
GOAL_SNAPSHOT_SECONDS = 10.0
GOAL_RECOVERY_SECONDS = 30.0
GOAL_MEMORY_RATIO = 2.0
GOAL_LAG_SECONDS = 0.05


def increment(x: int) -> int:
    """What each task runs."""
    return x + 1


def write_journal(store_url: str, n_tasks: int) -> int:
    """Write the journal of so many tasks; return its last LSN."""
    from dask._expr import LLGExpr
    from dask._task_spec import Task, TaskRef
    from distributed.protocol import Serialized, serialize

    from dask_resilience._distributed.scheduler_tap import graph_record
    from dask_resilience.journal.records import EpochStarted
    from dask_resilience.storage.journal_writer import JournalWriter
    from dask_resilience.storage.takeover import rule

    store = open_store(store_url)
    leadership = rule(store, address="tcp://127.0.0.1:1", ttl_seconds=600)
    writer = JournalWriter(
        store,
        leadership,
        commit_interval_seconds=0.02,
        segment_bytes=16 << 20,
        on_durable=lambda _: None,
        on_failure=lambda _: None,
    )
    lsn = writer.append(EpochStarted(epoch=leadership.epoch, cluster="c", holder="b", versions={}, sealed=None))
    for number in range(0, n_tasks, _GRAPH):
        half = min(_GRAPH, n_tasks - number) // 2
        layer = {f"first-{number}-{n}": n for n in range(half)}
        tasks = {key: Task(key, increment, n) for key, n in layer.items()}
        for first in layer:
            second = first.replace("first", "second")
            tasks[second] = Task(second, increment, TaskRef(first))
        msg = {
            "expr_ser": Serialized(*serialize(LLGExpr(tasks))),
            "keys": [key for key in tasks if key.startswith("second")],
            "span_metadata": {},
            "internal_priority": None,
            "submitting_task": None,
            "user_priority": 0,
            "actors": None,
            "fifo_timeout": 0,
            "code": (),
            "annotations": None,
        }
        lsn = writer.append(graph_record("Client", number // _GRAPH + 1, msg, number))
    writer.close()
    leadership.release()
    return lsn


async def rebuild(store_url: str) -> dict[str, Any]:
    """Rebuild the state as a scheduler does, from the newest snapshot if there is one."""
    from dask_resilience._distributed.headless import HeadlessScheduler
    from dask_resilience._distributed.scheduler_replay import Replay
    from dask_resilience.plugins.collector import collecting_rarely
    from dask_resilience.storage.snapshots import open_journal, read_snapshot

    replay = Replay(HeadlessScheduler())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started = time.monotonic()
    with collecting_rarely():
        store = open_store(store_url)
        snapshot, reader = open_journal(store)
        if snapshot is not None:
            replay.load(read_snapshot(store, snapshot))
        for logged in reader.read():
            replay.apply(logged.record)
    seconds = time.monotonic() - started
    return {
        "tasks": len(replay.scheduler.tasks),
        "seconds": seconds,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "rss_before_bytes": before,
    }


def in_process(*args: str) -> dict[str, Any]:
    """Run a step in a process of its own; it prints one line of JSON."""
    done = subprocess.run([sys.executable, "-m", *args], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def sizes(n_tasks: int, rounds: int, directory: Path) -> list[dict[str, Any]]:
    """Replay, snapshot and load, each in its own process, as often as there are rounds."""
    found = []
    for number in range(rounds):
        store = directory / f"store-{n_tasks}-{number}"
        store.mkdir(mode=0o700)
        lsn = in_process("benchmarks.snapshots", "--journal", str(store), str(n_tasks))["lsn"]
        replay = in_process("benchmarks.snapshots", "--rebuild", str(store))
        snapshot = in_process("dask_resilience.plugins.snapshot_process", str(store), str(lsn), "1")
        load = in_process("benchmarks.snapshots", "--rebuild", str(store))
        assert replay["tasks"] == load["tasks"] == snapshot["tasks"] == n_tasks
        journal = sum(path.stat().st_size for path in (store / "log").rglob("*") if path.is_file())
        found.append({"journal_bytes": journal, "replay": replay, "snapshot": snapshot, "load": load})
    return found


def lag(n_tasks: int, directory: Path) -> dict[str, list[float]]:
    """How late callbacks of a scheduler's loop come, without a snapshot and while one is taken."""

    async def measured(dask_scheduler: Any, *, taking: bool) -> list[float]:
        late: list[float] = []
        loop = asyncio.get_running_loop()
        until = loop.time() + 2.0
        task = loop.create_task(dask_scheduler.resilience.snapshots.take()) if taking else None
        while loop.time() < until or (task is not None and not task.done()):
            began = loop.time()
            await asyncio.sleep(0.005)
            late.append(loop.time() - began - 0.005)
        return late

    environment = {"DASK_RESILIENCE__SNAPSHOT__AFTER": "1 TiB"}
    with (
        Cluster(n_workers=0, resilient=True, directory=directory, environment=environment) as cluster,
        connect(cluster) as client,
    ):
        kept = [client.map(increment, range(_GRAPH), pure=False) for _ in range(0, n_tasks, _GRAPH)]
        await_true(lambda: count_tasks(client) == n_tasks, poll_seconds=0.1)
        client.sync(client.scheduler.resilience_committed)
        time.sleep(1)
        without = client.run_on_scheduler(measured, taking=False)
        while_taking = client.run_on_scheduler(measured, taking=True)
        taken = client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.resilience.snapshots.last)
        del kept
    assert taken["tasks"] == n_tasks, taken
    return {"without": without, "while_taking": while_taking}


def main() -> None:
    """Measure, print and save."""
    if sys.argv[1:2] == ["--journal"]:
        print(json.dumps({"lsn": write_journal(sys.argv[2], int(sys.argv[3]))}))
        return
    if sys.argv[1:2] == ["--rebuild"]:
        print(json.dumps(asyncio.run(rebuild(sys.argv[2]))))
        return
    options = arguments(__doc__)
    counts = {10_000: 1} if options.quick else {10_000: 5, 100_000: 3, 1_000_000: 1}
    lag_tasks = 10_000 if options.quick else 100_000
    with tempfile.TemporaryDirectory() as directory:
        samples = {n: sizes(n, rounds, Path(directory)) for n, rounds in counts.items()}
        late = lag(lag_tasks, Path(directory))
    rows = []
    results: dict[str, Any] = {"sizes": [], "lag": {}}
    for n, rounds in samples.items():
        best = sorted(rounds, key=lambda each: each["load"]["seconds"])[len(rounds) // 2]
        own = best["load"]["peak_rss_bytes"] - best["load"]["rss_before_bytes"]
        whole = best["snapshot"]["peak_rss_bytes"] - best["load"]["rss_before_bytes"]
        result = {
            "tasks": n,
            "journal_bytes": best["journal_bytes"],
            "snapshot_bytes": best["snapshot"]["bytes"],
            "replay_seconds": best["replay"]["seconds"],
            "snapshot_seconds": best["snapshot"]["seconds_to_replay"] + best["snapshot"]["seconds_to_write"],
            "write_seconds": best["snapshot"]["seconds_to_write"],
            "load_seconds": best["load"]["seconds"],
            "load_tasks_per_second": n / best["load"]["seconds"],
            "state_bytes": own,
            "snapshot_memory_ratio": whole / own,
        }
        results["sizes"].append(result)
        rows.append(
            (
                f"{n:,}",
                f"{best['journal_bytes'] / n:.0f}",
                f"{result['snapshot_bytes'] / n:.0f}",
                f"{result['replay_seconds']:.2f}",
                f"{result['write_seconds']:.2f}",
                f"{result['load_seconds']:.2f}",
                f"{result['load_tasks_per_second']:,.0f}",
                f"{result['snapshot_memory_ratio']:.2f}",
            )
        )
    table(
        ("tasks", "journal B/task", "snapshot B/task", "replay s", "write s", "load s", "load tasks/s", "memory ratio"),
        rows,
    )
    for kind, each in late.items():
        results["lag"][kind] = {"p50": percentile(each, 50), "p99": percentile(each, 99), "max": max(each)}
    results["lag"]["tasks"] = lag_tasks
    table(
        ("loop lag, ms", "median", "p99", "max"),
        [(kind, *(f"{1e3 * results['lag'][kind][p]:.2f}" for p in ("p50", "p99", "max"))) for kind in late],
    )
    save(
        options.json,
        parameters={"counts": counts, "lag_tasks": lag_tasks},
        samples={"sizes": samples, "lag": late},
        results=results,
    )


if __name__ == "__main__":
    main()
