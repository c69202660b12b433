"""A worker that is being retired when its scheduler dies keeps what it holds, and is retired by the next one."""

from __future__ import annotations

from distributed import wait
from support import fail_over, until, validate


def workers_of(client):
    return client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.workers))


def begin_to_retire(client, address):
    """What `retire_workers` does first; it then waits until all data is somewhere else."""

    def begin(dask_scheduler):
        ws = dask_scheduler.workers[address]
        dask_scheduler.handle_worker_status_change("closing_gracefully", ws, "test")
        msg = {"op": "worker-status-change", "status": "closing_gracefully", "stimulus_id": "test"}
        dask_scheduler.stream_comms[address].send(msg)

    client.run_on_scheduler(begin)
    until(lambda: client.run(lambda dask_worker: dask_worker.status.name)[address] == "closing_gracefully")


def test_a_retirement_that_was_cut_off_goes_on(cluster, client, run_log):
    first, second = workers_of(client)
    task = run_log.task()
    futures = [client.submit(task, number, workers=[first], allow_other_workers=True) for number in range(4)]
    (scattered,) = client.scatter(["data"], workers=[first])
    wait(futures)
    begin_to_retire(client, first)
    fail_over(cluster, client)
    until(lambda: first not in workers_of(client))
    assert client.gather(futures) == [0, 2, 4, 6]
    assert scattered.result(timeout=10) == "data"
    assert set(client.who_has(futures)[futures[0].key]) == {second}
    run_log.assert_each_once(range(4))
    validate(client)


def test_a_worker_that_was_retired_stays_away(cluster, client):
    first, second = workers_of(client)
    (data,) = client.scatter(["data"], workers=[first])
    client.retire_workers([first])
    until(lambda: workers_of(client) == [second])
    fail_over(cluster, client)
    assert workers_of(client) == [second]
    assert data.result(timeout=10) == "data"


def test_a_worker_that_is_let_go_and_not_closed_closes_itself(cluster, client):
    first, second = workers_of(client)
    client.retire_workers([first], close_workers=False)
    until(lambda: not cluster_process_serves(first))
    assert workers_of(client) == [second]


def cluster_process_serves(address):
    import socket

    host, _, port = address.rpartition("//")[2].partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True
