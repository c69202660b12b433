"""P2P shuffles that are in flight when the scheduler is killed: shards die with the run, rows do not."""

from __future__ import annotations

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from support import RunLog, and_long, fail_over, until, validate

PARTITIONS = 12
ROWS = 50


@pytest.fixture
def cluster(make_cluster):
    return make_cluster(n_workers=2, nanny=False)


@pytest.fixture(autouse=True)
def p2p():
    # With a small chunk size, because p2p joins smaller chunks before it sends them.
    with dask.config.set({"dataframe.shuffle.method": "p2p", "array.chunk-size": "10 kiB"}):
        yield


def square(hold=lambda x: x):
    """An array, and the same in chunks that do not come from one task."""
    side = 120
    expected = np.arange(side * side).reshape(side, side)

    def chunk(block_info=None):
        first, last = block_info[None]["array-location"][0]
        return hold(np.arange(first * side, last * side).reshape(last - first, side))

    chunks = ((side // PARTITIONS,) * PARTITIONS, (side,))
    return expected, da.map_blocks(chunk, chunks=chunks, meta=expected[:0, :0])


def rows(i: int, name: str = "v") -> pd.DataFrame:
    keys = (np.arange(ROWS) * 7 + i) % 23
    return pd.DataFrame({"k": keys, name: np.arange(ROWS) + 1000 * i})


def frame(hold=lambda x: x, *, name: str = "v"):
    make = rows

    def part(i):
        return hold(make(i, name))

    part.__module__ = make.__module__ = "__main__"  # so that both travel by value
    return dd.from_map(part, range(PARTITIONS), meta=rows(0, name).iloc[:0])


def whole(name: str = "v") -> pd.DataFrame:
    return pd.concat([rows(i, name) for i in range(PARTITIONS)])


def canonical(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.sort_values(list(frame.columns)).reset_index(drop=True)


def shuffling(client) -> bool:
    return bool(client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.plugins["shuffle"].active_shuffles))


def kill_in_the_middle(cluster, client, log, gate, *, after: int, sure: bool = True) -> None:
    # One thread at least is held, and the other is soon: the work stays where it is.
    until(lambda: log.calls() > after, what="a thread is held")
    assert shuffling(client) or not sure
    fail_over(cluster, client)
    gate.touch()


@pytest.mark.parametrize("after", and_long(7, 4, 10))
def test_rows_are_right_when_it_dies_while_they_are_sent(cluster, client, run_log, gate, after):
    shuffled = frame(run_log.hold(gate=gate, after=after)).shuffle("k")
    future = client.compute(shuffled)
    kill_in_the_middle(cluster, client, run_log, gate, after=after)
    pd.testing.assert_frame_equal(canonical(future.result(timeout=60)), canonical(whole()))
    validate(client)


@pytest.mark.parametrize("after", and_long(3, 0, 6))
def test_rows_are_right_when_it_dies_while_they_are_unpacked(cluster, client, run_log, gate, after):
    shuffled = frame().shuffle("k").map_partitions(run_log.hold(gate=gate, after=after), meta=rows(0).iloc[:0])
    future = client.compute(shuffled)
    # Which of the outputs are unpacked by now is up to Dask.
    kill_in_the_middle(cluster, client, run_log, gate, after=after, sure=after == 0)
    pd.testing.assert_frame_equal(canonical(future.result(timeout=60)), canonical(whole()))
    validate(client)


@pytest.mark.parametrize("after", and_long(13, 5, 20))
def test_a_merge_is_right_when_it_dies_while_rows_are_sent(cluster, client, run_log, gate, after):
    hold = run_log.hold(gate=gate, after=after)
    merged = frame(hold).merge(frame(hold, name="w"), on="k", shuffle_method="p2p")
    future = client.compute(merged)
    kill_in_the_middle(cluster, client, run_log, gate, after=after)
    expected = whole().merge(whole("w"), on="k")
    pd.testing.assert_frame_equal(canonical(future.result(timeout=60)), canonical(expected))
    validate(client)


@pytest.mark.parametrize("after", and_long(3, 0, 6))
def test_a_merge_is_right_when_it_dies_while_rows_are_joined(cluster, client, run_log, gate, after):
    merged = frame().merge(frame(name="w"), on="k", shuffle_method="p2p")
    merged = merged.map_partitions(run_log.hold(gate=gate, after=after), meta=merged._meta)
    future = client.compute(merged)
    # Which of the outputs are unpacked by now is up to Dask.
    kill_in_the_middle(cluster, client, run_log, gate, after=after, sure=after == 0)
    expected = whole().merge(whole("w"), on="k")
    pd.testing.assert_frame_equal(canonical(future.result(timeout=60)), canonical(expected))
    validate(client)


@pytest.mark.parametrize("after", and_long(7, 4, 10))
def test_a_rechunked_array_is_right_when_it_dies_while_chunks_are_sent(cluster, client, run_log, gate, after):
    expected, array = square(run_log.hold(gate=gate, after=after))
    future = client.compute(array.rechunk((120, 10), method="p2p"))
    kill_in_the_middle(cluster, client, run_log, gate, after=after)
    np.testing.assert_array_equal(future.result(timeout=60), expected)
    validate(client)


@pytest.mark.parametrize("after", and_long(3, 0, 6))
def test_a_rechunked_array_is_right_when_it_dies_while_chunks_are_put_together(cluster, client, run_log, gate, after):
    expected, array = square()
    array = array.rechunk((120, 10), method="p2p")
    future = client.compute(array.map_blocks(run_log.hold(gate=gate, after=after), meta=expected[:0, :0]))
    # Which of the outputs are unpacked by now is up to Dask.
    kill_in_the_middle(cluster, client, run_log, gate, after=after, sure=after == 0)
    np.testing.assert_array_equal(future.result(timeout=60), expected)
    validate(client)


def test_it_dies_three_times_during_one_shuffle(cluster, client, tmp_path):
    gates = [tmp_path / f"gate-{i}" for i in range(3)]
    logs = [RunLog(tmp_path / f"passed-{i}") for i in range(3)]
    shuffled = frame(logs[0].hold(gate=gates[0], after=6)).shuffle("k")
    shuffled = shuffled.map_partitions(logs[1].hold(gate=gates[1], after=3), meta=rows(0).iloc[:0]).shuffle("v")
    shuffled = shuffled.map_partitions(logs[2].hold(gate=gates[2], after=6), meta=rows(0).iloc[:0])
    future = client.compute(shuffled)
    # By the last, all that was sent may be unpacked before the first output is held.
    for log, gate, after, sure in zip(logs, gates, (6, 3, 6), (True, True, False), strict=True):
        kill_in_the_middle(cluster, client, log, gate, after=after, sure=sure)
    pd.testing.assert_frame_equal(canonical(future.result(timeout=60)), canonical(whole()))
    validate(client)


def test_outputs_that_were_finished_are_kept(cluster, client, run_log, gate):
    shuffled = frame().shuffle("k").map_partitions(run_log.hold(gate=gate, after=4), meta=rows(0).iloc[:0])
    persisted = client.persist(shuffled)
    # Which of the outputs are unpacked by now is up to Dask.
    kill_in_the_middle(cluster, client, run_log, gate, after=4, sure=False)
    pd.testing.assert_frame_equal(canonical(persisted.compute()), canonical(whole()))
    # Four were whole; the two that were held and the six that had not begun are unpacked once more.
    assert run_log.calls() <= 6 + PARTITIONS - 4
    validate(client)


def test_a_worker_whose_link_breaks_during_a_shuffle(cluster, client, run_log, gate):
    future = client.compute(frame(run_log.hold(gate=gate, after=5)).shuffle("k"))
    until(lambda: run_log.calls() > 5)
    client.run(lambda dask_worker: dask_worker.batched_stream.comm.abort())
    until(lambda: all(w.log.read_text().count("Registered with the scheduler") == 2 for w in cluster.workers))
    gate.touch()
    pd.testing.assert_frame_equal(canonical(future.result(timeout=60)), canonical(whole()))
    validate(client)
