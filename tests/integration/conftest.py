"""Clusters of real processes for the tests of this folder."""

from __future__ import annotations

import contextlib
import os
import uuid

import pytest
from support import RunLog

from dask_resilience import Client
from dask_resilience.chaos.processes import PRELOAD, Cluster, SchedulerProcess, WorkerProcess, free_port

#: A process that is killed leaves no coverage, so a measured cluster is asked to end.
MEASURED = any(name.startswith("COVERAGE_PROCESS") for name in os.environ)
#: Short graces, so that a test which loses a member for good does not wait for it as production would.
QUICK = {
    "DASK_RESILIENCE__FAILOVER__GRACE": "6s",
    "DASK_RESILIENCE__FAILOVER__CLIENT_GRACE": "6s",
    "DASK_RESILIENCE__FAILOVER__LEASE_TTL": "2s",
    "DASK_RESILIENCE__LEADER_POLL": "200ms",
}
#: Dask's memory manager removes copies in a while.
KEEP_COPIES = {"DASK_DISTRIBUTED__SCHEDULER__ACTIVE_MEMORY_MANAGER__START": "False"}


@pytest.fixture
def run_log(tmp_path):
    return RunLog(tmp_path / "runs")


@pytest.fixture
def gate(tmp_path):
    """A file that tasks may wait for; tests create it with `touch`."""
    return tmp_path / "gate"


@pytest.fixture
def make_cluster(tmp_path):
    """Start clusters that end with the test, whatever happens."""
    with contextlib.ExitStack() as stack:
        count = 0

        def make(*, environment=None, **kwargs):
            nonlocal count
            count += 1
            directory = tmp_path / f"cluster-{count}"
            directory.mkdir()
            kwargs.setdefault("resilient", True)
            cluster = Cluster(directory=directory, environment={**QUICK, **(environment or {})}, **kwargs)
            cluster.gentle = MEASURED
            return stack.enter_context(cluster)

        yield make


@pytest.fixture(scope="module")
def lasting_cluster(tmp_path_factory):
    """A cluster as below for a whole module: it and its journal grow old over the tests."""
    # Its schedulers are replaced in one test and serve in the next, so they do not count as left behind.
    lasting = {"RESILIENCE_TEST_RUN": uuid.uuid4().hex, **KEEP_COPIES}
    cluster = Cluster(
        n_workers=2, resilient=True, directory=tmp_path_factory.mktemp("cluster"), environment={**QUICK, **lasting}
    )
    cluster.gentle = MEASURED
    with cluster:
        yield cluster


@pytest.fixture
def cluster(make_cluster):
    """Two workers with one thread each, under nannies, and a scheduler with a journal."""
    return make_cluster(n_workers=2)


@pytest.fixture
def client(cluster):
    with Client(cluster.address) as client:
        yield client


class Starter:
    """Starts single members in a directory, resilient ones unless told otherwise."""

    def __init__(self, directory, stack):
        self._directory = directory
        self._stack = stack
        self._count = 0

    def _log(self):
        self._count += 1
        return self._directory / f"member-{self._count}.log"

    def scheduler(self, port=None, *, wait=True, environment=None, resilient=True, preload=PRELOAD, **kwargs):
        """A scheduler; without a preload it may still be resilient by its environment."""
        process = SchedulerProcess(
            free_port() if port is None else port,
            log=self._log(),
            preload=preload if resilient else None,
            environment={**QUICK, **(environment or {})},
            **kwargs,
        )
        process.resilient = resilient
        self._stack.enter_context(process)
        if wait:
            process.wait_ready()
        return process

    def worker(self, scheduler, *, wait=True, environment=None, resilient=True, preload=PRELOAD, nanny=True, **kwargs):
        """A worker of `scheduler`, a process or an address."""
        process = WorkerProcess(
            getattr(scheduler, "address", scheduler),
            log=self._log(),
            name=f"worker-{self._count}",
            nanny=nanny,
            preload=preload if resilient else None,
            environment={**QUICK, **(environment or {})},
            **kwargs,
        )
        self._stack.enter_context(process)
        if wait:
            process.wait_ready(scheduler)
        return process


@pytest.fixture
def start(tmp_path):
    """Start single members that end with the test."""
    with contextlib.ExitStack() as stack:
        yield Starter(tmp_path, stack)
