"""The process that takes snapshots, with what users bring: modules, plugins, output, threads, large constants."""

from __future__ import annotations

import asyncio
import datetime as dt
import errno
import importlib
import os
import sys
from pathlib import Path

import dask
import pytest
from dask._expr import LLGExpr
from dask._task_spec import Task, TaskRef
from distributed.diagnostics.plugin import SchedulerUploadFile
from distributed.protocol import Serialized, serialize
from distributed.protocol.pickle import dumps
from journals import graph, replayed

from dask_resilience._distributed import scheduler_snapshot
from dask_resilience.errors import SnapshotRefused, StoreError
from dask_resilience.journal import records
from dask_resilience.plugins.snapshot_process import take_snapshot
from dask_resilience.plugins.snapshots import Snapshots
from dask_resilience.storage import names
from dask_resilience.storage.local_file import LocalAppendHandle
from dask_resilience.storage.local_store import LocalStore
from dask_resilience.storage.snapshots import list_snapshots, open_journal, read_snapshot
from tests.storage.acting import Ruler


@pytest.fixture
def write(store):
    """Write a journal; returns the store and its last LSN."""

    def written(*journal):
        local = LocalStore(store)
        ruler = Ruler(local)
        for record in journal:
            ruler.records[ruler.writer.append(record)] = record
        ruler.settled().release()
        return local, ruler.writer.durable_lsn

    return written


def tasks(client, functions, **options):
    """The record of a graph of independent tasks, by what each runs."""
    expr = LLGExpr({key: Task(key, function) for key, function in functions.items()})
    return graph(client, 1, {key: [] for key in functions}, expr_ser=Serialized(*serialize(expr)), **options)


def take(local, lsn):
    return asyncio.run(take_snapshot(local, lsn=lsn, epoch=1))


def take_by_process(local, lsn):
    """As a scheduler has it taken; returns the event that tells of it."""
    told = []
    durable = lambda: (lsn, 1 << 30)  # noqa: E731
    asyncio.run(Snapshots(local, epoch=1, after_bytes=1, grown_bytes=0, durable=durable, tell=told.append).take())
    return told[0]


def recover(local):
    snapshot, reader = open_journal(local)
    state = list(read_snapshot(local, snapshot)) if snapshot else []
    replay = replayed([logged.record for logged in reader.read()], snapshot=state)
    replay.read_again()
    return replay.scheduler.tasks


class Module:
    """A module that can be imported here, or not."""

    def __init__(self, folder, name, source):
        self.name, self.folder = name, str(folder)
        self.path = Path(folder, f"{name}.py")
        self.path.write_text(source)
        self.there()
        self.module = importlib.import_module(name)

    def there(self):
        importlib.invalidate_caches()
        sys.path.insert(0, self.folder)
        if hasattr(self, "module"):
            sys.modules[self.name] = self.module

    def away(self):
        # It may also lie where uploaded files go.
        sys.path[:] = [path for path in sys.path if not Path(path, f"{self.name}.py").exists()]
        sys.modules.pop(self.name, None)
        importlib.invalidate_caches()


@pytest.fixture
def brought(tmp_path):
    folder = tmp_path / "modules"
    folder.mkdir()
    module = Module(folder, "brought", "class Tag:\n    pass\n\n\ndef f(*_):\n    return 1\n")
    yield module
    module.away()


class TestModulesOfUsers:
    def test_what_is_read_again_is_as_it_would_have_been(self, brought):
        expr = LLGExpr({"x": Task("x", brought.module.f), "y": Task("y", brought.module.f, TaskRef("x"))})
        annotations = {"retries": 3, "workers": ["tcp://1.2.3.4:5"], "resources": {"GPU": 1}, "priority": 7}
        record = graph(
            "Client",
            1,
            {"x": [], "y": ["x"]},
            keys=["y"],
            expr_ser=Serialized(*serialize(expr)),
            annotations=annotations,
        )

        async def read(*, late):
            if late:
                brought.away()
            replay = replayed([record])
            if late:
                brought.there()
                replay.read_again()
            return {
                ts.key: (ts.state, ts.retries, ts.worker_restrictions, ts.resource_restrictions, ts.priority[:1])
                for ts in replay.scheduler.tasks.values()
            }

        assert asyncio.run(read(late=True)) == asyncio.run(read(late=False))

    def test_what_is_behind_a_graph_that_is_read_again_has_not_failed(self, brought):
        first = tasks("Client", {"x": brought.module.f})
        behind = graph("Client", 2, {"x": [], "y": ["x"], "z": ["y"]}, keys=["z"])

        async def main():
            brought.away()
            replay = replayed([first, behind])
            brought.there()
            replay.read_again()
            return {ts.key: (ts.state, ts.exception_blame) for ts in replay.scheduler.tasks.values()}

        assert asyncio.run(main()) == dict.fromkeys("xyz", ("released", None))

    def test_annotations_of_an_uploaded_module(self, write, brought):
        upload = SchedulerUploadFile(brought.path)
        plugin = records.PluginRegistered(kind="scheduler", name=upload.name, plugin=dumps(upload))
        tag = brought.module.Tag()
        brought.away()
        local, lsn = write(plugin, graph("Client", 1, {"a": []}, annotations={"tag": tag}))
        take(local, lsn)
        brought.away()

        async def main():
            return type(recover(local)["a"].annotations["tag"]).__name__

        assert asyncio.run(main()) == "Tag"

    def test_annotations_that_cannot_be_read_stop_no_recovery(self, write, brought, caplog):
        local, lsn = write(graph("Client", 1, {"a": []}, annotations={"tag": brought.module.Tag(), "retries": 2}))
        take(local, lsn)
        brought.away()

        async def main():
            found = recover(local)["a"]
            return found.state, found.retries

        assert asyncio.run(main()) == ("released", 2)
        assert "cannot be read here" in caplog.text

    def test_a_plugin_that_cannot_be_read_is_the_schedulers_business(self, write, brought):
        mine = records.PluginRegistered(kind="scheduler", name="mine", plugin=dumps(brought.module.Tag()))
        local, lsn = write(mine, graph("Client", 1, {"a": []}))
        brought.away()
        assert take(local, lsn)["tasks"] == 1

    def test_what_cannot_be_read_fails_nothing_else(self, write, brought):
        others = graph("Client", 1, {f"a-{n}": [] for n in range(100)})
        local, lsn = write(others, tasks("Client-b", {"x": brought.module.f}))
        take(local, lsn)
        brought.away()

        async def main():
            return [key for key, ts in recover(local).items() if ts.state == "erred"]

        assert asyncio.run(main()) == ["x"]

    def test_no_foreign_file_of_the_working_directory_is_imported(self, write, tmp_path, monkeypatch):
        local, lsn = write(graph("Client", 1, {"a": []}))
        (tmp_path / "random.py").write_text("raise RuntimeError('this is not the random of Python')\n")
        monkeypatch.chdir(tmp_path)
        assert take_by_process(local, lsn)["action"] == "snapshot"

    @pytest.mark.parametrize(
        "source",
        [
            "import atexit\natexit.register(print, 'bye')\n",
            "import threading\nthreading.Thread(target=threading.Event().wait).start()\n",
        ],
        ids=["output at the end", "thread that never ends"],
    )
    def test_what_a_module_does_spoils_nothing(self, write, tmp_path, source, monkeypatch):
        (tmp_path / "noisy.py").write_text("import sys\nif 'pytest' not in sys.modules:\n    " +
                                           source.replace("\n", "\n    ") + "\ndef f():\n    return 1\n")  # fmt: skip
        monkeypatch.syspath_prepend(str(tmp_path))
        local, lsn = write(tasks("Client", {"x": importlib.import_module("noisy").f}))
        sys.modules.pop("noisy")
        assert take_by_process(local, lsn)["action"] == "snapshot"


class TestFailures:
    def test_whatever_fails_is_told(self, write):
        local, lsn = write(graph("Client", 1, {"a": []}))
        # YAML reads a date as one, and Dask cannot pass it to a process.
        with dask.config.set({"mine.valid-until": dt.date(2026, 1, 1)}):
            assert take_by_process(local, lsn)["action"] == "snapshot-failed"
        assert take_by_process(local, lsn)["action"] == "snapshot"

    def test_a_snapshot_that_is_refused_leaves_nothing(self, write, monkeypatch):
        local, lsn = write(graph("Client", 1, {f"a-{n}": [] for n in range(3000)}))
        stock, calls = scheduler_snapshot._pickled_specs, []

        def fails_late(batch):
            calls.append(batch)
            if len(calls) > 4:
                raise SnapshotRefused("no")
            return stock(batch)

        monkeypatch.setattr(scheduler_snapshot, "_pickled_specs", fails_late)
        with pytest.raises(SnapshotRefused):
            take(local, lsn)
        assert local.list(names.SNAPSHOT_DATA) == list_snapshots(local) == []

    def test_a_full_disk_gets_its_room_back(self, write, monkeypatch):
        local, lsn = write(graph("Client", 1, {f"a-{n}": [] for n in range(3000)}))
        stock, calls = LocalAppendHandle.write, []

        def full(self, buffers):
            calls.append(buffers)
            if len(calls) > 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            stock(self, buffers)

        monkeypatch.setattr(LocalAppendHandle, "write", full)
        with pytest.raises(StoreError):
            take(local, lsn)
        assert local.list(names.SNAPSHOT_DATA) == []

    def test_what_killed_attempts_left_is_removed_by_the_next(self, write):
        local, lsn = write(graph("Client", 1, {"a": []}))
        for at in (7, 9):
            local.open_append(names.data_of_snapshot(names.snapshot(at, 1)), b"begun").close()
        others = names.data_of_snapshot(names.snapshot(8, 2))
        local.open_append(others, b"of another reign").close()
        done = take(local, lsn)
        assert local.list(names.SNAPSHOT_DATA) == sorted([names.data_of_snapshot(done["name"]), others])


class Model:
    """A large thing that the tasks of a graph share."""

    def __init__(self, nbytes):
        self.data = os.urandom(nbytes)

    def __call__(self):
        return 1


class TestLargeTasks:
    def test_what_a_graph_shares_is_written_once(self, write):
        model = Model(2_000_000)
        local, lsn = write(tasks("Client", {f"x-{n}": model for n in range(3000)}))
        assert take(local, lsn)["bytes"] < 3_000_000

        async def main():
            return len({id(ts.run_spec.func) for ts in recover(local).values()})

        assert asyncio.run(main()) == 1

    def test_large_things_of_their_own_are_not_pickled_all_together(self, write, monkeypatch):
        monkeypatch.setattr(scheduler_snapshot, "_BATCH_BYTES", 500_000)
        local, lsn = write(tasks("Client", {f"x-{n}": Model(100_000) for n in range(20)}))
        take(local, lsn)
        snapshot, _ = open_journal(local)
        batches = [r for r in read_snapshot(local, snapshot) if isinstance(r, records.SnapshotTasks)]
        assert [len(batch.keys) for batch in batches] == [4, 4, 4, 4, 4]
