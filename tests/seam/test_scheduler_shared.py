"""What is shared by name is recorded by value, and promised only when it is durable."""

from __future__ import annotations

import asyncio

import pytest
from distributed.protocol.pickle import loads

from dask_resilience.journal import records

CALLS = {
    "variable_set": {"name": "v", "data": 1, "client": "c"},
    "event_set": {"name": "e"},
    "event_clear": {"name": "e"},
    "semaphore_acquire": {"name": "s", "timeout": 1, "lease_id": "l"},
    "set_metadata": {"keys": ["m"], "value": 1},
}


async def turns(count=20):
    for _ in range(count):
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("op", CALLS)
def test_a_call_is_answered_when_its_value_is_durable(seat, op):
    async def main():
        async with seat() as here:
            here.scheduler.extensions["semaphores"].create(name="s", max_leases=1, lease_timeout=30)
            here.ledger.durable(len(here.log.records))
            call = asyncio.ensure_future(here.scheduler.handlers[op](**CALLS[op]))
            await turns()
            assert here.records(records.SharedChanged)
            assert not call.done()
            here.ledger.durable(len(here.log.records))
            await asyncio.wait_for(call, 5)

    asyncio.run(main())


def test_a_lease_that_is_refreshed_is_recorded_once(seat):
    async def main():
        async with seat() as here:
            semaphores = here.scheduler.extensions["semaphores"]
            semaphores.create(name="s", max_leases=1, lease_timeout=30)
            semaphores._get_lease("s", "l")
            before = len(here.log.records)
            for _ in range(5):
                semaphores.refresh_leases(name="s", lease_ids=["l"])
            assert len(here.log.records) == before
            semaphores.release(name="s", lease_id="l")
            changed = here.records(records.SharedChanged)[-1]
            assert (changed.kind, changed.name, changed.value) == ("lease", ("s", "l"), None)

    asyncio.run(main())


def test_a_semaphore_that_is_closed_is_gone_with_its_leases(seat):
    async def main():
        async with seat() as here:
            semaphores = here.scheduler.extensions["semaphores"]
            semaphores.create(name="s", max_leases=2, lease_timeout=30)
            semaphores._get_lease("s", "l")
            with pytest.warns(RuntimeWarning, match="unreleased leases"):
                semaphores.close(name="s")
            left = {}
            for record in here.records(records.SharedChanged):
                left[record.kind, record.name] = record.value
            assert left == {("semaphore", "s"): None, ("lease", ("s", "l")): None}

    asyncio.run(main())


def holders(here):
    """Who holds multi-locks, by the records."""
    left = {}
    for record in here.records(records.SharedChanged):
        if record.kind == "multi-lock":
            left[record.name] = record.value and loads(record.value)
    return {user: locks for user, locks in left.items() if locks is not None}


def multi_lock(here, what, user, **kwargs):
    return asyncio.ensure_future(here.scheduler.handlers[f"multi_lock_{what}"](id=user, **kwargs))


async def settled(here, *calls):
    for _ in range(20):
        await asyncio.sleep(0.001)
        here.ledger.durable(len(here.log.records))
    return [call.result() if call.done() else "waits" for call in calls]


def test_who_holds_multi_locks_is_recorded_and_who_waits_is_not(seat):
    async def main():
        async with seat() as here:
            first = multi_lock(here, "acquire", "1", locks=["a", "b"], num_locks=2)
            await turns()
            assert not first.done()
            second = multi_lock(here, "acquire", "2", locks=["b", "c"], num_locks=2)
            assert await settled(here, first, second) == [True, "waits"]
            assert holders(here) == {"1": ("a", "b")}
            await settled(here, multi_lock(here, "release", "1"))
            assert await settled(here, second) == [True]
            assert holders(here) == {"2": ("b", "c")}
            await settled(here, multi_lock(here, "release", "2"))
            assert holders(here) == {}

    asyncio.run(main())


def test_an_acquisition_that_is_made_again_is_the_same(seat):
    async def main():
        async with seat() as here:
            first = multi_lock(here, "acquire", "1", locks=["a"], num_locks=1)
            once_more = multi_lock(here, "acquire", "1", locks=["a"], num_locks=1, again=True)
            waits = multi_lock(here, "acquire", "2", locks=["a"], num_locks=1)
            await turns()
            waits.cancel()
            waits = multi_lock(here, "acquire", "2", locks=["a"], num_locks=1, again=True)
            assert await settled(here, first, once_more, waits) == [True, True, "waits"]
            for _ in range(2):
                await settled(here, multi_lock(here, "release", "1", again=True))
            assert await settled(here, waits) == [True]
            assert holders(here) == {"2": ("a",)}
            await settled(here, multi_lock(here, "release", "2"))
            with pytest.raises(KeyError):
                await settled(here, multi_lock(here, "release", "2"))

    asyncio.run(main())


def test_a_wait_for_multi_locks_that_ends_leaves_the_others(seat):
    async def main():
        async with seat() as here:
            await settled(here, multi_lock(here, "acquire", "1", locks=["a"], num_locks=1))
            await settled(here, multi_lock(here, "acquire", "2", locks=["b"], num_locks=1))
            given_up = multi_lock(here, "acquire", "3", locks=["a"], num_locks=1, timeout=0.01)
            while not given_up.done():
                await settled(here)
            assert given_up.result() is False
            either = multi_lock(here, "acquire", "4", locks=["a", "b"], num_locks=1)
            assert await settled(here, either) == ["waits"]
            await settled(here, multi_lock(here, "release", "1"))
            assert await settled(here, either) == [True]
            # A second lock comes free for one that needs one of them, and does not wait any more.
            await settled(here, multi_lock(here, "release", "2"))
            assert holders(here) == {"4": ("a", "b")}

    asyncio.run(main())
