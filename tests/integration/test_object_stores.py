"""A cluster whose journal is in an object store: the scheduler dies, and the work goes on."""

from __future__ import annotations

import json
import threading

import dask
import pytest
from support import fail_over, until

from dask_resilience import Client
from dask_resilience.storage import open_store
from dask_resilience.storage.journal_reader import JournalReader
from dask_resilience.storage.takeover import leader
from tests.storage.servers import fake_gcs, moto, new_place

__all__ = ["fake_gcs", "moto"]


@pytest.fixture(params=["moto", "fake_gcs"])
def server(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def cluster(server, make_cluster):
    place = new_place(server)
    options = server.options()
    made = make_cluster(
        n_workers=2,
        environment={
            "DASK_RESILIENCE__STORE": place,
            "DASK_RESILIENCE__STORAGE_OPTIONS": json.dumps(options),
        },
    )
    made.opened = open_store(place, existing=True, storage_options=options)
    # The client of this process looks for the leader there, too.
    with dask.config.set({"resilience.store": place, "resilience.storage-options": options}):
        yield made
    made.opened.close()


def test_the_work_goes_on_from_there(cluster, client, run_log, gate):
    finished = client.map(run_log.task(), range(20), pure=False)
    assert client.gather(finished) == [2 * x for x in range(20)]
    running = client.map(run_log.task(gate=gate), range(100, 104), pure=False)
    until(lambda: len(run_log.counts()) == 22, what="both threads are busy")
    fail_over(cluster, client)
    gate.touch()
    assert client.gather(running) == [2 * x for x in range(100, 104)]
    assert client.gather(finished) == [2 * x for x in range(20)]
    run_log.assert_each_once([*range(20), *range(100, 104)])
    assert leader(cluster.opened).epoch == 2
    logged = list(JournalReader(cluster.opened).read())
    assert {each.epoch for each in logged} == {1, 2}


def test_a_standby_finds_it_there(cluster, client, run_log):
    futures = client.map(run_log.task(seconds=0.05), range(30), pure=False)
    standby = cluster.start_standby()
    until(lambda: "Standing by" in standby.log_tail(50))
    until(lambda: sum(future.done() for future in futures) > 5)
    cluster.kill_scheduler()
    cluster.promote_standby()
    assert client.gather(futures) == [2 * x for x in range(30)]
    run_log.assert_each_once(range(30))
    assert client.scheduler_info()["address"] == leader(cluster.opened).address


def test_a_client_that_is_closed_keeps_nothing_open(cluster):
    def io_threads():
        return [thread for thread in threading.enumerate() if thread.name.startswith("store-")]

    before = io_threads()
    with Client(cluster.address) as client:
        until(lambda: len(io_threads()) > len(before), what="the client looks into the store")
        assert client.submit(sum, [1, 2]).result() == 3
    assert io_threads() == before
