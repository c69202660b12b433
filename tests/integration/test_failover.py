"""The headline: the scheduler is killed in the middle of real work, and the work goes on."""

from __future__ import annotations

from support import fail_over, resilience_status, until


def test_results_are_adopted_running_tasks_finish_once_and_the_rest_follows(cluster, client, run_log, gate):
    run = run_log.task(gate=gate)
    finished = client.map(run_log.task(), range(20), pure=False)
    assert client.gather(finished) == [2 * x for x in range(20)]
    running = client.map(run, range(100, 106), pure=False)
    total = client.submit(sum, [*finished, *running])
    until(lambda: len(run_log.counts()) == 22, what="both threads are busy")

    fail_over(cluster, client)
    adopted = resilience_status(client)
    gate.touch()

    assert total.result(timeout=30) == 2 * (sum(range(20)) + sum(range(100, 106)))
    assert (adopted["tasks_adopted_in_memory"], adopted["tasks_adopted_running"]) == (20, 2)
    run_log.assert_each_once([*range(20), *range(100, 106)])


def test_futures_that_finished_before_are_still_there(cluster, client):
    future = client.submit(lambda: "kept")
    assert future.result() == "kept"
    fail_over(cluster, client)
    assert future.status == "finished"
    assert future.result(timeout=10) == "kept"


def test_what_is_submitted_while_nobody_rules_runs_afterwards_once(cluster, client, run_log):
    cluster.kill_scheduler()
    until(lambda: client.status == "connecting")
    futures = client.map(run_log.task(), range(5), pure=False)
    cluster.restart_scheduler()
    assert client.gather(futures) == [0, 2, 4, 6, 8]
    run_log.assert_each_once(range(5))


def test_a_second_and_a_third_failover(cluster, client, run_log):
    run = run_log.task(seconds=0.05)
    futures = client.map(run, range(60), pure=False)
    for done in (5, 20, 35):
        until(lambda done=done: sum(f.done() for f in futures) >= done)
        fail_over(cluster, client)
    assert client.gather(futures) == [2 * x for x in range(60)]
    run_log.assert_each_once(range(60))
