"""What tasks, actors and data on workers notice of a scheduler that is killed over them."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from concurrent.futures import CancelledError

import dask
import pytest
from distributed import as_completed, get_client, get_worker, rejoin, secede, wait, worker_client
from support import all_durable, fail_over, resilience_status, until, validate

from dask_resilience import Client


@pytest.fixture
def cluster(lasting_cluster):
    return lasting_cluster


@pytest.fixture
def workers(client):
    """Addresses of the two workers."""
    return sorted(client.scheduler_info()["workers"])


def state_of(client, future):
    """The scheduler's word for the state of a future."""
    key = future.key
    return client.run_on_scheduler(lambda dask_scheduler: getattr(dask_scheduler.tasks.get(key), "state", None))


def holders(client, future):
    return set(client.who_has([future]).get(future.key, ()))


def ran(run_log) -> list[str]:
    """What ran, in order."""
    return run_log.path.read_text().split() if run_log.path.exists() else []


@contextlib.contextmanager
def outage(cluster, client):
    """Nobody rules inside."""
    cluster.kill_scheduler()
    until(lambda: client.status == "connecting")
    try:
        yield
    finally:
        cluster.restart_scheduler()
        cluster.wait_scheduler_ready()
    validate(client)


# Tasks that are clients


def with_worker_client(run, run_child):
    def parent(x):
        run(x)
        with worker_client() as client:
            futures = client.map(run_child, range(10, 14), pure=False)
            return sum(client.gather(futures))

    return parent


def with_get_client(run, run_child):
    def parent(x):
        run(x)
        client = get_client()
        futures = client.map(run_child, range(10, 14), pure=False)
        secede()
        total = sum(future.result() for future in as_completed(futures))
        rejoin()
        return total

    return parent


def as_coroutine(run, run_child):
    async def parent(x):
        run(x)
        client = get_client()
        futures = client.map(run_child, range(10, 14), pure=False)
        return sum(await client.gather(futures))

    return parent


@pytest.mark.parametrize("flavour", [with_worker_client, with_get_client, as_coroutine])
def test_a_task_that_waits_for_its_subtasks_goes_on(cluster, client, run_log, gate, flavour):
    parent = client.submit(flavour(run_log.task(), run_log.task(gate=gate)), 1, pure=False)
    # A coroutine keeps its slot: one thread is left for its subtasks.
    until(lambda: len(run_log.counts()) >= (2 if flavour is as_coroutine else 3), what="subtasks run")

    fail_over(cluster, client)
    assert not parent.done()
    gate.touch()

    assert parent.result(timeout=60) == 2 * (10 + 11 + 12 + 13)
    run_log.assert_each_once([1, 10, 11, 12, 13])
    # The threads are back in the pool: both workers run something at once.
    pair = client.map(lambda x: time.sleep(0.01) or x, range(20), pure=False)
    assert client.gather(pair) == list(range(20))
    validate(client)


def test_a_task_submits_subtasks_while_nobody_rules(cluster, client, run_log, gate):
    run = run_log.task()
    open_gate = str(gate)

    def parent(x):
        run(x)
        with worker_client() as own:
            first = own.submit(run, 10, pure=False).result()
            run("waits")
            while not os.path.exists(open_gate):  # noqa: PTH110
                time.sleep(0.01)
            futures = own.map(run, range(11, 14), pure=False)
            run("submitted")
            return first + sum(own.gather(futures))

    future = client.submit(parent, 1, pure=False)
    until(lambda: "'waits'" in run_log.counts())
    with outage(cluster, client):
        gate.touch()
        until(lambda: "'submitted'" in run_log.counts())
    assert future.result(timeout=60) == 2 * (10 + 11 + 12 + 13)
    run_log.assert_each_once([1, 10, 11, 12, 13, "waits", "submitted"])


def test_seceded_tasks_leave_their_threads_to_others(cluster, client, run_log, gate):
    run = run_log.task(gate=gate)

    def aside(x):
        secede()
        return run(x)

    aside_futures = client.map(aside, range(6), pure=False)
    until(lambda: len(run_log.counts()) == 6, what="six run on two threads")

    fail_over(cluster, client)
    others = client.map(run_log.task(), range(10, 20), pure=False)
    assert client.gather(others) == [2 * x for x in range(10, 20)]
    assert resilience_status(client)["tasks_adopted_running"] == 6
    assert not any(future.done() for future in aside_futures)
    gate.touch()

    assert client.gather(aside_futures) == [2 * x for x in range(6)]
    run_log.assert_each_once([*range(6), *range(10, 20)])
    validate(client)


# Actors


def counter(gate=None):
    gate_path = str(gate)

    class Counter:
        n = 0

        def __init__(self, start):
            self.n = start

        def add(self, x):
            self.n += x
            return self.n

        def add_slowly(self, x):
            self.n += x
            while not os.path.exists(gate_path):  # noqa: PTH110
                time.sleep(0.01)
            return self.n

    return Counter


def test_an_actor_keeps_its_state_on_a_living_worker(cluster, client):
    future = client.submit(counter(), 10, actor=True)
    actor = future.result()
    assert actor.add(1).result() == 11

    fail_over(cluster, client)
    assert actor.add(1).result(timeout=30) == 12
    assert actor.n == 12
    assert future.result(timeout=10).add(1).result(timeout=10) == 13
    assert client.submit(lambda actor: actor.add(1).result(), future, pure=False).result(timeout=30) == 14
    with outage(cluster, client):
        waiting = actor.add(1)
    assert waiting.result(timeout=30) == 15
    fail_over(cluster, client)
    assert actor.add(1).result(timeout=30) == 16


def test_a_method_that_runs_while_the_scheduler_dies_is_called_once(cluster, client, gate):
    actor = client.submit(counter(gate), 0, actor=True).result()
    call = actor.add_slowly(1)
    until(lambda: actor.n == 1)
    fail_over(cluster, client)
    gate.touch()
    with pytest.raises(OSError):  # noqa: PT011 - whose message is Dask's
        call.result(timeout=30)
    assert actor.add(1).result(timeout=30) == 2


def test_an_actor_that_is_being_made_is_made_once(cluster, client, run_log, gate):
    run, run_slowly = run_log.task(), run_log.task(gate=gate)

    class Slow:
        def __init__(self, x, slow):
            self.n = run_slowly(x) if slow else run(x)

        def add(self, x):
            self.n += x
            return self.n

    future = client.submit(Slow, 5, slow=True, actor=True)
    heir = client.submit(lambda actor: actor.add(1).result(), future, pure=False)
    until(run_log.counts)
    with outage(cluster, client):
        gate.touch()
        late = client.submit(Slow, 6, slow=False, actor=True)
    assert heir.result(timeout=30) == 11
    assert late.result(timeout=30).add(1).result(timeout=30) == 13
    fail_over(cluster, client)
    assert future.result(timeout=30).add(1).result(timeout=30) == 12
    run_log.assert_each_once([5, 6])


@pytest.mark.parametrize("when", ["after", "meanwhile"])
def test_an_actor_whose_worker_dies_errs_clearly(make_cluster, when):
    cluster = make_cluster(n_workers=2)
    with Client(cluster.address) as client:
        place = client.scheduler_info()["workers"]
        name, address = next((worker["name"], address) for address, worker in place.items())
        future = client.submit(counter(), 10, actor=True, workers=[address], allow_other_workers=True)
        actor = future.result()
        assert actor.add(1).result() == 11
        index = int(name.partition("-")[2])
        if when == "after":
            fail_over(cluster, client)
            assert actor.add(1).result(timeout=30) == 12
            cluster.kill_worker(index)
        else:
            with outage(cluster, client):
                cluster.kill_worker(index)
        until(lambda: future.status == "error", what="the future errs: its state is lost, not made anew")
        with pytest.raises(RuntimeError, match="Worker holding Actor was lost"):
            future.result(timeout=30)
        with pytest.raises(RuntimeError, match="Worker holding Actor was lost"):
            actor.add(1).result(timeout=30)
        validate(client)


# Where, when and how often


def test_priorities_order_what_runs_after(cluster, client, run_log, gate, workers):
    blocker = client.submit(run_log.task(gate=gate), 0, pure=False, workers=workers[:1])
    until(lambda: ran(run_log) == ["0"])
    priorities = {1: -5, 2: 0, 3: 7, 4: 3, 5: 7, 6: -1}
    futures = [
        client.submit(run_log.task(), x, pure=False, workers=workers[:1], priority=priority, fifo_timeout=0)
        for x, priority in priorities.items()
    ]
    until(lambda: state_of(client, futures[-1]) == "processing")

    fail_over(cluster, client)
    gate.touch()

    assert client.gather([blocker, *futures]) == [0, 2, 4, 6, 8, 10, 12]
    assert ran(run_log) == ["0", "3", "5", "4", "2", "6", "1"]


def test_what_came_first_runs_first(cluster, client, run_log, gate):
    blockers = client.map(run_log.task(gate=gate), range(2), pure=False)
    until(lambda: len(ran(run_log)) == 2)
    earlier = [client.submit(run_log.task(seconds=0.02), x, pure=False, fifo_timeout=0) for x in range(2, 10)]
    until(lambda: {state_of(client, future) for future in earlier} <= {"queued", "processing"})

    with outage(cluster, client):
        later = [client.submit(run_log.task(), x, pure=False, fifo_timeout=0) for x in range(10, 14)]
    latest = client.map(run_log.task(), range(14, 18), pure=False)
    gate.touch()

    assert client.gather([*blockers, *earlier, *later, *latest]) == [2 * x for x in range(18)]
    order = [int(x) for x in ran(run_log)]
    # Two threads take turns, so neighbours may swap.
    assert all(abs(place - x) <= 3 for place, x in enumerate(order)), order
    run_log.assert_each_once(range(18))


def test_graphs_that_came_apart_run_one_after_the_other(cluster, client, run_log, gate, workers):
    blocker = client.submit(run_log.task(gate=gate), 0, pure=False, workers=workers[:1])
    until(run_log.counts)
    earlier = client.map(run_log.task(), range(1, 7), pure=False, workers=workers[:1])
    time.sleep(0.2)  # twice Dask's fifo_timeout: what comes within it shares a rank
    later = client.map(run_log.task(), range(7, 13), pure=False, workers=workers[:1])
    until(lambda: state_of(client, later[-1]) == "processing")

    fail_over(cluster, client)
    gate.touch()

    wait([blocker, *earlier, *later], timeout=60)
    assert [int(x) for x in ran(run_log)] == list(range(13))


def restrictions(client) -> dict:
    return client.run_on_scheduler(
        lambda dask_scheduler: {
            key: (ts.worker_restrictions, ts.host_restrictions, ts.loose_restrictions)
            for key, ts in dask_scheduler.tasks.items()
        }
    )


def test_worker_restrictions_hold(cluster, client, run_log, gate, workers):
    blockers = [client.submit(run_log.task(gate=gate), n, pure=False, workers=[w]) for n, w in enumerate(workers)]
    until(lambda: len(ran(run_log)) == 2)
    names = {address: worker["name"] for address, worker in client.scheduler_info()["workers"].items()}

    def where(x):
        return get_worker().address

    by_address = client.map(where, range(6), pure=False, workers=workers[1])
    by_name = client.map(where, range(6), pure=False, workers=names[workers[0]])
    loose = client.submit(where, 1, pure=False, workers=["tcp://127.0.0.1:9"], allow_other_workers=True)
    nowhere = client.submit(where, 1, pure=False, workers=["tcp://127.0.0.1:9"])
    with dask.annotate(workers=workers[1], priority=3, retries=2):
        annotated = client.compute(dask.delayed(where)(1), optimize_graph=False)

    until(lambda: state_of(client, nowhere) == "no-worker")
    until(lambda: state_of(client, annotated) is not None, what="the last graph has come in")
    before = restrictions(client)
    fail_over(cluster, client)
    assert restrictions(client) == before
    key = annotated.key
    kept = client.run_on_scheduler(
        lambda dask_scheduler: (
            dask_scheduler.tasks[key].annotations,
            dask_scheduler.tasks[key].retries,
            dask_scheduler.tasks[key].worker_restrictions,
        )
    )
    gate.touch()

    assert client.gather(blockers) == [0, 2]
    assert set(client.gather(by_address)) == {workers[1]}
    assert set(client.gather(by_name)) == {workers[0]}
    assert loose.result(timeout=30) in workers
    assert annotated.result(timeout=30) == workers[1]
    assert kept == ({"workers": [workers[1]], "priority": 3, "retries": 2}, 2, {workers[1]})
    assert state_of(client, nowhere) == "no-worker"
    assert nowhere.status == "pending"


def used_resources(client) -> list[dict]:
    return client.run_on_scheduler(lambda dask_scheduler: [w.used_resources for w in dask_scheduler.workers.values()])


def test_resources_are_never_used_twice(make_cluster, run_log, gate):
    cluster = make_cluster(n_workers=1, nthreads=3, environment={"DASK_DISTRIBUTED__WORKER__RESOURCES__CHIP": "1"})
    run = run_log.task(gate=gate)
    with Client(cluster.address) as client:
        first = client.submit(run, 1, pure=False, resources={"chip": 1})
        until(lambda: ran(run_log) == ["1"])
        second = client.submit(run, 2, pure=False, resources={"chip": 1})
        with dask.annotate(resources={"chip": 1}):
            third = client.compute(dask.delayed(run)(3), optimize_graph=False)
        too_many = client.submit(run, 4, pure=False, resources={"chip": 2})
        until(lambda: state_of(client, too_many) == "no-worker")
        used = used_resources(client)

        fail_over(cluster, client)
        assert used_resources(client) == used
        free = client.map(run_log.task(), range(10, 14), pure=False)
        assert client.gather(free) == [20, 22, 24, 26]
        assert set(ran(run_log)) == {"1", "10", "11", "12", "13"}, "one chip, one run"
        fourth = client.submit(run, 5, pure=False, resources={"chip": 1})
        gate.touch()

        assert client.gather([first, second, third, fourth]) == [2, 4, 6, 10]
        assert too_many.status == "pending"
        cluster.environment["DASK_DISTRIBUTED__WORKER__RESOURCES__CHIP"] = "2"
        cluster.add_worker()
        assert too_many.result(timeout=60) == 8
        until(lambda: used_resources(client) == [{"chip": 0}, {"chip": 0}])
        run_log.assert_each_once([1, 2, 3, 4, 5, 10, 11, 12, 13])
        validate(client)


def always_failing(run_log, gates):
    """Fail, each run after the gate of its number, if it has one."""
    run = run_log.task()
    path = str(run_log.path)
    gate_paths = {number: str(gate) for number, gate in gates.items()}

    def fail(x):
        run(x)
        with open(path) as lines:  # noqa: PTH123
            number = len(lines.readlines())
        while number in gate_paths and not os.path.exists(gate_paths[number]):  # noqa: PTH110
            time.sleep(0.01)
        raise ValueError(f"run {number}")

    return fail


@pytest.mark.parametrize("commit", ["1ms", "1s"], ids=["in the journal", "by the workers"])
def test_used_up_retries_are_remembered(make_cluster, run_log, gate, commit):
    cluster = make_cluster(n_workers=2, environment={"DASK_RESILIENCE__JOURNAL__COMMIT_INTERVAL": commit})
    with Client(cluster.address) as client:
        client.scatter(0)  # answered when all that was recorded is durable: who is here, for instance
        future = client.submit(always_failing(run_log, {3: gate}), 1, pure=False, retries=3)
        until(lambda: len(ran(run_log)) == 3)
        if commit == "1ms":
            # A call that is answered when all that was recorded is durable.
            client.scatter(0)
        fail_over(cluster, client)
        gate.touch()
        with pytest.raises(ValueError, match="run 4"):
            future.result(timeout=30)
        assert len(ran(run_log)) == 4


def test_a_failure_that_was_answered_with_a_retry_counts_once(make_cluster, run_log, gate):
    cluster = make_cluster(n_workers=1, nanny=False)
    with Client(cluster.address) as client:
        future = client.submit(always_failing(run_log, {1: gate}), 1, pure=False, retries=2)
        until(lambda: run_log.calls() == 1)

        def deaf(deaf_until, dask_worker=None):
            # What the scheduler says after the failure does not arrive, as on a link that breaks in that moment.
            import os

            for op in ("free-keys", "compute-task"):
                stock = dask_worker.stream_handlers[op]
                dask_worker.stream_handlers[op] = lambda stock=stock, **msg: (
                    stock(**msg) if os.path.exists(deaf_until) else None  # noqa: PTH110
                )

        hears = gate.with_name("hears")
        client.run(deaf, str(hears))
        gate.touch()
        key = future.key
        left = lambda: client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.tasks[key].retries)  # noqa: E731
        until(lambda: left() == 1)
        # A call is answered when the lease is sure; this one also when what was recorded is durable.
        client.retry([])
        cluster.kill_scheduler()
        hears.touch()
        cluster.restart_scheduler()
        with pytest.raises(ValueError, match="run 3"):
            future.result(timeout=30)
        validate(client)
    assert run_log.calls() == 3


def test_retries_used_up_while_nobody_rules_are_remembered(cluster, client, run_log, tmp_path):
    gates = {number: tmp_path / f"gate-{number}" for number in (1, 2, 3)}
    future = client.submit(always_failing(run_log, gates), 1, pure=False, retries=2)
    key = future.key
    for number in (1, 2):
        until(lambda number=number: len(ran(run_log)) == number)
        cluster.kill_scheduler()
        until(lambda: client.status == "connecting")
        gates[number].touch()
        cluster.restart_scheduler().wait_ready()
        validate(client)
    until(lambda: len(ran(run_log)) == 3)
    fail_over(cluster, client)
    assert client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.tasks[key].retries) == 0
    gates[3].touch()
    with pytest.raises(ValueError, match="run 3"):
        future.result(timeout=30)
    assert len(ran(run_log)) == 3


# Data


def test_scattered_data_on_living_workers_survives(cluster, client, run_log, gate, workers):
    number = client.scatter(17)
    again = client.scatter(17)
    [unhashed] = client.scatter([{"table": 1}], hash=False)
    listed = client.scatter([1, 2, 3], hash=False)
    everywhere = client.scatter("everywhere", broadcast=True)
    placed = client.scatter("placed", workers=workers[1])
    named = client.scatter({"x-name": 5, "y-name": 6})
    waiting = client.submit(lambda run, *values: (run(0), sum(values))[1], run_log.task(gate=gate), number, *listed)
    until(run_log.counts)

    fail_over(cluster, client)
    assert holders(client, everywhere) == set(workers)
    assert holders(client, placed) == {workers[1]}
    gate.touch()

    assert waiting.result(timeout=30) == 17 + 6
    everything = [number, again, unhashed, *listed, everywhere, placed, named["x-name"], named["y-name"]]
    assert client.gather(everything) == [17, 17, {"table": 1}, 1, 2, 3, "everywhere", "placed", 5, 6]
    after = client.submit(lambda *values: values, everywhere, placed, number, pure=False)
    assert after.result(timeout=30) == ("everywhere", "placed", 17)
    run_log.assert_each_once([0])
    keys = {future.key for future in everything}
    del number, again, unhashed, listed, everywhere, placed, named, waiting, after, everything
    until(lambda: not client.run_on_scheduler(lambda dask_scheduler: keys & set(dask_scheduler.tasks)))
    assert not any(client.run(lambda dask_worker: keys & set(dask_worker.data)).values())


def test_scattering_while_nobody_rules_waits(cluster, client, gate):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        with outage(cluster, client):
            scattering = pool.submit(client.scatter, [7, 8], hash=False)
        futures = scattering.result(30)
    assert client.gather(futures) == [7, 8]
    fail_over(cluster, client)
    assert client.gather(futures) == [7, 8]


@pytest.mark.parametrize("direct", [None, True])
def test_a_task_scatters_while_nobody_rules(cluster, client, run_log, gate, direct):
    run = run_log.task()
    open_gate = str(gate)
    key = f"x-{uuid.uuid4().hex}"

    def parent():
        worker = get_worker()

        def watch():
            while key not in worker.data:
                time.sleep(0.01)
            run("held")

        with worker_client() as own:
            run("waits")
            while not os.path.exists(open_gate):  # noqa: PTH110
                time.sleep(0.01)
            threading.Thread(target=watch, daemon=True).start()
            run("scatters")
            data = own.scatter({key: 40}, direct=direct)[key]
            return own.submit(lambda x: x + 2, data).result(), data.result()

    future = client.submit(parent, pure=False)
    until(lambda: "'waits'" in run_log.counts())
    with outage(cluster, client):
        gate.touch()
        # Without `direct` the worker holds by then what no scheduler knows.
        until(lambda: f"'{'scatters' if direct else 'held'}'" in run_log.counts())
    assert future.result(timeout=60) == (42, 40)


def test_what_is_left_of_a_worker_that_died_meanwhile(make_cluster, run_log, gate):
    """Copies and failures live, results are computed again, and scattered data is named as lost."""
    # Dask's memory manager would remove the copy in a while.
    keep_copies = {"DASK_DISTRIBUTED__SCHEDULER__ACTIVE_MEMORY_MANAGER__START": "False"}
    cluster = make_cluster(n_workers=2, environment=keep_copies)
    with Client(cluster.address) as client:
        addresses = {worker["name"]: address for address, worker in client.scheduler_info()["workers"].items()}
        dying = addresses["worker-1"]
        only = client.scatter("only", workers=dying)
        copied = client.scatter("copied", broadcast=True)
        gate.touch()
        computed = client.submit(run_log.task(gate=gate), 1, pure=False, workers=dying, allow_other_workers=True)
        failed = client.submit(always_failing(run_log, {}), 2, pure=False, workers=dying, allow_other_workers=True)
        heir = client.submit(lambda value: value, only, pure=False, workers=dying, allow_other_workers=True)
        wait([computed, failed, heir])
        assert set(ran(run_log)) == {"1", "2"}
        all_durable(client)
        gate.unlink()
        with outage(cluster, client):
            cluster.kill_worker(1)
        assert copied.result(timeout=30) == "copied"
        assert isinstance(failed.exception(timeout=30), ValueError)
        until(lambda: run_log.counts() == {"1": 2, "2": 1}, what="the result is computed again, the failure is not")
        assert computed.status == "pending"
        gate.touch()
        assert computed.result(timeout=30) == 2
        assert holders(client, copied) == {addresses["worker-0"]}
        for future in (only, heir):
            with pytest.raises(CancelledError, match=r"Scattered data|lost"):
                future.result(timeout=30)
        validate(client)


def test_what_was_spilled_to_disk_is_adopted(make_cluster, run_log):
    cluster = make_cluster(n_workers=1, memory_limit="400 MB")
    run = run_log.task()
    with Client(cluster.address) as client:
        blocks = client.map(lambda x: (run(x), os.urandom(1) + bytes(20_000_000))[1], range(20), pure=False)
        wait(blocks)
        spilled = client.run(lambda dask_worker: len(dask_worker.data.slow))
        assert all(count > 0 for count in spilled.values())
        sizes = client.map(len, blocks)

        fail_over(cluster, client)

        assert resilience_status(client)["tasks_adopted_in_memory"] >= 20
        assert client.gather(sizes) == [20_000_001] * 20
        assert client.submit(lambda *parts: sum(map(len, parts[:2])), *blocks[:2]).result(timeout=60) == 40_000_002
        run_log.assert_each_once(range(20))
        validate(client)
        del blocks, sizes
        until(lambda: not any(client.run(lambda dask_worker: len(dask_worker.data)).values()), what="files are freed")
