"""Snapshots in a store: what counts, what damage is seen, and that reading goes on behind one."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_resilience.errors import JournalCorrupt, StoreError
from dask_resilience.journal.records import ClientLeft, SnapshotBegun, SnapshotLinks, SnapshotTasks
from dask_resilience.storage import names
from dask_resilience.storage.journal_reader import JournalReader, ReadBeyondSeal
from dask_resilience.storage.local_store import LocalStore
from dask_resilience.storage.retention import covered, retain
from dask_resilience.storage.snapshots import (
    list_snapshots,
    newest_snapshot,
    open_journal,
    read_marker,
    read_snapshot,
    write_snapshot,
)
from tests.storage.acting import Ruler, dead, snapshot_at

CLUSTER = bytes(range(16))
STATE = [
    SnapshotTasks(keys=("a", ("b", 1)), specs=b"specs", rest=b"rest"),
    SnapshotLinks(first=1, counts=bytes([1, 0, 0, 0]), targets=bytes(4)),
    ClientLeft(client="c"),
]


@pytest.fixture
def local(store):
    return LocalStore(store)


def begun(lsn=7, **place):
    return SnapshotBegun(**{"lsn": lsn, "chain": 5, "epoch": 2, "seq": 1, "rest": b"r"} | place)


def write(store, lsn=7, *, epoch=2, state=STATE, **place):
    return write_snapshot(store, cluster=CLUSTER, epoch=epoch, begun=begun(lsn, **place), state=state)


class TestWriting:
    def test_what_was_written_is_read(self, faulty):
        written = write(faulty)
        found, problems = newest_snapshot(faulty, cluster=CLUSTER)
        assert (found, problems) == (written, [])
        assert list(read_snapshot(faulty, found)) == [begun(), *STATE]

    @pytest.mark.parametrize("size", [1, 100, 5000])
    def test_it_is_read_in_pieces(self, local, monkeypatch, size):
        """Also where one record is longer than what is read at a time."""
        monkeypatch.setattr("dask_resilience.storage.snapshots._CHUNK_BYTES", size)
        state = [ClientLeft(client="x" * (n * 37 % 900)) for n in range(60)]
        write(local, state=state)
        assert list(read_snapshot(local, newest_snapshot(local)[0]))[1:] == state

    def test_the_newest_counts(self, faulty):
        for lsn, epoch in ((7, 2), (30, 2), (12, 3)):
            write(faulty, lsn, epoch=epoch)
        assert newest_snapshot(faulty)[0].taken.lsn == 30
        assert [names.lsn_and_epoch_of_snapshot(name) for name in list_snapshots(faulty)] == [(7, 2), (12, 3), (30, 2)]

    def test_one_that_is_there_is_not_written_again(self, faulty):
        assert write(faulty) == write(faulty, state=[])
        assert len(list(read_snapshot(faulty, newest_snapshot(faulty)[0]))) == 4

    def test_what_an_attempt_left_is_replaced(self, faulty):
        handle = faulty.open_append(names.data_of_snapshot(names.snapshot(7, 2)), b"half a header")
        handle.close()
        assert newest_snapshot(faulty) == (None, [])
        assert newest_snapshot(faulty) != (write(faulty), [])
        assert newest_snapshot(faulty)[0].taken.lsn == 7

    def test_a_disk_that_is_full_leaves_nothing_that_counts(self, faulty):
        def filling():
            yield STATE[0]
            raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.raises(StoreError, match="space"):
            write(faulty, state=filling())
        assert newest_snapshot(faulty) == (None, [])

    def test_a_state_that_cannot_be_told_whole_leaves_nothing_that_counts(self, faulty):
        def failing():
            yield STATE[0]
            raise RuntimeError("no more")

        with pytest.raises(RuntimeError, match="no more"):
            write(faulty, state=failing())
        assert newest_snapshot(faulty) == (None, [])


def test_one_that_version_1_wrote_is_read(local):
    """As it was written when the format was fixed; these files never change."""
    for name in ("snapshot", "snapshot-data"):
        (local._root / name).mkdir()
        fixture = Path(__file__).parents[1] / "fixtures" / "snapshot-v1" / name
        (local._root / name / "00000000000000000007.0000000002").write_bytes(fixture.read_bytes())
    found, problems = newest_snapshot(local, cluster=CLUSTER)
    assert problems == []
    assert list(read_snapshot(local, found)) == [begun(), *STATE]


class TestDamage:
    @pytest.mark.parametrize("which", ["marker", "data"])
    def test_every_flipped_bit_is_seen(self, local, which):
        good = write(local, 3)
        newest = write(local, 7)
        name = newest.name if which == "marker" else names.data_of_snapshot(newest.name)
        path = local._root / name
        whole = path.read_bytes()
        for bit in range(len(whole) * 8):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            found, problems = newest_snapshot(local)
            assert found == good, bit
            assert len(problems) == 1

    @pytest.mark.parametrize("which", ["marker", "data"])
    def test_every_lost_tail_is_seen(self, local, which):
        newest = write(local, 7)
        path = local._root / (newest.name if which == "marker" else names.data_of_snapshot(newest.name))
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            found, [problem] = newest_snapshot(local)
            assert found is None
            assert isinstance(problem, JournalCorrupt)

    def test_one_of_another_cluster_or_place_does_not_count(self, local):
        newest = write(local, 7)
        assert newest_snapshot(local, cluster=bytes(16))[0] is None
        other = names.data_of_snapshot(names.snapshot(8, 2))
        (local._root / other).write_bytes((local._root / names.data_of_snapshot(newest.name)).read_bytes())
        (local._root / names.snapshot(8, 2)).write_bytes((local._root / newest.name).read_bytes())
        found, [problem] = newest_snapshot(local)
        assert found == newest
        assert "LSN 8" in str(problem)

    def test_the_data_is_missing(self, local):
        newest = write(local, 7)
        local.delete(names.data_of_snapshot(newest.name))
        assert "missing" in str(newest_snapshot(local)[1][0])

    def test_names_of_others_are_left_alone(self, local):
        (local._root / "snapshot").mkdir()
        (local._root / "snapshot" / "notes.txt").write_text("mine")
        assert newest_snapshot(local) == (None, [])
        assert retain(local).snapshots == 0
        assert (local._root / "snapshot" / "notes.txt").exists()


class TestReadingOn:
    @settings(max_examples=30)
    @given(
        reigns=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=3),
        data=st.data(),
    )
    def test_behind_any_record_the_rest_is_the_same(self, tmp_path_factory, reigns, data):
        """Also where what it covers is gone, and the log is followed while that happens."""
        local = LocalStore(tmp_path_factory.mktemp("store"))
        ruler = None
        for commits in reigns:
            ruler = Ruler(local, segment_bytes=200, holder=dead())
            for count in commits:
                ruler.append(count).settled()
        whole = list(JournalReader(local).read())
        cuts = sorted(data.draw(st.sets(st.integers(1, len(whole)), min_size=2, max_size=4)))
        follower = JournalReader(local)
        follower_at = data.draw(st.integers(cuts[0], len(whole)))
        followed = [next(follower.read()) for _ in range(follower_at)]
        for cut in cuts:
            taken = snapshot_at(local, cut, epoch=99).taken
            assert list(JournalReader(local, base=taken).read()) == whole[cut:]
            retain(local)
        ruler.append(3).settled()
        oldest, newest = list_snapshots(local)
        behind = []
        for name in (oldest, newest):
            taken = read_marker(local, name)
            rest = list(JournalReader(local, base=taken).read())
            assert rest[: len(whole) - taken.lsn] == whole[taken.lsn :]
            behind.append(rest[-3:])
        assert behind[0] == behind[1]
        if follower_at >= cuts[-2]:
            assert followed + list(follower.read()) == [*whole, *behind[0]]
        ruler.release()
        # And another reign goes on from a log of which only the end is there.
        after = Ruler(local).settled()
        snapshot, reader = open_journal(local)
        assert [logged.lsn for logged in reader.read()] == list(range(snapshot.taken.lsn + 1, after.acked[-1] + 1))
        after.release()

    def test_a_snapshot_whose_log_is_gone_is_refused(self, local):
        ruler = Ruler(local, segment_bytes=200)
        for _ in range(4):
            ruler.append(3).settled()
        ruler.release()
        taken = snapshot_at(local, 6, epoch=1).taken
        segments = local.list(names.LOG)
        for name in segments:
            local.delete(name)
        with pytest.raises(JournalCorrupt, match="missing"):
            list(JournalReader(local, base=taken).read())

    def test_a_snapshot_that_is_not_of_this_log_is_refused(self, local):
        Ruler(local).append(5).settled().release()
        taken = snapshot_at(local, 3, epoch=1).taken
        with pytest.raises(JournalCorrupt, match="other contents"):
            list(JournalReader(local, base=replace(taken, chain=5)).read())

    def test_a_snapshot_beyond_a_sealed_end_is_refused(self, local):
        Ruler(local, holder=dead()).append(5).settled()
        taken = snapshot_at(local, 6, epoch=1).taken
        Ruler(local).settled().release()
        with pytest.raises((ReadBeyondSeal, JournalCorrupt)):
            list(JournalReader(local, base=replace(taken, lsn=60)).read())


class TestRetention:
    def test_on_each_kind_of_store(self, faulty):
        ruler = Ruler(faulty, segment_bytes=200)
        for _ in range(6):
            ruler.append(3).settled()
        whole = list(JournalReader(faulty).read())
        for lsn in (5, 10, 14):
            taken = snapshot_at(faulty, lsn, epoch=1).taken
        assert retain(faulty).segments > 1
        assert len(faulty.list(names.SNAPSHOT_DATA)) == len(list_snapshots(faulty)) == 2
        assert list(JournalReader(faulty, base=taken).read()) == whole[14:]
        ruler.release()

    def test_nothing_goes_before_there_are_two(self, local):
        Ruler(local, segment_bytes=200).append(20).settled().release()
        snapshot_at(local, 15, epoch=1)
        before = local.list(names.LOG)
        assert retain(local).segments == 0
        assert local.list(names.LOG) == before

    def test_what_neither_needs_goes_and_a_second_time_nothing(self, local):
        ruler = Ruler(local, segment_bytes=200)
        for _ in range(6):
            ruler.append(3).settled()
        first, second, third = (snapshot_at(local, lsn, epoch=1) for lsn in (5, 10, 14))
        begun = names.data_of_snapshot(names.snapshot(12, 1))
        (local._root / begun).write_bytes(b"x")
        removed = retain(local)
        assert removed.segments == second.taken.seq > first.taken.seq
        assert removed.snapshots == 1
        assert local.list(names.LOG)[0] == names.segment(1, second.taken.seq)
        assert local.list(names.SNAPSHOTS) == [second.name, third.name]
        assert local.list(names.SNAPSHOT_DATA) == [names.data_of_snapshot(s.name) for s in (second, third)]
        assert (retain(local).segments, retain(local).snapshots) == (0, 0)
        ruler.release()

    def test_a_damaged_marker_removes_nothing(self, local):
        ruler = Ruler(local, segment_bytes=200)
        for _ in range(6):
            ruler.append(3).settled()
        ruler.release()
        markers = [snapshot_at(local, lsn, epoch=1).name for lsn in (5, 10, 14)]
        path = local._root / markers[1]
        path.write_bytes(b"?" + path.read_bytes()[1:])
        before = local.list("")
        with pytest.raises(JournalCorrupt):
            retain(local)
        assert local.list("") == before

    def test_a_scheduler_that_was_deposed_meanwhile_removes_nothing_of_its_successor(self, local, monkeypatch):
        """It was stopped after it had looked at what counts, for as long as two snapshots of the next one took."""
        ruler = Ruler(local, segment_bytes=200, holder=dead())
        for _ in range(6):
            ruler.append(3).settled()
        for lsn in (5, 10):
            snapshot_at(local, lsn, epoch=1)
        listed = list_snapshots(local)
        oldest = read_marker(local, listed[0])
        successor = Ruler(local, segment_bytes=200)
        successor.append(3).settled()
        for lsn in (21, 22):
            snapshot_at(local, lsn, epoch=2)
        retain(local)
        there = local.list("")
        monkeypatch.setattr("dask_resilience.storage.retention.list_snapshots", lambda _: listed)
        monkeypatch.setattr("dask_resilience.storage.retention.read_marker", lambda *_: oldest)
        retain(local)
        assert local.list("") == there
        successor.release()

    def test_manifests_stay(self, local):
        for _ in range(4):
            Ruler(local, segment_bytes=200).append(4).settled().release()
        last = JournalReader(local)
        end = len(list(last.read()))
        snapshot_at(local, end - 1, epoch=4)
        snapshot_at(local, end, epoch=4)
        assert retain(local).segments
        assert local.list(names.MANIFESTS) == [names.manifest(n) for n in (1, 2, 3, 4)]

    def test_only_segments_are_covered(self):
        there = [names.segment(2, 0), names.segment(1, 3), "log/notes", names.segment(1, 10), "lease"]
        assert covered(there, epoch=2, seq=0) == [names.segment(1, 3), names.segment(1, 10)]
