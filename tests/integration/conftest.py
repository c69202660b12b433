"""Clusters of real processes for the tests of this folder."""

from __future__ import annotations

import contextlib

import pytest
from support import RunLog

from dask_resilience import Client
from dask_resilience.chaos.processes import Cluster

#: Short graces, so that a test which loses a member for good does not wait for it as production would.
QUICK = {
    "DASK_RESILIENCE__FAILOVER__GRACE": "6s",
    "DASK_RESILIENCE__FAILOVER__CLIENT_GRACE": "6s",
    "DASK_RESILIENCE__FAILOVER__LEASE_TTL": "2s",
    "DASK_RESILIENCE__LEADER_POLL": "200ms",
}


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
            return stack.enter_context(
                Cluster(directory=directory, environment={**QUICK, **(environment or {})}, **kwargs)
            )

        yield make


@pytest.fixture
def cluster(make_cluster):
    """Two workers with one thread each, under nannies, and a scheduler with a journal."""
    return make_cluster(n_workers=2)


@pytest.fixture
def client(cluster):
    with Client(cluster.address) as client:
        yield client
