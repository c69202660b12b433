"""Everyone who joins before the plan is heard."""

from __future__ import annotations

import asyncio

from dask_resilience._distributed.scheduler_clients import Joining
from dask_resilience._distributed.scheduler_replay import Replay
from dask_resilience.failover.barrier import BarrierTerms
from dask_resilience.journal import records
from dask_resilience.journal.calls import Call
from dask_resilience.plugins.recovery import Recovery


def wants(client, *keys):
    """Messages by which a client wanted keys one by one, and nobody acked."""
    return [
        {"op": "client-desires-keys", "client": client, "keys": [key], "seq": seq, "origin": client}
        for seq, key in enumerate(keys, 1)
    ]


def recovery_of(here, replay):
    return Recovery(
        here.scheduler,
        replay=replay,
        tap=here.tap,
        workers=here.workers,
        clients=here.clients,
        owners=frozenset(),
        epoch=2,
        terms=BarrierTerms(worker_grace_seconds=0, client_grace_seconds=0),
    )


def test_a_client_that_joins_while_another_is_heard_is_heard_too(seat):
    async def main():
        async with seat() as here:
            recovery = recovery_of(here, Replay(here.scheduler))
            here.clients.joining["first"] = Joining(wants=[], outbox=wants("first", "x", "y"))

            async def join_meanwhile():
                here.clients.joining["second"] = Joining(wants=[], outbox=wants("second", "z"))
                # And the first loses its connection, and joins again with what it did since.
                here.clients.joining["first"] = Joining(wants=[], outbox=wants("first", "x", "y", "w"))

            joining = asyncio.create_task(join_meanwhile())
            await recovery._hear_clients()
            await joining
            wanted = [key for record in here.records(records.KeysWanted) for key in record.keys]
            assert sorted(wanted) == ["w", "x", "y", "z"]

    asyncio.run(main())


def test_a_client_that_did_not_come_back_is_not_expected_once_more_although_it_wanted_nothing(seat):
    async def main():
        async with seat() as here:
            replay = Replay(here.scheduler)
            replay.apply(records.ClientJoined(client="gone", resilient=True))
            here.once.calls.note(Call("gone", 1, 1))
            await recovery_of(here, replay)._hear_clients()
            assert records.ClientLeft(client="gone") in here.log.records
            assert not list(here.once.calls)

    asyncio.run(main())


def test_a_message_about_a_queue_that_nobody_acked_counts_once(seat):
    async def main():
        async with seat() as here:
            queues = here.scheduler.extensions["queues"]
            queues.create(name="q")
            queues.create(name="q")
            recovery = recovery_of(here, Replay(here.scheduler))
            closed = {"op": "queue_release", "name": "q", "seq": 1, "origin": "c"}
            for _ in range(2):
                here.clients.joining["c"] = Joining(wants=[], outbox=[closed])
                await recovery._hear_clients()
            assert queues.client_refcount == {"q": 1}
            assert [record.count for record in here.records(records.QueueChanged)] == [1]

    asyncio.run(main())
