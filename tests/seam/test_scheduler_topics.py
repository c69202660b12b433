"""Events of members are recorded and counted once; subscribers hear what they missed."""

from __future__ import annotations

import asyncio

from distributed.protocol.pickle import loads

from dask_resilience.journal import records


def run(seat, main):
    async def runner():
        async with seat() as here:
            await asyncio.wait_for(main(here), 20)

    asyncio.run(runner())


async def log(here, topic, msg, **kwargs):
    call = asyncio.ensure_future(here.scheduler.handlers["log_event"](topic=topic, msg=msg, **kwargs))
    for _ in range(10):
        await asyncio.sleep(0.001)
    assert not call.done() or not here.records(records.EventLogged)
    here.ledger.durable(len(here.log.records))
    await call


def messages(here, topic):
    return [event[1] for event in here.scheduler.get_events(topic)]


def test_an_event_is_promised_when_it_is_durable_and_counts_once(seat):
    async def main(here):
        for _ in range(2):
            await log(here, "t", 1, request=("c", 1, 1))
            break
        again = here.scheduler.handlers["log_event"](topic="t", msg=1, request=("c", 1, 1))
        await asyncio.wait_for(again, 5)
        assert messages(here, "t") == [1]
        (record,) = here.records(records.EventLogged)
        assert loads(record.event) == here.scheduler.get_events("t")[0]
        assert (record.topics, record.client, record.number) == (("t",), "c", 1)

    run(seat, main)


def test_what_dask_logs_for_itself_is_not_recorded(seat):
    async def main(here):
        here.scheduler.log_event("all", {"action": "x"})
        await log(here, ["all", "tcp://127.0.0.1:1", "mine"], 1)
        here.scheduler.stream_handlers["log-event"](worker="w", topic="worker-get-client", msg={})
        here.scheduler.stream_handlers["log-event"](worker="w", topic="print", msg={"args": ("said",)})
        assert [record.topics for record in here.records(records.EventLogged)] == [("mine",), ("print",)]

    run(seat, main)


def test_a_subscriber_hears_what_it_missed_once(seat):
    async def main(here):
        subscribe = here.scheduler.stream_handlers["subscribe-topic"]

        def heard():
            sent = [msg for msg in here.stream.sent if msg.get("topic") == "t"]
            here.stream.sent.clear()
            return [msg["event"][1] if msg["op"] == "event" else msg["last"] for msg in sent]

        subscribe(topic="t", client="c", after=None)
        assert heard() == [0.0]
        for number in (1, 2, 3):
            await log(here, "t", number)
        assert heard() == [1, 2, 3]
        first = here.scheduler.get_events("t")[0][0]
        subscribe(topic="t", client="c", after=first)
        assert heard() == [2, 3]
        # The event itself is gone, or its scheduler had another clock.
        subscribe(topic="t", client="c", after=first + 1e-9)
        assert heard() == [2, 3]
        subscribe(topic="t", client="c", after=0.0)
        assert heard() == [1, 2, 3]
        subscribe(topic="t", client="c")
        assert heard() == []

    run(seat, main)
