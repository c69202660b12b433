"""Whom a takeover waits for."""

from __future__ import annotations

import asyncio

from dask_resilience.failover.barrier import BarrierTerms
from dask_resilience.plugins.gathering import Gathering

LONG = BarrierTerms(worker_grace_seconds=60, client_grace_seconds=60)


def gather(*, workers, clients, returned, names=None):
    async def run():
        gathering = Gathering(
            LONG,
            workers={address: (address, nanny) for address, nanny in workers.items()},
            clients=clients,
            connection_args={},
        )
        for address, nanny in returned.items():
            gathering.worker_returned(address, nanny=nanny)
        return await asyncio.wait_for(gathering.wait(), 10)

    return asyncio.run(run())


def test_a_client_of_a_task_is_not_awaited_when_its_worker_was_replaced():
    opened = gather(
        workers={"tcp://127.0.0.1:1": "nanny"},
        clients={"client-of-a-task": "tcp://127.0.0.1:1"},
        returned={"tcp://127.0.0.1:2": "nanny"},
    )
    assert opened.given_up_clients == ()


def test_a_client_of_a_worker_that_had_left_is_not_awaited():
    opened = gather(workers={}, clients={"client-of-a-task": "tcp://127.0.0.1:1"}, returned={})
    assert opened.given_up_clients == ()


def test_a_worker_whose_address_refuses_is_not_awaited():
    opened = gather(
        workers={"tcp://127.0.0.1:1": None, "tcp://127.0.0.1:2": None},
        clients={},
        returned={"tcp://127.0.0.1:2": None},
    )
    assert opened.given_up_workers == ()
