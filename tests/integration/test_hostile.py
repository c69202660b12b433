from __future__ import annotations
import importlib, sys, time
import pytest
from distributed import wait
from support import fail_over, until
from dask_resilience import Client
from tests.integration.test_snapshots import SMALL, work_until_snapshot

SOURCE = """
import os, threading, time
_lock = threading.Lock()
class Tag:
    pass
def make(_):
    return Tag()
def locked(x):
    with _lock:
        return x
def f(x, gate):
    while not os.path.exists(gate):
        time.sleep(0.05)
    return x + 1
def flaky(x, gate, count):
    f(x, gate)
    with open(count, "a") as file:
        file.write("x")
    if os.path.getsize(count) < 3:
        raise ValueError("not yet")
    return x
"""

@pytest.fixture
def mod(tmp_path, monkeypatch):
    folder = tmp_path / "modules"
    folder.mkdir()
    path = folder / "hostile_mod.py"
    path.write_text(SOURCE)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    module = importlib.import_module("hostile_mod")
    module.path = str(path)
    yield module
    sys.path.remove(str(folder))
    sys.modules.pop("hostile_mod")


def inc(x):
    return x + 1


def test_chain_behind_an_uploaded_module(make_cluster, mod, gate):
    cluster = make_cluster(n_workers=2)
    with Client(cluster.address) as client:
        client.upload_file(mod.path)
        y = client.submit(mod.f, 1, str(gate), pure=False)
        z = client.submit(lambda x: x + 1, y, pure=False)
        w = client.submit(lambda x: x + 1, z, pure=False)
        v = client.submit(lambda x: x + 1, w, pure=False)
        time.sleep(1)
        fail_over(cluster, client)
        gate.touch()
        assert client.gather([y, z, w, v]) == [2, 3, 4, 5]


def test_retries_of_an_uploaded_module(make_cluster, mod, gate, tmp_path):
    cluster = make_cluster(n_workers=2)
    with Client(cluster.address) as client:
        client.upload_file(mod.path)
        y = client.submit(mod.flaky, 1, str(gate), str(tmp_path / "count"), pure=False, retries=5)
        time.sleep(1)
        fail_over(cluster, client)
        gate.touch()
        assert y.result() == 1


def test_resources_survive_a_snapshot(make_cluster, mod, gate):
    """The live scheduler had no trouble with it; the process of the snapshot loses what it runs on."""
    import dask
    cluster = make_cluster(n_workers=2, environment=SMALL)
    with Client(cluster.address) as client:
        client.upload_file(mod.path)
        y = client.submit(mod.f, 1, str(gate), pure=False, resources={"GPU": 1})
        work_until_snapshot(client)
        time.sleep(1)
        fail_over(cluster, client)
        key = y.key
        out = client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.tasks[key].resource_restrictions)
        assert out == {"GPU": 1}


def test_annotation_of_an_uploaded_module_and_a_snapshot(make_cluster, mod, gate):
    import dask
    cluster = make_cluster(n_workers=2, environment=SMALL)
    with Client(cluster.address) as client:
        client.upload_file(mod.path, load=False)
        with dask.annotate(tag=mod.Tag()):
            y = client.submit(mod.f, 1, str(gate), pure=False)
        work_until_snapshot(client)
        time.sleep(1)
        fail_over(cluster, client)
        gate.touch()
        assert y.result(timeout=30) == 2


def test_functions_of_an_uploaded_module_stay_references(make_cluster, mod, gate):
    cluster = make_cluster(n_workers=2, environment=SMALL)
    with Client(cluster.address) as client:
        client.upload_file(mod.path)
        x = client.submit(mod.f, 1, str(gate), pure=False)
        y = client.submit(mod.make, x, pure=False)
        work_until_snapshot(client)
        time.sleep(1)
        fail_over(cluster, client)
        gate.touch()
        assert type(y.result()) is mod.Tag


def test_a_lock_in_an_uploaded_module(make_cluster, mod, gate):
    cluster = make_cluster(n_workers=2, environment=SMALL)
    with Client(cluster.address) as client:
        client.upload_file(mod.path)
        events = []
        client.subscribe_topic("resilience", lambda event: events.append(event[1]))
        x = client.submit(mod.f, 1, str(gate), pure=False)
        y = client.submit(mod.locked, x, pure=False)
        while not events:
            client.gather([client.submit(len, ("x" * 8000, n), pure=False) for n in range(10)])
        assert events[0]["action"] == "snapshot", events
