"""Every way in works: options, configuration, LocalCluster, `install`, and each kind of client on each scheduler."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import warnings
from concurrent.futures import CancelledError
from pathlib import Path
from urllib.parse import urlsplit

import distributed
import pytest
from distributed import fire_and_forget, wait
from support import resilience_status, until, validate

import dask_resilience
from dask_resilience import Client
from dask_resilience._distributed.scheduler_clients import PLAIN_CLIENT_NOTICE

BY_CONFIG = {
    "DASK_DISTRIBUTED__SCHEDULER__PRELOAD": '["dask_resilience.preload"]',
    "DASK_DISTRIBUTED__WORKER__PRELOAD": '["dask_resilience.preload"]',
    "DASK_DISTRIBUTED__NANNY__PRELOAD": '["dask_resilience.preload"]',
}


def replace(start, scheduler, **kwargs):
    scheduler.kill()
    return start.scheduler(scheduler.port, http_port=scheduler.http_port, **kwargs)


@pytest.mark.parametrize("nanny", [True, False], ids=["nanny", "no nanny"])
@pytest.mark.parametrize("how", ["option", "configuration"])
def test_schedulers_and_workers_by_preload(start, store, run_log, how, nanny):
    kwargs = {"store": str(store)}
    if how == "configuration":
        kwargs |= {"preload": None, "environment": BY_CONFIG}
    scheduler = start.scheduler(**kwargs)
    worker = start.worker(scheduler, nanny=nanny, **kwargs)
    with Client(scheduler.address) as client:
        futures = client.map(run_log.task(), range(5), pure=False)
        wait(futures)
        replace(start, scheduler, **kwargs)
        assert client.gather(futures) == [0, 2, 4, 6, 8]
        assert client.submit(run_log.task(), 5).result(timeout=20) == 10
        assert resilience_status(client)["tasks_adopted_in_memory"] == 5
    assert worker.alive
    run_log.assert_each_once(range(6))


# The default store


def test_the_default_store_is_named_and_found_again_on_the_same_port(start, tmp_path):
    temporary = {"TMPDIR": str(tmp_path)}
    scheduler = start.scheduler(environment=temporary)
    start.worker(scheduler, environment=temporary)
    directory = tmp_path / f"dask-resilience-{os.getuid()}" / f"scheduler-{scheduler.port}"
    assert f"Journal in {directory.as_uri()}" in scheduler.log.read_text()
    assert directory.stat().st_mode & 0o777 == 0o700
    with Client(scheduler.address) as client:
        future = client.submit(abs, -7)
        assert future.result(timeout=20) == 7
        replace(start, scheduler, environment=temporary)
        assert future.result(timeout=20) == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_store_of_a_scheduler_on_any_port_goes_with_its_clean_end(start, tmp_path, number):
    scheduler = start.scheduler(0, environment={"TMPDIR": str(tmp_path)}, wait=False)
    until(lambda: "serves" in scheduler.log.read_text())
    [directory] = (tmp_path / f"dask-resilience-{os.getuid()}").iterdir()
    assert directory.as_uri() in scheduler.log.read_text()
    os.kill(scheduler.pid, number)
    assert scheduler.wait(timeout_seconds=20) in (0, -number)
    assert not directory.exists()


def test_the_store_of_a_scheduler_that_was_killed_is_left_to_be_recovered(start, tmp_path):
    scheduler = start.scheduler(0, environment={"TMPDIR": str(tmp_path)}, wait=False)
    until(lambda: "serves" in scheduler.log.read_text())
    scheduler.kill()
    [directory] = (tmp_path / f"dask-resilience-{os.getuid()}").iterdir()
    assert (directory / "log").is_dir()


def test_a_configured_store_stays_at_a_clean_end(start, store):
    scheduler = start.scheduler(0, store=str(store), wait=False)
    until(lambda: "serves" in scheduler.log.read_text())
    os.kill(scheduler.pid, signal.SIGTERM)
    scheduler.wait(timeout_seconds=20)
    assert (store / "log").is_dir()


def test_a_standby_that_is_asked_to_end_ends_and_never_rules(start, store):
    active = start.scheduler(store=str(store))
    standby = start.scheduler(store=str(store), wait=False)
    standby.wait_standing_by()
    os.kill(standby.pid, signal.SIGTERM)
    assert standby.wait(timeout_seconds=10) in (0, -signal.SIGTERM)
    assert "Traceback" not in standby.log.read_text()
    assert active.is_ready()
    assert json.loads((store / "lease").read_text())["epoch"] == 1


# LocalCluster, in a program of its own

LOCAL = """
import logging, threading
from pathlib import Path
from urllib.parse import urlsplit
import dask
from dask.distributed import LocalCluster
from dask_resilience import Client

PRELOAD = ["dask_resilience.preload"]

def cluster(**kwargs):
    kwargs = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": None} | kwargs
    return LocalCluster(scheduler_kwargs={"preload": PRELOAD}, **kwargs)

def store(cluster):
    return Path(urlsplit(cluster.scheduler.resilience.store_url).path)

def story(error):
    lines = []
    while error is not None:
        lines.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return " | ".join(lines)

def main():
{body}

if __name__ == "__main__":
    with dask.config.set({"distributed.worker.preload": PRELOAD}):
        main()
    print("threads", sorted(t.name for t in threading.enumerate() if t.name in ("lease-keeper", "journal-writer")))
"""


def run_locally(tmp_path, body, *, environment=None):
    script = tmp_path / "program.py"
    script.write_text(LOCAL.replace("{body}", textwrap.indent(textwrap.dedent(body), "    ")))
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "TMPDIR": str(tmp_path), **(environment or {})},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Whatever happened, nothing of ours goes on in the program.
    assert "threads []" in done.stdout
    return done


def test_local_clusters_do_not_meet_and_take_their_stores_with_them(tmp_path):
    done = run_locally(
        tmp_path,
        """
        with cluster(n_workers=2) as one, cluster() as other, Client(one) as client, Client(other) as second:
            assert store(one) != store(other)
            assert store(one).is_dir() and store(other).is_dir()
            kept = client.submit(sum, [1, 2])
            assert kept.result() == 3
            assert second.submit(sum, [3, 4]).result() == 7
            assert kept.key in one.scheduler.tasks and kept.key not in other.scheduler.tasks
            links = client.run(lambda dask_worker: dask_worker.resilience.compass.epoch)
            assert list(links.values()) == [1, 1], links
            stores = [store(one), store(other)]
        assert not any(path.exists() for path in stores)
        """,
    )
    assert "ERROR" not in done.stderr, done.stderr
    assert list((tmp_path / f"dask-resilience-{os.getuid()}").iterdir()) == []


def test_a_local_cluster_in_one_process(tmp_path):
    run_locally(
        tmp_path,
        """
        with cluster(processes=False) as local, Client(local) as client:
            assert client.submit(sum, [1, 2]).result() == 3
            path = store(local)
        assert not path.exists()
        """,
    )


def test_a_local_cluster_that_cannot_keep_a_journal_does_not_start(tmp_path):
    done = run_locally(
        tmp_path,
        """
        for settings in ({"resilience.store": "ftp://host/prod"}, {"resilience.failover.grace": "soon"}):
            with dask.config.set(settings):
                try:
                    cluster()
                except Exception as error:
                    print(story(error))
                else:
                    raise AssertionError("it runs without a journal")
        with cluster() as local, Client(local) as client:
            assert client.submit(sum, [1, 2]).result() == 3
        """,
    )
    assert "StoreError: ftp://host/prod: the scheme 'ftp' is not supported" in done.stdout
    assert "ConfigError: resilience.failover.grace: expected a duration such as '3s'" in done.stdout


def test_a_local_cluster_that_cannot_recover_gives_the_lease_back(tmp_path):
    done = run_locally(
        tmp_path,
        """
        path = Path("{store}")
        with dask.config.set({"resilience.store": str(path)}):
            with cluster() as local, Client(local) as client:
                assert client.submit(sum, [1, 2]).result() == 3
            [segment] = path.glob("log/*/*")
            good = segment.read_bytes()
            segment.write_bytes(good[:200] + bytes([good[200] ^ 1]) + good[201:])
            try:
                cluster()
            except Exception as error:
                print(story(error))
            else:
                raise AssertionError("it runs without its journal")
            segment.write_bytes(good)
            with cluster() as local, Client(local) as client:
                assert client.submit(sum, [1, 2]).result() == 3
        """.replace("{store}", str(tmp_path / "store")),
    )
    assert re.search(r"JournalCorrupt: log/\d+/\d+ at byte \d+: .* Nothing was changed", done.stdout), done.stdout


# install


@pytest.mark.parametrize("nanny", [True, False], ids=["nanny", "no nanny"])
def test_install_on_a_running_stock_cluster(start, tmp_path, run_log, nanny):
    temporary = {"TMPDIR": str(tmp_path)}
    scheduler = start.scheduler(resilient=False, environment=temporary)
    worker = start.worker(scheduler, resilient=False, nanny=nanny)
    with Client(scheduler.address) as client:
        before = client.submit(run_log.task(), 0, pure=False)
        assert before.result(timeout=20) == 0
        with pytest.warns(UserWarning, match="Start the scheduler with the preload") as warned:
            told = dask_resilience.install(client)
        assert [w for w in warned if "from now on" in str(w.message)]
        assert told["limits"] in {str(w.message) for w in warned}
        assert told["epoch"] == 1
        assert told["store"].startswith(tmp_path.as_uri())
        assert before.result(timeout=20) == 0

        after = client.map(run_log.task(), range(1, 6), pure=False)
        wait(after, timeout=20)
        replace(start, scheduler, store=told["store"])
        assert client.gather(after) == [2, 4, 6, 8, 10]
        assert client.submit(run_log.task(), 6, pure=False).result(timeout=20) == 12
        # What was there before ends, and says so.
        until(lambda: before.status == "cancelled")
        with pytest.raises(CancelledError, match="Neither the journal nor a living worker had it"):
            before.result(timeout=5)
        validate(client)
        run_log.assert_each_once(range(7))

        if nanny:  # one that is started anew is resilient again
            client.restart_workers(list(client.scheduler_info()["workers"]))
            epochs = client.run(lambda dask_worker: dask_worker.resilience.compass.epoch)
            assert list(epochs.values()) == [2]
    assert worker.alive


def test_install_by_a_plain_client_serves_those_that_come_later(start, tmp_path, run_log):
    temporary = {"TMPDIR": str(tmp_path)}
    scheduler = start.scheduler(resilient=False, environment=temporary)
    start.worker(scheduler, resilient=False)
    with distributed.Client(scheduler.address) as plain:
        with pytest.warns(UserWarning, match="from now on"):
            told = dask_resilience.install(plain)
        with pytest.warns(UserWarning, match="from now on"):
            assert dask_resilience.install(plain) == told
        assert plain.submit(abs, -3).result(timeout=20) == 3
    with Client(scheduler.address) as client:
        future = client.submit(run_log.task(), 1)
        assert future.result(timeout=20) == 2
        replace(start, scheduler, store=told["store"])
        assert future.result(timeout=20) == 2
    run_log.assert_each_once([1])


def test_install_says_at_the_client_why_it_cannot(start):
    scheduler = start.scheduler(resilient=False, store="ftp://host/prod")
    with (
        distributed.Client(scheduler.address) as plain,
        pytest.raises(dask_resilience.errors.StoreError, match=r"Give resilience\.store a path") as refused,
    ):
        dask_resilience.install(plain)
    assert refused.value.url == "ftp://host/prod"


def test_install_refuses_a_store_whose_cluster_did_not_end(start, store):
    first = start.scheduler(store=str(store))
    first.kill()
    scheduler = start.scheduler(resilient=False, store=str(store))
    with distributed.Client(scheduler.address) as plain:
        with pytest.raises(dask_resilience.errors.StoreError, match="a cluster that did not end"):
            dask_resilience.install(plain)
        # The stock scheduler is as it was, and the store free for the one that can recover it.
        assert "resilience" not in plain.sync(plain.scheduler.identity)
        start.scheduler(store=str(store))


# Each kind of client on the other kind of scheduler


def test_a_plain_client_works_as_stock_and_is_told_once(start, store, run_log):
    scheduler = start.scheduler(store=str(store))
    start.worker(scheduler, store=str(store))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with distributed.Client(scheduler.address) as plain:
            futures = plain.map(run_log.task(), range(5), pure=False)
            assert plain.gather(futures) == [0, 2, 4, 6, 8]
            failing = plain.submit(lambda: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                failing.result(timeout=20)
            [data] = plain.scatter([41])
            assert plain.submit(lambda x: x + 1, data).result(timeout=20) == 42
            fire_and_forget(plain.submit(run_log.task(), 5, pure=False))
            until(lambda: len(run_log.counts()) == 6)
            until(lambda: any(str(w.message) == PLAIN_CLIENT_NOTICE for w in told))
            plain.submit(abs, -1).result(timeout=20)
            validate(plain)
    assert [w.category for w in told if str(w.message) == PLAIN_CLIENT_NOTICE] == [UserWarning]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with Client(scheduler.address) as client:
            client.submit(abs, -2).result(timeout=20)
    assert not [w for w in told if str(w.message) == PLAIN_CLIENT_NOTICE]


def test_what_a_plain_client_wants_ends_with_it_and_the_cluster_goes_on(start, store):
    scheduler = start.scheduler(store=str(store))
    start.worker(scheduler, store=str(store))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with distributed.Client(scheduler.address) as plain:
            future = plain.submit(abs, -1)
            assert future.result(timeout=20) == 1
            replacement = replace(start, scheduler, store=str(store))
            until(lambda: future.status == "cancelled")
            until(lambda: plain.status == "running")
            assert plain.submit(abs, -2).result(timeout=20) == 2
            validate(plain)
        until(lambda: (replacement.json("counts") or {}).get("tasks") == 0)


def test_the_client_on_a_plain_scheduler_is_a_plain_client(start, run_log, gate):
    scheduler = start.scheduler(resilient=False)
    start.worker(scheduler, resilient=False)
    with Client(scheduler.address) as client:
        futures = client.map(run_log.task(), range(5), pure=False)
        assert client.gather(futures) == [0, 2, 4, 6, 8]
        with pytest.raises(ZeroDivisionError):
            client.submit(lambda: 1 / 0).result(timeout=20)
        [data] = client.scatter([41])
        assert client.submit(lambda x: x + 1, data).result(timeout=20) == 42
        fire_and_forget(client.submit(run_log.task(), 5, pure=False))
        until(lambda: len(run_log.counts()) == 6)
        waiting = client.submit(run_log.task(gate=gate), 6, pure=False)
        until(lambda: len(run_log.counts()) == 7)
        client.cancel(waiting)
        assert waiting.status == "cancelled"
        gate.touch()
        assert not client._outbox
        validate(client)

        scheduler.kill()
        until(lambda: all(future.status == "cancelled" for future in futures))
        with pytest.raises(CancelledError):
            futures[0].result(timeout=5)
        start.scheduler(scheduler.port, http_port=scheduler.http_port, resilient=False)
        until(lambda: client.status == "running")
        assert client.scheduler_info()["workers"] == {}


def test_a_path_or_a_url_names_the_same_store(start, store):
    scheduler = start.scheduler(store=store.as_uri())
    start.worker(scheduler, store=str(store))
    with Client(scheduler.address) as client:
        future = client.submit(abs, -1)
        assert future.result(timeout=20) == 1
        told = replace(start, scheduler, store=str(store)).readiness()
        assert future.result(timeout=20) == 1
    assert urlsplit(told["store"]).path == str(store)
    assert json.loads((Path(store) / "leader").read_text())["epoch"] == 2
