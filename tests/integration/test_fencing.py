"""Two schedulers, one rule: who was stopped, who stands by, and who may say that something is safe."""

from __future__ import annotations

import signal

import pytest
from support import fail_over, resilience_status, until, validate

from dask_resilience import Client
from dask_resilience.journal import records
from dask_resilience.storage import open_store
from dask_resilience.storage.journal_reader import JournalReader
from dask_resilience.storage.takeover import leader

#: Members look so seldom that only the end of the old scheduler tells them.
BLIND = {
    "DASK_RESILIENCE__LEADER_POLL": "4s",
    "DASK_RESILIENCE__FAILOVER__LEASE_TTL": "5s",
    "DASK_RESILIENCE__FAILOVER__GRACE": "1m",
    "DASK_RESILIENCE__FAILOVER__CLIENT_GRACE": "1m",
}


@pytest.fixture
def cluster(make_cluster):
    return make_cluster(n_workers=2, nanny=False)


def journal(cluster) -> list:
    """Everything that the journal holds now."""
    return list(JournalReader(open_store(cluster.store)).read())


def submissions(cluster) -> dict[int, int]:
    """Epoch to how many graphs count as submitted in it."""
    found: dict[int, int] = {}
    for logged in journal(cluster):
        if isinstance(logged.record, records.GraphSubmitted):
            found[logged.epoch] = found.get(logged.epoch, 0) + 1
    return found


def rules(scheduler) -> bool:
    return scheduler.ready_status() == 200


def follow(cluster, client) -> None:
    """Wait until the standby rules and everyone is with it."""
    cluster.promote_standby()
    cluster.wait_scheduler_ready()
    until(lambda: client.status == "running" and client._compass.address == cluster.scheduler.address)
    client.wait_for_workers(2, timeout=30)


def test_a_stopped_scheduler_is_replaced_by_its_standby_and_harms_nothing_afterwards(cluster, client, run_log, gate):
    finished = client.map(run_log.task(), range(20), pure=False)
    assert client.gather(finished) == [2 * x for x in range(20)]
    running = client.map(run_log.task(gate=gate), range(100, 106), pure=False)
    until(lambda: len(run_log.counts()) == 22)
    cluster.start_standby()
    old = cluster.scheduler

    old.pause()
    follow(cluster, client)
    assert cluster.scheduler.address != old.address
    assert leader(open_store(cluster.store)).address == cluster.scheduler.address
    status = resilience_status(client)
    assert (status["epoch"], status["workers_back"], status["clients_back"]) == (2, 2, 1)
    assert (status["tasks_adopted_in_memory"], status["tasks_adopted_running"]) == (20, 2)

    old.cont()
    assert old.wait() == 3
    assert "This scheduler stops" in old.log_tail(50)
    gate.touch()
    assert client.gather([*finished, *running]) == [2 * x for x in (*range(20), *range(100, 106))]
    run_log.assert_each_once([*range(20), *range(100, 106)])
    assert submissions(cluster) == {1: 2}
    validate(client)


def test_a_submission_that_a_stopped_scheduler_never_read_is_applied_once_by_the_next(cluster, client, run_log):
    cluster.start_standby()
    old = cluster.scheduler
    old.pause()
    # It goes into a socket that nobody reads, and stays unacked.
    futures = client.map(run_log.task(), range(10), pure=False)
    until(lambda: len(client._outbox) == 1)
    follow(cluster, client)
    old.cont()
    assert old.wait() == 3
    assert client.gather(futures) == [2 * x for x in range(10)]
    run_log.assert_each_once(range(10))
    assert submissions(cluster) == {2: 1}
    until(lambda: not client._outbox, what="the new scheduler acked it")
    validate(client)


def test_a_scheduler_that_wakes_with_all_its_members_around_it_acks_nothing_and_ends(make_cluster, run_log):
    """The worst moment: nobody has noticed yet, messages are in its sockets, and its tasks may go out to workers."""
    cluster = make_cluster(n_workers=2, environment=BLIND)
    with Client(cluster.address) as client:
        standby = cluster.start_standby()
        old = cluster.scheduler
        old.pause()
        futures = client.map(run_log.task(seconds=0.2), range(10), pure=False)
        until(lambda: "Epoch 2 begins" in standby.log_tail(50), seconds=40)
        old.cont()
        assert old.wait() == 3
        follow(cluster, client)
        assert client.gather(futures) == [2 * x for x in range(10)]
        run_log.assert_each_once(range(10))
        assert submissions(cluster) == {2: 1}
        validate(client)


def test_a_scheduler_that_nobody_told_is_fenced_by_its_own_journal(make_cluster, run_log):
    """As above, and the thread that keeps the lease is stuck: only the look before each ack is left."""
    cluster = make_cluster(n_workers=2, environment=BLIND)
    with Client(cluster.address) as client:
        standby = cluster.start_standby()
        old = cluster.scheduler
        client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.resilience._keeper.close())
        old.pause()
        futures = client.map(run_log.task(seconds=0.2), range(10), pure=False)
        until(lambda: "Epoch 2 begins" in standby.log_tail(50), seconds=40)
        old.cont()
        assert old.wait() == 3
        follow(cluster, client)
        assert client.gather(futures) == [2 * x for x in range(10)]
        run_log.assert_each_once(range(10))
        assert submissions(cluster) == {2: 1}
        validate(client)


def test_the_word_of_a_run_from_an_older_epoch_is_not_believed(make_cluster, run_log, gate):
    cluster = make_cluster(n_workers=2, nanny=False, environment={"DASK_RESILIENCE__FAILOVER__GRACE": "1500ms"})
    with Client(cluster.address) as client:
        future = client.submit(
            run_log.task(gate=gate), 1, key="held", workers="worker-1", allow_other_workers=True, pure=False
        )
        until(lambda: run_log.counts()["1"] == 1)
        run_id_of = lambda dask_scheduler: dask_scheduler.tasks["held"].run_id  # noqa: E731 - must travel by value
        [late] = [address for address, keys in client.processing().items() if keys]
        older = client.run_on_scheduler(run_id_of)
        cluster.workers[1].pause()
        fail_over(cluster)
        until(lambda: run_log.counts()["1"] == 2, what="the other worker runs it")
        cluster.workers[1].cont()
        client.wait_for_workers(2, timeout=30)

        def straggle(dask_worker, run_id):
            told = {"status": "OK", "key": "held", "nbytes": 8, "type": b"", "typename": "int", "metadata": {}}
            told |= {"thread": 0, "startstops": (), "run_id": run_id, "stimulus_id": "straggler"}
            dask_worker.batched_stream.send({"op": "task-finished", **told})

        straggle.__module__ = "__main__"
        client.run(straggle, run_id=older, workers=[late])
        # A message behind it on the same stream tells when it has arrived.
        client.run(lambda dask_worker: dask_worker.log_event("straggled", True), workers=[late])
        until(lambda: client.get_events("straggled"))
        assert client.run_on_scheduler(run_id_of) > older
        assert client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.tasks["held"].state) == "processing"
        gate.touch()
        assert future.result(timeout=20) == 2
        validate(client)


def test_the_second_scheduler_on_a_store_stands_by_and_says_so(cluster, client):
    future = client.submit(lambda: 7)
    assert future.result() == 7
    standby = cluster.start_standby()
    assert (cluster.scheduler.ready_status(), standby.ready_status()) == (200, 503)
    until(lambda: "Standing by: waiting for epoch 1" in standby.log_tail(50))

    cluster.kill_scheduler()
    until(lambda: rules(standby))
    follow(cluster, client)
    assert future.result(timeout=10) == 7
    assert client.submit(lambda: 8).result(timeout=10) == 8


def test_after_a_takeover_elsewhere_the_next_one_is_followed_back(cluster, client, run_log):
    futures = client.map(run_log.task(seconds=0.05), range(40), pure=False)
    for _ in range(2):
        cluster.start_standby()
        cluster.kill_scheduler()
        follow(cluster, client)
    fail_over(cluster, client)
    assert client.gather(futures) == [2 * x for x in range(40)]
    run_log.assert_each_once(range(40))


def test_after_a_planned_end_the_next_start_is_empty(cluster, run_log):
    with Client(cluster.address) as client:
        futures = client.map(run_log.task(), range(5), pure=False)
        assert client.gather(futures) == [0, 2, 4, 6, 8]
        cluster.kill_scheduler(signal.SIGTERM)
        assert cluster.scheduler.wait() == 0
        assert isinstance(journal(cluster)[-1].record, records.ClusterClosed)
        until(lambda: cluster.alive_workers() == 0, what="a closed cluster takes its workers with it")

        cluster.restart_scheduler()
        cluster.wait_scheduler_ready()
        until(lambda: all(future.cancelled() for future in futures), what="the old futures are told")
    cluster.add_worker()
    cluster.wait_workers(1)
    with Client(cluster.address) as client:
        status = resilience_status(client)
        assert (status["epoch"], status["tasks_replayed"], status["workers_back"]) == (2, 0, 0)
        assert client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)) == 0
        assert client.submit(lambda: 1).result(timeout=20) == 1
    run_log.assert_each_once(range(5))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_any_other_end_is_a_death(cluster, client, number):
    future = client.submit(lambda: 5)
    assert future.result() == 5
    cluster.kill_scheduler(number)
    cluster.scheduler.wait()
    cluster.restart_scheduler()
    cluster.wait_scheduler_ready()
    assert future.result(timeout=10) == 5
    assert resilience_status(client)["tasks_adopted_in_memory"] == 1
