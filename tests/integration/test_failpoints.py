"""The scheduler dies at each step of submission, commit and takeover; nothing is lost, nothing runs twice."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from distributed import worker_client
from support import only_long, until, validate

from dask_resilience import Client
from dask_resilience.failpoints import NAMES, VARIABLE

COMMIT = {
    "graph.before-record": 5,
    "graph.after-record": 5,
    "graph.after-apply": 5,
    "journal.before-write": 5,
    "journal.after-write": 5,
    "journal.after-sync": 5,
    "journal.after-fence-check": 5,
    "journal.after-ack": 5,
    "journal.after-footer": 1,
}
TAKEOVER = [
    "takeover.after-fence",
    "takeover.after-log-read",
    "recovery.after-replay",
    "journal.after-sync",
    "recovery.after-plan",
    "recovery.before-serving",
]
#: Beside these: they differ in less.
TAKEOVER_TOO = [
    "takeover.after-cluster",
    "takeover.after-lease",
    "journal.after-open",
    "journal.after-write",
    "takeover.after-epoch-started",
    "recovery.after-gather",
    "recovery.after-clients",
]


def test_every_failpoint_is_tried():
    elsewhere = {name for name in NAMES if name.startswith(("snapshot.", "retention."))}  # test_snapshots.py
    assert COMMIT.keys() | {*TAKEOVER, *TAKEOVER_TOO} | {"client.before-registration"} | elsewhere == NAMES


@pytest.mark.parametrize("name", COMMIT)
def test_killed_during_submission_and_commit(make_cluster, run_log, name):
    small = {"DASK_RESILIENCE__JOURNAL__SEGMENT_SIZE": "64 KiB"}
    # No nanny: stock fails its start when the scheduler dies before it is through, which is not what is tried here.
    cluster = make_cluster(n_workers=1, nanny=False, environment={VARIABLE: f"{name}=kill@{COMMIT[name]}", **small})
    cluster.environment.pop(VARIABLE)
    ballast = "x" * 8_000
    with Client(cluster.address) as client:
        run = run_log.task()
        futures = []
        for i in range(24):
            futures.append(client.submit(run, i, ballast, pure=False))
            if not cluster.scheduler.alive:
                break
            until(futures[-1].done if i % 3 == 2 and cluster.scheduler.alive else lambda: True, seconds=0.5, soft=True)
        until(lambda: not cluster.scheduler.alive, what="the scheduler died at its failpoint")
        later = [client.submit(run, i, ballast, pure=False) for i in range(100, 103)]
        cluster.restart_scheduler()
        cluster.wait_scheduler_ready()
        assert client.gather(futures) == [2 * i for i in range(len(futures))]
        assert client.gather(later) == [200, 202, 204]
        validate(client)
    run_log.assert_each_once([*range(len(futures)), 100, 101, 102])


@pytest.mark.parametrize("name", [*TAKEOVER, *only_long(*TAKEOVER_TOO)])
def test_killed_during_takeover(cluster, client, run_log, gate, name):
    finished = client.map(run_log.task(), range(10), pure=False)
    client.gather(finished)
    running = client.submit(run_log.task(gate=gate), 50, pure=False)
    until(lambda: "50" in run_log.counts())
    cluster.kill_scheduler()
    unacked = client.submit(run_log.task(), 60, pure=False)
    cluster.environment[VARIABLE] = f"{name}=kill"
    second = cluster.restart_scheduler()
    until(lambda: not second.alive, seconds=60, what="the second scheduler died at its failpoint")
    del cluster.environment[VARIABLE]
    cluster.restart_scheduler()
    cluster.wait_scheduler_ready()
    gate.touch()
    assert client.gather([*finished, running, unacked]) == [*(2 * i for i in range(10)), 100, 120]
    validate(client)
    run_log.assert_each_once([*range(10), 50, 60])


@pytest.mark.parametrize("where", ["program", "task"])
def test_killed_while_a_client_registers_for_the_first_time(make_cluster, run_log, where):
    def nested(x, run):
        with worker_client() as client:
            return client.submit(run, x).result()

    # The second registration is that of the client inside the task.
    nth = {"program": 1, "task": 2}[where]
    cluster = make_cluster(n_workers=1, nanny=False, environment={VARIABLE: f"client.before-registration=kill@{nth}"})
    cluster.environment.pop(VARIABLE)
    with ThreadPoolExecutor(1) as replacing:
        first = cluster.scheduler
        replaced = replacing.submit(lambda: until(lambda: not first.alive) or cluster.restart_scheduler())
        with Client(cluster.address) as client:
            future = client.submit(nested, 1, run_log.task(), pure=False)
            assert future.result(timeout=60) == 2
            replaced.result(timeout=1)
            validate(client)
    run_log.assert_each_once([1])
