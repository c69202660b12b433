"""Modules that clients brought by `upload_file`, over a failover and over snapshots."""

from __future__ import annotations

import importlib
import sys

import dask
import pytest
from support import all_durable, fail_over, resilience_status, until

from dask_resilience import Client
from tests.integration.test_snapshots import SMALL, work_until_snapshot

SOURCE = """
import os, threading, time

_lock = threading.Lock()

class Tag:
    pass

def wait_for(x, gate):
    while not os.path.exists(gate):
        time.sleep(0.05)
    return x + 1

def make(_):
    with _lock:
        return Tag()

def flaky(x, gate, count):
    wait_for(x, gate)
    with open(count, "a") as file:
        file.write("x")
    if os.path.getsize(count) < 3:
        raise ValueError("not yet")
    return x
"""


@pytest.fixture
def brought(tmp_path, monkeypatch):
    """A module that only this process can import."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "brought_along.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(folder))
    module = importlib.import_module("brought_along")
    yield module
    sys.modules.pop("brought_along")


def test_what_depends_on_it_goes_on(cluster, client, brought, gate, tmp_path):
    client.upload_file(brought.__file__)
    first = client.submit(brought.wait_for, 1, str(gate), pure=False)
    second = client.submit(lambda x: x + 1, first, pure=False)
    third = client.submit(lambda x: x + 1, second, pure=False)
    flaky = client.submit(brought.flaky, 1, str(gate), str(tmp_path / "count"), pure=False, retries=5)
    until(lambda: client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)) == 4)
    all_durable(client)
    fail_over(cluster, client)
    gate.touch()
    assert client.gather([first, second, third]) == [2, 3, 4]
    assert flaky.result(timeout=30) == 1


@pytest.mark.parametrize("load", [True, False])
def test_a_snapshot_refers_to_it(make_cluster, brought, gate, load):
    """Also where it has a lock, which cannot be pickled, and where it is more than a module of functions."""
    cluster = make_cluster(n_workers=2, environment=SMALL)
    with Client(cluster.address) as client:
        client.upload_file(brought.__file__, load=load)
        with dask.annotate(tag=brought.Tag()):
            first = client.submit(brought.wait_for, 1, str(gate), pure=False)
        second = client.submit(brought.make, first, pure=False)
        work_until_snapshot(client)
        fail_over(cluster, client)
        assert "Read the snapshot at LSN" in cluster.scheduler.log_tail(50)
        assert resilience_status(client)["tasks_lost"] == 0
        gate.touch()
        assert first.result(timeout=30) == 2
        assert type(second.result(timeout=30)) is brought.Tag
