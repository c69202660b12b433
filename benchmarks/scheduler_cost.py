"""What the journal costs a live scheduler: CPU time a task, and tasks per second, beside stock Dask.

In each round two new clusters, one of each kind, take turns: a change of the machine's pace meets both, and what
depends on how one process lies in memory averages out over the rounds. One sample is a submission, its computation and
its release. CPU time is that of the scheduler's process with all of its threads, the journal's writer included.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from dask import delayed
from distributed import wait

from benchmarks._common import (
    add,
    arguments,
    await_forgotten,
    connect,
    cpu_seconds,
    increment,
    median_error,
    save,
    spread,
    summary,
    table,
)
from dask_resilience.chaos.processes import Cluster

GOAL_THROUGHPUT_RATIO = 0.97
GOAL_ADDED_MICROSECONDS = 5.0

#: The order of sets, and with it some of the work, is the same in all processes.
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}


def mapped(client: Any, n_tasks: int) -> Any:
    """Submit independent tasks, each wanted by the client."""
    return client.map(increment, range(n_tasks), pure=False)


def tree(client: Any, n_tasks: int) -> Any:
    """Submit a binary tree of sums, whose root alone is wanted."""
    level = [delayed(increment, pure=False)(x) for x in range((n_tasks + 1) // 2)]
    while len(level) > 1:
        pairs = [delayed(add, pure=False)(x, y) for x, y in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[len(pairs) * 2 :]
    return [client.compute(level[0])]


def submitted(client: Any, n_tasks: int) -> Any:
    """Submit one task after another: each is a message, a record and an ack of its own, the dearest way there is."""
    return [client.submit(increment, x, pure=False) for x in range(n_tasks)]


#: How to submit, and what part of the tasks.
WORKLOADS: dict[str, tuple[Callable[[Any, int], Any], float]] = {
    "map": (mapped, 1.0),
    "tree": (tree, 1.0),
    "submit": (submitted, 0.25),
}


def sample(cluster: Cluster, client: Any, workload: str, n_tasks: int) -> dict[str, float]:
    """One submission from beginning to end."""
    submit, part = WORKLOADS[workload]
    n_tasks = round(n_tasks * part)
    await_forgotten(client)
    before = cpu_seconds(cluster.scheduler.pid)
    started = time.monotonic()
    futures = submit(client, n_tasks)
    wait(futures)
    took = time.monotonic() - started
    del futures
    await_forgotten(client)
    used = cpu_seconds(cluster.scheduler.pid) - before
    return {"tasks_per_second": n_tasks / took, "cpu_microseconds": used / n_tasks * 1e6}


def compare(ours: list[dict[str, float]], stock: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of both, and what pairs of neighbouring samples say of their difference."""
    pairs = list(zip(ours, stock, strict=True))
    ratios = [a["tasks_per_second"] / b["tasks_per_second"] for a, b in pairs]
    added = [a["cpu_microseconds"] - b["cpu_microseconds"] for a, b in pairs]
    return {
        side: {name: summary([each[name] for each in found]) for name in found[0]}
        for side, found in (("ours", ours), ("stock", stock))
    } | {
        "throughput_ratio": summary(ratios),
        "added_cpu_microseconds": summary(added),
        "added_cpu_error_microseconds": median_error(added),
        "throughput_ratio_error": median_error(ratios),
    }


def main() -> None:
    """Run all workloads and print the comparison."""
    given = arguments(__doc__)
    n_tasks, rounds = (1_000, 2) if given.quick else (20_000, 7)
    samples: dict[str, dict[str, list[dict[str, float]]]] = {name: {"ours": [], "stock": []} for name in WORKLOADS}
    for number in range(rounds):
        with ExitStack() as stack:
            clusters = {
                side: stack.enter_context(
                    Cluster(n_workers=2, nanny=False, resilient=side == "ours", environment=_ENVIRONMENT)
                )
                for side in ("stock", "ours")
            }
            clients = {side: stack.enter_context(connect(cluster)) for side, cluster in clusters.items()}
            for side, cluster in clusters.items():
                sample(cluster, clients[side], "map", n_tasks // 20)
            for workload, found in samples.items():
                # Who goes first alternates.
                for side in sorted(clusters, reverse=number % 2 == 0):
                    found[side].append(sample(clusters[side], clients[side], workload, n_tasks))
    results = {name: compare(found["ours"], found["stock"]) for name, found in samples.items()}
    rows = []
    for name, found in samples.items():
        for side in ("stock", "ours"):
            cpu = spread([each["cpu_microseconds"] for each in found[side]], 1)
            rows.append((name, side, cpu, spread([each["tasks_per_second"] for each in found[side]], 0)))
    table(("workload", "scheduler", "CPU us a task", "tasks a second"), rows)
    for name, result in results.items():
        added, error = result["added_cpu_microseconds"]["median"], result["added_cpu_error_microseconds"]
        ratio = result["throughput_ratio"]["median"]
        print(f"{name}: {added:+.1f} us a task (+-{error:.1f}), throughput ratio {ratio:.3f}")
    save(given.json, parameters={"tasks": n_tasks, "rounds": rounds, "workers": 2}, samples=samples, results=results)


if __name__ == "__main__":
    main()
