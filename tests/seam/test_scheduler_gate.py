"""A scheduler whose lease is not sure answers nobody, and takes nobody's silence for death."""

from __future__ import annotations

import asyncio
from time import time

from distributed.scheduler import WorkerState


async def turns(count=50):
    for _ in range(count):
        await asyncio.sleep(0.001)


def test_calls_wait_until_the_rule_is_sure(seat):
    async def main():
        async with seat() as here:
            here.reign.sure = False
            call = asyncio.ensure_future(here.scheduler.handlers["who_has"](keys=[]))
            await turns()
            assert not call.done()
            here.reign.sure = True
            assert await asyncio.wait_for(call, 5) == {}

    asyncio.run(main())


def test_calls_wait_until_it_serves(seat):
    async def main():
        async with seat() as here:
            here.gate.serving.clear()
            call = asyncio.ensure_future(here.scheduler.handlers["who_has"](keys=[]))
            identity = here.scheduler.handlers["identity"]()
            assert identity["resilience"]["ready"] is False
            await turns()
            assert not call.done()
            here.gate.serving.set()
            assert await asyncio.wait_for(call, 5) == {}

    asyncio.run(main())


def test_a_heartbeat_is_heard_at_once_and_answered_when_the_rule_is_sure(seat):
    async def main():
        async with seat() as here:
            address = "tcp://127.0.0.1:1"
            worker = WorkerState(
                address=address,
                status="running",
                pid=0,
                name="w",
                nthreads=1,
                memory_limit=0,
                local_directory="",
                nanny="",
                server_id="",
                versions={},
                services={},
                extra={},
                scheduler=here.scheduler,
            )
            here.scheduler.workers[address] = worker
            here.scheduler.host_info["127.0.0.1"] = {"addresses": {address}, "nthreads": 1}
            try:
                worker.last_seen = 0.0
                here.reign.sure = False
                beat = {"now": time(), "resources": {}, "host_info": {}, "metrics": {}, "executing": {}}
                call = asyncio.ensure_future(here.scheduler.handlers["heartbeat_worker"](address=address, **beat))
                await turns()
                assert not call.done()
                assert worker.last_seen > time() - 5
                call.cancel()
            finally:
                del here.scheduler.workers[address]

    asyncio.run(main())
