"""The writer: order, group commit, rolling, failures of every step, the fence, and the end."""

from __future__ import annotations

import errno
import re
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import until

from dask_resilience.errors import Fenced, StoreError
from dask_resilience.failover.lease import LeaseState
from dask_resilience.journal.codec import RecordRefused
from dask_resilience.journal.records import ClientLeft
from dask_resilience.storage import journal_writer, names
from dask_resilience.storage.journal_reader import JournalReader, ReadBeyondSeal
from dask_resilience.storage.leadership import LeaseKeeper
from dask_resilience.storage.local_store import LocalStore
from dask_resilience.storage.object_store import Outcome
from dask_resilience.storage.takeover import rule
from tests.storage.acting import FakeClock, FaultyStore, Ruler, another, dead, read, segments, verify

#: Changes files, or looks at them.
on_files = pytest.mark.parametrize("store_kind", ["local"])


def check(store, ruler):
    """All that was appended is read back as it was, and the store is sound."""
    assert {logged.lsn: logged.record for logged in read(store)} == ruler.records
    report = verify(store)
    assert not report.damaged, report


class TestWriting:
    def test_records_come_back_in_order(self, faulty):
        ruler = Ruler(faulty).append(100).settled()
        assert ruler.writer.durable_lsn == 101
        assert ruler.acked == sorted(ruler.acked)
        assert ruler.acked[-1] == 101
        assert ruler.writer.pending_bytes == 0
        assert ruler.writer.close()
        check(faulty, ruler)
        assert not ruler.writer._thread.is_alive()

    def test_nothing_is_written_before_something_is_appended_and_closing_twice_is_fine(self, faulty):
        ruler = Ruler(faulty).settled()
        assert ruler.writer.close()
        assert ruler.writer.close()
        assert segments(faulty) == [(1, 0)]

    def test_a_full_segment_is_sealed_and_the_next_begun(self, faulty):
        ruler = Ruler(faulty, segment_bytes=500)
        for _ in range(20):
            ruler.append(3, size=50).settled()
        assert ruler.writer.close()
        assert len(segments(faulty)) > 5
        check(faulty, ruler)
        assert verify(faulty).findings == ()

    def test_whoever_hurries_is_not_kept_by_the_interval(self, faulty):
        # An hour: only the hurry ends it.
        ruler = Ruler(faulty, interval_seconds=3600).settled()
        ruler.append(3)
        ruler.writer.hurry()
        ruler.settled()
        check(faulty, ruler)

    def test_commits_are_paced_and_the_first_after_a_pause_is_not(self, faulty):
        ruler = Ruler(faulty, interval_seconds=0.3).settled()
        started = time.monotonic()
        ruler.append(10)
        ruler.settled()
        # All ten in the one commit that comes when the interval has passed.
        assert len(ruler.acked) == 2
        until(lambda: time.monotonic() > started + 0.7)
        started = time.monotonic()
        ruler.append().settled()
        assert time.monotonic() - started < 0.25
        assert ruler.writer.close()

    def test_a_record_that_cannot_be_written_is_refused_and_leaves_no_hole(self, faulty):
        ruler = Ruler(faulty)
        with pytest.raises(RecordRefused):
            ruler.writer.append(ClientLeft(client=3))
        ruler.append().settled().writer.close()
        check(faulty, ruler)

    def test_pending_bytes_tell_what_is_not_acked(self, faulty, monkeypatch):
        gate = threading.Event()
        ruler = Ruler(faulty).settled()
        monkeypatch.setattr(ruler.leadership, "fenced", lambda: not gate.wait(30))
        ruler.append(10, size=1000)
        assert ruler.writer.pending_bytes > 10_000
        gate.set()
        ruler.settled()
        assert ruler.writer.pending_bytes == 0
        assert ruler.writer.close()

    def test_large_data_is_not_copied(self, faulty):
        ruler = Ruler(faulty).append(3, size=5_000_000).settled()
        assert ruler.writer.close()
        check(faulty, ruler)


class TestFailing:
    @pytest.mark.parametrize("loses", ["nothing", "all", "zeros", "start", "noise"])
    @pytest.mark.parametrize("operation", ["write", "sync"])
    def test_the_segment_is_given_up_and_nothing_is_lost(self, faulty, operation, loses):
        ruler = Ruler(faulty).append(5).settled()
        faulty.loses = loses
        faulty.faults[operation].extend([errno.EIO, errno.ENOSPC, None])
        before = ruler.writer.durable_lsn
        ruler.append(5).settled()
        assert [type(error) for error in ruler.failures] == [StoreError]
        assert "Check the" in str(ruler.failures[0]) or "Check that the file system" in str(ruler.failures[0])
        assert ruler.recoveries == 1
        assert before == 6
        assert segments(faulty) == [(1, 0), (1, 1), (1, 2)]
        ruler.append(5).settled()
        assert ruler.writer.close()
        check(faulty, ruler)

    def test_nothing_is_acked_meanwhile(self, faulty):
        ruler = Ruler(faulty).settled()
        faulty.faults["sync"].extend([errno.ENOSPC] * 1000)
        ruler.append(5)
        until(lambda: ruler.failures)
        assert re.search("Free some space|Raise the quota", str(ruler.failures[0]))
        ruler.append(5)
        assert ruler.writer.durable_lsn == 1
        assert ruler.writer.pending_bytes > 0
        faulty.faults["sync"].clear()
        ruler.settled()
        assert len(ruler.failures) == 1
        assert ruler.writer.close()
        check(faulty, ruler)

    def test_each_outage_is_told_once(self, faulty):
        ruler = Ruler(faulty).settled()
        for outage in range(1, 4):
            faulty.faults["sync"].extend([errno.EIO, errno.EIO])
            ruler.append().settled()
            assert len(ruler.failures) == ruler.recoveries == outage
        assert ruler.writer.close()
        check(faulty, ruler)

    @pytest.mark.parametrize("outcome", [Outcome.FULL, Outcome.DENIED, Outcome.RETRY])
    def test_a_segment_that_cannot_be_opened_is_tried_again(self, faulty, outcome):
        ruler = Ruler(faulty, segment_bytes=1).settled()
        faulty.faults["open"].extend([outcome, outcome])
        ruler.append().settled().append().settled()
        assert ruler.writer.close()
        check(faulty, ruler)

    def test_a_segment_of_which_nobody_knows_is_made_to_stay(self, faulty):
        def unsure(store, name, header):
            assert store.real.create(store, name, header) is Outcome.OK
            return Outcome.AMBIGUOUS

        ruler = Ruler(faulty, segment_bytes=1).settled()
        until(lambda: ruler.writer._segment is None)
        faulty.faults["open"].append(unsure)
        ruler.append().settled()
        assert segments(faulty) == [(1, 0), (1, 1), (1, 2)]
        assert ruler.writer.close()
        check(faulty, ruler)

    def test_a_segment_whose_creation_was_lost_leaves_its_number_free(self, faulty):
        ruler = Ruler(faulty, segment_bytes=1).settled()
        until(lambda: ruler.writer._segment is None)
        faulty.faults["open"].append(Outcome.AMBIGUOUS)
        ruler.append().settled()
        assert segments(faulty) == [(1, 0), (1, 1)]
        assert ruler.writer.close()
        check(faulty, ruler)

    def test_a_segment_whose_creation_comes_late_is_not_written_over(self, faulty):
        def late(store, name, header):
            assert store.real.create(store, name, header) is Outcome.OK
            # Between the look whether it is there and the next creation.
            return Outcome.EXISTS

        ruler = Ruler(faulty, segment_bytes=1).settled()
        until(lambda: ruler.writer._segment is None)
        faulty.faults["open"].extend([Outcome.AMBIGUOUS, late])
        ruler.append().settled()
        assert segments(faulty) == [(1, 0), (1, 1), (1, 2)]
        assert ruler.writer.close()
        check(faulty, ruler)

    def test_a_fence_that_cannot_be_looked_for_is_no_permission(self, faulty):
        ruler = Ruler(faulty).settled()
        faulty.faults["exists"].extend([errno.EIO, errno.EIO])
        ruler.append().settled()
        assert len(ruler.failures) == 1
        assert ruler.writer.close()
        check(faulty, ruler)

    @pytest.mark.parametrize("operation", ["write", "sync"])
    def test_a_footer_that_fails_is_no_failure(self, faulty, operation):
        ruler = Ruler(faulty).settled()
        faulty.loses = "noise"
        faulty.faults[operation].extend([None, errno.EIO])
        ruler.writer._segment_bytes = 1
        ruler.append().settled().append().settled()
        assert ruler.failures == []
        assert ruler.writer.close()
        check(faulty, ruler)

    def test_a_close_that_fails_changes_nothing(self, faulty, monkeypatch):
        ruler = Ruler(faulty).settled()
        handle = ruler.writer._segment
        faulty.faults["sync"].append(errno.EIO)

        def fails():
            type(handle).close(handle)
            raise OSError(errno.EIO, "once more")

        handle.close = fails
        ruler.append().settled()
        assert ruler.writer.close()
        check(faulty, ruler)

    def test_closing_gives_up_on_a_store_that_stays_broken(self, faulty):
        ruler = Ruler(faulty).settled()
        faulty.faults["sync"].extend([errno.EIO] * 10_000)
        ruler.append()
        assert not ruler.writer.close(timeout_seconds=0.1)
        assert "none of them was acked" in str(ruler.failures[-1])
        assert next(iter(read(faulty))).lsn == 1
        assert not verify(faulty).damaged

    def test_closing_waits_for_a_store_that_comes_back(self, faulty):
        ruler = Ruler(faulty).settled()
        faulty.faults["sync"].extend([errno.EIO] * 5)
        ruler.append()
        assert ruler.writer.close(timeout_seconds=10)
        check(faulty, ruler)

    def test_a_defect_ends_it_and_is_told(self, faulty, monkeypatch):
        ruler = Ruler(faulty).settled()
        monkeypatch.setattr(ruler.writer, "_on_durable", lambda lsn: 1 / 0)
        ruler.append()
        until(lambda: ruler.failures)
        assert isinstance(ruler.failures[0], ZeroDivisionError)
        with pytest.raises(ZeroDivisionError):
            ruler.writer.append(ClientLeft(client="c"))
        until(lambda: not ruler.writer._thread.is_alive())

    def test_it_can_be_closed_by_its_own_callback(self, faulty):
        ruler = Ruler(faulty).settled()
        done = []
        ruler.writer._on_durable = lambda lsn: done.append(ruler.writer.close())
        ruler.append()
        until(lambda: not ruler.writer._thread.is_alive())
        assert done


class TestFence:
    def test_a_fenced_writer_acks_nothing_and_stops(self, faulty):
        ruler = Ruler(faulty).settled()
        faulty.create(names.manifest(2), b"")
        ruler.append(5)
        until(lambda: ruler.failures)
        assert isinstance(ruler.failures[0], Fenced)
        assert (ruler.failures[0].epoch, ruler.failures[0].newer) == (1, 2)
        assert ruler.acked == [1]
        with pytest.raises(Fenced):
            ruler.writer.append(ClientLeft(client="c"))
        assert not ruler.writer.close()

    def test_a_fence_raised_before_the_check_of_a_commit_forbids_its_ack(self, faulty):
        ruler = Ruler(faulty).settled()
        gate = threading.Event()
        real = ruler.leadership.fenced
        ruler.leadership.fenced = lambda: gate.wait(30) and real()
        ruler.append()
        faulty.create(names.manifest(2), b"")
        gate.set()
        until(lambda: ruler.failures)
        assert ruler.acked == [1]

    def test_a_lease_that_ran_out_is_renewed_before_an_ack(self, faulty):
        clock = FakeClock()
        ruler = Ruler(faulty, clock=clock).settled()
        clock.seconds += 3600
        assert not ruler.leadership.valid()
        ruler.append().settled()
        assert ruler.leadership.valid()
        assert ruler.writer.close()

    def test_acks_wait_for_a_lease_that_cannot_be_renewed(self, faulty):
        clock = FakeClock()
        ruler = Ruler(faulty, clock=clock).settled()
        faulty.faults["swap"].extend([lambda *_: Outcome.FULL] * 10_000)
        clock.seconds += 3600
        ruler.append()
        until(lambda: ruler.leadership.trouble is not None)
        assert ruler.acked == [1]
        assert not ruler.writer.close(timeout_seconds=0.05)
        assert ruler.acked == [1]
        assert isinstance(ruler.failures[-1], StoreError)

    @on_files
    def test_a_lease_that_another_took_ends_it(self, faulty):
        clock = FakeClock()
        ruler = Ruler(faulty, clock=clock, holder=dead()).settled()
        clock.seconds += 3600
        # Another won the lease and has not raised its fence yet.
        rule(LocalStore(faulty._root), address="tcp://b:1", ttl_seconds=30)
        faulty.delete(names.manifest(2))
        ruler.append()
        until(lambda: ruler.failures)
        assert isinstance(ruler.failures[0], Fenced)
        assert ruler.leadership.lost()
        assert ruler.acked == [1]

    def test_the_keeper_tells_once(self, faulty):
        ruler = Ruler(faulty, ttl_seconds=0.5).settled()
        told = []
        keeper = LeaseKeeper(ruler.leadership, on_lost=told.append)
        keeper.start()
        generation = ruler.leadership._driver.seen.generation
        until(lambda: ruler.leadership._driver.seen.generation > generation + 1)
        assert ruler.leadership.valid()
        faulty.create(names.manifest(2), b"")
        until(lambda: told)
        keeper.close()
        keeper.close()
        assert [str(error) for error in told] == [str(Fenced(1, 2))]
        assert not ruler.leadership.valid()
        assert ruler.leadership._driver.state is LeaseState.LOST
        assert not keeper._thread.is_alive()
        ruler.writer.close()


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 5)),
        st.tuples(st.sampled_from(["write", "sync", "exists"]), st.integers(1, 3)),
        st.tuples(st.just("loses"), st.sampled_from(["nothing", "all", "zeros", "start", "noise"])),
        st.tuples(st.sampled_from(["follow", "settle", "die", "zombie"]), st.just(0)),
    ),
    max_size=25,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=STEPS)
def test_whatever_fails_the_acked_is_within_what_is_read(tmp_path_factory, steps):
    """Reigns follow each other over a store that fails; some rulers live on as zombies and write behind the seal."""
    faulty = FaultyStore(tmp_path_factory.mktemp("store"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal_writer, "_BACK_OFF_SECONDS", 0.0005)
        rulers = [Ruler(faulty, segment_bytes=400, holder=dead())]
        try:
            _act(faulty, rulers, steps)
            rulers[-1].settled()
        finally:
            for queue in faulty.faults.values():
                queue.clear()
            for ruler in rulers:
                ruler.writer.close()
    logged = read(faulty)
    assert [each.lsn for each in logged] == list(range(1, len(logged) + 1))
    seen = {(each.lsn, each.epoch): each.record for each in logged}
    for ruler in rulers:
        epoch = ruler.leadership.epoch
        for lsn, record in ruler.records.items():
            if lsn <= max(ruler.acked, default=0):
                assert seen[lsn, epoch] == record
            else:
                assert seen.get((lsn, epoch), record) == record
    report = verify(faulty)
    assert not report.damaged, report
    assert report.records == len(logged)


def _act(faulty, rulers, steps):
    follower, followed = JournalReader(faulty), []
    for what, number in steps:
        if what == "append":
            rulers[-1].append(number)
        elif what in faulty.faults:
            faulty.faults[what].extend([errno.EIO] * number)
        elif what == "loses":
            faulty.loses = number
        elif what == "settle":
            rulers[-1].settled()
        elif what == "follow":
            try:
                followed += follower.read()
            except ReadBeyondSeal:
                follower, followed = JournalReader(faulty), []
            assert [each.lsn for each in followed] == list(range(1, len(followed) + 1))
        else:
            for queue in faulty.faults.values():
                queue.clear()
            if what == "die":
                rulers[-1].writer.close(timeout_seconds=0)
            rulers.append(Ruler(faulty, segment_bytes=400, holder=dead()))
            if what == "zombie" and not rulers[-2].writer._ended_by:
                # It does not know yet, and writes on; nothing of it may be acked.
                acked = list(rulers[-2].acked)
                try:
                    rulers[-2].writer.append(ClientLeft(client="late"))
                except Fenced:
                    continue
                until(lambda: rulers[-2].writer._ended_by)
                assert rulers[-2].acked[: len(acked)] == acked


def test_another_process_is_waited_for(store):
    """A holder elsewhere cannot be shown to be dead."""
    clock = FakeClock()
    first = Ruler(LocalStore(store), ttl_seconds=0.5, holder=another(), clock=clock).settled()
    started = time.monotonic()
    second = Ruler(LocalStore(store), ttl_seconds=0.5).settled()
    assert time.monotonic() - started >= 0.5
    assert second.leadership.epoch == 2
    assert second.writer.close()
    first.writer.close()
