"""Transcripts: what happened on the left, what the barrier decided on the right. Graces: workers 30 s, clients 10 s."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_resilience.failover.barrier import (
    STORY_LENGTH,
    Action,
    Barrier,
    BarrierPhase,
    BarrierTerms,
    Event,
    InvalidBarrierTransition,
    KeepWaiting,
    MemberDropped,
    MemberExpected,
    MemberKind,
    MemberProvenGone,
    MemberReturned,
    Open,
    TimePassed,
)

TERMS = BarrierTerms(worker_grace_seconds=30, client_grace_seconds=10)
EVENTS = {"expected": MemberExpected, "returned": MemberReturned, "dropped": MemberDropped, "gone": MemberProvenGone}

EVERYONE_COMES_BACK = """
worker a expected   |
worker b expected   |
client c expected   |
at 100              | wait for workers a b, clients c, until 130
worker b returned   | wait for workers a, clients c, until 130
client c returned   | wait for workers a, clients -, until 130
worker a returned   | open
"""

NOBODY_WAS_THERE = """
at 100              | open
"""

A_DEAD_WORKER_IS_NOT_WAITED_FOR = """
worker a expected   |
worker b expected   |
at 100              | wait for workers a b, clients -, until 130
worker a returned   | wait for workers b, clients -, until 130
worker b gone       | open
"""

A_SILENT_WORKER_IS_GIVEN_UP_AFTER_ITS_GRACE = """
worker a expected   |
worker b expected   |
at 100              | wait for workers a b, clients -, until 130
worker a returned   | wait for workers b, clients -, until 130
at 129.9            | wait for workers b, clients -, until 130
at 130              | open, given up b
"""

A_CLIENT_HAS_ITS_OWN_GRACE = """
worker a expected   |
client c expected   |
at 100              | wait for workers a, clients c, until 130
worker a returned   | wait for workers -, clients c, until 110
at 110              | open, given up c
"""

A_CLIENT_IS_STILL_WELCOME_WHILE_WORKERS_ARE_AWAITED = """
worker a expected   |
client c expected   |
at 100              | wait for workers a, clients c, until 130
at 115              | wait for workers a, clients c, until 130
client c returned   | wait for workers a, clients -, until 130
at 130              | open, given up a
"""

BOTH_ARE_GIVEN_UP = """
worker a expected   |
client c expected   |
at 0                | wait for workers a, clients c, until 30
at 30               | open, given up a c
"""

ALL_WORKERS_ARE_GONE_AND_NOBODY_WAITS_FOR_NEW_ONES = """
worker a expected   |
worker b expected   |
at 100              | wait for workers a b, clients -, until 130
worker a gone       | wait for workers b, clients -, until 130
worker b gone       | open
"""

ALL_WORKERS_ARE_GONE_AND_A_CLIENT_IS_AWAITED = """
worker a expected   |
client c expected   |
worker a gone       |
at 100              | wait for workers -, clients c, until 110
client c returned   | open
"""

A_CLIENT_ALONE_NEEDS_NO_WORKER = """
client c expected   |
at 100              | wait for workers -, clients c, until 110
client c returned   | open
"""

SOMEBODY_NEW_IS_NOT_WHOM_WE_WAIT_FOR = """
worker a expected   |
at 100              | wait for workers a, clients -, until 130
worker new returned | wait for workers a, clients -, until 130
client new returned | wait for workers a, clients -, until 130
worker a returned   | open
"""

A_PROOF_IS_REFUTED = """
worker a expected   |
worker b expected   |
at 100              | wait for workers a b, clients -, until 130
worker a gone       | wait for workers b, clients -, until 130
worker a returned   | wait for workers b, clients -, until 130
worker b gone       | open
"""

A_REFUTED_PROOF_COUNTS_NO_MORE = """
worker a expected   |
worker b expected   |
at 100              | wait for workers a b, clients -, until 130
worker a gone       | wait for workers b, clients -, until 130
worker a returned   | wait for workers b, clients -, until 130
worker a dropped    | wait for workers a b, clients -, until 130
worker b returned   | wait for workers a, clients -, until 130
worker a gone       | open
"""

A_WORKER_COMES_BACK_AND_DIES = """
worker a expected   |
worker b expected   |
at 100              | wait for workers a b, clients -, until 130
worker a returned   | wait for workers b, clients -, until 130
worker a gone       | wait for workers b, clients -, until 130
worker b gone       | open
"""

A_LINK_BREAKS_AND_IS_AWAITED_AGAIN = """
worker a expected   |
worker b expected   |
at 100              | wait for workers a b, clients -, until 130
worker a returned   | wait for workers b, clients -, until 130
worker a dropped    | wait for workers a b, clients -, until 130
worker b returned   | wait for workers a, clients -, until 130
worker a returned   | open
"""

A_LINK_BREAKS_WHILE_THE_JOURNAL_IS_READ = """
worker a expected   |
worker a returned   |
worker a dropped    |
worker new returned |
at 100              | wait for workers a, clients -, until 130
worker new dropped  | wait for workers a, clients -, until 130
worker a returned   | open
"""

MEMBERS_KNOCK_WHILE_THE_JOURNAL_IS_READ = """
worker a returned   |
worker a expected   |
client c returned   |
client c expected   |
at 100              | open
"""

THE_CLOCK_IS_READ_OUT_OF_ORDER = """
worker a expected   |
at 100              | wait for workers a, clients -, until 130
at 90               | wait for workers a, clients -, until 130
at 130              | open, given up a
"""

TRANSCRIPTS = {name.lower(): text for name, text in list(globals().items()) if name.isupper() and "|" in str(text)}


def event_of(words: str) -> Event:
    match words.split():
        case ["at", now]:
            return TimePassed(now_seconds=float(now))
        case [kind, member, happened]:
            return EVENTS[happened](kind=MemberKind(kind), member=member)
    raise ValueError(words)


def told(actions: list[Action]) -> str:
    match actions:
        case []:
            return ""
        case [KeepWaiting(workers=workers, clients=clients, until_seconds=until)]:
            return f"wait for workers {' '.join(workers) or '-'}, clients {' '.join(clients) or '-'}, until {until:g}"
        case [Open(given_up_workers=workers, given_up_clients=clients)]:
            return f"open, given up {' '.join(workers + clients)}" if workers + clients else "open"
    raise ValueError(actions)


@pytest.mark.parametrize("transcript", TRANSCRIPTS.values(), ids=TRANSCRIPTS.keys())
def test_transcript(transcript: str) -> None:
    barrier = Barrier(TERMS)
    lines = []
    for line in transcript.strip().splitlines():
        words = line.split("|")[0]
        lines.append(f"{words}| {told(barrier.step(event_of(words)))}".rstrip())
    assert "\n".join(lines) == transcript.strip()
    assert barrier.phase is BarrierPhase.OPEN


@pytest.mark.parametrize(
    "words", ["at 101", "worker a expected", "worker a returned", "worker a dropped", "worker a gone"]
)
def test_after_it_opened_nothing_is_expected(words: str) -> None:
    barrier = Barrier(TERMS)
    barrier.step(event_of("at 100"))
    with pytest.raises(InvalidBarrierTransition, match="the barrier is open and does not expect") as caught:
        barrier.step(event_of(words))
    assert caught.value.phase is BarrierPhase.OPEN
    assert caught.value.event == event_of(words)
    assert len(caught.value.story) == 1


def test_nobody_is_expected_after_the_journal_was_read() -> None:
    barrier = Barrier(TERMS)
    barrier.step(event_of("worker a expected"))
    barrier.step(event_of("at 100"))
    with pytest.raises(InvalidBarrierTransition, match=r"gathering .*(\n.*)+listing -> gathering"):
        barrier.step(event_of("worker b expected"))


def test_its_story_is_bounded() -> None:
    barrier = Barrier(TERMS)
    for _ in range(2 * STORY_LENGTH):
        barrier.step(event_of("worker a expected"))
    assert len(barrier.story) == STORY_LENGTH


@pytest.mark.parametrize("graces", [(-1, 0), (0, -1), (float("nan"), 0)])
def test_a_grace_is_not_negative(graces: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        BarrierTerms(worker_grace_seconds=graces[0], client_grace_seconds=graces[1])


def test_without_grace_only_who_is_back_counts() -> None:
    barrier = Barrier(BarrierTerms(worker_grace_seconds=0, client_grace_seconds=0))
    barrier.step(event_of("worker a expected"))
    assert told(barrier.step(event_of("at 100"))) == "open, given up a"


happenings = st.tuples(
    st.sampled_from(MemberKind), st.sampled_from("abc"), st.sampled_from(("returned", "gone", "dropped"))
)


@given(st.sets(st.tuples(st.sampled_from(MemberKind), st.sampled_from("abc"))), st.lists(happenings))
def test_it_opens_in_time_and_never_too_early(expected, happened) -> None:
    barrier = Barrier(TERMS)
    for kind, member in sorted(expected, key=str):
        barrier.step(MemberExpected(kind=kind, member=member))
    [action] = barrier.step(TimePassed(now_seconds=100))
    there: dict[tuple[MemberKind, str], str] = {}
    for kind, member, what in happened:
        if isinstance(action, Open):
            break
        if (what, there.get((kind, member))) != ("dropped", "gone"):  # a link that breaks refutes no proof
            there[kind, member] = what
        [action] = barrier.step(EVENTS[what](kind=kind, member=member))
    unheard = {member for member in expected if there.get(member, "dropped") == "dropped"}
    assert isinstance(action, Open) == (not unheard)
    if isinstance(action, KeepWaiting):
        assert action.until_seconds <= 130
        [action] = barrier.step(TimePassed(now_seconds=action.until_seconds))
        assert isinstance(action, Open)
        assert set(action.given_up_workers) == {m for kind, m in unheard if kind is MemberKind.WORKER}
        assert set(action.given_up_clients) == {m for kind, m in unheard if kind is MemberKind.CLIENT}
