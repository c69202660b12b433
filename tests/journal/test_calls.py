"""A call counts once, however often and in whatever order its copies arrive."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_resilience._distributed.client_calls import Numbers
from dask_resilience.errors import ChangeTooNew
from dask_resilience.journal.calls import Call, Calls, call_of, call_records
from dask_resilience.journal.queues import QueueState, QueueStates
from dask_resilience.journal.records import EventLogged, QueueChanged
from dask_resilience.journal.topics import TopicStates


class Server:
    """Hands a new item to each call that has none."""

    def __init__(self, calls, items):
        self.calls, self.items = calls, items

    def serve(self, call):
        self.calls.hear(call)
        if self.calls.is_over(call):
            return None
        if not self.calls.counted(call):
            self.calls.note(call, next(self.items))
        return self.calls.handed(call)


@given(st.data())
def test_copies_of_calls_are_handed_the_same_and_no_item_goes_to_two_calls(data):
    server = Server(Calls(), iter(range(10_000)))
    numbers, open_calls, answers, travelling = Numbers("c"), {}, {}, []
    for _ in range(data.draw(st.integers(1, 40), label="steps")):
        step = data.draw(st.sampled_from(["call", "again", "arrive", "arrive", "replaced"]), label="step")
        if step == "call" and len(open_calls) < 4:
            under_way = numbers.next()
            open_calls[under_way.__enter__()] = under_way
            step = "again"
        if step == "again" and open_calls:
            number = data.draw(st.sampled_from(sorted(open_calls)), label="number")
            travelling.append(Call(*numbers.request(number)))
        elif step == "arrive" and travelling:
            # A copy may be on its way for long: the link on which it came is broken, and it is read later.
            call = travelling.pop(data.draw(st.integers(0, len(travelling) - 1), label="which"))
            answer = server.serve(call)
            if call.number in open_calls and data.draw(st.booleans(), label="answer arrives"):
                open_calls.pop(call.number).__exit__(None, None, None)
                answers[call.number] = answer
            assert answer is None or answers.get(call.number, answer) == answer
        elif step == "replaced":
            # What it was connected to is gone, and with it what was on its way.
            travelling.clear()
            after = Calls()
            for record in call_records(server.calls):
                after.note(call_of(record), *record.items)
            assert list(after) == list(server.calls)
            server.calls = after
        assert len(list(server.calls)) <= 5
    assert None not in answers.values()
    assert len(set(answers.values())) == len(answers)


def test_a_client_that_is_gone_is_forgotten():
    calls = Calls()
    calls.note(Call("c", 1, 1))
    calls.note(Call("d", 1, 1))
    calls.forget("c")
    assert not calls.counted(Call("c", 1, 1))
    assert calls.counted(Call("d", 1, 1))


def put(item, **fields):
    return QueueChanged(name="q", change="put", items=(item,), **fields)


def test_what_was_taken_is_kept_with_its_call():
    calls = Calls()
    states = QueueStates(calls)
    states.apply(QueueChanged(name="q", change="users", count=1, maxsize=7))
    for item in (b"1", b"2", b"3"):
        states.apply(put(item))
    for _ in range(2):
        states.apply(QueueChanged(name="q", change="taken", client="c", number=4, settled=2))
    assert calls.handed(Call("c", 4, 2)) == (b"1", b"2")
    assert states.queues == {"q": QueueState(maxsize=7, users=1, items=states.queues["q"].items)}
    assert list(states.queues["q"].items) == [(b"3", ())]
    states.apply(put(b"4", client="c", number=5, settled=5))
    assert list(calls) == [(Call("c", 5, 5), ())]


def test_a_future_is_held_until_it_was_received():
    states = QueueStates(Calls())
    states.apply(QueueChanged(name="q", change="users", count=1))
    states.apply(put(b"f", keys=("k",)))
    states.apply(QueueChanged(name="q", change="taken"))
    assert states.held == {("q", "k"): 1}
    states.apply(QueueChanged(name="q", change="received", keys=("k",)))
    assert not states.held


def test_a_queue_that_is_closed_holds_nothing():
    states = QueueStates(Calls())
    states.apply(QueueChanged(name="q", change="users", count=2))
    states.apply(put(b"f", keys=("k",)))
    states.apply(QueueChanged(name="q", change="users", count=0))
    assert not states.queues
    assert not states.held


def test_a_change_of_a_newer_release_is_refused():
    with pytest.raises(ChangeTooNew, match="about 'sorted', which this release does not know"):
        QueueStates(Calls()).apply(QueueChanged(name="q", change="sorted"))


queue_changes = st.lists(
    st.one_of(
        st.builds(
            QueueChanged,
            name=st.sampled_from("pq"),
            change=st.just("users"),
            count=st.integers(0, 2),
            maxsize=st.just(3),
        ),
        st.builds(
            lambda name, key: QueueChanged(
                name=name, change="put", items=(b"item",), keys=() if key is None else (key,)
            ),
            st.sampled_from("pq"),
            st.sampled_from([None, "k", "l"]),
        ),
        st.builds(QueueChanged, name=st.sampled_from("pq"), change=st.just("taken")),
        st.builds(
            QueueChanged, name=st.sampled_from("pq"), change=st.just("received"), keys=st.sampled_from([("k",), ("l",)])
        ),
    ),
    max_size=30,
)


@given(queue_changes)
def test_the_state_of_queues_can_be_written_as_records(changes):
    states, again = QueueStates(Calls()), QueueStates(Calls())
    for name in "pq":
        states.apply(QueueChanged(name=name, change="users", count=1, maxsize=3))
    for change in changes:
        # Only a future that was handed out can be received.
        waiting = [(change.name, key) for _, keys in states.queues.get(change.name, QueueState()).items for key in keys]
        out = [
            (change.name, key)
            for key in change.keys
            if states.held[change.name, key] > waiting.count((change.name, key))
        ]
        if change.change != "received" or out:
            states.apply(change)
    for record in states.as_records():
        again.apply(record)
    assert again.queues == states.queues
    assert again.held == states.held


@given(st.lists(st.tuples(st.lists(st.sampled_from("ab"), min_size=1, max_size=2), st.binary(max_size=3)), max_size=20))
def test_topics_keep_their_last_events_and_can_be_written_as_records(logged):
    states, again = TopicStates(Calls(), 3), TopicStates(Calls(), 3)
    for topics, event in logged:
        states.apply(EventLogged(topics=tuple(topics), event=event))
    for topic, events in states.events.items():
        everything = [event for topics, event in logged for each in topics if each == topic]
        assert list(events) == everything[-3:]
        assert states.counts[topic] == len(everything)
    for record in states.as_records():
        again.apply(record)
    assert (again.events, again.counts) == (states.events, states.counts)
