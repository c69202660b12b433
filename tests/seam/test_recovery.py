"""Everyone who joins before the plan is heard."""

from __future__ import annotations

import asyncio

from dask_resilience._distributed.scheduler_clients import Joining
from dask_resilience._distributed.scheduler_replay import Replay
from dask_resilience.failover.barrier import BarrierTerms
from dask_resilience.journal import records
from dask_resilience.plugins.recovery import Recovery


def wants(client, *keys):
    """Messages by which a client wanted keys one by one, and nobody acked."""
    return [
        {"op": "client-desires-keys", "client": client, "keys": [key], "seq": seq, "origin": client}
        for seq, key in enumerate(keys, 1)
    ]


def test_a_client_that_joins_while_another_is_heard_is_heard_too(seat):
    async def main():
        async with seat() as here:
            recovery = Recovery(
                here.scheduler,
                replay=Replay(here.scheduler),
                tap=here.tap,
                workers=here.workers,
                clients=here.clients,
                owners=frozenset(),
                epoch=2,
                terms=BarrierTerms(worker_grace_seconds=0, client_grace_seconds=0),
            )
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
