"""Messages that come twice count once, and answers wait for the journal."""

from __future__ import annotations

import asyncio

import pytest
from dask._expr import LLGExpr
from distributed.protocol import Serialized, serialize

from dask_resilience.journal import records


def graph(*keys, seq):
    header, frames = serialize(LLGExpr(dict.fromkeys(keys, 1)), serializers=("pickle",), on_error="raise")
    return {
        "expr_ser": Serialized(header, frames),
        "keys": set(keys),
        "span_metadata": {},
        "internal_priority": None,
        "submitting_task": None,
        "seq": seq,
        "origin": "c",
    }


MESSAGES = {
    "update-graph": (records.GraphSubmitted, lambda seq: {"client": "c", **graph("x", "y", seq=seq)}),
    "client-desires-keys": (
        records.KeysWanted,
        lambda seq: {"client": "variable-v", "keys": [], "seq": seq, "origin": "c"},
    ),
    "cancel-keys": (
        records.KeysCancelled,
        lambda seq: {"client": "c", "keys": ["x"], "force": False, "reason": "", "msg": "", "seq": seq, "origin": "c"},
    ),
}


@pytest.mark.parametrize("op", MESSAGES)
def test_a_message_that_comes_twice_counts_once_and_is_acked_twice(seat, op):
    kind, message = MESSAGES[op]

    async def main():
        async with seat() as here:

            async def say(seq):
                result = here.scheduler.stream_handlers[op](**message(seq))
                if asyncio.iscoroutine(result):
                    await result
                here.tap.ledger.durable(len(here.log.records))

            await say(1)
            await say(1)
            assert len(here.records(kind)) == 1
            assert here.stream.acks() == [1, 1]
            await say(2)
            assert len(here.records(kind)) == 2
            assert here.stream.acks() == [1, 1, 2]

    asyncio.run(main())


def test_nothing_is_acked_before_it_is_durable(seat):
    async def main():
        async with seat() as here:
            await here.scheduler.stream_handlers["update-graph"](client="c", **graph("x", seq=1))
            assert "x" in here.scheduler.tasks
            assert here.stream.acks() == []
            here.tap.ledger.durable(len(here.log.records))
            assert here.stream.acks() == [1]

    asyncio.run(main())


CALLS = {
    "resilience_committed": {},
    "update_data": {"who_has": {}, "nbytes": {}, "client": "c"},
}


@pytest.mark.parametrize("op", CALLS)
def test_a_call_is_answered_when_what_it_recorded_is_durable(seat, op):
    async def main():
        async with seat() as here:
            here.tap.ledger.record(records.KeysReleased(client="c", keys=("x",)))
            call = asyncio.ensure_future(here.scheduler.handlers[op](**CALLS[op]))
            for _ in range(20):
                await asyncio.sleep(0)
            assert not call.done()
            here.tap.ledger.durable(len(here.log.records))
            await asyncio.wait_for(call, 5)

    asyncio.run(main())
