"""What is shared by name is recorded by value, and promised only when it is durable."""

from __future__ import annotations

import asyncio

import pytest

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
