"""What is shared by name is there after a failover: variables, events, all kinds of locks, datasets and metadata."""

from __future__ import annotations

import threading
import time

import pytest
from distributed import Event, Lock, MultiLock, Semaphore, Variable, wait
from support import all_durable, fail_over, until, validate


def variables_of(client):
    return client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.extensions["variables"].variables))


def test_variables(cluster, client):
    plain, held, gone = Variable("plain", client), Variable("held", client), Variable("gone", client)
    plain.set({"a": 1})
    plain.set({"a": 2})
    future = client.submit(lambda: 41, key="held by a variable")
    held.set(future)
    gone.set(1)
    gone.delete()
    wait(future)
    del future
    until(lambda: not client.futures)
    # Nobody answers a deletion.
    until(lambda: "gone" not in variables_of(client))
    all_durable(client)
    fail_over(cluster, client)
    assert plain.get(timeout=10) == {"a": 2}
    assert held.get(timeout=10).result(timeout=10) == 41
    with pytest.raises(TimeoutError):
        gone.get(timeout=0.2)
    # And once more, by the journal of the second scheduler.
    plain.set("changed")
    fail_over(cluster, client)
    assert plain.get(timeout=10) == "changed"
    held.delete()
    until(
        lambda: "held by a variable" not in client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.tasks))
    )


def test_events(cluster, client):
    happened, cleared, awaited = (Event(name, client) for name in ("happened", "cleared", "awaited"))
    happened.set()
    cleared.set()
    cleared.clear()
    waiting = threading.Thread(target=awaited.wait)
    waiting.start()
    fail_over(cluster, client)
    assert happened.is_set()
    assert not cleared.is_set()
    assert waiting.is_alive()
    awaited.set()
    waiting.join(timeout=20)
    assert not waiting.is_alive()


def test_tasks_that_take_turns_go_on_taking_turns(cluster, client, tmp_path):
    path = str(tmp_path / "inside")

    def take_a_turn(number):
        with Lock("one at a time"):
            with open(path, "x"):  # noqa: PTH123 - it fails where two are inside
                time.sleep(0.4)
            import os

            os.unlink(path)  # noqa: PTH108
        return number

    turns = client.map(take_a_turn, range(6), pure=False)
    until(lambda: sum(turn.done() for turn in turns) == 1)
    fail_over(cluster, client)
    assert client.gather(turns) == list(range(6))
    validate(client)


def test_semaphores_count_on(cluster, client):
    semaphore = Semaphore(max_leases=2, name="two")
    assert semaphore.acquire(timeout=5)
    assert semaphore.acquire(timeout=5)
    fail_over(cluster, client)
    assert semaphore.get_value() == 2
    assert not semaphore.acquire(timeout=0.2)
    semaphore.release()
    assert semaphore.get_value() == 1
    fail_over(cluster, client)
    assert semaphore.get_value() == 1
    assert semaphore.acquire(timeout=5)


def test_published_datasets(cluster, client):
    future = client.submit(lambda: [1, 2], key="published")
    client.publish_dataset(kept=future, gone=future)
    client.unpublish_dataset("gone")
    wait(future)
    del future
    until(lambda: not client.futures)
    fail_over(cluster, client)
    assert client.list_datasets() == ("kept",)
    assert client.get_dataset("kept").result(timeout=10) == [1, 2]
    client.unpublish_dataset("kept")
    until(lambda: client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)) == 0)


def test_metadata(cluster, client):
    client.set_metadata("run", {"started": 1})
    client.set_metadata(["run", "ended"], None)
    fail_over(cluster, client)
    assert client.get_metadata("run") == {"started": 1, "ended": None}


def test_who_holds_multi_locks_holds_them_on(cluster, client):
    held, wanted, other = (MultiLock(names, client) for names in (["a", "b"], ["b", "c"], ["c"]))
    assert held.acquire(timeout=5)
    got = threading.Event()

    def wait_for_it():
        assert wanted.acquire()
        got.set()

    waiting = threading.Thread(target=wait_for_it)
    waiting.start()
    for _ in range(2):
        fail_over(cluster, client)
        assert not MultiLock(["a"], client).acquire(timeout=0.2)
        assert not got.is_set()
    held.release()
    waiting.join(timeout=20)
    assert got.is_set()
    fail_over(cluster, client)
    assert not other.acquire(timeout=0.2)
    assert MultiLock(["a"], client).acquire(timeout=5)
    wanted.release()
    again = MultiLock(["b", "c"], client)
    assert again.acquire(timeout=5)
    with pytest.raises(KeyError):
        client.sync(client.scheduler.multi_lock_release, id=wanted.id)


def test_tasks_that_lock_several_things_go_on_taking_turns(cluster, client, tmp_path):
    path = str(tmp_path / "inside")

    def take_a_turn(number):
        with MultiLock(["left", "right"]):
            with open(path, "x"):  # noqa: PTH123 - it fails where two are inside
                time.sleep(0.4)
            import os

            os.unlink(path)  # noqa: PTH108
        return number

    turns = client.map(take_a_turn, range(6), pure=False)
    until(lambda: sum(turn.done() for turn in turns) == 1)
    fail_over(cluster, client)
    assert client.gather(turns) == list(range(6))
    until(lambda: not client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.extensions["multi_locks"].requests))
    validate(client)
