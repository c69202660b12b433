"""Processes of a cluster: started, killed, paused, replaced, and gone afterwards; and no stranger is ever signalled."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dask_resilience.chaos import owned_process, processes
from dask_resilience.chaos.loopback import HOST, free_port
from dask_resilience.chaos.owned_process import MemberError, OwnedProcess, wait_until
from dask_resilience.chaos.processes import Cluster, SchedulerProcess

pytestmark = pytest.mark.integration

#: Starts a cluster, tells its processes, and is killed before it can clean up.
_KILLED_IN_THE_MIDDLE = """
import os, signal, sys
from pathlib import Path
from dask_resilience.chaos.processes import Cluster
cluster = Cluster(n_workers=1, resilient=False, warm_replacement=True, directory=Path(sys.argv[1])).__enter__()
members = [cluster.scheduler, *cluster.workers, cluster._parked]
print(*(pid for member in members for pid in member.pids()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def exists(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def all_gone(pids):
    return wait_until(lambda: not any(map(exists, pids)), timeout_seconds=10)


@pytest.fixture
def scheduler(tmp_path):
    with SchedulerProcess(free_port(), log=tmp_path / "scheduler.log") as scheduler:
        scheduler.wait_ready()
        yield scheduler


def test_exit_code_and_log(tmp_path):
    with OwnedProcess(["--version"], name="version", log=tmp_path / "deep" / "log") as process:
        assert process.wait() == 0
    assert "version" in process.log_tail()
    assert process.exit_code == 0
    assert not process.alive


def test_kill_is_over_when_it_returns(scheduler):
    pid = scheduler.pid
    scheduler.kill()
    assert scheduler.exit_code == -signal.SIGKILL
    assert not psutil.pid_exists(pid)  # reaped, not a zombie: a lease must see that its holder is dead
    assert not scheduler.is_ready()


def test_a_paused_process_is_silent_until_it_goes_on(scheduler):
    scheduler.pause()
    assert scheduler.json("counts") is None
    assert scheduler.alive
    scheduler.cont()
    assert wait_until(lambda: scheduler.json("counts") is not None, timeout_seconds=10)


def test_the_dead_are_not_signalled(scheduler, monkeypatch):
    signalled = []
    kill_group = os.killpg

    def recording(group, number):
        signalled.append((group, exists(group), number))
        kill_group(group, number)

    monkeypatch.setattr(owned_process.os, "killpg", recording)
    scheduler.kill()
    # The request, and the sweep of what is left of the group while the leader is not reaped yet.
    assert {group for group, _, _ in signalled} == {scheduler.pid}
    signalled.clear()
    assert not scheduler.send(signal.SIGTERM)
    scheduler.pause()
    scheduler.close()
    assert signalled == []


def test_only_the_own_group_is_signalled(scheduler):
    stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert os.getpgid(scheduler.pid) == scheduler.pid != os.getpgid(stranger.pid)
        scheduler.kill()
        assert stranger.poll() is None
    finally:
        stranger.communicate(b"\n", timeout=10)


def test_what_an_exited_leader_leaves_behind_is_killed(tmp_path):
    with Cluster(n_workers=1, resilient=False, directory=tmp_path) as cluster:
        worker = cluster.workers[0]
        pids = worker.pids()
        assert len(pids) > 1  # the nanny and its worker
        os.kill(worker.pid, signal.SIGKILL)  # the nanny alone
        worker.wait()
        assert all_gone(pids)


@pytest.fixture
def taken_port():
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_a_scheduler_without_its_port_exits(tmp_path, taken_port):
    with (
        SchedulerProcess(taken_port, log=tmp_path / "log") as scheduler,
        pytest.raises(MemberError, match="exited with 1"),
    ):
        scheduler.wait_ready()


def test_a_cluster_tries_another_port(tmp_path, taken_port, monkeypatch):
    ports = iter([taken_port])
    monkeypatch.setattr(processes, "free_port", lambda: next(ports, None) or free_port())
    with Cluster(n_workers=0, resilient=False, directory=tmp_path) as cluster:
        assert cluster.scheduler.port != taken_port
        assert cluster.scheduler.is_ready()


def test_free_ports_are_never_handed_out_by_the_kernel():
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(free_port() < lowest for _ in range(50))


def test_a_process_starts_once(tmp_path):
    with OwnedProcess(["--version"], name="version", log=tmp_path / "log") as process:
        process.wait()
        with pytest.raises(MemberError, match="make a new one"):
            process.start()


def test_a_cluster_is_gone_after_a_failure(tmp_path):
    pids = []

    def fail():
        with Cluster(n_workers=1, resilient=False, warm_replacement=True, directory=tmp_path) as cluster:
            pids.extend(
                pid for member in (cluster.scheduler, *cluster.workers, cluster._parked) for pid in member.pids()
            )
            cluster.workers[0].pause()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(pids) > 3
    assert all_gone(pids)


def test_a_cluster_that_cannot_start_is_gone(tmp_path, monkeypatch):
    started = []

    def refuse(self, count):
        started.extend(self.scheduler.pids())
        raise MemberError("cluster", "does not start")

    monkeypatch.setattr(Cluster, "wait_workers", refuse)
    with pytest.raises(MemberError, match="does not start"), Cluster(n_workers=1, resilient=False, directory=tmp_path):
        pass
    assert started
    assert all_gone(started)


def test_a_cluster_dies_with_its_parent(tmp_path):
    parent = subprocess.run(
        [sys.executable, "-c", _KILLED_IN_THE_MIDDLE, str(tmp_path)],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    pids = [int(pid) for pid in parent.stdout.split()]
    assert parent.returncode == -signal.SIGKILL, parent.stderr
    assert len(pids) > 3
    assert all_gone(pids)


@pytest.mark.parametrize("warm", [False, True])
def test_a_dead_scheduler_is_replaced_at_its_address(tmp_path, warm):
    with Cluster(n_workers=0, resilient=False, supervise=True, warm_replacement=warm, directory=tmp_path) as cluster:
        first = cluster.scheduler
        killed_at_seconds = cluster.kill_scheduler()
        second = cluster.wait_scheduler_ready()
        assert second is not first
        assert second.address == first.address == cluster.address
        assert cluster.restarts == 1
        assert killed_at_seconds < time.monotonic()


def test_without_supervision_a_dead_scheduler_stays_dead(tmp_path):
    with Cluster(n_workers=0, resilient=False, directory=tmp_path) as cluster:
        with pytest.raises(MemberError, match="still lives"):
            cluster.restart_scheduler()
        cluster.kill_scheduler()
        assert cluster.restarts == 0
        cluster.restart_scheduler().wait_ready()
        with pytest.raises(MemberError, match="no standby"):
            cluster.promote_standby()


def test_the_temporary_directory_is_removed():
    with Cluster(n_workers=0, resilient=False) as cluster:
        assert cluster.scheduler.log.exists()
    assert not cluster.directory.exists()
