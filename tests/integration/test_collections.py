"""What users compute with: the scheduler is killed in the middle, and the result is the one that it always was."""

from __future__ import annotations

import operator
from functools import partial, reduce

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from distributed import as_completed, wait
from support import and_long, fail_over, until, validate

from dask_resilience import Client

PARTITIONS = 12


@pytest.fixture
def cluster(make_cluster):
    return make_cluster(n_workers=2, nanny=False)


def chunked(hold=lambda x: x):
    side = 96

    def chunk(block_info=None):
        first, last = block_info[None]["array-location"][0]
        return hold(np.arange(first * side, last * side, dtype=float).reshape(last - first, side))

    chunks = ((side // PARTITIONS,) * PARTITIONS, (side,))
    return da.map_blocks(chunk, chunks=chunks, meta=np.empty((0, 0)))


def frame(hold=lambda x: x, *, name: str = "v"):
    def part(i):
        return hold(pd.DataFrame({"k": [(7 * row + i) % 5 for row in range(30)], name: range(30 * i, 30 * i + 30)}))

    return dd.from_map(part, range(PARTITIONS), meta=pd.DataFrame({"k": [0], name: [0]}).iloc[:0])


def array(hold):
    x = chunked(hold)
    return (x @ x.T).sum(axis=0) + x.mean()


def groupby(hold):
    return frame(hold).groupby("k").v.agg(["sum", "count", "max"])


def merge(hold):
    # Both sides in few rows a key: the join of everything with everything is no use.
    right = frame(name="w").groupby("k").w.sum().reset_index()
    return frame(hold).merge(right, on="k").groupby("k")[["v", "w"]].sum()


def bag(hold):
    return (
        db.from_sequence(range(240), npartitions=PARTITIONS)
        .map_partitions(lambda part: hold([x * x for x in part]))
        .fold(operator.add)
    )


def delayed(hold):
    leaves = [dask.delayed(hold)(i) for i in range(PARTITIONS)]
    return reduce(dask.delayed(operator.add), leaves)


WORKLOADS = pytest.mark.parametrize("make", [array, groupby, merge, bag, delayed], ids=lambda make: make.__name__)


def equal(result, expected) -> bool:
    if isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(result.sort_index(), expected.sort_index())
    else:
        np.testing.assert_allclose(result, expected)
    return True


def expected_of(make):
    with dask.config.set(scheduler="sync"):
        return make(lambda x: x).compute()


@WORKLOADS
@pytest.mark.parametrize("after", and_long(9, 2))
def test_results_are_equal_when_it_dies_in_the_middle(cluster, client, run_log, gate, make, after):
    future = client.compute(make(run_log.hold(gate=gate, after=after)))
    until(lambda: run_log.calls() > after, what="a thread is held")
    fail_over(cluster, client)
    gate.touch()
    assert equal(future.result(timeout=60), expected_of(make))
    assert run_log.calls() == PARTITIONS, "no input was made twice"
    validate(client)


@WORKLOADS
def test_what_is_persisted_is_still_there_when_it_is_computed_with(cluster, client, run_log, gate, make):
    gate.touch()
    persisted = client.persist(make(run_log.hold(gate=gate, after=PARTITIONS)))
    wait(persisted)
    assert run_log.calls() == PARTITIONS
    fail_over(cluster, client)
    assert equal(persisted.compute(), expected_of(make))
    assert run_log.calls() == PARTITIONS, "nothing was made again"
    validate(client)


def test_a_persisted_collection_is_built_upon_after_two_deaths(cluster, client, run_log, gate):
    gate.touch()
    persisted = client.persist(chunked(run_log.hold(gate=gate, after=PARTITIONS)))
    wait(persisted)
    for _ in range(2):
        fail_over(cluster, client)
        result = ((persisted + 1) @ persisted).sum().compute()
        x = chunked().compute(scheduler="sync")
        np.testing.assert_allclose(result, ((x + 1) @ x).sum())
    assert run_log.calls() == PARTITIONS
    del persisted
    until(lambda: not client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)), what="all is let go")


def test_the_blocking_call_of_a_program_that_knows_nothing_of_it(cluster, client, run_log, gate):
    """`compute` in one thread, the death in another: the caller sees the result and nothing else."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        computing = pool.submit(array(run_log.hold(gate=gate, after=5)).compute, scheduler=client)
        until(lambda: run_log.calls() > 5)
        fail_over(cluster, client)
        gate.touch()
        assert equal(computing.result(timeout=60), expected_of(array))
    assert run_log.calls() == PARTITIONS


def test_futures_in_every_state(cluster, client, run_log, gate):
    def fails(x):
        raise ZeroDivisionError(f"at {x}")

    done = client.submit(run_log.task(), 1, pure=False)
    erred = client.submit(fails, 2, pure=False)
    scattered = client.scatter({"a": 3})
    [broadcast] = client.scatter([4], broadcast=True)
    wait([done, erred])
    running = client.map(run_log.task(gate=gate), [10, 11], pure=False)
    until(lambda: run_log.calls() == 3)
    waiting = client.submit(operator.add, done, running[0])
    after_error = client.submit(lambda x: x, erred)
    other = client.submit(partial(operator.add, 1), broadcast)

    fail_over(cluster, client)
    assert [done.status, erred.status, scattered["a"].status, running[0].status, waiting.status] == [
        "finished",
        "error",
        "finished",
        "pending",
        "pending",
    ]
    gate.touch()
    assert client.gather([done, scattered["a"], broadcast, *running, waiting, other]) == [2, 3, 4, 20, 22, 22, 5]
    for future in (erred, after_error):
        with pytest.raises(ZeroDivisionError, match="at 2"):
            future.result(timeout=20)
    run_log.assert_each_once([1, 10, 11])
    validate(client)


def test_as_completed_and_callbacks_go_on(cluster, client, run_log):
    called = []
    futures = client.map(run_log.task(seconds=0.05), range(40), pure=False)
    for future in futures:
        future.add_done_callback(lambda future: called.append(future.key))
    results = []
    for number, (_, result) in enumerate(as_completed(futures, with_results=True)):
        results.append(result)
        if number == 10:
            fail_over(cluster)
    assert sorted(results) == [2 * x for x in range(40)]
    until(lambda: len(called) == 40)
    assert sorted(called) == sorted(future.key for future in futures), "each was called back once"
    run_log.assert_each_once(range(40))


def test_two_clients_with_work_in_common(cluster, client, run_log, gate):
    with Client(cluster.address, set_as_default=False) as second:
        shared = client.submit(run_log.task(gate=gate), 1, key="shared")
        also = second.submit(run_log.task(gate=gate), 1, key="shared")
        own = second.submit(run_log.task(), 2, pure=False)
        until(lambda: run_log.calls() == 2)
        fail_over(cluster, client)
        shared.release()
        gate.touch()
        assert (also.result(timeout=20), own.result(timeout=20)) == (2, 4)
        run_log.assert_each_once([1, 2])
        validate(client)
