"""What becomes of a call whose link breaks, and of one whose handler raises."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest
from distributed.comm import CommClosedError
from distributed.core import ConnectionPool, Server

from dask_resilience._distributed.client_calls import Numbers
from dask_resilience._distributed.rpc import COUNTED, NOT_REPEATABLE, FollowingRPC, drop_connections
from dask_resilience.errors import CallInterrupted


class Link:
    """A member that is connected, always to the same address."""

    def __init__(self, address, numbers=None):
        self.address = address
        self.suspected = 0
        self.numbers = numbers

    async def up(self):
        """It is."""

    def suspect(self, address):
        self.suspected += 1


@asynccontextmanager
async def serving(breaks=0, numbers=None):
    """A server whose calls break their link so many times, and then answer; and a caller that follows it."""
    calls = []

    def call(comm, **kwargs):
        calls.append(kwargs)
        if len(calls) <= breaks:
            comm.abort()
        return len(calls)

    def refuse(**kwargs):
        calls.append(kwargs)
        raise FileNotFoundError("its configuration")

    async with Server(
        {
            **dict.fromkeys([*NOT_REPEATABLE, *COUNTED, "who_has", "terminate", "multi_lock_acquire"], call),
            "refuse": refuse,
        }
    ) as server:
        await server.listen("tcp://127.0.0.1:0")
        yield FollowingRPC(server.rpc, Link(server.address, numbers)), calls


def run(main):
    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_call_that_may_run_twice_is_repeated():
    async def main():
        async with serving(breaks=2) as (rpc, calls):
            assert await rpc.who_has(key="x") == 3
            assert calls == [{"key": "x"}] * 3

    run(main)


@pytest.mark.parametrize("op", sorted(NOT_REPEATABLE))
def test_a_call_that_may_not_run_twice_is_told_to_its_caller(op):
    async def main():
        async with serving(breaks=2) as (rpc, calls):
            with pytest.raises(CallInterrupted, match=op):
                await getattr(rpc, op)()
            assert len(calls) == 1

    run(main)


def test_the_end_of_the_link_is_the_answer_of_whoever_was_ended():
    async def main():
        async with serving(breaks=1) as (rpc, calls):
            with pytest.raises(CommClosedError):
                await rpc.terminate()
            assert len(calls) == 1

    run(main)


def test_an_error_of_the_handler_is_an_answer_whatever_its_type():
    async def main():
        async with serving() as (rpc, calls):
            with pytest.raises(FileNotFoundError, match="its configuration"):
                await rpc.refuse()
            assert len(calls) == 1

    run(main)


@pytest.mark.parametrize("op", sorted(COUNTED))
def test_a_call_that_counts_once_has_the_same_number_each_time(op):
    async def main():
        async with serving(breaks=1, numbers=Numbers("c")) as (rpc, calls):
            await getattr(rpc, op)(name="q")
            await rpc.who_has(key="x")
            await getattr(rpc, op)(name="q")
            requests = [call.get("request") for call in calls]
            assert requests == [("c", 1, 1), ("c", 1, 1), None, ("c", 2, 2)]

    run(main)


def test_a_scheduler_that_would_not_know_numbers_is_told_none():
    async def main():
        async with serving(breaks=1) as (rpc, calls):
            await rpc.queue_put(name="q")
            await rpc.multi_lock_acquire(id="u")
            assert calls == [{"name": "q"}] * 2 + [{"id": "u"}]

    run(main)


def test_a_call_for_a_lock_says_when_it_is_made_again():
    async def main():
        async with serving(breaks=1, numbers=Numbers("c")) as (rpc, calls):
            await rpc.multi_lock_acquire(id="u")
            assert calls == [{"id": "u"}, {"id": "u", "again": True}]

    run(main)


def test_connections_are_dropped_twice_at_the_same_moment():
    """The client and the call that it makes both learn that the scheduler is gone, while they try to connect."""

    async def main():
        async def silent(reader, writer):
            await reader.read()

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        address = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        pool = await ConnectionPool()
        attempt = asyncio.create_task(pool.connect(address))
        await asyncio.sleep(0)
        assert address in pool._connecting
        drop_connections(pool, address)
        drop_connections(pool, address)
        # What Dask fails at is that the attempt is ending already.
        await asyncio.sleep(0)
        drop_connections(pool, address)
        with pytest.raises(CommClosedError):
            await attempt
        await pool.close()
        server.close()

    asyncio.run(main())
