"""Whom a member takes for its scheduler."""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import asynccontextmanager

import pytest
from distributed.core import Server

from dask_resilience._distributed import leader as leader_module
from dask_resilience._distributed.leader import Compass, Ruler
from dask_resilience.errors import StoreError
from dask_resilience.storage import open_store


@asynccontextmanager
async def scheduler_that_says(**described):
    """A server that answers as a scheduler of an epoch would."""
    server = Server({"identity": lambda n_workers=None: {"resilience": described} if described else {}})
    await server.listen("tcp://127.0.0.1:0")
    await server
    try:
        yield server.address
    finally:
        await server.close()


def of_epoch(epoch, cluster="us"):
    return scheduler_that_says(cluster=cluster, epoch=epoch, store=None)


def test_a_scheduler_of_an_older_epoch_is_refused_though_it_is_the_only_one_that_answers():
    async def main():
        async with of_epoch(3) as old, of_epoch(4) as new:
            compass = Compass(old, connection_args={}, store_url=None)
            assert (await compass.find()).epoch == 3
            compass.follow(await compass.find())
            compass.follow(Ruler(address=new, resilient=True, cluster="us", epoch=4))
            assert (await compass.find()).address == new
            return compass, old

    async def new_is_gone():
        async with of_epoch(3) as old:
            compass = Compass(old, connection_args={}, store_url=None)
            compass.follow(Ruler(address="tcp://127.0.0.1:1", resilient=True, cluster="us", epoch=4))
            assert await compass.find() is None

    asyncio.run(main())
    asyncio.run(new_is_gone())


def test_the_epoch_of_another_cluster_says_nothing():
    async def main():
        async with of_epoch(3, cluster="them") as theirs:
            compass = Compass(theirs, connection_args={}, store_url=None)
            compass.follow(Ruler(address="tcp://127.0.0.1:1", resilient=True, cluster="us", epoch=4))
            # Whoever asks decides what to do with it.
            assert (await compass.find()).cluster == "them"

    asyncio.run(main())


def test_a_stock_scheduler_is_found():
    async def main():
        async with scheduler_that_says() as address:
            ruler = await Compass(address, connection_args={}, store_url=None).find()
            assert (ruler.address, ruler.resilient) == (address, False)

    asyncio.run(main())


def test_a_store_that_does_not_answer_is_not_waited_for(monkeypatch):
    started, gate = [], threading.Event()

    def hangs(*args, **kwargs):
        started.append(args)
        gate.wait(30)
        raise StoreError("s3://bucket", "away")

    monkeypatch.setattr(leader_module, "open_store", hangs)
    monkeypatch.setattr(leader_module, "_STORE_SECONDS", 0.05)

    async def main():
        compass = Compass("tcp://127.0.0.1:1", connection_args={}, store_url="s3://bucket")
        try:
            for _ in range(3):
                assert await asyncio.wait_for(compass.recorded(), 5) is None
            assert len(started) == 1
        finally:
            gate.set()

    asyncio.run(main())


def test_the_store_is_let_go_and_not_opened_again(store, monkeypatch):
    opened = []

    def noting(*args, **kwargs):
        opened.append(open_store(*args, **kwargs))
        return opened[-1]

    monkeypatch.setattr(leader_module, "open_store", noting)

    async def main():
        compass = Compass("tcp://127.0.0.1:1", connection_args={}, store_url=str(store))
        assert await compass.recorded() is None
        await compass.close()
        await compass.close()
        assert await compass.recorded() is None

    asyncio.run(main())
    (only,) = opened
    with pytest.raises(OSError):  # noqa: PT011 - the folder's descriptor is closed
        os.fstat(only._folder)
