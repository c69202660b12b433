"""What becomes of a call whose link breaks, and of one whose handler raises."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest
from distributed.comm import CommClosedError
from distributed.core import Server

from dask_resilience._distributed.rpc import NOT_REPEATABLE, FollowingRPC
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
async def serving(breaks=0):
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

    async with Server({**dict.fromkeys([*NOT_REPEATABLE, "who_has", "terminate"], call), "refuse": refuse}) as server:
        await server.listen("tcp://127.0.0.1:0")
        yield FollowingRPC(server.rpc, Link(server.address)), calls


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
