"""What is in a queue is there after a failover, and each item is handed out once."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
from distributed import Client as PlainClient
from distributed import Queue, get_client, wait
from support import all_durable, fail_over, until, validate

from dask_resilience import Client


def queues_of(client):
    """Names of the queues that the scheduler has."""
    return client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.extensions["queues"].queues))


def keys_of(client):
    return client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.tasks))


def test_what_is_in_a_queue(cluster, client):
    queue, full, gone = Queue("q", client), Queue("full", client, maxsize=1), Queue("gone", client)
    for item in (1, {"a": 2}, "three"):
        queue.put(item)
    assert queue.get() == 1
    full.put("only")
    gone.put(1)
    gone.close()
    fail_over(cluster, client)
    assert queue.qsize() == 2
    with pytest.raises(TimeoutError):
        full.put("too many", timeout=0.2)
    assert "gone" not in queues_of(client)
    queue.put(4)
    # And once more, by the journal of the second scheduler.
    fail_over(cluster, client)
    assert queue.get(batch=True) == [{"a": 2}, "three", 4]
    assert full.get() == "only"
    queue.close()
    until(lambda: "q" not in queues_of(client))
    fail_over(cluster, client)
    assert queues_of(client) == ["full"]


def test_futures_in_a_queue_live_on(cluster, client):
    queue = Queue("q", client)
    for number in range(3):
        queue.put(client.submit(lambda x: x * 10, number, key=f"in the queue-{number}"))
    handed = queue.get()
    wait(handed)
    until(lambda: list(client.futures) == ["in the queue-0"])
    fail_over(cluster, client)
    assert handed.result(timeout=10) == 0
    assert queue.get().result(timeout=10) == 10
    del handed
    until(lambda: keys_of(client) == ["in the queue-2"])
    fail_over(cluster, client)
    assert queue.get().result(timeout=10) == 20
    until(lambda: keys_of(client) == [])
    validate(client)


def test_a_future_that_was_handed_out_is_let_go_although_nobody_could_be_told(cluster, client):
    queue = Queue("q", client)
    queue.put(client.submit(lambda: 1, key="handed"))
    all_durable(client)
    future = queue.get()
    cluster.kill_scheduler()
    cluster.restart_scheduler()
    cluster.wait_scheduler_ready()
    assert future.result(timeout=10) == 1
    del future
    until(lambda: keys_of(client) == [])


def test_calls_that_wait_go_on_waiting(cluster, client):
    empty, full = Queue("empty", client), Queue("full", client, maxsize=1)
    full.put(0)
    got, put = [], threading.Event()

    def get():
        got.append(empty.get())

    def put_one():
        full.put(1)
        put.set()

    threads = [threading.Thread(target=get), threading.Thread(target=put_one)]
    for thread in threads:
        thread.start()
    for _ in range(2):
        fail_over(cluster, client)
        assert not got
        assert not put.is_set()
    empty.put("at last")
    assert full.get() == 0
    for thread in threads:
        thread.join(timeout=20)
    assert got == ["at last"]
    assert full.get() == 1
    assert empty.qsize() == 0


def test_a_batch_that_is_gathered_over_a_failover(cluster, client):
    queue, got = Queue("q", client), []
    thread = threading.Thread(target=lambda: got.extend(queue.get(batch=4)))
    thread.start()
    queue.put(1)
    queue.put(2)
    until(lambda: queue.qsize() == 0)
    fail_over(cluster, client)
    queue.put(3)
    queue.put(4)
    thread.join(timeout=20)
    assert got == [1, 2, 3, 4]


def test_each_item_is_consumed_once_over_two_failovers(cluster, client):
    each, items = 400, Queue("items", client, maxsize=20)
    produced, consumed, wrong = [], [], []

    def put(first):
        for number in range(first, first + each):
            items.put(number)
            produced.append(number)

    def get():
        try:
            consumed.extend(items.get(timeout=60) for _ in range(each))
        except Exception as error:  # noqa: BLE001 - the test shows it
            wrong.append(error)

    with Client(cluster.address, set_as_default=False) as other:
        theirs = Queue("items", other)

        def get_theirs():
            try:
                left = each
                while left:
                    batch = theirs.get(batch=min(3, left))
                    left -= len(batch)
                    consumed.extend(batch)
            except Exception as error:  # noqa: BLE001 - the test shows it
                wrong.append(error)

        threads = [
            threading.Thread(target=target, args=args)
            for target, args in ((put, (0,)), (put, (each,)), (get, ()), (get_theirs, ()))
        ]
        for thread in threads:
            thread.start()
        for share in (1, 2):
            until(lambda share=share: wrong or len(consumed) >= share * 2 * each // 3, seconds=60)
            assert len(consumed) < 2 * each
            fail_over(cluster, client)
        for thread in threads:
            thread.join(timeout=60)
    assert not wrong
    assert Counter(consumed) == Counter(range(2 * each))
    assert items.qsize() == 0


def test_tasks_use_queues_over_a_failover(cluster, client):
    def produce(name, numbers):
        queue = Queue(name, get_client())
        for number in numbers:
            queue.put(number)

    def consume(name, out, count):
        source, sink = Queue(name, get_client()), Queue(out, get_client())
        for _ in range(count):
            sink.put(source.get())

    source, sink = Queue("source", client, maxsize=5), Queue("sink", client)
    tasks = [client.submit(produce, "source", range(300)), client.submit(consume, "source", "sink", 300)]
    for share in (100, 200):
        until(lambda share=share: sink.qsize() >= share, seconds=60)
        assert not tasks[1].done()
        fail_over(cluster, client)
    client.gather(tasks)
    arrived = list(sink.get(batch=True))
    assert arrived == list(range(300)), [n for i, n in enumerate(arrived) if n != i][:10]
    assert source.qsize() == 0


def test_a_plain_client_works_as_on_stock_dask(cluster, client):
    with PlainClient(cluster.address, set_as_default=False) as plain:
        queue = Queue("q", plain, maxsize=2)
        queue.put(1)
        queue.put(plain.submit(lambda: 2, key="of a plain client"))
        assert queue.get() == 1
        assert queue.get().result(timeout=10) == 2
        queue.put(3)
        with pytest.raises(TimeoutError):
            Queue("empty", plain).get(timeout=0.1)
    fail_over(cluster, client)
    assert Queue("q", client).get(timeout=10) == 3
