"""What all benchmarks share: arguments, samples, summaries, tables and the file of results."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from dask_resilience.chaos.processes import Cluster

RESULTS = Path(__file__).parent / "results"

_POLL_SECONDS = 0.05
_PACKAGES = ("dask-resilience", "dask", "distributed", "msgpack", "numpy", "pandas", "tornado")


def arguments(about: str | None) -> argparse.Namespace:
    """Read ``--json FILE`` and ``--quick``."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write samples and summary there")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: does it run at all?")
    return parser.parse_args()


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}


def median_error(samples: Sequence[float]) -> float:
    """Standard error of the median, about 1.25 sigma / sqrt(n) where samples are normal; 0 of a single one."""
    return 1.25 * statistics.stdev(samples) / len(samples) ** 0.5 if len(samples) > 1 else 0.0


def percentile(samples: Sequence[float], percent: float) -> float:
    """The nearest rank: the least sample that `percent` of all samples do not exceed."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows under a header, the first column to the left, numbers to the right."""
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for number, line in enumerate(lines):
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        print("  ".join(cells).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def spread(samples: Sequence[float], digits: int) -> str:
    """The median with the least and the greatest beside it."""
    found = summary(samples)
    return f"{found['median']:.{digits}f} ({found['min']:.{digits}f}..{found['max']:.{digits}f})"


def save(path: Path | None, *, parameters: Mapping[str, Any], samples: Any, results: Any) -> None:
    """Write what was measured, and where, with everything that a report needs."""
    if path is None:
        return
    content = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            "cores": psutil.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "kernel": f"{platform.system()} {platform.release()}",
            "architecture": platform.machine(),
            # Of the last minute: what else ran here, or only the benchmark.
            "load_average": round(os.getloadavg()[0], 1),
        },
        "versions": {"python": platform.python_version(), **_versions()},
        "parameters": parameters,
        "results": results,
        "samples": samples,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def connect(cluster: Cluster) -> Any:
    """A client of the kind that belongs to the cluster: ours where it is resilient, else stock."""
    import distributed

    import dask_resilience

    if cluster.resilient:
        return dask_resilience.Client(cluster.address)
    return distributed.Client(cluster.address)


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used, in all of its threads."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def count_tasks(client: Any) -> int:
    """How many tasks the scheduler holds."""
    return int(client.run_on_scheduler(_count_tasks))


def _count_tasks(dask_scheduler: Any) -> int:
    return len(dask_scheduler.tasks)


def await_forgotten(client: Any) -> None:
    """Wait until the scheduler holds no task any more."""
    await_true(lambda: count_tasks(client) == 0, poll_seconds=_POLL_SECONDS)


def await_true(condition: Callable[[], bool], *, poll_seconds: float, timeout_seconds: float = 300.0) -> float:
    """Poll until a condition holds; return the moment, in seconds of ``time.monotonic``."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_seconds:g} s: {condition}")
        time.sleep(poll_seconds)
    return time.monotonic()


def increment(x: float, *_dependencies: Any) -> float:
    """The smallest task."""
    return x + 1


def add(x: float, y: float) -> float:
    """The smallest task of two arguments."""
    return x + y
