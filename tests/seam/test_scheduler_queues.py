"""Calls on queues count once, are answered when durable, and leave in the journal what the scheduler has."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from distributed.protocol.pickle import dumps, loads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dask_resilience._distributed.scheduler_once import Once
from dask_resilience.journal import records
from dask_resilience.journal.calls import Call, Calls
from dask_resilience.journal.queues import QueueStates


async def turns(count=20):
    for _ in range(count):
        await asyncio.sleep(0.001)


def durable(here):
    here.ledger.durable(len(here.log.records))


async def answered(here, op, **kwargs):
    """What a call says, in a journal that is always durable."""
    call = asyncio.ensure_future(here.scheduler.handlers[op](**kwargs))
    while not call.done():
        await asyncio.sleep(0)
        durable(here)
    return call.result()


def replayed(here):
    calls = Calls()
    states = QueueStates(calls)
    for record in here.records(records.QueueChanged):
        states.apply(record)
    return states, calls


def run(seat, main):
    async def runner():
        async with seat() as here:
            await asyncio.wait_for(main(here), 20)

    asyncio.run(runner())


@pytest.mark.parametrize(
    ("op", "kwargs"),
    [("queue_create", {"name": "new"}), ("queue_put", {"name": "q", "data": 2}), ("queue_get", {"name": "q"})],
)
@pytest.mark.parametrize("request_", [None, ("c", 9, 9)])
def test_a_call_is_answered_when_it_is_durable(seat, op, kwargs, request_):
    async def main(here):
        await answered(here, "queue_create", name="q")
        await answered(here, "queue_put", name="q", data=1)
        call = asyncio.ensure_future(here.scheduler.handlers[op](**kwargs, request=request_))
        await turns()
        assert len(here.records(records.QueueChanged)) == 3
        assert not call.done()
        durable(here)
        await call

    run(seat, main)


def test_calls_that_are_made_again_count_once(seat):
    async def main(here):
        queue = here.scheduler.extensions["queues"]
        for _ in range(2):
            await answered(here, "queue_create", name="q", request=("c", 1, 1))
            await answered(here, "queue_put", name="q", data="a", request=("c", 2, 1))
            await answered(here, "queue_put", name="q", data="b", request=("c", 3, 1))
        assert queue.client_refcount == {"q": 1}
        assert queue.qsize("q") == 2
        for _ in range(2):
            got = await answered(here, "queue_get", name="q", request=("c", 4, 4))
            assert got["value"] == "a"
        assert queue.qsize("q") == 1
        # The same numbers of another client are other calls.
        assert (await answered(here, "queue_get", name="q", request=("d", 4, 4)))["value"] == "b"

    run(seat, main)


def test_a_copy_that_was_long_under_way_does_not_count(seat):
    async def main(here):
        await answered(here, "queue_create", name="q")
        await answered(here, "queue_put", name="q", data="a", request=("c", 1, 1))
        await answered(here, "queue_put", name="q", data="b", request=("c", 2, 2))
        with pytest.raises(LookupError, match="nobody waits"):
            await here.scheduler.handlers["queue_put"](name="q", data="a", request=("c", 1, 1))
        assert here.scheduler.extensions["queues"].qsize("q") == 2

    run(seat, main)


def test_a_get_that_is_made_again_while_it_waits_takes_one_item(seat):
    async def main(here):
        await answered(here, "queue_create", name="q")
        copies = [
            asyncio.ensure_future(here.scheduler.handlers["queue_get"](name="q", request=("c", 1, 1))) for _ in range(3)
        ]
        await turns()
        copies.pop(0).cancel()
        await answered(here, "queue_put", name="q", data="a")
        await answered(here, "queue_put", name="q", data="b")
        assert [copy["value"] for copy in await asyncio.gather(*copies)] == ["a", "a"]
        assert here.scheduler.extensions["queues"].qsize("q") == 1

    run(seat, main)


@pytest.mark.parametrize("how", ["settled", "forgotten", "closed"])
def test_a_get_that_nobody_waits_for_takes_nothing(seat, how):
    async def main(here):
        await answered(here, "queue_create", name="q")
        waiting = asyncio.ensure_future(here.scheduler.handlers["queue_get"](name="q", request=("c", 1, 1)))
        await turns()
        if how == "settled":
            await answered(here, "queue_create", name="other", request=("c", 2, 2))
        elif how == "forgotten":
            here.once.forget("c")
        else:
            here.once.close()
        with pytest.raises(LookupError, match="nobody waits"):
            await waiting
        await answered(here, "queue_put", name="q", data="a")
        assert here.scheduler.extensions["queues"].qsize("q") == 1

    run(seat, main)


def test_a_batch_goes_on_where_it_was_cut_off(seat):
    async def main(here):
        await answered(here, "queue_create", name="q")
        await answered(here, "queue_put", name="q", data="c")
        # What a replay brings back of a call that had two of its three items.
        before = Calls()
        items = [dumps({"type": "msgpack", "value": value}) for value in "ab"]
        before.note(Call("c", 7, 7), *items)
        here.once.restore(before)
        got = await answered(here, "queue_get", name="q", batch=3, request=("c", 7, 7))
        assert [item["value"] for item in got] == ["a", "b", "c"]
        assert here.scheduler.extensions["queues"].qsize("q") == 0

    run(seat, main)


def test_messages_of_clients_count_once_and_are_acked(seat):
    async def main(here):
        queue = here.scheduler.extensions["queues"]
        here.scheduler.new_task("k", None, "released")
        for _ in range(2):
            await answered(here, "queue_create", name="q")
        for _ in range(2):
            await answered(here, "queue_put", name="q", key="k")
            await answered(here, "queue_get", name="q")
        for _ in range(2):
            here.scheduler.stream_handlers["queue-future-release"](name="q", key="k", client="c", seq=1, origin="c")
        assert queue.future_refcount == {("q", "k"): 1}
        for _ in range(2):
            here.scheduler.stream_handlers["queue_release"](name="q", client="c", seq=2, origin="c")
        assert queue.client_refcount == {"q": 1}
        # Of a queue that nobody knows: it must be acked all the same.
        here.scheduler.stream_handlers["queue_release"](name="never", client="c", seq=3, origin="c")
        durable(here)
        assert here.stream.acks()[-1] == 3
        assert replayed(here)[0].held == {("q", "k"): 1}

    run(seat, main)


def test_a_queue_from_before_the_journal_is_recorded_and_goes_on(seat):
    async def main(here):
        extension = here.scheduler.extensions["queues"]
        queue = extension.queues["old"] = asyncio.Queue(maxsize=1)
        extension.client_refcount["old"] = 1
        waiting = asyncio.ensure_future(queue.get())
        await turns()
        here.queues.attach(here.ledger)
        await answered(here, "queue_put", name="old", data=1)
        assert (await waiting)["value"] == 1
        states, _ = replayed(here)
        assert (states.queues["old"].users, states.queues["old"].maxsize) == (1, 1)
        assert not states.queues["old"].items

    run(seat, main)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("queue_create"), st.sampled_from("pq")),
        st.tuples(st.just("queue_put"), st.sampled_from("pq"), st.sampled_from([1, 2, "key"])),
        st.tuples(st.just("queue_get"), st.sampled_from("pq"), st.sampled_from([False, True])),
        st.tuples(st.just("queue_release"), st.sampled_from("pq")),
        st.tuples(st.just("queue-future-release"), st.sampled_from("pq")),
    ),
    max_size=25,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps)
def test_a_replay_of_what_was_recorded_has_what_the_scheduler_has(seat, steps):
    async def main(here):
        extension = here.scheduler.extensions["queues"]
        here.scheduler.new_task("k", None, "released")
        for number, (op, name, *rest) in enumerate([("queue_create", "p"), ("queue_create", "q"), *steps], 1):
            request = ("c", number, max(1, number - 3))
            if op == "queue-future-release":
                inside = extension.queues[name]._queue if name in extension.queues else ()
                # Only what was handed out can be received.
                if extension.future_refcount.get((name, "k"), 0) > sum(item["type"] == "Future" for item in inside):
                    here.scheduler.stream_handlers[op](name=name, key="k", client="c")
            elif op == "queue_release":
                here.scheduler.stream_handlers[op](name=name, client="c")
            elif op == "queue_create":
                await answered(here, op, name=name, maxsize=2, request=request)
            elif name in extension.queues:
                args = {"batch": rest[0]} if op == "queue_get" else {"data": rest[0]}
                if rest == ["key"]:
                    args = {"key": "k"}
                if rest[0] is not True:
                    args["timeout"] = 0.01
                for _ in range(2):
                    with contextlib.suppress(TimeoutError):
                        await answered(here, op, name=name, request=request, **args)
        states, calls = replayed(here)
        assert {name: (q.maxsize, [loads(i) for i, _ in q.items]) for name, q in states.queues.items()} == {
            name: (q.maxsize, list(q._queue)) for name, q in extension.queues.items()
        }
        assert {name: q.users for name, q in states.queues.items()} == extension.client_refcount
        # Calls that changed nothing may have settled more since the last record.
        again = Once()
        again.restore(calls)
        live = {call[:2]: items for call, items in here.once.calls}
        assert live.items() <= {call[:2]: items for call, items in again.calls}.items()

    run(seat, main)
