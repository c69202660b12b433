"""A journal that is bounded by the state: snapshots on a live cluster, failovers from them, and what may go wrong."""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path

import pytest
from distributed import wait
from support import and_long, fail_over, resilience_status, until, validate

from dask_resilience import Client
from dask_resilience.failpoints import VARIABLE
from dask_resilience.storage import names, open_store
from dask_resilience.storage.snapshots import list_snapshots, read_marker
from dask_resilience.storage.store_check import check_store

#: Snapshots after 64 KiB, and segments as small.
SMALL = {"DASK_RESILIENCE__SNAPSHOT__AFTER": "64 KiB", "DASK_RESILIENCE__JOURNAL__SEGMENT_SIZE": "64 KiB"}
_BALLAST = "x" * 8_000


def last_snapshot(client):
    return resilience_status(client).get("snapshot") or {"lsn": 0}


def work_until_snapshot(client, *, count=1):
    """Submit work that is let go of, until `count` more snapshots were taken."""
    for _ in range(count):
        before = last_snapshot(client)["lsn"]
        while last_snapshot(client)["lsn"] == before:
            client.gather([client.submit(len, (_BALLAST, n), pure=False) for n in range(10)])


def test_the_journal_stays_as_long_as_the_state_is_large(make_cluster, run_log):
    cluster = make_cluster(n_workers=2, environment=SMALL)
    with Client(cluster.address) as client:
        kept = client.map(run_log.task(), range(50), pure=False)
        total = client.submit(sum, kept)
        wait(total)
        work_until_snapshot(client, count=5)
        store = open_store(cluster.store)
        older, newer = (read_marker(store, name) for name in list_snapshots(store))
        assert store.list(names.LOG)[0] == names.segment(older.epoch, older.seq)
        # Some 60 tasks, a few of them with their arguments, and never the thousands that are gone.
        assert max(older.nbytes, newer.nbytes) < 3 * 65_536
        fail_over(cluster, client)
        status = resilience_status(client)
        assert (status["tasks_adopted_in_memory"], status["tasks_to_recompute"], status["tasks_lost"]) == (51, 0, 0)
        assert "Read the snapshot at LSN" in cluster.scheduler.log_tail(50)
        assert client.gather(kept) == [2 * x for x in range(50)]
        assert total.result() == 2450
        assert check_store(store).findings == ()
        # And on from there, over a second failover and more snapshots.
        work_until_snapshot(client, count=3)
        fail_over(cluster, client)
        assert total.result() == 2450
        validate(client)
    run_log.assert_each_once(range(50))


def test_tasks_of_a_snapshot_run_as_their_graph_said(make_cluster, run_log, gate):
    """What a snapshot holds of tasks that have yet to run: functions, arguments, order, restrictions, retries."""
    cluster = make_cluster(n_workers=2, environment=SMALL)
    with Client(cluster.address) as client:
        [where, *_] = sorted(client.scheduler_info()["workers"])
        blockers = client.map(run_log.task(gate=gate), [100, 101], pure=False)
        until(lambda: len(run_log.counts()) == 2)
        run = run_log.task()
        bias = 7
        layer = client.map(lambda x: run(x) + bias, range(20), pure=False)
        tied = client.submit(lambda x, *_: (run(x), x)[1], 50, *layer, pure=False, workers=[where])
        failing = client.submit(lambda x: (run(x), 1 / 0), 60, pure=False, retries=1)
        lsn = last_snapshot(client)["lsn"]
        client.map(lambda n: _BALLAST + str(n), range(20), pure=False)
        for n in range(20):
            client.submit(len, _BALLAST, pure=False, priority=-n)
        until(lambda: last_snapshot(client)["lsn"] > lsn, what="a snapshot of what waits")
        fail_over(cluster, client)
        assert "Read the snapshot at LSN" in cluster.scheduler.log_tail(50)
        gate.touch()
        assert client.gather(layer) == [2 * x + bias for x in range(20)]
        assert tied.result(timeout=30) == 50
        assert list(client.who_has([tied])[tied.key]) == [where]
        assert isinstance(failing.exception(timeout=30), ZeroDivisionError)
        assert client.gather(blockers) == [200, 202]
        assert run_log.counts() == {str(x): 1 for x in (*range(20), 50, 100, 101)} | {"60": 2}
        validate(client)


@pytest.mark.parametrize(
    "name", and_long("snapshot.after-data", "snapshot.before-data", "snapshot.after-check", "snapshot.after-marker")
)
def test_a_snapshot_whose_process_dies_changes_nothing(make_cluster, run_log, name):
    cluster = make_cluster(n_workers=1, environment=SMALL | {VARIABLE: f"{name}=kill"})
    with Client(cluster.address) as client:
        events = []
        client.subscribe_topic("resilience", lambda event: events.append(event[1]))
        kept = client.map(run_log.task(), range(20), pure=False)
        wait(kept)
        failed = lambda: [e for e in events if e["action"] == "snapshot-failed"]  # noqa: E731
        while len(failed()) < 2:
            client.gather([client.submit(len, (_BALLAST, n), pure=False) for n in range(10)])
        assert "ended with -9" in failed()[0]["error"]
        cluster.environment.pop(VARIABLE)
        fail_over(cluster, client)
        assert client.gather(kept) == [2 * x for x in range(20)]
        # The next scheduler's are whole, and what the others left is gone.
        work_until_snapshot(client, count=3)
        store = open_store(cluster.store)
        assert len(store.list(names.SNAPSHOT_DATA)) == len(list_snapshots(store)) == 2
        assert not check_store(store).damaged
        fail_over(cluster, client)
        assert client.gather(kept) == [2 * x for x in range(20)]
        validate(client)
    run_log.assert_each_once(range(20))


@pytest.mark.parametrize("name", and_long("retention.before-segment=kill@2", "retention.after-marker=kill"))
def test_the_scheduler_dies_while_it_removes_what_a_snapshot_stands_for(make_cluster, run_log, name):
    cluster = make_cluster(n_workers=1, environment=SMALL | {VARIABLE: name})
    cluster.environment.pop(VARIABLE)
    with Client(cluster.address) as client:
        kept = client.map(run_log.task(), range(20), pure=False)
        wait(kept)
        futures = []
        while cluster.scheduler.alive:
            futures = [client.submit(len, (_BALLAST, n), pure=False) for n in range(10)]
            until(lambda: not cluster.scheduler.alive or all(f.done() for f in futures))  # noqa: B023
        cluster.restart_scheduler()
        cluster.wait_scheduler_ready()
        assert client.gather(futures) == [2] * 10
        assert client.gather(kept) == [2 * x for x in range(20)]
        work_until_snapshot(client, count=3)
        fail_over(cluster, client)
        assert client.gather(kept) == [2 * x for x in range(20)]
        store = open_store(cluster.store)
        assert len(store.list(names.SNAPSHOT_DATA)) == len(list_snapshots(store)) == 2
        validate(client)
    run_log.assert_each_once(range(20))


def test_a_damaged_snapshot_is_passed_over(make_cluster, run_log):
    cluster = make_cluster(n_workers=1, environment=SMALL)
    with Client(cluster.address) as client:
        kept = client.map(run_log.task(), range(20), pure=False)
        wait(kept)
        work_until_snapshot(client, count=3)
        cluster.kill_scheduler()
        [_, newest] = list_snapshots(open_store(cluster.store))
        data = Path(cluster.store) / names.data_of_snapshot(newest)
        damaged = bytearray(data.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        data.write_bytes(damaged)
        cluster.restart_scheduler()
        cluster.wait_scheduler_ready()
        assert client.gather(kept) == [2 * x for x in range(20)]
        assert "A snapshot is damaged and passed over" in cluster.scheduler.log_tail(50)
        validate(client)
    run_log.assert_each_once(range(20))


def test_a_standby_takes_over_from_snapshots_that_came_while_it_stood_by(make_cluster, run_log):
    cluster = make_cluster(n_workers=1, environment=SMALL)
    with Client(cluster.address) as client:
        kept = client.map(run_log.task(), range(20), pure=False)
        wait(kept)
        work_until_snapshot(client)
        standby = cluster.start_standby()
        work_until_snapshot(client, count=3)
        cluster.kill_scheduler()
        cluster.promote_standby()
        until(standby.is_ready)
        assert client.gather(kept) == [2 * x for x in range(20)]
        validate(client)
    run_log.assert_each_once(range(20))


def test_no_snapshot_is_taken_where_a_graph_cannot_be_read(make_cluster, tmp_path, monkeypatch):
    """Its tasks would be missing. The journal goes on, and the next scheduler has all of it."""
    module = tmp_path / "modules" / "only_there.py"
    module.parent.mkdir()
    module.write_text("def double(x):\n    return 2 * x\n")
    monkeypatch.syspath_prepend(str(module.parent))
    monkeypatch.setenv("PYTHONPATH", str(module.parent), prepend=os.pathsep)
    cluster = make_cluster(n_workers=1, environment=SMALL)
    with Client(cluster.address) as client:
        future = client.submit(import_module("only_there").double, 21, pure=False)
        assert future.result() == 42
        events = []
        client.subscribe_topic("resilience", lambda event: events.append(event[1]))
        module.rename(module.with_suffix(".away"))
        while not events:
            client.gather([client.submit(len, (_BALLAST, n), pure=False) for n in range(10)])
        assert events[0]["action"] == "snapshot-failed"
        assert "only_there" in events[0]["error"]
        module.with_suffix(".away").rename(module)
        fail_over(cluster, client)
        assert future.result() == 42
        work_until_snapshot(client)
        fail_over(cluster, client)
        assert future.result() == 42


def test_snapshots_can_be_switched_off(make_cluster):
    cluster = make_cluster(n_workers=1, environment=SMALL | {"DASK_RESILIENCE__SNAPSHOT__AFTER": "null"})
    with Client(cluster.address) as client:
        client.gather([client.submit(len, (_BALLAST, n), pure=False) for n in range(50)])
        assert "snapshot" not in resilience_status(client)
        state = client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.resilience.snapshots is None)
        assert state


def test_readiness_tells_of_the_last_snapshot(make_cluster):
    cluster = make_cluster(n_workers=1, environment=SMALL)
    with Client(cluster.address) as client:
        work_until_snapshot(client)
        told = cluster.scheduler.readiness()["snapshot"]
        assert told["lsn"] == last_snapshot(client)["lsn"]
        assert json.dumps(told)
