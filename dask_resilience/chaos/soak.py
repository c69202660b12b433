"""Random kills of the scheduler under load, judged by an oracle.

``python -m dask_resilience.chaos.soak --kills 100 --seed 7`` prints what it did and ends with one JSON line. It exits
with 0 only if every result, every future, every count of runs and Dask's own `validate_state` were right after each
kill.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dask_resilience.chaos.processes import Cluster
from dask_resilience.chaos.traffic import Expectation, Traffic
from dask_resilience.client import Client

#: How long a result may take after the last kill.
_RESULT_SECONDS = 90.0


@dataclass(slots=True, kw_only=True)
class Report:
    """What a soak found.

    Parameters
    ----------
    seed, kills, worker_kills, operations
        What was done.
    failover_seconds
        From each kill of the scheduler until its replacement was ready.
    violations
        What was not as expected, in words.
    """

    seed: int
    kills: int = 0
    worker_kills: int = 0
    operations: int = 0
    failover_seconds: list[float] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)


def soak(
    *, kills: int, seed: int, worker_kills: int = 0, n_workers: int = 2, directory: Path | None = None, say: Any = print
) -> Report:
    """Run seeded traffic while the scheduler is killed again and again.

    Parameters
    ----------
    kills
        How often the scheduler dies.
    seed
        Of traffic, moments and victims.
    worker_kills
        How many of the rounds also kill a worker, which excuses second runs.
    n_workers
        How many workers.
    directory
        Where logs and the store stay; a temporary one by default.
    say
        Called with a line for people.

    Returns
    -------
    Report
    """
    chance = random.Random(seed)
    report = Report(seed=seed)
    victims = set(chance.sample(range(kills), worker_kills))
    directory = directory or Path(tempfile.mkdtemp(prefix="soak-"))
    with (
        Cluster(n_workers=n_workers, nthreads=2, resilient=True, warm_replacement=True, directory=directory) as cluster,
        Client(cluster.address) as client,
    ):
        traffic = Traffic(client, directory / "runs", seed=seed)
        for round_number in range(kills):
            until = time.monotonic() + chance.uniform(0.05, 1.5)
            with concurrent.futures.ThreadPoolExecutor(1) as thread:
                sending = thread.submit(_send_until, traffic, until + chance.uniform(-0.3, 0.3))
                time.sleep(max(0.0, until - time.monotonic()))
                if round_number in victims:
                    cluster.kill_worker(chance.randrange(n_workers))
                    report.worker_kills += 1
                killed = time.monotonic()
                cluster.kill_scheduler()
                report.kills += 1
                cluster.restart_scheduler()
                cluster.wait_scheduler_ready()
                report.failover_seconds.append(round(time.monotonic() - killed, 3))
                sending.result(timeout=_RESULT_SECONDS)
            if round_number in victims:
                cluster.add_worker()
            cluster.park_replacement()
            _check_now(client, traffic, report, round_number)
            seconds, done = report.failover_seconds[-1], len(traffic.expectations)
            say(f"kill {report.kills}/{kills}: back in {seconds} s, {done} operations")
        report.operations = len(traffic.expectations)
        _check_results(traffic.expectations, report)
        _await_forgotten(traffic)
        _check_runs(traffic, report)
        _check_now(client, traffic, report, kills)
    return report


def _send_until(traffic: Traffic, deadline: float) -> None:
    while True:
        traffic.step()
        if time.monotonic() >= deadline:
            return
        time.sleep(0.02)


def _check_now(client: Client, traffic: Traffic, report: Report, round_number: int) -> None:
    """After each kill: Dask's own check, and no future may be cancelled or lost."""
    try:
        client.run_on_scheduler(_validate)  # type: ignore[no-untyped-call]
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
        report.violations.append(f"round {round_number}: validate_state: {error!r}")
    for expectation in traffic.expectations:
        status = expectation.future.status if expectation.future is not None else "none"
        if expectation.excused and report.worker_kills:
            continue
        if status in ("cancelled", "lost") or (status == "error" and not expectation.fails):
            report.violations.append(f"round {round_number}: {expectation.operation} is {status}")


def _validate(dask_scheduler: Any) -> None:
    dask_scheduler.validate_state()


def _check_results(expectations: Sequence[Expectation], report: Report) -> None:
    deadline = time.monotonic() + _RESULT_SECONDS
    for expectation in expectations:
        if expectation.future is None or (expectation.excused and report.worker_kills):
            continue
        left = max(1.0, deadline - time.monotonic())
        try:
            found = expectation.future.result(timeout=left)
            right = not expectation.fails and found == expectation.result
        except ValueError as error:
            found, right = error, expectation.fails and str(error) == expectation.result
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
            found, right = error, False
        if not right:
            report.violations.append(f"{expectation.operation}: got {found!r}, expected {expectation.result!r}")


def _await_forgotten(traffic: Traffic) -> None:
    """What was fired and forgotten has no future to wait for, only its run."""
    waiting = {tag for e in traffic.expectations if e.future is None for tag, (least, _) in e.runs.items() if least}
    deadline = time.monotonic() + _RESULT_SECONDS
    while waiting - traffic.runs().keys() and time.monotonic() < deadline:
        time.sleep(0.05)


def _check_runs(traffic: Traffic, report: Report) -> None:
    runs = traffic.runs()
    for expectation in traffic.expectations:
        if expectation.excused and report.worker_kills:
            continue
        for tag, (least, most) in expectation.runs.items():
            allowed = most + report.worker_kills
            if not least <= runs[tag] <= allowed:
                report.violations.append(f"{tag} ran {runs[tag]} times, expected {least} to {allowed}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--worker-kills", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args(arguments)
    report = soak(
        kills=options.kills,
        seed=options.seed,
        worker_kills=options.worker_kills,
        n_workers=options.workers,
        directory=options.directory,
    )
    for violation in report.violations:
        sys.stderr.write(f"VIOLATION {violation}\n")
    sys.stdout.write(json.dumps(asdict(report)) + "\n")
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
