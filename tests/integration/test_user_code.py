"""What a program that uses the client notices of a scheduler that is killed under it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import uuid
from collections import Counter
from concurrent.futures import CancelledError, ThreadPoolExecutor

import dask
import dask.array
import dask.bag
import dask.dataframe
import distributed
import numpy as np
import pandas as pd
import pytest
from distributed import as_completed, fire_and_forget, wait
from support import fail_over, resilience_status, until, validate

from dask_resilience import Client


@pytest.fixture
def cluster(lasting_cluster):
    return lasting_cluster


@pytest.fixture
def background():
    """Run calls that block beside the test."""
    with ThreadPoolExecutor(4) as pool:
        yield pool.submit


def failing(run_log, gate=None):
    """A task that logs its run and raises."""
    run = run_log.task(gate=gate)

    def fail_on_purpose(x):
        run(x)
        raise ZeroDivisionError(f"about {x}")

    return fail_on_purpose


def known_to_scheduler(client, keys) -> set:
    keys = set(keys)
    return client.run_on_scheduler(lambda dask_scheduler: keys & set(dask_scheduler.tasks))


def known_to_workers(client, keys) -> set:
    keys = set(keys)
    return set().union(*client.run(lambda dask_worker: keys & set(dask_worker.state.tasks)).values())


def until_nobody_knows(client, keys) -> None:
    until(lambda: not known_to_scheduler(client, keys), what="the scheduler forgets")
    until(lambda: not known_to_workers(client, keys), what="the workers forget")


# Waiting


def test_as_completed_goes_on_and_gives_each_future_once(cluster, client, run_log, gate):
    early = client.map(run_log.task(), range(8), pure=False)
    completed = as_completed(early, with_results=True)
    seen = [next(completed) for _ in range(8)]
    completed.update(client.map(run_log.task(gate=gate), range(8, 16), pure=False))
    until(lambda: len(run_log.counts()) == 10, what="both threads are busy")

    fail_over(cluster, client)
    completed.add(client.submit(run_log.task(), 16, pure=False))
    gate.touch()
    seen += completed

    assert Counter(result for _, result in seen) == Counter(2 * x for x in range(17))
    assert len({future.key for future, _ in seen}) == 17
    run_log.assert_each_once(range(17))


def test_wait_that_began_before_ends_after(cluster, client, run_log, gate, background):
    futures = client.map(run_log.task(gate=gate), range(4), pure=False)
    waiting = background(wait, futures, timeout=60)
    first = background(wait, futures, timeout=60, return_when="FIRST_COMPLETED")
    until(lambda: len(run_log.counts()) == 2)

    fail_over(cluster, client)
    assert not waiting.done()
    assert not first.done()
    with pytest.raises(TimeoutError):
        wait(futures, timeout=0.1)
    gate.touch()

    assert waiting.result(60).done == set(futures)
    assert first.result(60).done
    run_log.assert_each_once(range(4))


def test_callbacks_are_called_once_for_each_future(cluster, client, run_log, gate):
    called = Counter()
    before = client.map(run_log.task(), range(4), pure=False)
    wait(before)
    after = client.map(run_log.task(gate=gate), range(4, 8), pure=False)
    failed = client.submit(failing(run_log, gate), 8, pure=False)
    for future in [*before, *after, failed]:
        future.add_done_callback(lambda future: called.update([(future.key, future.status)]))
    until(lambda: len(called) == 4)

    fail_over(cluster, client)
    gate.touch()

    wait([*after, failed], timeout=60)
    expected = Counter({(future.key, "finished"): 1 for future in [*before, *after]} | {(failed.key, "error"): 1})
    until(lambda: called.total() == expected.total())
    assert called == expected
    run_log.assert_each_once(range(9))


def test_gather_of_many_that_began_before(cluster, client, run_log, gate, background):
    held = client.map(run_log.task(), range(300), pure=False)
    wait(held)
    blocked = client.map(run_log.task(gate=gate), range(300, 302), pure=False)
    rest = client.map(run_log.task(), range(302, 500), pure=False)
    gathering = background(client.gather, [*held, *blocked, *rest])
    until(lambda: {"300", "301"} <= run_log.counts().keys(), what="both threads are busy")

    fail_over(cluster, client)
    gate.touch()

    assert gathering.result(60) == [2 * x for x in range(500)]
    run_log.assert_each_once(range(500))


def test_a_thousand_tiny_tasks(cluster, client, run_log):
    futures = client.map(run_log.task(), range(1000), pure=False)
    until(lambda: len(run_log.counts()) > 100)
    fail_over(cluster, client)
    assert client.gather(futures) == [2 * x for x in range(1000)]
    run_log.assert_each_once(range(1000))
    validate(client)


# Failures


def test_failures_from_before_stay_what_they_were(cluster, client, run_log):
    failed = client.submit(failing(run_log), 1, pure=False)
    heir = client.submit(run_log.task(), failed, pure=False)
    wait([failed, heir])
    before = "".join(traceback.format_tb(failed.traceback()))

    fail_over(cluster, client)

    later = client.submit(run_log.task(), heir, pure=False)
    for future in (failed, heir, later):
        assert isinstance(future.exception(timeout=30), ZeroDivisionError)
        assert str(future.exception()) == "about 1"
        assert future.status == "error"
    assert "".join(traceback.format_tb(failed.traceback())) == before
    assert "fail_on_purpose" in before
    with pytest.raises(ZeroDivisionError, match="about 1"):
        client.gather([failed])
    run_log.assert_each_once([1])


def test_a_task_that_fails_while_nobody_rules_fails_once(cluster, client, run_log, gate):
    failed = client.submit(failing(run_log, gate), 1, pure=False)
    heir = client.submit(run_log.task(), failed, pure=False)
    until(run_log.counts)
    cluster.kill_scheduler()
    until(lambda: client.status == "connecting")
    gate.touch()
    cluster.restart_scheduler()
    assert isinstance(failed.exception(timeout=60), ZeroDivisionError)
    assert isinstance(heir.exception(timeout=60), ZeroDivisionError)
    validate(client)
    run_log.assert_each_once([1])


def test_a_retry_that_ends_before_it_is_durable_is_not_awaited_for_ever(make_cluster, run_log, tmp_path):
    slow = {"DASK_RESILIENCE__JOURNAL__COMMIT_INTERVAL": "700ms"}
    cluster = make_cluster(n_workers=1, nanny=False, environment=slow)
    cure = str(tmp_path / "cure")

    def fragile(x):
        if not os.path.exists(cure):  # noqa: PTH110
            raise ValueError("ill")
        return "well"

    with Client(cluster.address) as client:
        future = client.submit(fragile, 1, pure=False)
        first = future.exception(timeout=20)
        client.retry([future])
        assert isinstance(future.exception(timeout=20), ValueError)
        assert future.exception() is not first
        (tmp_path / "cure").touch()
        client.retry([future])
        assert future.result(timeout=20) == "well"
        client.retry([])


def test_a_retry_that_was_answered_is_not_lost(make_cluster, run_log, tmp_path, gate):
    cluster = make_cluster(n_workers=1, nanny=False)
    cure = str(tmp_path / "cure")
    run = run_log.task(gate=gate)

    def fragile(x):
        if not os.path.exists(cure):  # noqa: PTH110
            raise ValueError("ill")
        run(x)
        return "well"

    with Client(cluster.address) as client:
        future = client.submit(fragile, 1, pure=False)
        assert isinstance(future.exception(timeout=20), ValueError)
        (tmp_path / "cure").touch()
        client.retry([future])
        cluster.workers[0].kill()
        fail_over(cluster)
        cluster.add_worker()
        gate.touch()
        assert future.result(timeout=30) == "well"
        validate(client)


def test_a_failed_task_is_retried_after_the_failover_and_once_more_after_another(cluster, client, run_log, tmp_path):
    run = run_log.task()
    cure = str(tmp_path / "cure")

    def fragile(x):
        run(x)
        if not os.path.exists(cure):  # noqa: PTH110
            raise ValueError("ill")
        return "well"

    future = client.submit(fragile, 1, pure=False)
    heir = client.submit(lambda word: word.upper(), future, pure=False)
    assert isinstance(heir.exception(timeout=30), ValueError)

    fail_over(cluster, client)
    client.retry([heir])
    assert isinstance(heir.exception(timeout=30), ValueError)
    assert run_log.counts() == {"1": 2}

    (tmp_path / "cure").touch()
    client.retry([heir])
    assert heir.result(timeout=30) == "WELL"
    fail_over(cluster, client)
    assert (future.result(timeout=30), heir.result(timeout=30)) == ("well", "WELL")
    assert run_log.counts() == {"1": 3}


# Letting go


def test_what_is_fired_and_forgotten_runs_once(cluster, client, run_log, gate):
    fire_and_forget(client.map(run_log.task(), range(10), pure=False))
    until(lambda: len(run_log.counts()) == 10)
    futures = client.map(run_log.task(gate=gate), range(10, 16), pure=False)
    keys = [future.key for future in futures]
    fire_and_forget(futures)
    del futures
    until(lambda: len(run_log.counts()) == 12, what="two run, four wait")

    fail_over(cluster, client)
    gate.touch()

    until(lambda: len(run_log.counts()) == 16)
    until_nobody_knows(client, keys)
    run_log.assert_each_once(range(16))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_was_fired_right_before_the_client_closed_runs_although_nobody_ruled(
    make_cluster, run_log, monkeypatch, asynchronous
):
    monkeypatch.setattr("dask_resilience._distributed.client_link._CLOSE_DRAIN_SECONDS", 60.0)
    cluster = make_cluster(n_workers=1)
    run = run_log.task()

    async def in_a_loop():
        client = await Client(cluster.address, asynchronous=True)
        cluster.kill_scheduler()
        fire_and_forget(client.submit(run, 1, pure=False))
        cluster.restart_scheduler()
        await client.close()

    if asynchronous:
        asyncio.run(in_a_loop())
    else:
        client = Client(cluster.address)
        cluster.kill_scheduler()
        fire_and_forget(client.submit(run, 1, pure=False))
        cluster.restart_scheduler()
        client.close()
    until(lambda: run_log.counts() == {"1": 1}, what="the task ran although its client is gone")


def test_what_was_fired_and_ends_while_nobody_rules_runs_once(cluster, client, run_log, gate):
    root = client.submit(run_log.task(gate=gate), 0, pure=False)
    heirs = client.map(run_log.task(), range(1, 4), [root] * 3, pure=False)
    failed = client.submit(failing(run_log, gate), 4, pure=False)
    keys = [future.key for future in [root, *heirs, failed]]
    fire_and_forget([*heirs, failed])
    until(lambda: len(run_log.counts()) == 2)
    del root, heirs, failed
    cluster.kill_scheduler()
    until(lambda: client.status == "connecting")
    gate.touch()
    cluster.restart_scheduler().wait_ready()
    until(lambda: len(run_log.counts()) == 5)
    until_nobody_knows(client, keys)
    run_log.assert_each_once(range(5))
    validate(client)


def test_what_is_fired_while_nobody_rules_runs_once(cluster, client, run_log):
    cluster.kill_scheduler()
    until(lambda: client.status == "connecting")
    futures = client.map(run_log.task(), range(6), pure=False)
    keys = [future.key for future in futures]
    fire_and_forget(futures)
    del futures
    cluster.restart_scheduler().wait_ready()
    until(lambda: len(run_log.counts()) == 6)
    until_nobody_knows(client, keys)
    run_log.assert_each_once(range(6))


def test_nothing_is_done_twice_when_acks_are_lost(cluster, client, run_log):
    client._stream_handlers["resilience-ack"] = lambda seq: None
    futures = client.map(run_log.task(), range(5), pure=False)
    keys = [future.key for future in futures]
    fire_and_forget(futures)
    kept = client.submit(run_log.task(), 5, pure=False)
    del futures
    assert kept.result(timeout=30) == 10
    until_nobody_knows(client, keys)
    assert len(client._outbox) >= 2

    fail_over(cluster, client)

    assert client.submit(run_log.task(), 6, pure=False).result(timeout=30) == 12
    assert not known_to_scheduler(client, keys)
    run_log.assert_each_once(range(7))


def test_what_is_cancelled_never_runs(cluster, client, run_log, gate):
    blockers = client.map(run_log.task(gate=gate), range(2), pure=False)
    until(lambda: len(run_log.counts()) == 2)
    early = client.map(run_log.task(), range(10, 13), pure=False)
    outage = client.map(run_log.task(), range(20, 23), pure=False)
    late = client.map(run_log.task(), range(30, 33), pure=False)
    heir = client.submit(sum, outage, pure=False)
    keys = [future.key for future in [*early, *outage, *late, heir]]
    until(lambda: known_to_scheduler(client, keys) == set(keys))

    client.cancel(early)
    cluster.kill_scheduler()
    until(lambda: client.status == "connecting")
    client.cancel(outage)
    cluster.restart_scheduler().wait_ready()
    client.cancel(late)
    validate(client)
    gate.touch()

    assert client.gather(blockers) == [0, 2]
    for future in [*early, *outage, *late]:
        assert future.cancelled()
        with pytest.raises(CancelledError):
            future.result(timeout=10)
    until(heir.cancelled, what="what depends on a cancelled key is cancelled")
    until_nobody_knows(client, keys)
    run_log.assert_each_once(range(2))


def test_futures_let_go_while_nobody_rules_are_freed(cluster, client, run_log):
    kept, dropped = client.map(run_log.task(), range(2), pure=False)
    erred = client.submit(failing(run_log), 2, pure=False)
    heir = client.submit(run_log.task(), kept, dropped, pure=False)
    wait([kept, dropped, erred, heir])
    pending = client.submit(run_log.task(), heir, erred, pure=False)
    keys = [dropped.key, erred.key, heir.key, pending.key]

    cluster.kill_scheduler()
    until(lambda: client.status == "connecting")
    del dropped, erred, heir, pending
    cluster.restart_scheduler().wait_ready()

    until_nobody_knows(client, keys)
    validate(client)
    assert kept.result(timeout=10) == 0
    assert known_to_workers(client, [kept.key]) == {kept.key}


# Other ways to be a client


def test_an_asynchronous_client(cluster, run_log, gate):
    async def use():
        async with Client(cluster.address, asynchronous=True) as client:
            done = await client.gather(client.map(run_log.task(), range(4), pure=False))
            futures = client.map(run_log.task(gate=gate), range(4, 8), pure=False)
            completed = as_completed(futures, with_results=True)
            while len(run_log.counts()) < 6:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

            await asyncio.to_thread(fail_over, cluster)
            await client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.validate_state())
            gate.touch()

            done += sorted([result async for _, result in completed])
            assert [await future for future in futures] == done[4:]
            return [*done, await client.submit(run_log.task(), 8, pure=False)]

    assert asyncio.run(use()) == [2 * x for x in range(9)]
    run_log.assert_each_once(range(9))


def test_collections_use_it_as_the_default_client(cluster, client, gate, background):
    assert distributed.default_client() is client
    open_gate = str(gate)

    def slow(x):
        while not os.path.exists(open_gate):  # noqa: PTH110
            time.sleep(0.01)
        return x

    frame = pd.DataFrame({"k": [0, 1] * 50, "v": range(100)})
    array = dask.array.arange(1000, chunks=100).map_blocks(slow, meta=np.arange(0))
    bag = dask.bag.range(100, npartitions=4).map(slow)
    table = dask.dataframe.from_pandas(frame, npartitions=4).map_partitions(slow, meta=frame)
    tree = dask.delayed(sum)([dask.delayed(slow)(x) for x in range(10)])
    kept = dask.persist(dask.array.ones(1000, chunks=100))[0]
    wait(kept)
    running = dask.persist(dask.array.arange(500, chunks=100).map_blocks(slow, meta=np.arange(0)))[0]
    computing = background(dask.compute, array.sum(), bag.sum(), tree)
    grouping = background(table.groupby("k").v.sum().compute)
    until(lambda: any(client.processing().values()))

    fail_over(cluster, client)
    gate.touch()

    assert computing.result(60) == (499500, 4950, 45)
    assert grouping.result(60).to_dict() == {0: 2450, 1: 2500}
    assert kept.sum().compute() == 1000
    assert (running.sum() + kept.sum()).compute() == 500 * 499 / 2 + 1000
    validate(client)


PROGRAM = """
    import sys, time
    from dask_resilience import Client

    if __name__ == "__main__":
        client = Client(sys.argv[1])
        alone = client.submit(lambda: "alone", key=sys.argv[2])
        shared = client.submit(lambda: "shared", key=sys.argv[3])
        blocked = client.submit(time.sleep, 3600, key=sys.argv[4], retries=0) if len(sys.argv) > 4 else None
        print(alone.result(), shared.result(), flush=True)
        time.sleep(3600)
"""


@contextlib.contextmanager
def other_program(tmp_path, *arguments):
    """Another program with a client, which may be killed."""
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(PROGRAM))
    process = subprocess.Popen([sys.executable, str(path), *arguments], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


@pytest.mark.parametrize("killed", ["during the outage", "never"])
def test_two_clients_of_which_one_may_be_gone_for_good(cluster, client, tmp_path, killed):
    alone, shared = f"alone-{uuid.uuid4().hex}", f"shared-{uuid.uuid4().hex}"
    with other_program(tmp_path, cluster.address, alone, shared) as process:
        assert process.stdout.readline() == "alone shared\n"
        ours = client.submit(lambda: "shared", key=shared)
        own = client.submit(lambda: "own", pure=False)
        wait([ours, own])

        cluster.kill_scheduler()
        if killed == "during the outage":
            process.send_signal(signal.SIGKILL)
            process.wait(10)
        killed_at = time.monotonic()
        cluster.restart_scheduler().wait_ready()
        validate(client)

        if killed == "never":
            assert resilience_status(client)["clients_back"] == 2
            assert known_to_scheduler(client, [alone, shared]) == {alone, shared}
            assert process.poll() is None
        else:
            assert resilience_status(client)["clients_back"] == 1
            until_nobody_knows(client, [alone])
            assert time.monotonic() - killed_at >= 6, "the grace of a client that may come back"
        assert (ours.result(timeout=10), own.result(timeout=10)) == ("shared", "own")
        assert ours.status == own.status == "finished"


def test_many_threads_share_one_client(cluster, client, run_log):
    """Submissions race with the loss and the join: each is applied once, and its result is right."""
    run = run_log.task()
    stop, errors, results = threading.Event(), [], {}

    def work(number):
        try:
            for x in range(number * 1000, number * 1000 + 1000):
                if stop.is_set():
                    return
                a = client.submit(run, x, pure=False)
                results[x] = client.submit(lambda value: value + 1, a, pure=False).result(timeout=60)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        for goal in (20, 60):
            until(lambda goal=goal: len(results) > goal or errors)
            fail_over(cluster, client)
        until(lambda: len(results) > 100 or errors)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not errors
    assert results == {x: 2 * x + 1 for x in results}
    run_log.assert_each_once(results)


# What clients bring with them, and leave


def test_modules_that_were_uploaded_are_there_before_the_graphs_that_need_them(cluster, client, tmp_path, monkeypatch):
    (tmp_path / "only_uploaded.py").write_text("def triple(x):\n    return 3 * x\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_uploaded

    client.upload_file(str(tmp_path / "only_uploaded.py"))
    finished = client.submit(only_uploaded.triple, 1)
    assert finished.result(timeout=20) == 3
    let_go = client.submit(only_uploaded.triple, 5)
    assert let_go.result(timeout=20) == 15
    del let_go
    cluster.kill_scheduler()
    later = client.map(only_uploaded.triple, range(10, 20))
    cluster.restart_scheduler()
    cluster.wait_scheduler_ready()
    assert finished.result(timeout=30) == 3
    assert client.gather(later) == [3 * x for x in range(10, 20)]
    assert resilience_status(client)["tasks_adopted_in_memory"] == 1
    validate(client)


def test_subscriptions_go_on(cluster, client):
    heard = []
    client.subscribe_topic("mine", lambda event: heard.append(event[1]))
    # A subscription and a call take different ways, so that one may overtake the other.
    until(lambda: client.log_event("mine", 1) or 1 in heard)
    fail_over(cluster, client)
    until(lambda: client.log_event("mine", 2) or 2 in heard)


def test_an_error_of_a_call_is_an_answer(cluster, client):
    class Refusing(distributed.SchedulerPlugin):
        name = "refusing"

        def start(self, scheduler):
            raise FileNotFoundError("its configuration")

    with pytest.raises(FileNotFoundError, match="its configuration"):
        client.register_plugin(Refusing())


def test_a_cluster_that_is_shut_down_is_not_waited_for(make_cluster):
    cluster = make_cluster(n_workers=1, nanny=False)
    ends = Client(cluster.address)
    with Client(cluster.address) as other:
        pending = other.submit(time.sleep, 60)
        ends.shutdown()
        assert ends.status == "closed"
        with pytest.raises(CancelledError):
            pending.result(timeout=10)
