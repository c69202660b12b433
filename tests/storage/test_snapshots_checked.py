"""What `check_store` says of a store with snapshots, and that the reader agrees."""

from __future__ import annotations

import pytest

from dask_resilience.errors import ResilienceError
from dask_resilience.journal.records import SnapshotBegun
from dask_resilience.storage import names
from dask_resilience.storage.cluster_object import read_cluster
from dask_resilience.storage.local_store import LocalStore
from dask_resilience.storage.retention import retain
from dask_resilience.storage.snapshots import open_journal, read_snapshot, write_snapshot
from dask_resilience.storage.store_check import check_store
from tests.storage.acting import Ruler, snapshot_at


@pytest.fixture
def truncated(store):
    """Two reigns, of which the beginning is gone, and two snapshots."""
    local = LocalStore(store)
    ruler = Ruler(local, segment_bytes=200)
    for _ in range(4):
        ruler.append(3).settled()
    ruler.release()
    Ruler(local, segment_bytes=200).append(3).settled().release()
    snapshot_at(local, 8)
    snapshot_at(local, 11)
    assert retain(local).segments == 2
    return local


def recovered(store):
    snapshot, reader = open_journal(store)
    return len(list(read_snapshot(store, snapshot))) + len(list(reader.read()))


def test_a_store_whose_beginning_is_gone_is_sound(truncated):
    report = check_store(truncated)
    assert report.findings == ()
    assert (report.snapshots, report.last_lsn) == (2, 17)


def test_flipped_bits_of_log_and_snapshots_are_found(truncated):
    """Every seventh; `test_flipped_bits` tries all of a whole store."""
    objects = [*truncated.list(names.LOG), *truncated.list(names.SNAPSHOTS), *truncated.list(names.SNAPSHOT_DATA)]
    assert len(objects) == 7
    for name in objects:
        path = truncated._root / name
        whole = path.read_bytes()
        for bit in range(0, len(whole) * 8, 7):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            assert check_store(truncated).findings, (name, bit)
        path.write_bytes(whole)
    assert not check_store(truncated).findings


def test_every_missing_object_is_found_and_a_reader_refuses_or_goes_around(truncated):
    # That the whole newest epoch is gone cannot be told: it may never have begun.
    for name in [*truncated.list(names.LOG)[:-1], *truncated.list(names.SNAPSHOT_DATA)]:
        path = truncated._root / name
        whole = path.read_bytes()
        path.unlink()
        assert check_store(truncated).damaged, name
        if name == names.segment(1, 3):
            with pytest.raises(ResilienceError):
                recovered(truncated)
        else:
            assert recovered(truncated)
        path.write_bytes(whole)


def test_what_a_snapshot_stands_for_may_be_damaged(store):
    local = LocalStore(store)
    ruler = Ruler(local, segment_bytes=200)
    for _ in range(4):
        ruler.append(3).settled()
    ruler.release()
    snapshot_at(local, 11)
    path = local._root / names.segment(1, 0)
    path.write_bytes(path.read_bytes()[:-30] + bytes(30))
    report = check_store(local)
    assert not report.damaged
    assert "a snapshot stands for it" in str(report.findings[0])
    assert recovered(local) > 1


def test_a_snapshot_of_another_log_is_damage(truncated):
    """Sound by itself, and not of the record that is there."""
    for name in truncated.list(names.SNAPSHOTS):
        truncated.delete(name)
    begun = SnapshotBegun(lsn=9, chain=5, epoch=1, seq=2, rest=b"")
    cluster = bytes.fromhex(read_cluster(truncated).cluster_id.replace("-", ""))
    write_snapshot(truncated, cluster=cluster, epoch=9, begun=begun, state=[])
    assert check_store(truncated).damaged
    with pytest.raises(ResilienceError):
        recovered(truncated)
