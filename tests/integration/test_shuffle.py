"""P2P shuffles that are in flight when the scheduler is killed: shards die with the run, rows do not."""

from __future__ import annotations

import os
import time

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from support import fail_over, until, validate

PARTITIONS = 12
ROWS = 50


@pytest.fixture
def cluster(make_cluster):
    return make_cluster(n_workers=2, nanny=False)


@pytest.fixture(autouse=True)
def p2p():
    with dask.config.set({"dataframe.shuffle.method": "p2p", "array.rechunk.method": "p2p"}):
        yield


def holding(path, gate, *, after: int):
    """A function that logs a line and, when more than `after` lines are there, waits for the gate."""
    path, gate = str(path), str(gate)

    def hold(x):
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        os.write(fd, b"x\n")
        lines = os.fstat(fd).st_size // 2
        os.close(fd)
        while lines > after and not os.path.exists(gate):  # noqa: PTH110
            time.sleep(0.01)
        return x

    return hold


def lines(path) -> int:
    return path.stat().st_size // 2 if path.exists() else 0


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


def kill_in_the_middle(cluster, client, path, gate, *, after: int, shuffles: bool = True) -> None:
    # Both threads are held, so the work has got exactly so far.
    until(lambda: lines(path) == after + 2, what="both threads are held")
    assert shuffling(client) == shuffles
    fail_over(cluster, client)
    gate.touch()


@pytest.mark.parametrize("after", [1, 5, 10])
def test_rows_are_right_when_it_dies_while_they_are_sent(cluster, client, tmp_path, gate, after):
    path = tmp_path / "sent"
    shuffled = frame(holding(path, gate, after=after)).shuffle("k")
    future = client.compute(shuffled)
    kill_in_the_middle(cluster, client, path, gate, after=after)
    pd.testing.assert_frame_equal(canonical(future.result(timeout=60)), canonical(whole()))
    validate(client)


@pytest.mark.parametrize("after", [0, 4, 9])
def test_rows_are_right_when_it_dies_while_they_are_unpacked(cluster, client, tmp_path, gate, after):
    path = tmp_path / "unpacked"
    shuffled = frame().shuffle("k").map_partitions(holding(path, gate, after=after), meta=rows(0).iloc[:0])
    future = client.compute(shuffled)
    kill_in_the_middle(cluster, client, path, gate, after=after)
    pd.testing.assert_frame_equal(canonical(future.result(timeout=60)), canonical(whole()))
    validate(client)


@pytest.mark.parametrize("after", [2, 13, 20])
def test_a_merge_is_right_when_it_dies_while_rows_are_sent(cluster, client, tmp_path, gate, after):
    path = tmp_path / "sent"
    hold = holding(path, gate, after=after)
    merged = frame(hold).merge(frame(hold, name="w"), on="k", shuffle_method="p2p")
    future = client.compute(merged)
    kill_in_the_middle(cluster, client, path, gate, after=after)
    expected = whole().merge(whole("w"), on="k")
    pd.testing.assert_frame_equal(canonical(future.result(timeout=60)), canonical(expected))
    validate(client)


@pytest.mark.parametrize("after", [0, 5, 9])
def test_a_merge_is_right_when_it_dies_while_rows_are_joined(cluster, client, tmp_path, gate, after):
    path = tmp_path / "joined"
    merged = frame().merge(frame(name="w"), on="k", shuffle_method="p2p")
    merged = merged.map_partitions(holding(path, gate, after=after), meta=merged._meta)
    future = client.compute(merged)
    kill_in_the_middle(cluster, client, path, gate, after=after)
    expected = whole().merge(whole("w"), on="k")
    pd.testing.assert_frame_equal(canonical(future.result(timeout=60)), canonical(expected))
    validate(client)


@pytest.mark.parametrize("after", [1, 5, 10])
def test_a_rechunked_array_is_right_when_it_dies_while_chunks_are_sent(cluster, client, tmp_path, gate, after):
    path = tmp_path / "sent"
    expected = np.arange(120 * 120).reshape(120, 120)
    array = da.from_array(expected, chunks=(10, 120)).map_blocks(holding(path, gate, after=after), dtype=int)
    future = client.compute(array.rechunk((120, 10), method="p2p"))
    kill_in_the_middle(cluster, client, path, gate, after=after)
    np.testing.assert_array_equal(future.result(timeout=60), expected)
    validate(client)


@pytest.mark.parametrize("after", [0, 5, 9])
def test_a_rechunked_array_is_right_when_it_dies_while_chunks_are_put_together(cluster, client, tmp_path, gate, after):
    path = tmp_path / "put-together"
    expected = np.arange(120 * 120).reshape(120, 120)
    array = da.from_array(expected, chunks=(10, 120)).rechunk((120, 10), method="p2p")
    future = client.compute(array.map_blocks(holding(path, gate, after=after), dtype=int))
    kill_in_the_middle(cluster, client, path, gate, after=after)
    np.testing.assert_array_equal(future.result(timeout=60), expected)
    validate(client)


def test_it_dies_three_times_during_one_shuffle(cluster, client, tmp_path):
    gates = [tmp_path / f"gate-{i}" for i in range(3)]
    paths = [tmp_path / f"passed-{i}" for i in range(3)]
    shuffled = frame(holding(paths[0], gates[0], after=6)).shuffle("k")
    shuffled = shuffled.map_partitions(holding(paths[1], gates[1], after=3), meta=rows(0).iloc[:0]).shuffle("v")
    shuffled = shuffled.map_partitions(holding(paths[2], gates[2], after=6), meta=rows(0).iloc[:0])
    future = client.compute(shuffled)
    for path, gate, after in zip(paths, gates, (6, 3, 6), strict=True):
        kill_in_the_middle(cluster, client, path, gate, after=after)
    pd.testing.assert_frame_equal(canonical(future.result(timeout=60)), canonical(whole()))
    validate(client)


def test_outputs_that_were_finished_are_kept(cluster, client, tmp_path, gate):
    path = tmp_path / "unpacked"
    shuffled = frame().shuffle("k").map_partitions(holding(path, gate, after=4), meta=rows(0).iloc[:0])
    persisted = client.persist(shuffled)
    until(lambda: lines(path) == 6)
    kill_in_the_middle(cluster, client, path, gate, after=4)
    pd.testing.assert_frame_equal(canonical(persisted.compute()), canonical(whole()))
    # Four were whole; the two that were held and the six that had not begun are unpacked once more.
    assert lines(path) <= 6 + PARTITIONS - 4
    validate(client)


def test_a_worker_whose_link_breaks_during_a_shuffle(cluster, client, tmp_path, gate):
    path = tmp_path / "sent"
    future = client.compute(frame(holding(path, gate, after=5)).shuffle("k"))
    until(lambda: lines(path) == 7)
    client.run(lambda dask_worker: dask_worker.batched_stream.comm.abort())
    until(lambda: all(w.log.read_text().count("Registered with the scheduler") == 2 for w in cluster.workers))
    gate.touch()
    pd.testing.assert_frame_equal(canonical(future.result(timeout=60)), canonical(whole()))
    validate(client)
