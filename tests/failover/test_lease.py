"""The lease table: who may try, for how long, and what each event does in each state."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_resilience.failover import lease
from dask_resilience.failover.lease import (
    AllowActing,
    DetailsChanged,
    FenceSeen,
    ForbidActing,
    InvalidLeaseTransition,
    LeaseMachine,
    LeaseSeen,
    LeaseState,
    LeaseWritten,
    ReadLease,
    ReleaseAsked,
    StopForGood,
    TimePassed,
    WriteLease,
    WriteRefused,
    WriteUncertain,
)
from dask_resilience.failover.lease_record import HolderIdentity, HostFacts, LeaseRecord, provably_dead
from dask_resilience.failover.lease_terms import LeaseTerms

ME = HolderIdentity(host="a", boot_id="boot", pid_namespace="pid:[1]", pid=7, started_ticks=100)
OTHER = replace(ME, pid=8)
TERMS = LeaseTerms(ttl_seconds=10.0, drift=0.02)
THEIRS = LeaseRecord(cluster="c", epoch=4, generation=9, holder=OTHER, address="tcp://b:1", ttl_seconds=10.0)


def machine(holder=ME):
    return LeaseMachine(cluster="c", holder=holder, address="tcp://a:1", terms=TERMS)


def holding(now=0.0):
    """A machine that holds since `now`, and its record."""
    made = machine()
    [write] = made.step(LeaseSeen(now_seconds=now, record=None))
    made.step(LeaseWritten(now_seconds=now))
    return made, write.record


class TestTerms:
    def test_the_holder_stops_before_the_standby_starts(self):
        assert TERMS.act_seconds < TERMS.ttl_seconds < TERMS.wait_seconds
        assert TERMS.wait_seconds == pytest.approx(10 * 1.02 + 1)

    @given(st.floats(0.1, 600), st.floats(0, 0.5), st.floats(0.5, 2))
    def test_also_when_the_clocks_differ_within_the_drift(self, ttl, drift, speed):
        terms = LeaseTerms(ttl_seconds=ttl, drift=drift)
        # `speed` is how fast the holder's clock goes by the standby's; a slow one makes it act longer.
        if 1 / (1 + drift) <= speed:
            assert terms.act_seconds / speed < terms.wait_seconds

    @pytest.mark.parametrize(("ttl", "drift"), [(0, 0), (-1, 0), (float("nan"), 0), (1, -0.1), (1, 1.0)])
    def test_senseless_ones_are_refused(self, ttl, drift):
        with pytest.raises(ValueError, match="positive TTL"):
            LeaseTerms(ttl_seconds=ttl, drift=drift)


class TestObserving:
    def test_a_free_lease_is_taken(self):
        made = machine()
        made.step(DetailsChanged(now_seconds=0.0, epoch=5, address="tcp://a:2"))
        [write] = made.step(LeaseSeen(now_seconds=1.0, record=None))
        assert made.state is LeaseState.ACQUIRING
        assert write.record == LeaseRecord(
            cluster="c", epoch=5, generation=1, holder=ME, address="tcp://a:2", ttl_seconds=10.0
        )

    def test_a_released_lease_is_taken_and_its_generation_goes_on(self):
        [write] = machine().step(LeaseSeen(now_seconds=0.0, record=replace(THEIRS, holder=None)))
        assert write.record.generation == 10

    def test_a_dead_holder_is_not_waited_for(self):
        [write] = machine().step(LeaseSeen(now_seconds=0.0, record=THEIRS, holder_dead=True))
        assert write.record.holder == ME

    def test_a_silent_holder_is_waited_for_from_the_first_sight(self):
        made = machine()
        assert made.step(LeaseSeen(now_seconds=100.0, record=THEIRS)) == [ReadLease(after_seconds=0.5)]
        assert made.step(LeaseSeen(now_seconds=100.0 + TERMS.wait_seconds - 0.001, record=THEIRS)) == [
            ReadLease(after_seconds=0.5)
        ]
        [write] = made.step(LeaseSeen(now_seconds=100.0 + TERMS.wait_seconds, record=THEIRS))
        assert isinstance(write, WriteLease)

    def test_each_renewal_starts_the_wait_again(self):
        made = machine()
        for generation in range(5):
            now = generation * 8.0
            made.step(LeaseSeen(now_seconds=now, record=replace(THEIRS, generation=generation)))
            assert made.state is LeaseState.OBSERVING

    def test_the_holders_own_ttl_counts(self):
        made = machine()
        long = replace(THEIRS, ttl_seconds=60.0)
        made.step(LeaseSeen(now_seconds=0.0, record=long))
        made.step(LeaseSeen(now_seconds=50.0, record=long))
        assert made.state is LeaseState.OBSERVING
        made.step(LeaseSeen(now_seconds=63.0, record=long))
        assert made.state is LeaseState.ACQUIRING

    def test_time_alone_does_nothing(self):
        assert machine().step(TimePassed(now_seconds=1e9)) == []


class TestAcquiring:
    def test_acting_counts_from_before_the_sending(self):
        made = machine()
        made.step(LeaseSeen(now_seconds=5.0, record=None))
        assert made.step(LeaseWritten(now_seconds=8.0)) == [AllowActing(until_seconds=14.0)]
        assert made.state is LeaseState.HOLDING

    def test_a_reply_after_the_time_allows_nothing(self):
        made = machine()
        made.step(LeaseSeen(now_seconds=5.0, record=None))
        [forbid, read] = made.step(LeaseWritten(now_seconds=14.0))
        assert isinstance(forbid, ForbidActing)
        assert read == ReadLease(after_seconds=0.0)
        assert made.state is LeaseState.DOUBTFUL

    def test_a_lost_race_is_observed(self):
        made = machine()
        made.step(LeaseSeen(now_seconds=0.0, record=None))
        assert made.step(WriteRefused(now_seconds=0.1)) == [ReadLease(after_seconds=0.0)]
        made.step(LeaseSeen(now_seconds=0.2, record=THEIRS))
        assert made.state is LeaseState.OBSERVING

    def test_a_write_without_a_reply_is_found_again(self):
        made = machine()
        [write] = made.step(LeaseSeen(now_seconds=1.0, record=None))
        made.step(WriteUncertain(now_seconds=3.0))
        assert made.step(LeaseSeen(now_seconds=4.0, record=write.record)) == [AllowActing(until_seconds=10.0)]

    def test_or_given_up(self):
        made = machine()
        made.step(LeaseSeen(now_seconds=1.0, record=None))
        made.step(WriteUncertain(now_seconds=3.0))
        assert made.step(LeaseSeen(now_seconds=4.0, record=THEIRS)) == [ReadLease(after_seconds=0.5)]


class TestHolding:
    def test_it_renews_at_a_third(self):
        made, record = holding()
        assert made.step(TimePassed(now_seconds=3.3)) == []
        assert made.step(TimePassed(now_seconds=3.4)) == [WriteLease(record=replace(record, generation=2))]
        assert made.step(LeaseWritten(now_seconds=3.5)) == [AllowActing(until_seconds=12.4)]

    def test_it_doubts_when_stopped_too_long(self):
        made, _ = holding()
        [forbid, read] = made.step(TimePassed(now_seconds=9.0))
        assert isinstance(forbid, ForbidActing)
        assert read.after_seconds == 0.0
        assert made.state is LeaseState.DOUBTFUL

    def test_a_renewal_that_was_refused_is_looked_into(self):
        made, record = holding()
        made.step(TimePassed(now_seconds=4.0))
        assert made.step(WriteRefused(now_seconds=4.1)) == [ReadLease(after_seconds=0.0)]
        assert made.step(LeaseSeen(now_seconds=4.2, record=THEIRS)) == [StopForGood(epoch=4)]
        assert made.state is LeaseState.LOST
        assert made.step(LeaseSeen(now_seconds=5.0, record=record)) == []

    def test_a_renewal_without_a_reply_that_was_done(self):
        made, _ = holding()
        [write] = made.step(TimePassed(now_seconds=4.0))
        assert made.step(WriteUncertain(now_seconds=5.0)) == [ReadLease(after_seconds=0.5)]
        assert made.step(TimePassed(now_seconds=6.0)) == [ReadLease(after_seconds=0.0)]
        assert made.step(LeaseSeen(now_seconds=6.1, record=write.record)) == [AllowActing(until_seconds=13.0)]

    def test_a_renewal_without_a_reply_that_was_not_done_is_sent_again(self):
        made, record = holding()
        made.step(TimePassed(now_seconds=4.0))
        made.step(WriteUncertain(now_seconds=5.0))
        [write] = made.step(LeaseSeen(now_seconds=6.0, record=record))
        assert write.record.generation == 2
        assert made.step(LeaseWritten(now_seconds=6.1)) == [AllowActing(until_seconds=15.0)]

    def test_an_older_write_of_ours_that_came_late_is_ours(self):
        made, record = holding()
        made.step(TimePassed(now_seconds=4.0))
        made.step(WriteUncertain(now_seconds=5.0))
        made.step(LeaseSeen(now_seconds=6.0, record=record))
        made.step(WriteRefused(now_seconds=6.1))
        [write] = made.step(LeaseSeen(now_seconds=6.2, record=replace(record, generation=2, epoch=99)))
        assert write.record.generation == 3

    def test_a_lease_that_vanished_is_lost(self):
        made, _ = holding()
        made.step(TimePassed(now_seconds=4.0))
        made.step(WriteRefused(now_seconds=4.1))
        assert made.step(LeaseSeen(now_seconds=4.2, record=None)) == [StopForGood(epoch=0)]

    def test_a_newer_epoch_ends_it(self):
        made, _ = holding()
        assert made.step(FenceSeen(now_seconds=1.0, epoch=6)) == [StopForGood(epoch=6)]

    def test_details_are_told_at_once_and_once(self):
        made, _ = holding()
        [write] = made.step(DetailsChanged(now_seconds=1.0, epoch=5, address="tcp://a:9"))
        assert (write.record.epoch, write.record.address) == (5, "tcp://a:9")
        assert made.step(DetailsChanged(now_seconds=1.0, epoch=6, address="tcp://a:9")) == []
        made.step(LeaseWritten(now_seconds=1.1))
        assert made.step(DetailsChanged(now_seconds=1.2, epoch=6, address="tcp://a:9")) == []

    def test_a_release_leaves_no_holder(self):
        made, record = holding()
        [forbid, write] = made.step(ReleaseAsked(now_seconds=1.0))
        assert isinstance(forbid, ForbidActing)
        assert write.record == replace(record, holder=None, generation=2)
        assert made.step(LeaseWritten(now_seconds=1.1)) == []
        assert made.state is LeaseState.RELEASED


class TestDoubtful:
    def doubtful(self):
        made, record = holding()
        made.step(TimePassed(now_seconds=20.0))
        return made, record

    def test_it_holds_again_when_nobody_came(self):
        made, record = self.doubtful()
        [write] = made.step(LeaseSeen(now_seconds=20.1, record=record))
        assert made.step(LeaseWritten(now_seconds=20.2)) == [AllowActing(until_seconds=29.1)]
        assert write.record.generation == 2
        assert made.state is LeaseState.HOLDING

    def test_it_looks_until_the_store_answers(self):
        made, _ = self.doubtful()
        assert made.step(TimePassed(now_seconds=21.0)) == [ReadLease(after_seconds=0.0)]

    def test_it_loses_to_whoever_came(self):
        made, _ = self.doubtful()
        assert made.step(LeaseSeen(now_seconds=20.1, record=THEIRS)) == [StopForGood(epoch=4)]

    def test_it_loses_the_last_moment_race(self):
        made, record = self.doubtful()
        made.step(LeaseSeen(now_seconds=20.1, record=record))
        assert made.step(WriteRefused(now_seconds=20.2)) == [ReadLease(after_seconds=0.0)]
        assert made.step(LeaseSeen(now_seconds=20.3, record=THEIRS)) == [StopForGood(epoch=4)]

    def test_it_adopts_details_and_can_be_released(self):
        made, _ = self.doubtful()
        assert made.step(DetailsChanged(now_seconds=21.0, epoch=9, address="x")) == []
        made.step(ReleaseAsked(now_seconds=21.0))
        assert made.state is LeaseState.RELEASED


class TestTable:
    def test_an_unlisted_event_raises_with_the_story(self):
        made = machine()
        made.step(LeaseSeen(now_seconds=0.0, record=None))
        with pytest.raises(InvalidLeaseTransition, match="the lease is acquiring") as caught:
            made.step(ReleaseAsked(now_seconds=1.0))
        assert caught.value.state is LeaseState.ACQUIRING
        assert "observing -> acquiring" in caught.value.story[0]

    def test_the_story_has_a_bound(self):
        made = machine()
        for now in range(1000):
            made.step(TimePassed(now_seconds=float(now)))
        assert len(made.story) == lease.STORY_LENGTH

    @pytest.mark.parametrize("end", [LeaseState.LOST, LeaseState.RELEASED])
    def test_an_end_takes_every_event_and_stays(self, end):
        made, record = holding()
        made.step(FenceSeen(now_seconds=0, epoch=1) if end is LeaseState.LOST else ReleaseAsked(now_seconds=0))
        for event in (
            TimePassed(now_seconds=1),
            LeaseSeen(now_seconds=1, record=record),
            LeaseWritten(now_seconds=1),
            WriteRefused(now_seconds=1),
            WriteUncertain(now_seconds=1),
            FenceSeen(now_seconds=1, epoch=9),
            DetailsChanged(now_seconds=1, epoch=1, address=""),
            ReleaseAsked(now_seconds=1),
        ):
            assert made.step(event) == []
            assert made.state is end

    def test_every_state_has_a_row(self):
        assert {state for state, _ in lease._TRANSITIONS} == set(LeaseState)


class Duel:
    """Two machines over one record with compare-and-swap, whose replies can be late or lost."""

    def __init__(self):
        self.now = 0.0
        self.record = None
        self.machines = [machine(ME), machine(OTHER)]
        self.until = [0.0, 0.0]
        self.read = [None, None]
        self.writing = [None, None]

    def take(self, who, actions):
        for action in actions:
            if isinstance(action, AllowActing):
                self.until[who] = action.until_seconds
            elif isinstance(action, ForbidActing | StopForGood):
                self.until[who] = 0.0
            elif isinstance(action, WriteLease):
                self.writing[who] = action.record

    def step(self, who, event):
        self.take(who, self.machines[who].step(event))

    def answer(self, who, what):
        """While a write is under way, only its outcome may come, however late."""
        record, self.writing[who] = self.writing[who], None
        if what == "drop":
            self.step(who, WriteUncertain(now_seconds=self.now))
        elif self.record == self.read[who]:
            self.record = self.read[who] = record
            kind = WriteUncertain if what == "lose reply" else LeaseWritten
            self.step(who, kind(now_seconds=self.now))
        else:
            self.step(who, WriteRefused(now_seconds=self.now))

    def move(self, who, what, seconds):
        self.now += seconds
        if self.writing[who] is not None:
            self.answer(who, what)
        elif what == "read" and self.machines[who].state is not LeaseState.RELEASED:
            self.read[who] = self.record
            self.step(who, LeaseSeen(now_seconds=self.now, record=self.record))
        else:
            self.step(who, TimePassed(now_seconds=self.now))


MOVES = st.tuples(st.integers(0, 1), st.sampled_from(["tick", "read", "read", "lose reply", "drop"]), st.floats(0, 4))


@given(st.lists(MOVES, max_size=150))
def test_two_machines_never_both_act(moves):
    """Whatever is delayed, dropped or stopped: at no moment do both think that they may act."""
    duel = Duel()
    for who, what, seconds in moves:
        duel.move(who, what, seconds)
        assert sum(duel.now < limit for limit in duel.until) <= 1


def test_the_duel_can_change_hands():
    duel = Duel()
    for who, what, seconds in [(0, "read", 0), (0, "tick", 0), (1, "read", 1), (1, "read", 12), (1, "tick", 0)]:
        duel.move(who, what, seconds)
    assert [each.state for each in duel.machines] == [LeaseState.HOLDING, LeaseState.HOLDING]
    assert [duel.now < limit for limit in duel.until] == [False, True]


class TestProof:
    FACTS = HostFacts(host="a", boot_id="boot", pid_namespace="pid:[1]", pid=7, started_ticks=100)

    def test_a_living_process_is_not_dead(self):
        assert not provably_dead(ME, self.FACTS)

    @pytest.mark.parametrize("ticks", [None, 101])
    def test_no_process_or_another_under_its_pid_is_proof(self, ticks):
        assert provably_dead(ME, replace(self.FACTS, started_ticks=ticks))

    @pytest.mark.parametrize(
        "elsewhere", [{"host": "b"}, {"boot_id": "later"}, {"pid_namespace": "pid:[2]"}, {"pid": 8}]
    )
    def test_facts_from_elsewhere_prove_nothing(self, elsewhere):
        assert not provably_dead(ME, replace(self.FACTS, started_ticks=None, **elsewhere))

    @pytest.mark.parametrize("unknown", ["boot_id", "pid_namespace"])
    def test_what_is_unknown_on_both_sides_proves_nothing(self, unknown):
        holder, facts = replace(ME, **{unknown: ""}), replace(self.FACTS, started_ticks=None, **{unknown: ""})
        assert not provably_dead(holder, facts)


#: As version 1 had them.
FIELDS = {**asdict(THEIRS), "version": 1}


class TestRecord:
    @pytest.mark.parametrize("holder", [ME, None])
    def test_it_comes_back(self, holder):
        record = replace(THEIRS, holder=holder)
        assert LeaseRecord.decode(record.encode()) == record

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\xff",
            b"[]",
            b"{}",
            b'{"version": 1}',
            json.dumps({**FIELDS, "extra": 1}).encode(),
            json.dumps({**FIELDS, "ttl_seconds": 0}).encode(),
            json.dumps({**FIELDS, "holder": 3}).encode(),
        ],
    )
    def test_anything_else_is_told(self, data):
        with pytest.raises(ValueError, match=r"no lease record|a lease of|was never written|no JSON|Expecting|decode"):
            LeaseRecord.decode(data)

    def test_one_without_a_checksum_is_read(self):
        assert LeaseRecord.decode(json.dumps(FIELDS).encode()) == THEIRS

    def test_a_newer_one_says_so(self):
        data = json.dumps({**FIELDS, "version": 3}).encode()
        with pytest.raises(ValueError, match="install a newer release"):
            LeaseRecord.decode(data)


def test_events_and_actions_are_frozen_slotted_and_keyword_only():
    for kind in itertools.chain(lease.Event.__args__, lease.Action.__args__):
        assert kind.__dataclass_params__.frozen
        assert hasattr(kind, "__slots__")
        assert all(field.kw_only for field in kind.__dataclass_fields__.values())
