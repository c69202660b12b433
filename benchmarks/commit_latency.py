"""How long until a record is durable and may be acked, what appending costs, and what a client sees of both.

*Writer*: records at a steady rate through the journal's writer on a local store. Beside each rate stands what the disk
takes for the same bytes without any of our code: one write and one ``fdatasync``, in the same minute.

*Client*: the round trip of one small task, on stock Dask and with a journal, taking turns; and until its submission
is acked. Scheduling does not wait for acks, so the round trip should not change.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks._common import arguments, connect, increment, percentile, save, table
from dask_resilience.chaos.processes import Cluster
from dask_resilience.journal.records import EpochStarted, GraphSubmitted
from dask_resilience.settings import Settings
from dask_resilience.storage.journal_writer import JournalWriter
from dask_resilience.storage.leadership import LeaseKeeper
from dask_resilience.storage.local_store import LocalStore
from dask_resilience.storage.takeover import rule

_GRAPH_BYTES = 1_000
#: A submission in full flight: as fast as one thread can append.
_BURST = 0
_BURST_RECORDS = 20_000
_PERCENTS = (50, 99)
_SPIN_SECONDS = 1e-5
#: Streams send at most every 10 ms: a message soon after another would wait for that and not for the scheduler.
_SETTLE_SECONDS = 0.05


def writer_latency(directory: Path, *, rate: int, seconds: float) -> dict[str, Any]:
    """Append at `rate` records a second; seconds from append to ack of each, and of the append alone."""
    settings = Settings.load()
    store = LocalStore(directory)
    leadership = rule(store, address="tcp://127.0.0.1:1", ttl_seconds=30.0)
    keeper = LeaseKeeper(leadership, on_lost=print)
    keeper.start()
    acked: list[tuple[int, float]] = []
    commits = threading.Semaphore(0)

    def on_durable(lsn: int) -> None:
        acked.append((lsn, time.perf_counter()))
        commits.release()

    writer = JournalWriter(
        store,
        leadership,
        commit_interval_seconds=settings.journal.commit_interval_seconds,
        segment_bytes=settings.journal.segment_size_bytes,
        on_durable=on_durable,
        on_failure=print,
    )
    first = EpochStarted(epoch=leadership.epoch, cluster=leadership.cluster_id, holder="", versions={}, sealed=None)
    writer.append(first)
    commits.acquire()
    acked.clear()
    appended: list[tuple[int, float]] = []
    costs: list[float] = []
    count = _BURST_RECORDS if rate == _BURST else int(rate * seconds)
    frames = (os.urandom(_GRAPH_BYTES),)
    started = time.perf_counter()
    for number in range(count):
        if rate != _BURST:
            _await_moment(started + number / rate)
        record = GraphSubmitted(
            client="c", seq=number + 1, stimulus_id="s", keys=(f"increment-{number}",), frames=frames, rest=b""
        )
        before = time.perf_counter()
        lsn = writer.append(record)
        after = time.perf_counter()
        appended.append((lsn, before))
        costs.append(after - before)
    writer.close()
    keeper.close()
    leadership.release()
    return {"latency_seconds": _latencies(appended, acked), "append_seconds": costs, "commits": len(acked)}


def _await_moment(moment: float) -> None:
    while (left := moment - time.perf_counter()) > 0:
        time.sleep(max(left, _SPIN_SECONDS))


def _latencies(appended: list[tuple[int, float]], acked: list[tuple[int, float]]) -> list[float]:
    """Match each record with the first ack that reaches it."""
    found: list[float] = []
    acks = iter(acked)
    lsn, moment = next(acks)
    for record, before in appended:
        while lsn < record:
            lsn, moment = next(acks)
        found.append(moment - before)
    return found


def disk_latency(directory: Path, *, count: int) -> list[float]:
    """What the disk takes for one record: write and ``fdatasync``."""
    data = os.urandom(_GRAPH_BYTES)
    descriptor = os.open(directory / "bare", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    found: list[float] = []
    try:
        for _ in range(count):
            before = time.perf_counter()
            os.write(descriptor, data)
            os.fdatasync(descriptor)
            found.append(time.perf_counter() - before)
    finally:
        os.close(descriptor)
    return found


def round_trips(count: int) -> dict[str, list[float]]:
    """The round trip of one small task on each of two clusters in turn, and the ack of ours."""
    found: dict[str, list[float]] = {"stock": [], "ours": [], "ack": []}
    with ExitStack() as stack:
        clusters = {
            side: stack.enter_context(Cluster(n_workers=1, nanny=False, resilient=side == "ours"))
            for side in ("stock", "ours")
        }
        clients = {side: stack.enter_context(connect(cluster)) for side, cluster in clusters.items()}
        warm_up = max(5, count // 10)
        for number in range(-warm_up, count):
            for side in sorted(clients, reverse=number % 2 == 0):
                time.sleep(_SETTLE_SECONDS)
                before = time.perf_counter()
                future = clients[side].submit(increment, number, pure=False)
                future.result()
                took = time.perf_counter() - before
                del future
                if number >= 0:
                    found[side].append(took)
            time.sleep(_SETTLE_SECONDS)
            acked = _ack_latency(clients["ours"], number)
            if number >= 0:
                found["ack"].append(acked)
    return found


def _ack_latency(client: Any, number: int) -> float:
    # Acks have no public side: a client is only ever told by what survives.
    arrived = threading.Event()
    handle = client._handle_ack  # noqa: SLF001

    def told(seq: int) -> None:
        handle(seq)
        arrived.set()

    client._stream_handlers["resilience-ack"] = told  # noqa: SLF001
    before = time.perf_counter()
    future = client.submit(increment, number, pure=False)
    arrived.wait(10)
    took = time.perf_counter() - before
    client._stream_handlers["resilience-ack"] = handle  # noqa: SLF001
    future.result()
    return took


def milliseconds(samples: list[float]) -> dict[str, float]:
    """Percentiles and the greatest, in milliseconds."""
    found = {f"p{percent}": percentile(samples, percent) * 1e3 for percent in _PERCENTS}
    return {**found, "max": max(samples) * 1e3}


def main() -> None:
    """Run all rates and the round trips, and print them."""
    given = arguments(__doc__)
    rates, seconds, trips = ((100, _BURST), 0.5, 20) if given.quick else ((10, 100, 1_000, 5_000, _BURST), 5.0, 300)
    samples: dict[str, Any] = {"writer": {}, "disk": {}}
    results: dict[str, Any] = {"writer": {}, "disk": {}, "client": {}}
    rows = []
    for rate in rates:
        name = "burst" if rate == _BURST else str(rate)
        with tempfile.TemporaryDirectory(prefix="dask-resilience-") as directory:
            bare = disk_latency(Path(directory), count=20 if given.quick else 200)
            found = writer_latency(Path(directory, "store"), rate=rate, seconds=seconds)
        latency, disk = milliseconds(found["latency_seconds"]), milliseconds(bare)
        append = percentile(found["append_seconds"], 50) * 1e6
        # Each thousandth of the ordered samples: all of what a distribution says, in a file of bounded size.
        samples["writer"][name] = {
            "latency_seconds": _thinned(found["latency_seconds"]),
            "append_seconds": _thinned(found["append_seconds"]),
        }
        samples["disk"][name] = bare
        results["writer"][name] = {"milliseconds": latency, "append_microseconds": append, "commits": found["commits"]}
        results["disk"][name] = {"milliseconds": disk}
        cells = [f"{each:.2f}" for each in (*latency.values(), *disk.values())]
        rows.append((name, f"{append:.1f}", *cells))
    names = [*(f"p{percent}" for percent in _PERCENTS), "max"]
    header = ("records/s", "append us", *(f"ack {n} ms" for n in names), *(f"disk {n} ms" for n in names))
    table(header, rows)
    print()
    samples["client"] = round_trips(trips)
    results["client"] = {side: milliseconds(taken) for side, taken in samples["client"].items()}
    results["round_trip_ratio"] = results["client"]["ours"]["p50"] / results["client"]["stock"]["p50"]
    labels = {"stock": "round trip, stock", "ours": "round trip, ours", "ack": "ack, ours"}
    table(
        ("client", *(f"{name} ms" for name in names)),
        [(labels[side], *(f"{each:.2f}" for each in taken.values())) for side, taken in results["client"].items()],
    )
    save(
        given.json,
        parameters={"rates": rates, "seconds": seconds, "record_bytes": _GRAPH_BYTES, "round_trips": trips},
        samples=samples,
        results=results,
    )


def _thinned(samples: list[float]) -> list[float]:
    ordered = sorted(samples)
    step = max(1, len(ordered) // 1_000)
    return ordered[::step]


if __name__ == "__main__":
    main()
