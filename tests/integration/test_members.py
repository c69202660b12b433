"""Workers and clients that die with the scheduler, come late, come twice, or lose only their link."""

from __future__ import annotations

import os
import signal
from concurrent.futures import CancelledError

import dask
import pytest
from support import fail_over, resilience_status, until, validate

from dask_resilience import Client
from dask_resilience.chaos.loopback import free_port, http_get

#: Longer than any test waits: whoever waits for it fails.
FOREVER = {"DASK_RESILIENCE__FAILOVER__GRACE": "5m", "DASK_RESILIENCE__FAILOVER__CLIENT_GRACE": "5m"}
SHORT_GRACE = {"DASK_RESILIENCE__FAILOVER__GRACE": "1500ms"}


def pids(client) -> dict[str, int]:
    """Address of each worker to its process."""
    return client.run(os.getpid)


def where(client, futures) -> dict[str, set[int]]:
    """Address of each worker to the positions of the results that it holds."""
    held: dict[str, set[int]] = {address: set() for address in client.scheduler_info()["workers"]}
    for position, future in enumerate(futures):
        for address in client.who_has([future])[future.key]:
            held[address].add(position)
    return held


def address_of(client, name: str) -> str:
    return client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.workers[dask_scheduler.aliases[name]].address)


def opened(cluster) -> bool:
    return cluster.scheduler.ready_status() == 200


def gathering(cluster) -> bool:
    answer = http_get(cluster.scheduler.http_port, "/resilience/ready")
    return answer is not None and b'"gathering"' in answer[1]


def cut_link(client, **kwargs) -> None:
    """Break workers' streams to the scheduler, as a network would."""
    client.run(lambda dask_worker: dask_worker.batched_stream.comm.abort(), **kwargs)


def registered(client, address: str) -> bool:
    return address in client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.workers))


def registrations(cluster, index: int) -> int:
    """How often a worker has registered so far."""
    return cluster.workers[index].log.read_text().count("Registered with the scheduler")


# Late workers


def test_a_late_worker_comes_back_with_its_results(make_cluster, run_log, gate):
    # A worker is given no task before it has a free thread.
    terms = {**SHORT_GRACE, "DASK_DISTRIBUTED__SCHEDULER__WORKER_SATURATION": "1.0"}
    cluster = make_cluster(n_workers=2, nanny=False, environment=terms)
    with Client(cluster.address) as client:
        busy = client.submit(run_log.task(gate=gate), 100, workers="worker-0", pure=False)
        until(lambda: run_log.counts()["100"] == 1)
        futures = client.map(run_log.task(), range(30), pure=False)
        assert client.gather(futures) == [2 * x for x in range(30)]
        late = address_of(client, "worker-1")
        assert where(client, futures)[late] == set(range(30))

        cluster.workers[1].pause()
        fail_over(cluster)
        # The one thread that is left is busy: what was on the late worker is to be computed again, and cannot be yet.
        assert resilience_status(client)["workers_back"] == 1
        assert resilience_status(client)["tasks_to_recompute"] == 30
        cluster.workers[1].cont()
        until(lambda: registered(client, late), what="the late worker is back")
        gate.touch()

        assert client.gather([busy, *futures]) == [200, *(2 * x for x in range(30))]
        run_log.assert_each_once([*range(30), 100])
        validate(client)
        assert client.submit(sum, futures).result() == sum(2 * x for x in range(30))
        validate(client)


def test_a_late_worker_yields_where_another_one_has_computed_again(make_cluster, run_log, gate):
    cluster = make_cluster(n_workers=2, nanny=False, environment=SHORT_GRACE)
    with Client(cluster.address) as client:
        futures = client.map(run_log.task(), range(10), pure=False)
        assert client.gather(futures) == [2 * x for x in range(10)]
        running = client.submit(run_log.task(gate=gate), 100, workers="worker-1", allow_other_workers=True, pure=False)
        until(lambda: run_log.counts()["100"] == 1)
        late = address_of(client, "worker-1")

        cluster.workers[1].pause()
        fail_over(cluster)
        until(lambda: run_log.counts()["100"] == 2, what="the other worker runs it")
        cluster.workers[1].cont()
        until(lambda: registered(client, late), what="the late worker is back")
        gate.touch()

        assert running.result(timeout=30) == 200
        assert client.gather(futures) == [2 * x for x in range(10)]
        assert run_log.counts()["100"] == 2
        validate(client)
        until(lambda: not client.run(lambda dask_worker: len(dask_worker.state.executing))[late])
        held = client.run(lambda dask_worker: set(dask_worker.state.tasks))[late]
        known = client.run_on_scheduler(
            lambda dask_scheduler, a: {ts.key for ts in dask_scheduler.workers[a].has_what}, a=late
        )
        assert held == known, "the late worker holds exactly what the scheduler believes"


def test_a_running_task_of_a_late_worker_is_adopted_when_nobody_else_can_run_it(make_cluster, run_log, gate):
    cluster = make_cluster(n_workers=2, nanny=False, environment=SHORT_GRACE)
    with Client(cluster.address) as client:
        running = client.submit(run_log.task(gate=gate), 1, workers="worker-1", pure=False)
        until(lambda: run_log.counts()["1"] == 1)
        late = address_of(client, "worker-1")
        cluster.workers[1].pause()
        fail_over(cluster, client)
        cluster.workers[1].cont()
        until(lambda: registered(client, late), what="the late worker is back")
        validate(client)
        gate.touch()
        assert running.result(timeout=30) == 2
        run_log.assert_each_once([1])


# Workers that die with the scheduler


def test_a_worker_dies_with_the_scheduler_and_its_nanny_brings_another(make_cluster, run_log):
    cluster = make_cluster(n_workers=2, environment=FOREVER)
    with Client(cluster.address) as client:
        futures = client.map(run_log.task(), range(20), pure=False)
        assert client.gather(futures) == [2 * x for x in range(20)]
        held = where(client, futures)
        dead = address_of(client, "worker-1")
        assert held[dead]

        os.kill(pids(client)[dead], signal.SIGKILL)
        fail_over(cluster, client)

        assert resilience_status(client)["seconds_to_gather"] < 15
        client.wait_for_workers(2, timeout=30)
        assert client.gather(futures) == [2 * x for x in range(20)]
        assert run_log.counts() == {repr(x): 1 + (x in held[dead]) for x in range(20)}
        validate(client)


def test_a_worker_without_nanny_dies_with_the_scheduler(make_cluster, run_log, gate):
    cluster = make_cluster(n_workers=2, nanny=False, environment=FOREVER)
    with Client(cluster.address) as client:
        futures = client.map(run_log.task(), range(20), pure=False)
        assert client.gather(futures) == [2 * x for x in range(20)]
        running = client.map(run_log.task(gate=gate), range(100, 102), pure=False)
        until(lambda: len(run_log.counts()) == 22)
        dead = address_of(client, "worker-1")
        held = where(client, futures)[dead]
        [lost_run] = client.run_on_scheduler(
            lambda dask_scheduler, a: [ts.key for ts in dask_scheduler.workers[a].processing], a=dead
        )

        cluster.kill_worker(1)
        fail_over(cluster, client)
        status = resilience_status(client)
        gate.touch()

        assert (status["workers_back"], status["tasks_adopted_running"]) == (1, 1)
        assert status["seconds_to_gather"] < 15
        assert client.gather([*futures, *running]) == [2 * x for x in (*range(20), 100, 101)]
        expected = {repr(x): 1 + (x in held) for x in range(20)}
        expected |= {repr(100 + i): 1 + (future.key == lost_run) for i, future in enumerate(running)}
        assert run_log.counts() == expected
        validate(client)


def test_all_workers_die_with_the_scheduler(make_cluster, run_log):
    cluster = make_cluster(n_workers=2, nanny=False, environment=FOREVER)
    with Client(cluster.address) as client:
        futures = client.map(run_log.task(), range(5), pure=False)
        assert client.gather(futures) == [0, 2, 4, 6, 8]
        for index in (0, 1):
            cluster.kill_worker(index)
        fail_over(cluster, client)
        assert resilience_status(client)["workers_back"] == 0
        total = client.submit(sum, futures)
        cluster.add_worker()
        assert total.result(timeout=60) == 20
        validate(client)


def test_without_nannies_everything_is_adopted_as_well(make_cluster, run_log, gate):
    cluster = make_cluster(n_workers=2, nanny=False)
    with Client(cluster.address) as client:
        futures = client.map(run_log.task(), range(10), pure=False)
        assert client.gather(futures) == [2 * x for x in range(10)]
        running = client.map(run_log.task(gate=gate), range(10, 16), pure=False)
        until(lambda: len(run_log.counts()) == 12)
        fail_over(cluster, client)
        gate.touch()
        assert client.gather(running) == [2 * x for x in range(10, 16)]
        assert client.gather(futures) == [2 * x for x in range(10)]
        run_log.assert_each_once(range(16))


# The scheduler dies again


def test_the_scheduler_is_killed_again_while_it_gathers(make_cluster, run_log, gate):
    cluster = make_cluster(n_workers=2, nanny=False, environment=FOREVER)
    with Client(cluster.address) as client:
        finished = client.map(run_log.task(), range(10), pure=False)
        assert client.gather(finished) == [2 * x for x in range(10)]
        running = client.map(run_log.task(gate=gate), range(10, 16), pure=False)
        until(lambda: len(run_log.counts()) == 12)

        cluster.workers[1].pause()
        cluster.kill_scheduler()
        until(lambda: client.status == "connecting")
        later = client.map(run_log.task(), range(20, 25), pure=False)
        for _ in range(2):
            cluster.restart_scheduler()
            # One worker and the client are heard, the other worker is awaited: in the middle of the gathering.
            until(lambda: "Worker" in (log := cluster.scheduler.log_tail(50)) and "is back with" in log)
            assert gathering(cluster)
            cluster.kill_scheduler()
        cluster.workers[1].cont()
        cluster.restart_scheduler()
        cluster.wait_scheduler_ready()
        status = resilience_status(client)
        gate.touch()

        assert (status["epoch"], status["workers_back"], status["tasks_adopted_running"]) == (4, 2, 2)
        assert client.gather([*finished, *running, *later]) == [2 * x for x in (*range(16), *range(20, 25))]
        run_log.assert_each_once([*range(16), *range(20, 25)])
        validate(client)


# A link breaks while the scheduler lives


def test_a_worker_whose_link_breaks_comes_back_with_its_data_and_runs(cluster, client, run_log, gate):
    finished = client.map(run_log.task(), range(20), pure=False)
    assert client.gather(finished) == [2 * x for x in range(20)]
    held = where(client, finished)
    running = client.map(run_log.task(gate=gate), range(100, 102), pure=False)
    until(lambda: len(run_log.counts()) == 22)
    cut = address_of(client, "worker-0")
    assert registrations(cluster, 0) == 1

    cut_link(client, workers=[cut])
    until(lambda: registrations(cluster, 0) == 2, what="the worker is back as a new member")
    validate(client)
    assert where(client, finished) == held
    gate.touch()

    assert client.gather([*finished, *running]) == [2 * x for x in (*range(20), 100, 101)]
    run_log.assert_each_once([*range(20), 100, 101])
    validate(client)


def test_all_links_break_at_once_again_and_again(cluster, client, run_log):
    futures = client.map(run_log.task(seconds=0.05), range(60), pure=False)
    for round_, done in enumerate((10, 25, 40)):
        until(lambda done=done: sum(f.done() for f in futures) >= done)
        cut_link(client)
        for index in (0, 1):
            until(lambda i=index, n=round_ + 2: registrations(cluster, i) == n)
        validate(client)
    assert client.gather(futures) == [2 * x for x in range(60)]
    run_log.assert_each_once(range(60))


def test_a_worker_that_dies_while_the_scheduler_lives_is_replaced_at_once(make_cluster, run_log):
    cluster = make_cluster(n_workers=2, nanny=False, environment={"DASK_RESILIENCE__FAILOVER__LINK_GRACE": "600s"})
    with Client(cluster.address) as client:
        futures = client.map(run_log.task(), range(20), pure=False)
        assert client.gather(futures) == [2 * x for x in range(20)]
        held = where(client, futures)[address_of(client, "worker-1")]
        cluster.kill_worker(1)
        until(lambda: len(client.scheduler_info()["workers"]) == 1, what="it was refused, so it is gone")
        assert client.gather(futures) == [2 * x for x in range(20)]
        assert run_log.counts() == {repr(x): 1 + (x in held) for x in range(20)}


# Patience


@pytest.mark.parametrize("nanny", [True, False])
def test_workers_close_as_stock_ones_do_when_their_patience_ends(make_cluster, nanny):
    terms = {"DASK_RESILIENCE__FAILOVER__LEASE_TTL": "1s", "DASK_RESILIENCE__WORKER__PATIENCE": "2s"}
    cluster = make_cluster(n_workers=1, nanny=nanny, environment=terms)
    with Client(cluster.address) as client:
        # A nanny that is still introducing itself dies with the scheduler.
        until(lambda: not client.run_on_scheduler(lambda dask_scheduler: dask_scheduler._starting_nannies))
        cluster.kill_scheduler()
        until(lambda: cluster.alive_workers() == 0, what="the worker and its nanny have ended")
    log = cluster.workers[0].log.read_text()
    assert "keeping data and running tasks" in log
    assert "No scheduler within 2 s" in log


def test_a_client_cancels_its_futures_when_its_patience_ends(cluster):
    terms = {"resilience.failover.lease-ttl": "1500ms", "resilience.client.patience": "2s"}
    with dask.config.set(terms), Client(cluster.address) as client:
        future = client.submit(lambda: 1)
        assert future.result() == 1
        cluster.kill_scheduler()
        until(lambda: future.status == "cancelled")
        with pytest.raises(CancelledError, match="No scheduler of this cluster came back within 2 s"):
            future.result()
        until(lambda: client.status == "closed")


def test_what_a_worker_gives_back_with_a_broken_link_runs_with_what_it_kept(make_cluster, run_log, gate):
    eager = {"DASK_DISTRIBUTED__SCHEDULER__WORKER_SATURATION": "inf"}
    cluster = make_cluster(n_workers=1, nanny=False, environment=eager)
    with Client(cluster.address) as client:
        kept = client.submit(run_log.task(), 1, pure=False)
        assert kept.result(timeout=20) == 2
        running = client.submit(run_log.task(gate=gate), 2, pure=False)
        until(lambda: run_log.counts()["2"] == 1)
        # On the worker, behind the one that runs.
        waiting = client.submit(run_log.task(), 3, kept, pure=False)
        until(lambda: client.run(lambda dask_worker: len(dask_worker.state.ready)).popitem()[1] == 1)
        before = registrations(cluster, 0)
        cut_link(client)
        until(lambda: registrations(cluster, 0) == before + 1)
        gate.touch()
        assert client.gather([kept, running, waiting]) == [2, 4, 6]
        validate(client)
    run_log.assert_each_once([1, 2, 3])


# Everyone is in before anyone is heard


SLOW_ENTRY = """
import logging, time

def slow(record):
    if "Starting worker compute stream" in record.getMessage():
        time.sleep(0.5)  # as if the machine had something else to do right after the worker had its answer
    return True

logging.getLogger("distributed.scheduler").addFilter(slow)
"""


def test_a_result_that_arrives_before_all_workers_are_in_is_not_computed_again(start, tmp_path, run_log, gate):
    store = str(tmp_path / "store")
    scheduler = start.scheduler(store=store, environment=FOREVER)
    workers = [start.worker(scheduler, store=store, nanny=False) for _ in range(3)]
    with Client(scheduler.address) as client:
        names = [f"worker-{number}" for number in (2, 3)]
        leaves = [
            client.submit(run_log.task(gate=gate), number, workers=name, pure=False)
            for number, name in enumerate(names)
        ]
        total = client.submit(lambda *parts: sum(parts), *leaves, workers=names[1], pure=False)
        # From here on nobody but `total` needs them.
        del leaves
        until(lambda: run_log.calls() == 2)
        workers[2].pause()
        scheduler.kill()
        (tmp_path / "slow_entry.py").write_text(SLOW_ENTRY)
        preloads = f'["{tmp_path / "slow_entry.py"}", "dask_resilience.preload"]'
        second = start.scheduler(
            scheduler.port,
            http_port=scheduler.http_port,
            store=store,
            wait=False,
            preload=None,
            environment={**FOREVER, "DASK_DISTRIBUTED__SCHEDULER__PRELOAD": preloads},
        )
        second.await_condition(
            lambda: second.log.read_text().count("is back with") == 2, "both are back", timeout_seconds=30
        )
        gate.touch()
        workers[2].cont()
        assert total.result(timeout=30) == 2
        validate(client)
    run_log.assert_each_once(range(2))


# Nannies


def test_a_nanny_goes_on_although_the_scheduler_dies_while_it_starts(start, tmp_path):
    store = str(tmp_path / "store")
    scheduler = start.scheduler(store=store)
    worker = start.worker(scheduler, store=store, wait=False)
    worker.await_condition(lambda: "Start Nanny at" in worker.log.read_text(), "introduced", timeout_seconds=30)
    scheduler.kill()
    second = start.scheduler(scheduler.port, http_port=scheduler.http_port, store=store)
    worker.wait_ready(second)
    with Client(second.address) as client:
        until(lambda: "finds the next one" in worker.log.read_text())
        [pid] = pids(client).values()
        assert client.submit(os.getpid, pure=False).result(timeout=20) == pid
        # It is a whole nanny: it starts a new worker when this one dies.
        os.kill(pid, signal.SIGKILL)
        assert client.submit(os.getpid, pure=False).result(timeout=30) != pid


def test_a_nanny_waits_for_a_scheduler_that_is_not_there_yet(start, tmp_path):
    store = str(tmp_path / "store")
    port = free_port()
    worker = start.worker(f"tcp://127.0.0.1:{port}", store=store, wait=False)
    worker.await_condition(lambda: "Run preload setup" in worker.log.read_text(), "set up", timeout_seconds=30)
    scheduler = start.scheduler(port, store=store)
    worker.wait_ready(scheduler)
