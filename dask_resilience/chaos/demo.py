"""``python -m dask_resilience.chaos.demo``: a cluster loses its scheduler twice and a worker once, and goes on.

A real job (see `pipeline`) runs on a cluster of processes of this host. At a fifth of the work the scheduler is killed,
in the middle a worker with its nanny, at three quarters the scheduler again. A dead scheduler is replaced at
the same address at once, as systemd or Kubernetes would. The same job on stock Dask, with one kill, is shown
beside it. ``--store s3://bucket/prefix`` or ``gs://bucket/prefix`` keeps the journal there, reached as
``DASK_RESILIENCE__STORAGE_OPTIONS`` and the configuration of fsspec say. The last line of stdout is one JSON object.
The exit code is 0 when every result is the one that pandas computes and nothing ran twice because of the scheduler, and
2 when the store is of no use.
"""

from __future__ import annotations

import argparse
import json
import logging
import secrets
import shutil
import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
import distributed
from rich.console import Console
from rich.table import Table

from dask_resilience.chaos.drive import Fault, Outcome, Run
from dask_resilience.chaos.flights import FlightFiles, load_tables, write_files
from dask_resilience.chaos.pipeline import expected_results
from dask_resilience.chaos.processes import Cluster
from dask_resilience.chaos.progress import make_board
from dask_resilience.chaos.run_log import RunLog
from dask_resilience.errors import ResilienceError
from dask_resilience.settings import Settings
from dask_resilience.storage import open_store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dask_resilience.storage.object_store import ConditionalStore

_PARTITIONS = 24
_RESILIENT_FAULTS = (
    Fault(after=0.2, victim="scheduler"),
    Fault(after=0.5, victim="worker"),
    Fault(after=0.75, victim="scheduler"),
)
_STOCK_FAULTS = _RESILIENT_FAULTS[:1]
_RESILIENT_PATIENCE_SECONDS = 40.0
_STOCK_PATIENCE_SECONDS = 20.0
#: A result stays where it was computed: the count of repeated runs relies on it (see `run_log`).
_ENVIRONMENT = {"DASK_DISTRIBUTED__SCHEDULER__ACTIVE_MEMORY_MANAGER__START": "False"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What the runs share.

    Parameters
    ----------
    console
        Where they show themselves.
    directory
        Where data, logs and stores go.
    files, expected
        The data, and the results that pandas gets from it.
    n_workers
        Worker processes of each cluster.
    store
        Of the resilient cluster; None for one in the directory.
    """

    console: Console
    directory: Path
    files: FlightFiles
    expected: dict[str, Any]
    n_workers: int
    store: str | None

    def run_stock(self) -> Outcome:
        """Run the job on stock Dask, with one kill."""
        with Cluster(
            n_workers=self.n_workers,
            resilient=False,
            supervise=True,
            directory=self.directory / "stock",
            environment=_ENVIRONMENT,
        ) as cluster:
            return self._run(cluster, distributed.Client, _STOCK_FAULTS, _STOCK_PATIENCE_SECONDS)

    def run_resilient(self, *, replacement: str) -> Outcome:
        """Run the job on the resilient cluster, with all kills.

        Parameters
        ----------
        replacement
            ``restart``, ``warm`` or ``standby``: what follows a dead scheduler.
        """
        from dask_resilience import Client

        with ExitStack() as stack:
            cluster = stack.enter_context(
                Cluster(
                    n_workers=self.n_workers,
                    resilient=True,
                    supervise=True,
                    warm_replacement=replacement == "warm",
                    directory=self.directory / "resilient",
                    environment=_ENVIRONMENT | ({} if self.store is None else {"DASK_RESILIENCE__STORE": self.store}),
                )
            )
            if replacement == "standby":
                for _ in range(sum(fault.victim == "scheduler" for fault in _RESILIENT_FAULTS)):
                    cluster.start_standby()
            stack.enter_context(dask.config.set({"resilience.store": cluster.store}))
            return self._run(cluster, Client, _RESILIENT_FAULTS, _RESILIENT_PATIENCE_SECONDS)

    def _run(self, cluster: Cluster, client_type: Any, faults: Sequence[Fault], patience_seconds: float) -> Outcome:
        title = "resilient" if cluster.resilient else "stock Dask"
        with client_type(cluster.address) as client, make_board(title, self.console) as board:
            run = Run(
                cluster=cluster,
                client=client,
                files=self.files,
                log=RunLog(cluster.directory / "runs.jsonl"),
                board=board,
                faults=faults,
                patience_seconds=patience_seconds,
            )
            return run.carry_out(self.expected)


def _comparison(outcomes: dict[str, Outcome]) -> Table:
    table = Table(title="The same job")
    table.add_column("")
    for title in outcomes:
        table.add_column(title, overflow="fold")
    rows = {
        "scheduler kills": lambda outcome: str(outcome.kills["scheduler"]),
        "worker kills": lambda outcome: str(outcome.kills["worker"]),
        "tasks finished": lambda outcome: f"{outcome.done} of {outcome.total}",
        "workers alive at the end": lambda outcome: str(outcome.workers),
        "results equal pandas'": lambda outcome: "yes" if outcome.result_equal else "no",
        "ran twice because of the scheduler": lambda outcome: str(outcome.repeated),
        "ran again because a worker died": lambda outcome: str(outcome.repeated_for_worker),
        "ready again after": lambda outcome: ", ".join(f"{s:.2f} s" for s in outcome.ready_seconds) or "-",
        "results again after": lambda outcome: ", ".join(f"{s:.2f} s" for s in outcome.failover_seconds) or "never",
        "seconds": lambda outcome: f"{outcome.seconds:.1f}",
        "error": lambda outcome: outcome.error or "-",
    }
    for label, cell in rows.items():
        table.add_row(label, *map(cell, outcomes.values()))
    return table


def _summary(outcome: Outcome) -> str:
    return json.dumps(
        {
            "result_equal": outcome.result_equal,
            "scheduler_kills": outcome.kills["scheduler"],
            "worker_kills": outcome.kills["worker"],
            "tasks": outcome.total,
            "tasks_run_twice_because_of_the_scheduler": outcome.repeated,
            "failover_seconds": outcome.failover_seconds,
        }
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dask_resilience.chaos.demo", description=__doc__)
    parser.add_argument("--workers", type=int, default=3, help="worker processes, at least 2 (default: 3)")
    parser.add_argument("--no-stock", action="store_true", help="leave out the run on stock Dask")
    parser.add_argument("--keep-logs", action="store_true", help="keep logs, stores and data, and say where")
    parser.add_argument(
        "--store",
        metavar="URL",
        help="keep the journal below s3://bucket/prefix, gs://bucket/prefix or a directory (default: a temporary one)",
    )
    parser.add_argument(
        "--replacement",
        choices=("restart", "warm", "standby"),
        default="restart",
        help="what follows a dead scheduler: a new process at the same address; one with everything imported; "
        "or standbys on other ports that wait for the lease (default: restart)",
    )
    arguments = parser.parse_args(argv)
    if arguments.workers < 2:
        parser.error("--workers: one worker is killed, so at least 2 are needed")
    return arguments


def _open_store(url: str, *, existing: bool) -> ConditionalStore:
    return open_store(url, existing=existing, storage_options=Settings.load().storage_options)


def _fresh_store(url: str) -> str:
    """A place of this run's own below a URL, found to be of use: an earlier run's journal would be recovered."""
    store = _open_store(f"{url.rstrip('/')}/demo-{secrets.token_hex(6)}", existing=False)
    store.close()
    return store.url


def _remove_store(url: str) -> None:
    # What is left of a demo does no harm, and its result has been told.
    with suppress(ResilienceError):
        store = _open_store(url, existing=True)
        for name in store.list(""):
            store.delete(name)
        store.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return 0 when the results are right and nothing ran twice because of the scheduler."""
    arguments = _arguments(argv)
    console = Console()
    logging.disable(logging.CRITICAL)  # lost connections are what is shown here
    try:
        store = None if arguments.store is None else _fresh_store(arguments.store)
    except ResilienceError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    directory = Path(tempfile.mkdtemp(prefix="dask-resilience-demo-"))
    try:
        tables = load_tables()
        console.print(f"{len(tables.flights):,} flights; pandas computes what must come out", highlight=False)
        if store is not None:
            console.print(f"the journal is in {store}", soft_wrap=True, highlight=False)
        files = write_files(tables, directory / "data", partitions=_PARTITIONS)
        stage = Stage(
            console=console,
            directory=directory,
            files=files,
            expected=expected_results(tables, files),
            n_workers=arguments.workers,
            store=store,
        )
        outcomes = {} if arguments.no_stock else {"stock Dask": stage.run_stock()}
        resilient = outcomes["dask-resilience"] = stage.run_resilient(replacement=arguments.replacement)
        console.print(_comparison(outcomes))
        for line in (resilient.differing or [])[:10]:
            console.print(f"differs: {line}", markup=False, highlight=False)
    finally:
        if arguments.keep_logs:
            console.print(f"logs: {directory}", soft_wrap=True, highlight=False)
        else:
            shutil.rmtree(directory, ignore_errors=True)
            if store is not None:
                _remove_store(store)
    sys.stdout.write(_summary(resilient) + "\n")
    sys.stdout.flush()
    return 0 if resilient.result_equal and resilient.repeated == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
