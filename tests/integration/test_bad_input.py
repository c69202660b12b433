"""Each mistake and each failure of the store ends in a message that says what to do, and in an undamaged store."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from pathlib import Path

import distributed
import google_crc32c
import pytest
from distributed import wait
from support import until, validate

from dask_resilience import Client
from dask_resilience.chaos.processes import free_port
from dask_resilience.errors import ConfigError, GraphUnreadable, StoreError
from dask_resilience.journal.segment import HEADER_BYTES
from dask_resilience.journal.verify import verify_store
from dask_resilience.storage import names, open_store
from dask_resilience.storage.leadership import leader

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts and other owners need root")


@pytest.fixture
def journal(start, store):
    """A store with a sound journal, whose scheduler was killed while a result was wanted."""
    scheduler = start.scheduler(store=str(store))
    worker = start.worker(scheduler, store=str(store))
    with Client(scheduler.address) as client:
        future = client.submit(abs, -1)
        assert future.result(timeout=20) == 1
        scheduler.kill()
    worker.close()
    assert verified(store).records > 0
    return store


def in_own_mounts(test):
    """Run a test in a mount namespace: what it mounts ends with its threads and processes, whatever kills them."""

    def isolated(**fixtures):
        # CLONE_NEWNS. It is a matter of the thread, and of those threads and processes that it starts.
        if ctypes.CDLL(None, use_errno=True).unshare(0x00020000):
            pytest.skip(f"this environment forbids mount namespaces: {os.strerror(ctypes.get_errno())}")
        mount("--make-rprivate", "/")
        test(**fixtures)

    @needs_root
    @wraps(test)
    def run(**fixtures):
        with ThreadPoolExecutor(1) as thread:
            thread.submit(isolated, **fixtures).result()

    return run


def mount(*arguments):
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this environment forbids mounts: {done.stderr}")


def small_disk(tmp_path):
    """A file system of one megabyte."""
    path = tmp_path / "disk"
    path.mkdir()
    mount("-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", path)
    return path


def verified(store):
    """What the verification finds: nothing that a recovery would refuse."""
    report = report_on(store)
    assert not report.damaged, report.findings
    return report


def report_on(store):
    opened = open_store(str(store), existing=True)
    return verify_store((name, opened.get(name).data) for name in opened.list(names.LOG))


def contents(store):
    """Every object below the log, whole."""
    return {path.relative_to(store): path.read_bytes() for path in sorted(Path(store).glob("log/*/*"))}


def refused(process, *, code=3):
    """Wait for the end of a member that cannot do its job; return what it said, without its journeys there."""
    try:
        assert process.wait(timeout_seconds=40) == code, process.log_tail(40)
    finally:
        process.close()
    return process.log.read_text()


def say(log, *parts):
    for part in parts:
        assert part in " ".join(log.split()), log


# Settings


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        (
            "DASK_RESILIENCE__FAILOVER__GRAZE",
            "3s",
            "resilience.failover.graze: there is no such setting; did you mean resilience.failover.grace?",
        ),
        ("DASK_RESILIENCE__LEADER_POLL", "often", "resilience.leader-poll: expected a duration such as '3s' or"),
        ("DASK_RESILIENCE__JOURNAL__ON_FAILURE", "panic", "'panic' is not one of stop-acks, stop-scheduler"),
        ("DASK_RESILIENCE__STORE", "ftp://host/prod", "Give resilience.store a path, file:///path, s3://bucket/prefix"),
    ],
)
def test_what_is_configured_wrongly_is_refused_everywhere(start, store, variable, value, told):
    environment = {variable: value}
    url = str(store) if "STORE" not in variable else None
    say(refused(start.scheduler(wait=False, environment=environment, store=url)), told)
    address = f"tcp://127.0.0.1:{free_port()}"
    for nanny in (True, False):
        say(refused(start.worker(address, wait=False, nanny=nanny, environment=environment, store=url)), told)
    done = subprocess.run(
        [sys.executable, "-c", f"from dask_resilience import Client; Client({address!r})"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    say(done.stderr, told)
    assert list(store.iterdir()) == []


def test_a_worker_that_is_preloaded_by_configuration_is_refused_through_its_nanny(start, store):
    scheduler = start.scheduler(store=str(store))
    environment = {
        "DASK_DISTRIBUTED__WORKER__PRELOAD": '["dask_resilience.preload"]',
        "DASK_RESILIENCE__WORKER__PATIENCE": "0.1s",
    }
    worker = start.worker(scheduler, wait=False, preload=None, environment=environment)
    log = refused(worker, code=1)
    say(log, "resilience.worker.patience: '0.1s' is out of bounds: from 1.00 s to")
    assert scheduler.worker_names() == set()


def test_a_client_names_the_key(monkeypatch):
    import dask

    with dask.config.set({"resilience.client.patience": "long"}), pytest.raises(ConfigError) as error:
        Client("tcp://127.0.0.1:1")
    assert error.value.key == "resilience.client.patience"
    with dask.config.set({"resilience.store": "file://host/path"}), pytest.raises(StoreError, match="three slashes"):
        Client("tcp://127.0.0.1:1")


# Stores that cannot be used


def test_a_store_that_cannot_be_reached(start, tmp_path):
    (tmp_path / "file").write_text("")
    log = refused(start.scheduler(wait=False, store=str(tmp_path / "file" / "store")))
    say(log, "store: cannot be opened:", "or point resilience.store at another folder")


@in_own_mounts
def test_a_store_that_is_read_only(start, journal):
    before, report = contents(journal), verified(journal)
    mount("--bind", journal, journal)
    mount("-o", "remount,ro,bind", journal)
    log = refused(start.scheduler(wait=False, store=str(journal)))
    # Looking is possible without writing.
    assert verified(journal) == report
    looked = look(journal)
    subprocess.run(["umount", "--lazy", journal], check=True)
    say(log, "cannot be written (denied). Give this user permission to write there")
    assert "sound" in looked
    assert contents(journal) == before
    start.scheduler(store=str(journal))


def look(store):
    """All that looks at a store without a claim to it."""
    told = ""
    for command in (["verify"], ["verify", "-o", "json"], ["inspect"]):
        done = subprocess.run(
            [Path(sys.executable).with_name("dask-resilience"), *command, store],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        told += done.stdout
    assert leader(open_store(str(store), existing=True)).epoch == 1
    return told


def test_looking_at_a_copy_of_a_journal_writes_nothing(journal, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(journal, copy, ignore=shutil.ignore_patterns(".*"))
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    told = look(copy)
    assert "sound" in told
    assert "GraphSubmitted" in told
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


@needs_root
def test_a_store_that_another_user_owns(start, journal):
    before = contents(journal)
    os.chown(journal, 12345, -1)
    log = refused(start.scheduler(wait=False, store=str(journal)))
    say(log, "the folder belongs to user 12345", "Use a folder that user 0 owns, or run as its owner")
    os.chown(journal, 0, -1)
    assert contents(journal) == before


def test_a_store_that_others_may_write_to(start, store):
    store.chmod(0o777)
    say(refused(start.scheduler(wait=False, store=str(store))), "other users may write to the folder", "chmod 700")


def test_a_store_of_another_cluster(start, store):
    first = start.scheduler(store=str(store), environment={"DASK_RESILIENCE__CLUSTER": "prod"})
    first.kill()
    before = contents(store)
    log = refused(start.scheduler(wait=False, store=str(store), environment={"DASK_RESILIENCE__CLUSTER": "staging"}))
    say(
        log,
        "belongs to cluster 'prod', but resilience.cluster is 'staging'",
        "Point resilience.store at this cluster's own prefix, or correct resilience.cluster",
    )
    verified(store)
    assert contents(store) == before
    start.scheduler(store=str(store), environment={"DASK_RESILIENCE__CLUSTER": "prod"})


# Journals that cannot be read


def last_segment(store):
    return max(Path(store).glob("log/*/*"))


def newer_header(data):
    """The header of version 2, checked as docs/reference/journal-format.md says."""
    header = data[:8] + (2).to_bytes(2, "little") + data[10:72]
    return header + google_crc32c.value(header).to_bytes(4, "little") + data[76:]


def newer_frame(data):
    """The first frame of version 2; its checks are computed anew from the chain value in the header."""
    at, chain = HEADER_BYTES, int.from_bytes(data[68:72], "little")
    head = (2).to_bytes(2, "little") + data[at + 2 : at + 16]
    payload = data[at + 24 : at + 24 + int.from_bytes(data[at + 4 : at + 8], "little")]
    checks = google_crc32c.value(head).to_bytes(4, "little") + google_crc32c.extend(
        google_crc32c.extend(chain, head), payload
    ).to_bytes(4, "little")
    return data[:at] + head + checks + data[at + 24 :]


def flipped_in_the_middle(data):
    middle = HEADER_BYTES + (len(data) - HEADER_BYTES) // 2
    return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (newer_header, "has journal format 2, this release reads up to 1. Install a newer dask-resilience"),
        (newer_frame, "has journal format 2, this release reads up to 1. Install a newer dask-resilience"),
        (flipped_in_the_middle, "Nothing was changed. Run `dask resilience verify` on the store, and restore"),
    ],
)
def test_a_journal_that_cannot_be_read_is_never_served_as_an_empty_cluster(start, journal, change, told):
    good = contents(journal)
    segment = last_segment(journal)
    segment.write_bytes(change(segment.read_bytes()))
    changed, report = contents(journal), report_on(journal)
    assert report.damaged
    scheduler = start.scheduler(wait=False, store=str(journal))
    answers = []
    while scheduler.alive:
        answers.append(scheduler.ready_status())
        time.sleep(0.02)
    say(refused(scheduler), segment.relative_to(journal).as_posix(), told)
    assert 200 not in answers
    # Neither repaired nor made worse, also by a second try.
    refused(start.scheduler(wait=False, store=str(journal)))
    assert contents(journal) == changed
    assert report_on(journal) == report
    segment.write_bytes(good[segment.relative_to(journal)])
    recovered = start.scheduler(store=str(journal))
    assert recovered.readiness()["graphs_replayed"] == 1
    verified(journal)


def test_a_damage_in_an_older_epoch(start, journal):
    second = start.scheduler(store=str(journal))
    second.kill()
    first = min(Path(journal).glob("log/*/*"))
    first.write_bytes(flipped_in_the_middle(first.read_bytes()))
    say(refused(start.scheduler(wait=False, store=str(journal))), first.relative_to(journal).as_posix())


# A full disk


@in_own_mounts
def test_a_full_disk_stops_acks_until_there_is_space(start, tmp_path, run_log):
    environment = {
        "DASK_RESILIENCE__JOURNAL__ON_FAILURE": "stop-acks",
        "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "1s",  # five in the end: ten heartbeats
    }
    disk = small_disk(tmp_path)
    store = disk / "store"
    scheduler = start.scheduler(store=str(store), environment=environment)
    start.worker(scheduler, store=str(store))
    with Client(scheduler.address) as client:
        before = client.submit(run_log.task(), 0, pure=False)
        assert before.result(timeout=20) == 0
        until(lambda: not client._outbox)
        fill(disk)
        verified(store)

        pending = client.submit(run_log.task(), 1, b"x" * 100_000, pure=False)
        until(lambda: len(run_log.counts()) == 2, what="the cluster works on")
        until(lambda: (scheduler.readiness() or {}).get("journal_error"))
        say(scheduler.readiness()["journal_error"], "No space left on device", "Free some space or raise the quota")
        # Longer than the lease and than worker-ttl.
        time.sleep(8)
        assert client._outbox
        assert scheduler.alive
        assert "failed to heartbeat" not in scheduler.log.read_text()
        say(scheduler.log.read_text(), "The journal cannot be written, so nothing is acked")

        (disk / "ballast").unlink()
        until(lambda: not client._outbox, what="it is acked")
        assert pending.result(timeout=20) == 2
        assert "journal_error" not in scheduler.readiness()
        say(scheduler.log.read_text(), "The journal can be written again")
        events = [event["action"] for _, event in client.get_events("resilience")]
        assert events[-2:] == ["journal-failed", "journal-recovered"]
        verified(store)

        # What was acked then is there.
        scheduler.kill()
        scheduler = start.scheduler(scheduler.port, http_port=scheduler.http_port, store=str(store))
        assert client.gather([before, pending]) == [0, 2]
        assert scheduler.readiness()["tasks_adopted_in_memory"] == 2
        validate(client)
    run_log.assert_each_once(range(2))


@in_own_mounts
def test_a_full_disk_stops_the_scheduler_where_that_is_asked_for(start, tmp_path, run_log):
    environment = {"DASK_RESILIENCE__JOURNAL__ON_FAILURE": "stop-scheduler"}
    disk = small_disk(tmp_path)
    store = disk / "store"
    scheduler = start.scheduler(store=str(store), environment=environment)
    worker = start.worker(scheduler, store=str(store))
    with Client(scheduler.address) as client:
        before = client.submit(run_log.task(), 0, pure=False)
        assert before.result(timeout=20) == 0
        until(lambda: not client._outbox)
        fill(disk)
        pending = client.submit(run_log.task(), 1, b"x" * 100_000, pure=False)
        say(refused(scheduler), "No space left on device", "Free some space or raise the quota", "This scheduler stops")
        verified(store)
        # It does not start on a full disk either, and harms nothing.
        again = start.scheduler(scheduler.port, store=str(store), environment=environment, wait=False)
        say(refused(again), "cannot be written (full). Free some space")
        verified(store)
        (disk / "ballast").unlink()
        start.scheduler(scheduler.port, http_port=scheduler.http_port, store=str(store), environment=environment)
        assert client.gather([before, pending]) == [0, 2]
        validate(client)
    assert worker.alive


def fill(disk):
    """Leave not a byte."""
    with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert shutil.disk_usage(disk).free == 0


# Environments


MODULE = """
import os

def double(x, path):
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{x!r}\\n".encode())
    os.close(fd)
    return 2 * x
"""


def test_a_graph_that_the_new_scheduler_cannot_read_errs_its_own_keys(start, store, tmp_path, run_log, monkeypatch):
    there = tmp_path / "there"
    there.mkdir()
    (there / "only_there.py").write_text(MODULE)
    monkeypatch.syspath_prepend(there)
    import only_there

    root = str(Path(__file__).parents[2])
    environment = {"PYTHONPATH": os.pathsep.join([root, str(there)])}
    scheduler = start.scheduler(store=str(store), environment=environment)
    start.worker(scheduler, store=str(store), environment=environment)
    with Client(scheduler.address) as client:
        unreadable = client.submit(only_there.double, 1, str(run_log.path), key="unreadable")
        kept = client.map(run_log.task(), range(2, 5), pure=False)
        above = client.submit(lambda x: x + 1, unreadable, key="above")
        beside = client.submit(sum, kept, key="beside")
        wait([unreadable, above, beside, *kept], timeout=20)

        scheduler.kill()
        scheduler = start.scheduler(scheduler.port, http_port=scheduler.http_port, store=str(store))
        until(lambda: unreadable.status == "error")
        with pytest.raises(GraphUnreadable) as error:
            unreadable.result(timeout=10)
        assert error.value.keys == ("unreadable",)
        say(str(error.value), "'unreadable'", "only_there", "Install the same environment as the client's")
        say(scheduler.log.read_text(), "'unreadable'", "only_there")
        assert client.gather([*kept, beside]) == [4, 6, 8, 18]
        until(lambda: above.status in ("error", "finished"))
        assert client.submit(run_log.task(), 5, pure=False).result(timeout=20) == 10
        validate(client)
        verified(store)

        # With the environment repaired, and the graph sent again, it works.
        scheduler.kill()
        start.scheduler(scheduler.port, http_port=scheduler.http_port, store=str(store), environment=environment)
        assert client.submit(only_there.double, 6, str(run_log.path)).result(timeout=20) == 12
        assert client.gather(kept) == [4, 6, 8]
        validate(client)


SITE = """
import importlib.abc, importlib.util, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "distributed.scheduler":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            module._cull_renamed = module.__dict__["_cull"]
            del module._cull
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


@pytest.fixture
def another_dask(tmp_path):
    """An environment in which one of the internals that we rely on has another name."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(textwrap.dedent(SITE))
    return {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(site)])}


UNSUPPORTED = (
    f"distributed {distributed.__version__} is not supported by this release of dask-resilience:",
    "- distributed.scheduler:_cull is gone",
    "Install a supported distributed, or a newer dask-resilience",
)


def test_a_dask_whose_internals_differ(start, store, another_dask):
    for how in ({}, {"preload": None, "config": True}):
        environment = dict(another_dask)
        if how.pop("config", False):
            environment["DASK_DISTRIBUTED__SCHEDULER__PRELOAD"] = '["dask_resilience.preload"]'
        say(refused(start.scheduler(wait=False, store=str(store), environment=environment, **how)), *UNSUPPORTED)
    for nanny in (True, False):
        worker = start.worker("tcp://127.0.0.1:1", wait=False, nanny=nanny, environment=another_dask)
        say(refused(worker), *UNSUPPORTED)
    assert list(store.iterdir()) == []


def test_a_client_and_an_install_on_a_dask_whose_internals_differ(start, store, another_dask):
    program = "import dask_resilience; dask_resilience.Client('tcp://127.0.0.1:1')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **another_dask},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    say(done.stderr, "UnsupportedDask", *UNSUPPORTED)

    import dask_resilience
    from dask_resilience.errors import UnsupportedDask

    scheduler = start.scheduler(resilient=False, store=str(store), environment=another_dask)
    with distributed.Client(scheduler.address) as plain:
        with pytest.raises(UnsupportedDask) as error:
            dask_resilience.install(plain)
        assert error.value.differences == ("distributed.scheduler:_cull is gone",)
        assert plain.sync(plain.scheduler.identity)["id"]
    os.kill(scheduler.pid, signal.SIGTERM)
    assert list(store.iterdir()) == []
