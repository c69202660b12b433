"""A key that is let go and used again while nobody rules means what it was used for last."""

from __future__ import annotations

import contextlib

import pytest
from support import until, validate

from dask_resilience import Client


@contextlib.contextmanager
def outage(cluster, client):
    """Nobody rules within."""
    cluster.kill_scheduler()
    until(lambda: client.status == "connecting")
    yield
    cluster.restart_scheduler()
    cluster.wait_scheduler_ready()


def gone(client, key):
    until(lambda: key not in client.futures)


def test_one_that_had_finished(cluster, client):
    future = client.submit(lambda x: x, 1, key="again")
    assert future.result(timeout=20) == 1
    with outage(cluster, client):
        del future
        gone(client, "again")
        future = client.submit(lambda x: x, 2, key="again")
    assert future.result(timeout=30) == 2
    validate(client)


@pytest.mark.parametrize("how", ["released", "cancelled"])
def test_one_that_was_running(cluster, client, run_log, gate, how):
    future = client.submit(run_log.task(gate=gate), 1, key="again")
    until(lambda: run_log.calls() == 1)
    with outage(cluster, client):
        if how == "cancelled":
            future.cancel()
        del future
        gone(client, "again")
        future = client.submit(run_log.task(), 2, key="again")
    gate.touch()
    assert future.result(timeout=30) == 4
    validate(client)


def test_one_that_had_failed(cluster, client, tmp_path):
    path = tmp_path / "input"

    def load(path):
        with open(path) as file:  # noqa: PTH123
            return file.read()

    future = client.submit(load, str(path))
    assert isinstance(future.exception(timeout=20), FileNotFoundError)
    key = future.key
    with outage(cluster, client):
        path.write_text("repaired")
        del future
        gone(client, key)
        future = client.submit(load, str(path))
        assert future.key == key
    assert future.result(timeout=30) == "repaired"
    validate(client)


@pytest.mark.parametrize("dies", ["scheduler", "link"])
def test_one_that_its_worker_has_not_been_told_of(make_cluster, gate, dies):
    """Released and used again while the scheduler lived, but its words did not reach the worker."""

    def deaf(deaf_until, dask_worker=None):
        import os

        for op in ("free-keys", "compute-task"):
            stock = dask_worker.stream_handlers[op]
            dask_worker.stream_handlers[op] = lambda stock=stock, **msg: (
                stock(**msg) if os.path.exists(deaf_until) else None  # noqa: PTH110
            )

    cluster = make_cluster(n_workers=1, nanny=False)
    with Client(cluster.address) as client:
        future = client.submit(lambda x: x, 1, key="again")
        assert future.result(timeout=20) == 1
        client.run(deaf, str(gate))
        del future
        gone(client, "again")
        future = client.submit(lambda x: x, 2, key="again")
        until(lambda: not client._outbox, what="it is durable")
        if dies == "scheduler":
            cluster.kill_scheduler()
            gate.touch()
            cluster.restart_scheduler()
            cluster.wait_scheduler_ready()
        else:
            client.run(
                lambda path, dask_worker=None: (open(path, "w").close(), dask_worker.batched_stream.comm.abort()),  # noqa: PTH123
                str(gate),
            )
        assert future.result(timeout=30) == 2
        validate(client)


def test_one_that_is_still_needed_keeps_its_meaning_and_its_result(cluster, client, run_log, gate):
    """Let go and used again while another task holds it: it is the same task, and what it gave is not given up."""
    future = client.submit(run_log.task(), 1, key="again")
    assert future.result(timeout=20) == 2
    heir = client.submit(run_log.task(gate=gate), 3, future, pure=False)
    until(lambda: run_log.calls() == 2)
    del future
    gone(client, "again")
    future = client.submit(run_log.task(), 1, key="again")
    until(lambda: not client._outbox, what="it is durable")
    with outage(cluster, client):
        pass
    gate.touch()
    assert client.gather([future, heir]) == [2, 6]
    validate(client)
    run_log.assert_each_once([1, 3])


def test_failures_of_a_key_count_for_what_it_was_used_for_then(cluster, client, run_log, gate):
    def fails(until_path, x):
        import os

        if not os.path.exists(until_path):  # noqa: PTH110
            raise ValueError("ill")
        return x

    with Client(cluster.address) as other:
        first = other.submit(fails, str(gate), 1, key="again", retries=2)
        assert isinstance(first.exception(timeout=20), ValueError)
        del first
        gone(other, "again")
    until(lambda: "again" not in client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.tasks)))
    # Another client, which has never had it: nothing tells that the key is used again.
    running = client.submit(run_log.task(gate=gate), 5, key="again", retries=2)
    until(lambda: run_log.calls() == 1)
    until(lambda: not client._outbox, what="it is durable")
    with outage(cluster, client):
        pass
    left = client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.tasks["again"].retries)
    assert left == 2
    gate.touch()
    assert running.result(timeout=30) == 10
