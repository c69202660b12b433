"""How long a cluster is without a scheduler: from SIGKILL until it serves again, and until a new task has its result.

*Cold*: the process is started again from nothing, as systemd would. *Warm*: a process that has everything imported
takes over. Beside both stands, measured in the same rounds, how long a stock scheduler takes from its start to
``/health`` 200, which no cold restart can beat.

Half of the tasks are finished and in memory, the other half wait for one task that runs through the whole
measurement. The client wants them all, so it hands over that many keys each time.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from distributed import wait

from benchmarks._common import arguments, await_true, connect, increment, median_error, save, spread, summary, table
from dask_resilience.chaos.loopback import free_port, http_get
from dask_resilience.chaos.processes import Cluster, SchedulerProcess

GOAL_ADDED_SECONDS = 0.5
GOAL_TASKS = 1_000

_POLL_SECONDS = 0.01
#: What the scheduler says of its recovery.
_BREAKDOWN = ("seconds_to_rule", "seconds_to_replay", "seconds_to_gather")


def hold(gate: str) -> int:
    """Run until a file is there."""
    while not Path(gate).exists():
        time.sleep(0.1)
    return 0


def stock_start(directory: Path) -> dict[str, float]:
    """Start a stock scheduler and see it answer."""
    scheduler = SchedulerProcess(free_port(), log=directory / "stock.log", name="stock")
    started = time.monotonic()
    with scheduler:

        def healthy() -> bool:
            answer = http_get(scheduler.http_port, "/health")
            return answer is not None and answer[0] == 200

        health = await_true(healthy, poll_seconds=_POLL_SECONDS) - started
        serving = await_true(scheduler.is_ready, poll_seconds=_POLL_SECONDS) - started
    return {"health_seconds": health, "serving_seconds": serving}


def recovery_status(dask_scheduler: Any) -> dict[str, Any]:
    """What the scheduler says of its recovery."""
    status: dict[str, Any] = dask_scheduler.resilience.status()
    return status


def fail_over(cluster: Cluster, client: Any, *, n_workers: int, n_tasks: int) -> dict[str, float]:
    """Kill the scheduler, replace it at once, and time what a client sees."""
    killed = cluster.kill_scheduler()
    replacement = cluster.restart_scheduler()
    probe = client.submit(increment, 1, pure=False, priority=1)
    ready = await_true(lambda: replacement.ready_status() == 200, poll_seconds=_POLL_SECONDS) - killed
    assert probe.result(timeout=300) == 2
    result = time.monotonic() - killed
    status = client.run_on_scheduler(recovery_status)
    # One of the tasks runs; a benchmark of a recovery that lost something would be worth nothing.
    adopted = (status["workers_back"], status["tasks_adopted_in_memory"], status["tasks_adopted_running"])
    assert adopted == (n_workers, n_tasks // 2, 1), status
    return {"ready_seconds": ready, "result_seconds": result, **{name: status[name] for name in _BREAKDOWN}}


def scenario(directory: Path, *, n_tasks: int, n_workers: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    """All rounds with one cluster: warm, cold and stock take turns."""
    gate = directory / f"gate-{n_tasks}-{n_workers}"
    found: dict[str, list[dict[str, float]]] = {"stock": [], "cold": [], "warm": []}
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(n_workers=n_workers, nthreads=2, resilient=True, warm_replacement=True))
        client = stack.enter_context(connect(cluster))
        running = client.submit(hold, str(gate), pure=False)
        finished = client.map(increment, range(n_tasks // 2), pure=False)
        pending = client.map(increment, range(n_tasks - n_tasks // 2 - 1), [running] * n_tasks, pure=False)
        wait(finished)
        for _ in range(rounds):
            for kind in ("warm", "cold"):
                found[kind].append(fail_over(cluster, client, n_workers=n_workers, n_tasks=n_tasks))
            found["stock"].append(stock_start(directory))
            cluster.park_replacement()
        gate.touch()
        assert not any(future.done() for future in pending[:10])
    return found


def main() -> None:
    """Run all scenarios and print what they took."""
    given = arguments(__doc__)
    scenarios = [(1_000, 2), (10_000, 2), (100_000, 2), (1_000, 4), (1_000, 8)]
    rounds = 7
    if given.quick:
        scenarios, rounds = [(200, 2)], 1
    samples, results, rows = [], [], []
    with tempfile.TemporaryDirectory(prefix="dask-resilience-") as directory:
        for n_tasks, n_workers in scenarios:
            few = min(rounds, 3 if n_tasks >= 100_000 else rounds)
            found = scenario(Path(directory), n_tasks=n_tasks, n_workers=n_workers, rounds=few)
            about = {"tasks": n_tasks, "workers": n_workers}
            taken = {
                kind: {name: summary([each[name] for each in many]) for name in many[0]} for kind, many in found.items()
            }
            # Neighbours are compared, as they met the same pace of the machine.
            added = [
                cold["ready_seconds"] - stock["health_seconds"]
                for cold, stock in zip(found["cold"], found["stock"], strict=True)
            ]
            samples.append({**about, **found})
            more = {"cold_added_seconds": statistics.median(added), "cold_added_error_seconds": median_error(added)}
            results.append({**about, **taken, **more})
            for kind in ("cold", "warm"):
                seconds = [spread([each[n] for each in found[kind]], 2) for n in ("ready_seconds", "result_seconds")]
                parts = [f"{taken[kind][name]['median']:.3f}" for name in _BREAKDOWN]
                rows.append((f"{n_tasks:,}", n_workers, kind, *seconds, *parts))
            rows.append(
                (f"{n_tasks:,}", n_workers, "stock", spread([s["health_seconds"] for s in found["stock"]], 2), *"----")
            )
    table(("tasks", "workers", "start", "serves after s", "new result after s", "rule", "replay", "gather"), rows)
    for result in results:
        cold = f"cold restart takes {result['cold_added_seconds']:+.2f} s beside a stock start"
        print(f"{result['tasks']:,} tasks, {result['workers']} workers: {cold}")
    save(given.json, parameters={"scenarios": scenarios, "rounds": rounds}, samples=samples, results=results)


if __name__ == "__main__":
    main()
