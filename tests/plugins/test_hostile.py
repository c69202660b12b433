"""Hostile tests: each shows a defect."""
from __future__ import annotations

import asyncio, datetime, os, subprocess, sys, textwrap, time
from pathlib import Path

import dask
import pytest
from distributed.protocol.pickle import dumps
from journals import described, graph, replayed

from dask_resilience.errors import SnapshotRefused, StoreError
from dask_resilience.journal import records
from dask_resilience.plugins.snapshot_process import take_snapshot
from dask_resilience.plugins.snapshots import Snapshots
from dask_resilience.storage.local_store import LocalStore
from dask_resilience.storage.snapshots import open_journal, read_snapshot, list_snapshots
from tests.storage.acting import Ruler


def write(path, *recs):
    local = LocalStore(path)
    ruler = Ruler(local)
    for record in recs:
        ruler.records[ruler.writer.append(record)] = record
    ruler.settled().release()
    return local, ruler.writer.durable_lsn


def recovered(store):
    snapshot, reader = open_journal(store)
    state = list(read_snapshot(store, snapshot)) if snapshot else []
    return replayed([logged.record for logged in reader.read()], snapshot=state)


def snapshots_of(local, lsn, told, after=1):
    return Snapshots(local, epoch=1, after_bytes=after, grown_bytes=0, durable=lambda: (lsn, 10**9), tell=told.append)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module that an upload_file brought: not importable, except for its pickles here."""
    import importlib
    folder = tmp_path / "mods"
    folder.mkdir()
    (folder / "brought.py").write_text("class Tag:\n    pass\n\ndef f(*a):\n    return 1\n")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    brought = importlib.import_module("brought")
    class Away:
        tag = brought.Tag()
        mod = brought
        def away(self):
            while str(folder) in sys.path:
                sys.path.remove(str(folder))
            sys.modules.pop("brought", None)
            for p in list(sys.path):
                if Path(p, "brought.py").exists():
                    sys.path.remove(p)
            importlib.invalidate_caches()
        def back(self):
            sys.path.insert(0, str(folder))
            sys.modules["brought"] = brought
    out = Away()
    yield out
    out.away()


def test_what_is_read_again_keeps_its_annotations(store, module):
    """Not of snapshots alone: retries and restrictions of a graph that needs an uploaded module."""
    from dask._expr import LLGExpr
    from dask._task_spec import Task, TaskRef
    from distributed.protocol import Serialized, serialize
    from distributed.diagnostics.plugin import SchedulerUploadFile
    upload = SchedulerUploadFile(Path(module.mod.__file__))
    expr = LLGExpr({"x": Task("x", module.mod.f), "y": Task("y", module.mod.f, TaskRef("x"))})
    ann = {"retries": 3, "workers": ["tcp://1.2.3.4:5"], "resources": {"GPU": 1}, "priority": 7}
    g = graph("Client", 1, {"x": [], "y": ["x"]}, keys=["y"], expr_ser=Serialized(*serialize(expr)), annotations=ann)

    def seen(r):
        return {ts.key: (ts.retries, ts.worker_restrictions, ts.resource_restrictions, ts.priority[:1]) for ts in r.scheduler.tasks.values()}

    async def main(later):
        if later:
            module.away()
        r = replayed([g])
        if later:
            module.back()
            r.read_again()
        return seen(r)

    assert asyncio.run(main(True)) == asyncio.run(main(False))


@pytest.mark.parametrize("how", ["graph", "layer"])
def test_annotations_of_an_uploaded_module(store, module, how, monkeypatch):
    from distributed.diagnostics.plugin import SchedulerUploadFile
    upload = SchedulerUploadFile(Path(module.mod.__file__))
    plug = records.PluginRegistered(kind="scheduler", name=upload.name, plugin=dumps(upload))
    g = graph("Client", 1, {"a": [], "b": ["a"]}, keys=["b"], annotations={"tag": module.tag})
    module.away()
    local, lsn = write(store, plug, g)

    async def whole():
        r = recovered(local)  # does not raise: the graph is read again when plugins run
        return len(r.scheduler.tasks)

    assert asyncio.run(whole())
    asyncio.run(take_snapshot(local, lsn=lsn, epoch=1))
    module.away()

    with pytest.raises(ImportError):
        import brought

    async def main():
        r = recovered(local)
        print({ts.key: ts.annotations for ts in r.scheduler.tasks.values()})

    asyncio.run(main())


def test_config_with_a_date_ends_snapshots_silently(store):
    local, lsn = write(store, graph("Client", 1, {"a": []}))
    told = []
    with dask.config.set({"mine.valid-until": datetime.date(2026, 1, 1)}):
        asyncio.run(snapshots_of(local, lsn, told).take())
    assert told


def test_a_failed_snapshot_leaves_nothing(store):
    class Unpicklable:
        def __reduce__(self):
            raise TypeError("no")
    gs = [graph("Client", n + 1, {f"k{n}-{i}": [] for i in range(1000)}) for n in range(3)]
    local, lsn = write(store, *gs)
    from dask_resilience._distributed import scheduler_snapshot as ss
    stock, calls = ss._pickled_specs, []
    def fails_late(batch):
        calls.append(1)
        if len(calls) % 3 == 0:
            raise SnapshotRefused("no")
        return stock(batch)
    ss._pickled_specs = fails_late
    try:
        for at in range(1, lsn + 1):
            try:
                asyncio.run(take_snapshot(local, lsn=at, epoch=1))
            except SnapshotRefused:
                pass
    finally:
        ss._pickled_specs = stock
    left = local.list("snapshot-data/")
    marked = list_snapshots(local)
    assert len(left) == len(marked), (left, marked)


def test_a_plugin_that_cannot_be_read_here(store, module):
    p = records.PluginRegistered(kind="scheduler", name="mine", plugin=dumps(module.tag))
    local, lsn = write(store, p, graph("Client", 1, {"a": []}))
    module.away()
    assert asyncio.run(take_snapshot(local, lsn=lsn, epoch=1))["tasks"] == 1


def test_one_unreadable_graph_does_not_fail_others(store, module):
    from dask._expr import LLGExpr
    from dask._task_spec import Task
    from distributed.protocol import Serialized, serialize
    expr = LLGExpr({"x": Task("x", module.mod.f)})
    bad = graph("Client-b", 1, {"x": []}, expr_ser=Serialized(*serialize(expr)))
    local, lsn = write(store, graph("Client", 1, {f"a{n}": [] for n in range(100)}), bad)
    module.away()

    async def errs():
        r = recovered(local)
        r.read_again()
        return {ts.key for ts in r.scheduler.tasks.values() if ts.state == "erred"}

    assert asyncio.run(errs()) == {"x"}
    module.back()
    asyncio.run(take_snapshot(local, lsn=lsn, epoch=1))
    module.away()
    assert asyncio.run(errs()) == {"x"}


def test_shared_constant_is_written_once(store):
    big = os.urandom(2_000_000)

    class Model:
        def __init__(self): self.data = big
        def __call__(self, *a): return 1
        def __dask_tokenize__(self): return "model"

    model = Model()
    from dask._expr import LLGExpr
    from dask._task_spec import Task
    from distributed.protocol import Serialized, serialize
    expr = LLGExpr({f"x{n}": Task(f"x{n}", model, 1) for n in range(5_000)})
    local, lsn = write(store, graph("Client", 1, {f"x{n}": [] for n in range(5_000)}, expr_ser=Serialized(*serialize(expr))))
    log = sum(f.stat().st_size for f in (store / "log").rglob("*") if f.is_file())
    done = asyncio.run(take_snapshot(local, lsn=lsn, epoch=1))
    assert done["bytes"] < 2 * log, (done, log)


CWD = "raise RuntimeError('foreign code from the working directory ran')\n"

def test_a_file_in_the_working_directory_is_not_imported(store, tmp_path, monkeypatch):
    local, lsn = write(store, graph("Client", 1, {"a": []}))
    (tmp_path / "random.py").write_text(CWD)
    monkeypatch.chdir(tmp_path)
    told = []
    asyncio.run(snapshots_of(local, lsn, told).take())
    assert told[0]["action"] == "snapshot", told


@pytest.mark.parametrize("what", ["import atexit; atexit.register(print, 'bye')", "import atexit; atexit.register(print, 0)"])
def test_output_of_a_users_module(store, tmp_path, monkeypatch, what):
    (tmp_path / "noisy_mod.py").write_text(what + "\ndef f(*a): return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import importlib
    m = importlib.import_module("noisy_mod")
    from dask._expr import LLGExpr
    from dask._task_spec import Task
    from distributed.protocol import Serialized, serialize
    expr = LLGExpr({"x": Task("x", m.f)})
    local, lsn = write(store, graph("Client", 1, {"x": []}, expr_ser=Serialized(*serialize(expr))))
    sys.modules.pop("noisy_mod")
    told = []
    asyncio.run(snapshots_of(local, lsn, told).take())
    assert told[0]["action"] == "snapshot", (told, list_snapshots(local))


def test_a_users_thread_does_not_hold_the_process(store, tmp_path, monkeypatch):
    (tmp_path / "threaded_mod.py").write_text("import threading, time\nthreading.Thread(target=time.sleep, args=(8,)).start()\ndef f(*a): return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import importlib
    m = importlib.import_module("threaded_mod")
    from dask._expr import LLGExpr
    from dask._task_spec import Task
    from distributed.protocol import Serialized, serialize
    expr = LLGExpr({"x": Task("x", m.f)})
    local, lsn = write(store, graph("Client", 1, {"x": []}, expr_ser=Serialized(*serialize(expr))))
    sys.modules.pop("threaded_mod")
    told = []
    async def main():
        await asyncio.wait_for(snapshots_of(local, lsn, told).take(), 7)
    asyncio.run(main())
    assert told[0]["action"] == "snapshot", told
