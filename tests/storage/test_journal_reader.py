"""The reader: following, sealed ends, abandoned segments, torn tails, and damage where no crash explains it."""

from __future__ import annotations

import errno
import re

import google_crc32c
import pytest
from support import until

from dask_resilience.errors import JournalCorrupt, JournalTooNew
from dask_resilience.journal.records import ClientLeft, EpochStarted
from dask_resilience.journal.segment import HEADER_BYTES
from dask_resilience.storage import journal_writer, log_map, names
from dask_resilience.storage.journal_reader import JournalReader, Logged, ReadBeyondSeal
from dask_resilience.storage.log_map import LogEnd, find_end
from tests.storage.acting import FaultyStore, Ruler, dead, read, verify

#: Changes files, or looks at them.
on_files = pytest.mark.parametrize("store_kind", ["local"])


def path_of(store, epoch, seq):
    return store._root / names.segment(epoch, seq)


def change(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def flip(path, offset):
    change(path, offset, bytes([path.read_bytes()[offset] ^ 0x10]))


def lsns(logged):
    return [each.lsn for each in logged]


def refused(store, says, name=None, error=JournalCorrupt):
    """Reading is refused, by the reader and by a takeover's look at the end or by its replay."""
    with pytest.raises(error, match=says) as caught:
        read(store)
    if name is not None:
        assert caught.value.segment == name
    assert verify(store).damaged or error is not JournalCorrupt


class TestFollowing:
    def test_an_empty_store_has_no_log(self, faulty):
        assert read(faulty) == []
        assert find_end(faulty, before=1) == LogEnd(sealed=None, next_lsn=1, chain=0)

    def test_each_call_goes_on_where_the_last_stopped(self, faulty):
        ruler = Ruler(faulty, segment_bytes=300).settled()
        reader = JournalReader(faulty)
        assert list(reader.read()) == [Logged(lsn=1, epoch=1, record=ruler.start)]
        for count in (1, 0, 7, 3):
            ruler.append(count).settled()
            assert lsns(reader.read()) == list(range(reader.next_lsn - count, reader.next_lsn))
        ruler.release()
        assert list(reader.read()) == []
        assert reader.next_lsn == 13

    def test_a_call_that_was_left_early_is_gone_on_with(self, faulty):
        Ruler(faulty, segment_bytes=200).append(5).settled().append(5).settled().release()
        reader = JournalReader(faulty)
        seen = []
        while True:
            first = next(reader.read(), None)
            if first is None:
                break
            seen.append(first.lsn)
        assert seen == list(range(1, 12))

    def test_it_follows_into_later_epochs(self, faulty):
        reader = JournalReader(faulty)
        for epoch in (1, 2, 3):
            Ruler(faulty).append(2).settled().release()
            assert [each.epoch for each in reader.read()] == [epoch] * 3
        assert lsns(read(faulty)) == list(range(1, 10))

    @on_files
    def test_an_epoch_that_did_not_start_does_not_count(self, faulty):
        Ruler(faulty).append(2).settled().release()
        for contents in (b"", b"\0" * 100, None):
            second = Ruler(faulty, holder=dead()).settled()
            second.writer.close()
            path = path_of(faulty, second.leadership.epoch, 0)
            whole = path.read_bytes()
            path.write_bytes(
                whole[:HEADER_BYTES] + (whole[HEADER_BYTES : HEADER_BYTES + 30] if contents is None else contents)
            )
            assert lsns(read(faulty)) == [1, 2, 3]
            assert not verify(faulty).damaged
        third = Ruler(faulty).settled().release()
        assert third.start.sealed[0] == 1
        assert lsns(read(faulty)) == [1, 2, 3, 4]

    def test_foreign_names_are_left_alone(self, faulty):
        Ruler(faulty).settled().release()
        faulty.create("log/notes", b"hello")
        faulty.create("log/0000000001/00000000000000000000.bak", b"hello")
        faulty.create("manifest/notes", b"hello")
        assert lsns(read(faulty)) == [1]
        assert Ruler(faulty).settled().release().leadership.epoch == 2

    def test_a_long_first_record_is_read_whole(self, faulty, monkeypatch):
        monkeypatch.setattr(log_map, "_FIRST_BYTES", HEADER_BYTES + 10)
        Ruler(faulty).append(2).settled().release()
        assert lsns(read(faulty)) == [1, 2, 3]


class TestSealedEnds:
    @on_files
    def test_what_is_behind_one_is_ignored_for_ever(self, faulty):
        old = Ruler(faulty, holder=dead()).append(2).settled()
        new = Ruler(faulty).settled()
        old.append(3)
        until(lambda: old.failures)
        assert path_of(faulty, 1, 0).stat().st_size > new.start.sealed[2]
        new.append().settled().release()
        assert [(each.lsn, each.epoch) for each in read(faulty)] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)]

    @on_files
    def test_also_whole_segments(self, faulty):
        old = Ruler(faulty, holder=dead()).append(2).settled()
        new = Ruler(faulty).settled()
        faulty.faults["sync"].append(errno.EIO)
        old.append(3)
        until(lambda: any(not str(error).startswith("file") for error in old.failures))
        assert path_of(faulty, 1, 1).exists()
        new.release()
        assert lsns(read(faulty)) == [1, 2, 3, 4]

    def test_what_was_written_but_not_acked_before_it_counts(self, faulty, monkeypatch):
        old = Ruler(faulty, holder=dead()).settled()
        faulty.faults["exists"].extend([errno.EIO] * 10_000)
        old.append(2)
        until(lambda: old.failures)
        faulty.faults["exists"].clear()
        until(lambda: old.writer.durable_lsn == 3)
        new = Ruler(faulty).settled().release()
        assert new.start.sealed[3] == 3

    def test_reading_to_one_stops_there_though_bytes_follow(self, faulty):
        old = Ruler(faulty, holder=dead()).append(2).settled()
        new = Ruler(faulty)
        sealed = new.leadership.sealed
        old.append(3)
        until(lambda: old.failures)
        new.settled()
        assert lsns(JournalReader(faulty).read_to(sealed)) == [1, 2, 3]
        assert list(JournalReader(faulty).read_to(None)) == []
        reader = JournalReader(faulty)
        assert lsns(reader.read_to(sealed)) == [1, 2, 3]
        assert lsns(reader.read()) == [4]
        new.release()

    @on_files
    def test_a_follower_that_read_more_is_told(self, faulty):
        old = Ruler(faulty, holder=dead()).append(2).settled()
        new = Ruler(faulty)
        # Its first record is not there yet, so the follower still believes in the old epoch.
        until(lambda: new.writer.durable_lsn == 4)
        path = path_of(faulty, 2, 0)
        hidden = path.rename(path.with_name("hidden"))
        old.append(3)
        until(lambda: old.failures)
        reader = JournalReader(faulty)
        assert lsns(reader.read()) == [1, 2, 3, 4, 5, 6]
        hidden.rename(path)
        with pytest.raises(ReadBeyondSeal) as caught:
            list(reader.read())
        assert (caught.value.read, caught.value.sealed) == (6, 3)
        with pytest.raises(ReadBeyondSeal):
            list(reader.read_to(None))
        new.release()
        assert lsns(read(faulty)) == [1, 2, 3, 4]

    @on_files
    def test_a_follower_of_an_epoch_that_does_not_count_is_told(self, faulty):
        first = Ruler(faulty).append(2).settled().release()
        second = Ruler(faulty, holder=dead()).settled()
        path = path_of(faulty, 2, 0)
        reader = JournalReader(faulty)
        assert lsns(reader.read()) == [1, 2, 3, 4]
        hidden = path.rename(path.with_name("hidden"))
        third = Ruler(faulty).settled().release()
        hidden.rename(path)
        second.writer.close()
        assert third.start.sealed[0] == first.leadership.epoch
        with pytest.raises(ReadBeyondSeal):
            list(reader.read())
        assert lsns(read(faulty)) == [1, 2, 3, 4]

    @on_files
    def test_a_follower_returns_from_a_segment_that_does_not_count(self, faulty):
        """The old writer gave a segment up after the new one had sealed it."""
        old = Ruler(faulty, holder=dead()).append(2).settled()
        faulty.faults["exists"].append(errno.EIO)
        ends = []

        def seal(store, name, header):
            ends.append(find_end(store, before=2).sealed)
            return store.open_append(name, header)

        faulty.faults["open"].append(seal)
        faulty.faults["write"].extend([None, errno.EIO])
        old.append()
        until(lambda: old.writer.durable_lsn == 4)
        # Segment 0 holds record 4 without an ack, and the seal counts it; segment 1 holds half of it, segment 2 all.
        [sealed] = ends
        assert (sealed[1], sealed[3]) == (0, 4)
        reader = JournalReader(faulty)
        assert lsns(reader.read()) == [1, 2, 3, 4]
        assert list(reader.read_to(sealed)) == []
        path_of(faulty, 1, 2).rename(path_of(faulty, 1, 2).with_name("hidden"))
        reader = JournalReader(faulty)
        assert lsns(reader.read()) == [1, 2, 3]
        assert lsns(reader.read_to(sealed)) == [4]
        old.writer.close()

    def test_the_footer_may_lie_behind_one(self, faulty):
        ruler = Ruler(faulty, holder=dead()).append(2).settled()
        end = find_end(faulty, before=2)
        reader = JournalReader(faulty)
        ruler.writer.close()
        assert lsns(reader.read()) == [1, 2, 3]
        assert find_end(faulty, before=2).sealed[2] > end.sealed[2]
        assert list(reader.read_to(end.sealed)) == []
        assert lsns(JournalReader(faulty).read_to(end.sealed)) == [1, 2, 3]


class TestTornTails:
    @on_files
    def test_at_every_byte_the_whole_records_are_read_and_the_next_epoch_goes_on(self, faulty):
        ruler = Ruler(faulty).append(3).settled()
        ruler.leadership.release()
        ruler.writer._seal()
        path = path_of(faulty, 1, 0)
        whole = path.read_bytes()
        ends, previous = [], 0
        for length in range(HEADER_BYTES, len(whole) + 1):
            path.write_bytes(whole[:length])
            count = len(read(faulty))
            assert count - previous in (0, 1)
            if count > previous:
                ends.append(length)
            previous = count
            end = find_end(faulty, before=2)
            assert end.next_lsn == count + 1
        assert len(ends) == 4
        ruler.writer.close()

    @on_files
    def test_zeros_at_the_end_are_torn(self, faulty):
        ruler = Ruler(faulty).append(3).settled()
        with path_of(faulty, 1, 0).open("ab") as file:
            file.write(bytes(4096))
        ruler.leadership.release()
        assert lsns(read(faulty)) == [1, 2, 3, 4]
        second = Ruler(faulty).settled().release()
        assert second.leadership.next_lsn == 5
        assert lsns(read(faulty)) == [1, 2, 3, 4, 5]
        ruler.writer.close()


class TestDamage:
    @pytest.fixture
    def log(self, faulty):
        """Two epochs, the first in several segments, the second unsealed."""
        first = Ruler(faulty, segment_bytes=1)
        for _ in range(3):
            first.append(3).settled()
        first.release()
        second = Ruler(faulty).append(3).settled()
        second.writer._seal()
        second.writer.close()
        return faulty

    @on_files
    def test_a_flipped_bit_is_noticed_wherever_it_is(self, log):
        whole = read(log)
        for name in log.list(names.LOG):
            path = log._root / name
            before = path.read_bytes()
            for offset in range(0, len(before), 3):
                flip(path, offset)
                try:
                    logged = read(log)
                except (JournalCorrupt, JournalTooNew):
                    pass
                else:
                    # Only in a footer, which says nothing that counts, and only where nothing is lost by it.
                    assert logged == whole, (name, offset)
                path.write_bytes(before)

    @on_files
    @pytest.mark.parametrize("seq", [0, 1])
    def test_a_missing_segment(self, log, seq):
        path_of(log, 1, seq).unlink()
        refused(log, "the segment is missing|begins with ClientLeft")

    @on_files
    def test_a_missing_last_segment_of_a_sealed_epoch(self, log):
        last = max(path_of(log, 1, 0).parent.iterdir())
        last.unlink()
        refused(log, "missing, and a later epoch goes on from it")

    @on_files
    def test_a_missing_epoch(self, log):
        for path in path_of(log, 1, 0).parent.iterdir():
            path.unlink()
        refused(log, "missing")

    @on_files
    def test_a_shorter_sealed_segment(self, log):
        last = max(path_of(log, 1, 0).parent.iterdir())
        last.write_bytes(last.read_bytes()[:-60])
        refused(log, "sealed length")

    @on_files
    def test_a_shorter_inner_segment(self, log):
        path = path_of(log, 1, 1)
        path.write_bytes(path.read_bytes()[: HEADER_BYTES + 40])
        refused(log, "bytes of a frame are there", names.segment(1, 1))

    @on_files
    def test_an_inner_segment_without_its_records(self, log):
        path = path_of(log, 1, 1)
        path.write_bytes(path.read_bytes()[:HEADER_BYTES])
        refused(log, "the segment ends at LSN", names.segment(1, 1))

    @on_files
    def test_a_segment_without_its_header(self, log):
        path_of(log, 1, 1).write_bytes(b"")
        refused(log, "header", names.segment(1, 1))

    @on_files
    def test_a_last_segment_without_its_header(self, log):
        path_of(log, 2, 1).write_bytes(b"")
        refused(log, "header", names.segment(2, 1))
        with pytest.raises(JournalCorrupt, match="header"):
            find_end(log, before=3)

    @on_files
    def test_segments_in_each_others_place(self, log):
        first, second = path_of(log, 1, 1), path_of(log, 1, 2)
        one, two = first.read_bytes(), second.read_bytes()
        first.write_bytes(two)
        second.write_bytes(one)
        refused(log, "was written as segment|the segment ends at")

    @on_files
    def test_a_segment_of_another_cluster(self, log, tmp_path):
        other = FaultyStore(tmp_path / "other")
        Ruler(other, segment_bytes=250).append(3).settled().append(3).settled().release()
        path_of(log, 1, 0).write_bytes(path_of(other, 1, 0).read_bytes())
        refused(log, "another cluster|belongs to cluster", names.segment(1, 0))

    @on_files
    def test_a_log_without_the_object_that_says_whose_it_is(self, log):
        log.delete(names.CLUSTER)
        with pytest.raises(JournalCorrupt, match="whose it is"):
            read(log)

    @on_files
    def test_a_damaged_tail_is_refused_by_a_takeover(self, log):
        path = path_of(log, 2, 0)
        flip(path, HEADER_BYTES + 150)
        with pytest.raises(JournalCorrupt):
            find_end(log, before=3)
        with pytest.raises(JournalCorrupt):
            read(log)

    @on_files
    def test_a_damaged_first_record_does_not_hide_its_epoch(self, log):
        flip(path_of(log, 2, 0), HEADER_BYTES + 30)
        refused(log, "corrupt", names.segment(2, 0))

    @on_files
    def test_a_first_record_that_is_torn_though_others_follow(self, log):
        path = path_of(log, 1, 0)
        path.write_bytes(path.read_bytes()[: HEADER_BYTES + 10])
        refused(log, "torn", names.segment(1, 0))

    @on_files
    def test_a_newer_format_is_told(self, log):
        path = path_of(log, 2, 0)
        header = bytearray(path.read_bytes()[:HEADER_BYTES])
        header[8:10] = (2).to_bytes(2, "little")
        header[-5:-1] = google_crc32c.value(bytes(header[:-5])).to_bytes(4, "little")
        change(path, 0, bytes(header))
        with pytest.raises(JournalTooNew):
            read(log)
        with pytest.raises(JournalTooNew):
            find_end(log, before=3)


@on_files
class TestFirstRecords:
    """What an epoch's first record may not be, though it checks."""

    def ruler_that_starts_with(self, faulty, record):
        Ruler(faulty).settled().release()
        second = Ruler(faulty).settled()
        second.writer.close()
        path = path_of(faulty, 2, 0)
        path.unlink()
        writer = journal_writer.JournalWriter(
            faulty,
            second.leadership,
            commit_interval_seconds=0,
            segment_bytes=1 << 20,
            on_durable=lambda lsn: None,
            on_failure=lambda error: None,
        )
        writer.append(record)
        assert writer.close()

    def test_another_record(self, faulty):
        self.ruler_that_starts_with(faulty, ClientLeft(client="c"))
        refused(faulty, "begins with ClientLeft")

    def test_the_start_of_another_epoch(self, faulty):
        record = EpochStarted(epoch=7, cluster="c", holder="", versions={}, sealed=None)
        self.ruler_that_starts_with(faulty, record)
        refused(faulty, "the record starts epoch 7")

    def test_one_that_goes_on_from_itself(self, faulty):
        record = EpochStarted(epoch=2, cluster="c", holder="", versions={}, sealed=(2, 0, 100, 1))
        self.ruler_that_starts_with(faulty, record)
        refused(faulty, re.escape("says that it goes on from epoch 2"))

    def test_a_wrong_sealed_lsn(self, faulty):
        Ruler(faulty).append(2).settled().release()
        end = find_end(faulty, before=2)
        with pytest.raises(JournalCorrupt, match="sealed behind LSN 9"):
            list(JournalReader(faulty).read_to((*end.sealed[:3], 9)))
