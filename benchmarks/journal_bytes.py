"""How many bytes the journal takes for a task, for graphs of each collection.

Each graph is submitted by a real client to a real scheduler that has no workers, so that all of its tasks can be
counted. The store's log is measured before, after the submission was acked, and after the release. *Message* is what
stock Dask sends over the network as well: the graph as the client serialized it, which is stored as it came, the keys
that the client wants, and priorities and the like.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import msgpack
import numpy as np
import pandas as pd
from dask import datasets

from benchmarks._common import (
    arguments,
    await_forgotten,
    await_true,
    connect,
    count_tasks,
    increment,
    save,
    table,
)
from benchmarks.scheduler_cost import mapped, tree
from dask_resilience.chaos.processes import Cluster
from dask_resilience.journal.records import GraphSubmitted
from dask_resilience.storage import open_store
from dask_resilience.storage.journal_reader import JournalReader

_POLL_SECONDS = 0.02


def matmul(client: Any, scale: int) -> Any:
    """Multiply arrays of ``scale`` times ``scale`` chunks."""
    x = da.random.random((scale * 10, scale * 10), chunks=(10, 10))
    return [client.compute((x @ x).sum())]


def transposed_mean(client: Any, scale: int) -> Any:
    """Add an array in memory, of 8 bytes x 100 x scale^2, to its transpose."""
    x = da.from_array(np.ones((scale * 10, scale * 10)), chunks=(10, 10))
    return [client.compute((x + x.T).mean())]


def groupby(client: Any, scale: int) -> Any:
    """Group a year of made-up time series."""
    frame = datasets.timeseries(end="2000-12-31", freq="1h", partition_freq=f"{max(1, 40 // scale)}D")
    return [client.compute(frame.groupby("name").x.mean())]


def from_pandas(client: Any, scale: int) -> Any:
    """Group a frame that travels inside the graph: 16 bytes x 5,000 x scale^2."""
    rows = 5_000 * scale**2
    pandas = pd.DataFrame({"key": np.arange(rows) % 10, "value": np.arange(rows, dtype=float)})
    return [client.compute(dd.from_pandas(pandas, npartitions=scale * 5).groupby("key").value.mean())]


def bag(client: Any, scale: int) -> Any:
    """Count words of a bag."""
    return [client.compute(db.from_sequence(range(scale * 200), npartitions=scale * 50).map(increment).frequencies())]


GRAPHS: dict[str, Callable[[Any, int], Any]] = {
    "map": lambda client, scale: mapped(client, scale * 500),
    "delayed tree": lambda client, scale: tree(client, scale * 500),
    "array matmul": matmul,
    "array from memory": transposed_mean,
    "dataframe groupby": groupby,
    "dataframe from pandas": from_pandas,
    "bag": bag,
}


def log_bytes(store: str) -> int:
    """Size of all segments."""
    return sum(path.stat().st_size for path in Path(store, "log").rglob("*") if path.is_file())


def known_keys(dask_scheduler: Any, keys: list[Any]) -> bool:
    """Whether the scheduler holds all keys."""
    return all(key in dask_scheduler.tasks for key in keys)


async def committed(dask_scheduler: Any) -> None:
    """Return when all that was recorded is durable."""
    await dask_scheduler.resilience.tap.committed()


def measure(cluster: Cluster, client: Any, reader: JournalReader, graph: Any, scale: int) -> dict[str, int]:
    """Submit one graph and let it go."""
    assert cluster.store is not None
    client.run_on_scheduler(committed)
    before = log_bytes(cluster.store)
    futures = graph(client, scale)
    keys = [future.key for future in futures]
    await_true(lambda: client.run_on_scheduler(known_keys, keys=keys), poll_seconds=_POLL_SECONDS)
    client.run_on_scheduler(committed)
    submitted = log_bytes(cluster.store) - before
    n_tasks = count_tasks(client)
    del futures
    await_forgotten(client)
    client.run_on_scheduler(committed)
    released = log_bytes(cluster.store) - before - submitted
    graphs = [logged.record for logged in reader.read() if isinstance(logged.record, GraphSubmitted)]
    message = sum(
        len(frame) for record in graphs for frame in (*record.frames, record.rest, msgpack.packb(record.keys))
    )
    return {
        "tasks": n_tasks,
        "message_bytes": message,
        "submission_bytes": submitted,
        "release_bytes": released,
    }


def main() -> None:
    """Measure all graphs and print bytes a task."""
    given = arguments(__doc__)
    scale = 2 if given.quick else 20
    samples: dict[str, dict[str, int]] = {}
    with Cluster(n_workers=0, resilient=True) as cluster, connect(cluster) as client:
        reader = JournalReader(open_store(str(cluster.store)))
        list(reader.read())
        for name, graph in GRAPHS.items():
            samples[name] = measure(cluster, client, reader, graph, scale)
    results = {
        name: {
            "tasks": each["tasks"],
            "message_bytes_a_task": each["message_bytes"] / each["tasks"],
            "journal_bytes_a_task": (each["submission_bytes"] + each["release_bytes"]) / each["tasks"],
            "journal_to_message_ratio": (each["submission_bytes"] + each["release_bytes"]) / each["message_bytes"],
        }
        for name, each in samples.items()
    }
    rows = []
    for name, each in samples.items():
        n_tasks = each["tasks"]
        parts = [f"{each[part] / n_tasks:,.1f}" for part in ("message_bytes", "submission_bytes", "release_bytes")]
        rows.append((name, f"{n_tasks:,}", *parts, f"{results[name]['journal_to_message_ratio']:.3f}"))
    table(("graph", "tasks", "message B/task", "submission B/task", "release B/task", "journal/message"), rows)
    save(given.json, parameters={"scale": scale}, samples=samples, results=results)


if __name__ == "__main__":
    main()
