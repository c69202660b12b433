"""What a commit takes on each kind of store, how many requests that are, and what they would cost at list prices.

*Commit*: one record at a time, appended when the one before it was acked, so that each commit is one of its own.
*Requests* are counted where they leave for the server. From them and the commit interval follows what a day of steady
submissions costs: one commit an interval and three renewals of the lease in its time to live. A quiet cluster only
renews.

*Throughput*: tasks a second of `client.map` with the journal on each store, and without one, taking turns.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from distributed import wait

from benchmarks._common import arguments, await_forgotten, connect, increment, median_error, percentile, save, table
from dask_resilience.chaos.processes import Cluster
from dask_resilience.journal.records import ClientLeft, EpochStarted
from dask_resilience.storage import open_store
from dask_resilience.storage.journal_writer import JournalWriter
from dask_resilience.storage.object_store import ConditionalStore
from dask_resilience.storage.takeover import rule
from tests.storage.servers import FakeGcs, SeaweedFS, new_place

_RECORD_BYTES = 1_000
_INTERVALS_SECONDS = (0.02, 0.1, 0.5, 1.0)
_LEASE_TTL_SECONDS = {"s3": 10.0, "gs": 10.0}
#: Dollars for a thousand requests that write or list, and that read: standard class, us-east-1 and us-east1, as listed
#: in 2025.
PRICES = {"s3": (0.005, 0.0004), "gs": (0.005, 0.0004)}


class Counted:
    """A backend that counts what it is asked for."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.counts: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        self.counts[name] += 1
        return getattr(self.backend, name)


def commits(store: ConditionalStore, count: int) -> dict[str, Any]:
    """Seconds from append to ack of single commits, the requests of one, and the bytes that are stored for one."""
    leadership = rule(store, address="tcp://127.0.0.1:1", ttl_seconds=600)
    acked = threading.Semaphore(0)
    writer = JournalWriter(
        store,
        leadership,
        commit_interval_seconds=0.0,
        segment_bytes=16 << 20,
        on_durable=lambda _: acked.release(),
        on_failure=print,
    )
    writer.append(EpochStarted(epoch=leadership.epoch, cluster="c", holder="", versions={}, sealed=leadership.sealed))
    acked.acquire()
    counted = None
    if hasattr(store, "_requests"):
        # Where requests leave for the server.
        counted = store._requests._backend = Counted(store._requests._backend)  # noqa: SLF001
    seconds = []
    for number in range(count):
        record = ClientLeft(client=f"{number:06d}" + "x" * _RECORD_BYTES)
        began = time.perf_counter()
        writer.append(record)
        acked.acquire()
        seconds.append(time.perf_counter() - began)
    requests = {name: found / count for name, found in (counted.counts if counted else {}).items()}
    writer.close()
    leadership.release()
    return {"seconds": seconds, "requests": requests, "bytes": writer.durable_bytes / (count + 1)}


def cost_of_a_day(scheme: str, requests: dict[str, float], interval_seconds: float) -> dict[str, float]:
    """Requests and dollars of a day with one commit an interval, and of a day without any."""
    day = 86_400.0
    writes = sum(requests.get(name, 0.0) for name in ("put", "list"))
    reads = sum(requests.get(name, 0.0) for name in ("get",))
    renewals = 3 * day / _LEASE_TTL_SECONDS[scheme]
    write_price, read_price = (price / 1000 for price in PRICES[scheme])
    n = day / interval_seconds
    busy = n * (writes * write_price + reads * read_price) + renewals * write_price
    return {"requests": n * (writes + reads) + renewals, "dollars": busy, "quiet_dollars": renewals * write_price}


def throughput(places: dict[str, dict[str, str] | None], directory: Path, *, tasks: int, rounds: int) -> dict[str, Any]:
    """Tasks a second with the journal on each place, None for stock Dask, all clusters taking turns."""
    found: dict[str, list[float]] = {name: [] for name in places}
    for number in range(rounds):
        with ExitStack() as stack:
            for name, environment in places.items():
                folder = directory / f"{name}-{number}"
                folder.mkdir()
                options = {**(environment or {})}
                if "DASK_RESILIENCE__STORE" in options:
                    options["DASK_RESILIENCE__STORE"] += f"-{number}"
                cluster = stack.enter_context(
                    Cluster(n_workers=1, resilient=environment is not None, directory=folder, environment=options)
                )
                client = stack.enter_context(connect(cluster))
                for turn in range(4):
                    began = time.perf_counter()
                    futures = client.map(increment, range(tasks), pure=False)
                    wait(futures)
                    if turn:
                        found[name].append(tasks / (time.perf_counter() - began))
                    del futures
                    await_forgotten(client)
    return found


def main() -> None:
    """Measure, print and save."""
    options = arguments(__doc__)
    count, tasks, rounds = (20, 500, 1) if options.quick else (300, 3000, 3)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {"SeaweedFS": SeaweedFS(directory / "weed"), "fake-gcs-server": FakeGcs()}
        for server in servers.values():
            stack.callback(server.kill)
            server.start()
        found: dict[str, Any] = {}
        local = directory / "local"
        local.mkdir(mode=0o700)
        places: dict[str, dict[str, str] | None] = {"stock": None, "local": {}}
        found["local"] = {"scheme": "", **commits(open_store(str(local)), count)}
        for name, server in servers.items():
            url = new_place(server)
            store = open_store(url, storage_options=server.options())
            found[name] = {"scheme": server.scheme, **commits(store, count)}
            store.close()
            places[name] = {
                "DASK_RESILIENCE__STORE": new_place(server),
                "DASK_RESILIENCE__STORAGE_OPTIONS": json.dumps(server.options()),
            }
        paces = throughput(places, directory, tasks=tasks, rounds=rounds)
    results: dict[str, Any] = {"commits": {}, "days": [], "throughput": {}}
    for name, each in found.items():
        results["commits"][name] = {
            "p50": percentile(each["seconds"], 50),
            "p99": percentile(each["seconds"], 99),
            "requests": each["requests"],
            "bytes": each["bytes"],
        }
        if each["scheme"]:
            for interval in _INTERVALS_SECONDS:
                day = cost_of_a_day(each["scheme"], each["requests"], interval)
                results["days"].append({"store": name, "scheme": each["scheme"], "interval": interval, **day})
    base = sorted(paces["stock"])[len(paces["stock"]) // 2]
    for name, each in paces.items():
        middle = sorted(each)[len(each) // 2]
        results["throughput"][name] = {"median": middle, "error": median_error(each), "ratio": middle / base}
    table(
        ("commit", "p50 ms", "p99 ms", "requests", "bytes"),
        [
            (
                name,
                f"{1e3 * c['p50']:.2f}",
                f"{1e3 * c['p99']:.2f}",
                f"{sum(c['requests'].values()):.1f}",
                f"{c['bytes']:.0f}",
            )
            for name, c in results["commits"].items()
        ],
    )
    table(
        ("a day", "interval s", "requests", "dollars", "quiet"),
        [
            (d["store"], d["interval"], f"{d['requests']:,.0f}", f"{d['dollars']:.2f}", f"{d['quiet_dollars']:.2f}")
            for d in results["days"]
        ],
    )
    table(
        ("throughput", "tasks/s", "ratio"),
        [(name, f"{t['median']:,.0f}", f"{t['ratio']:.2f}") for name, t in results["throughput"].items()],
    )
    save(
        options.json,
        parameters={"commits": count, "tasks": tasks, "rounds": rounds, "prices": PRICES},
        samples={"commits": found, "throughput": paces},
        results=results,
    )


if __name__ == "__main__":
    main()
