"""Snapshots in a store: written, read back, and only then marked as one that counts.

A snapshot is framed as a segment is, and a second, small object says that it was read back whole. What has no marker
does not exist for a reader: its writer may have died. What a snapshot says is the state of a scheduler and none of
this module's business.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from dask_resilience.errors import JournalCorrupt, StoreError
from dask_resilience.failpoints import failpoint
from dask_resilience.journal.codec import FrameCorrupt, FrameTorn, decode_frame, encode_frame
from dask_resilience.journal.records import Record, SnapshotBegun, SnapshotTaken
from dask_resilience.journal.segment import (
    FIRST_CHAIN,
    FIRST_LSN,
    Position,
    SegmentHeader,
    encode_footer,
    encode_header,
    scan_segment,
)
from dask_resilience.storage import names
from dask_resilience.storage.journal_reader import JournalReader
from dask_resilience.storage.object_store import AppendHandle, ConditionalStore, Outcome
from dask_resilience.storage.trouble import store_error

logger = logging.getLogger("distributed.resilience")

#: How much is read, and at least how much is synced, at a time.
_CHUNK_BYTES: Final = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A snapshot that counts.

    Parameters
    ----------
    name
        Of its marker.
    taken
        What the marker says.
    """

    name: str
    taken: SnapshotTaken


def write_snapshot(
    store: ConditionalStore, *, cluster: bytes, epoch: int, begun: SnapshotBegun, state: Iterable[Record]
) -> Snapshot:
    """Write a snapshot, read it back, and mark it.

    Parameters
    ----------
    store
        Where the journal is.
    cluster
        Its id, 16 bytes.
    epoch
        The epoch that takes it; of one epoch only one process at a time takes snapshots.
    begun
        What it is a snapshot of.
    state
        The records that rebuild that state.

    Returns
    -------
    Snapshot
        Of the same or an earlier attempt, if that was finished.

    Raises
    ------
    StoreError
        If it could not be written.
    JournalCorrupt
        If what was read back is not what was written. Nothing counts then.
    """
    marker = names.snapshot(begun.lsn, epoch)
    data = names.data_of_snapshot(marker)
    if store.exists(marker):
        return Snapshot(name=marker, taken=read_marker(store, marker))
    # What attempts of this epoch left that did not end, at any record.
    for left in store.list(names.SNAPSHOT_DATA):
        if left.endswith(f".{epoch:010d}") and not store.exists(names.marker_of_data(left)):
            store.delete(left)
    header = SegmentHeader(
        cluster=cluster,
        epoch=epoch,
        seq=0,
        nonce=secrets.token_bytes(16),
        first_lsn=FIRST_LSN,
        chain=FIRST_CHAIN,
    )
    failpoint("snapshot.before-data")
    handle = store.open_append(data, encode_header(header))
    if isinstance(handle, Outcome):
        raise store_error(store.url, f"written ({data})", handle)
    try:
        taken = _write(handle, begun, state)
    except BaseException as error:
        handle.close()
        # The disk may be full of it, and the journal needs the room.
        with contextlib.suppress(StoreError):
            store.delete(data)
        if isinstance(error, OSError):
            raise store_error(store.url, f"written ({data})", error) from error
        raise
    handle.close()
    failpoint("snapshot.after-data")
    for _ in read_snapshot(store, Snapshot(name=marker, taken=taken), cluster=cluster):
        pass
    failpoint("snapshot.after-check")
    buffers, _ = encode_frame(taken, lsn=FIRST_LSN, chain=FIRST_CHAIN)
    outcome = store.create(marker, b"".join(buffers))
    if outcome not in (Outcome.OK, Outcome.AMBIGUOUS):
        raise store_error(store.url, f"written ({marker})", outcome)
    if outcome is Outcome.AMBIGUOUS and not store.exists(marker):
        raise store_error(store.url, f"written ({marker})", Outcome.RETRY)
    failpoint("snapshot.after-marker")
    return Snapshot(name=marker, taken=taken)


def _write(handle: AppendHandle, begun: SnapshotBegun, state: Iterable[Record]) -> SnapshotTaken:
    lsn, chain, unsynced = FIRST_LSN, FIRST_CHAIN, 0
    for record in _chained(begun, state):
        buffers, chain = encode_frame(record, lsn=lsn, chain=chain)
        lsn += 1
        handle.write(buffers)
        unsynced += sum(map(len, buffers))
        if unsynced >= _CHUNK_BYTES:
            handle.sync()
            unsynced = 0
    frames = lsn - FIRST_LSN
    handle.write([encode_footer(frames=frames, nbytes=handle.size_bytes, lsn=lsn, chain=chain)])
    handle.sync()
    return SnapshotTaken(
        lsn=begun.lsn,
        chain=begun.chain,
        epoch=begun.epoch,
        seq=begun.seq,
        frames=frames,
        nbytes=handle.size_bytes,
        end_chain=chain,
    )


def _chained(begun: SnapshotBegun, state: Iterable[Record]) -> Iterator[Record]:
    yield begun
    yield from state


def list_snapshots(store: ConditionalStore) -> list[str]:
    """Names of the markers in a store, oldest first."""
    found = []
    for name in store.list(names.SNAPSHOTS):
        try:
            names.lsn_and_epoch_of_snapshot(name)
        except ValueError:
            continue  # none of ours
        found.append(name)
    return found


def check_snapshots(
    store: ConditionalStore, *, cluster: bytes | None = None
) -> tuple[list[Snapshot], list[JournalCorrupt]]:
    """Check every byte of all snapshots; return those that are sound, oldest first, and what is wrong with others."""
    sound: list[Snapshot] = []
    problems: list[JournalCorrupt] = []
    for name in list_snapshots(store):
        found = _check(store, name, cluster)
        if isinstance(found, Snapshot):
            sound.append(found)
        else:
            problems.append(found)
    return sound, problems


def _check(store: ConditionalStore, name: str, cluster: bytes | None) -> Snapshot | JournalCorrupt:
    try:
        snapshot = Snapshot(name=name, taken=read_marker(store, name))
        for _ in read_snapshot(store, snapshot, cluster=cluster):
            pass
    except JournalCorrupt as error:
        return error
    return snapshot


def newest_snapshot(
    store: ConditionalStore, *, cluster: bytes | None = None
) -> tuple[Snapshot | None, list[JournalCorrupt]]:
    """Find the newest snapshot of which every byte is what was written.

    Parameters
    ----------
    store
        Where the journal is.
    cluster
        Id that it must have; None for any.

    Returns
    -------
    Snapshot, list
        None where there is none; and what is wrong with newer ones that were passed over.

    Raises
    ------
    JournalTooNew
        If a newer release wrote one.
    StoreError
        If the store cannot be read.
    """
    problems: list[JournalCorrupt] = []
    for name in reversed(list_snapshots(store)):
        found = _check(store, name, cluster)
        if isinstance(found, Snapshot):
            return found, problems
        problems.append(found)
    return None, problems


def read_snapshot(store: ConditionalStore, snapshot: Snapshot, *, cluster: bytes | None = None) -> Iterator[Record]:
    """Read the records of a snapshot.

    Parameters
    ----------
    store
        Where it is.
    snapshot
        What its marker says.
    cluster
        Id that it must have; None for any.

    Yields
    ------
    Record
        In the order in which they were written.

    Raises
    ------
    JournalCorrupt
        If a byte is not what was written. Some records may have been yielded before that is seen.
    JournalTooNew
        If a newer release wrote it.
    """
    name, taken = names.data_of_snapshot(snapshot.name), snapshot.taken
    position: Position | None = None
    length, begins = _CHUNK_BYTES, True
    while True:
        offset = position.offset if position else 0
        data = store.read_from(name, offset, length=length)
        if data is None:
            raise JournalCorrupt(name, 0, "the snapshot is missing, its marker is there")
        contents, fault = scan_segment(data, name=name, after=position)
        if fault:
            raise fault
        if position is None and contents.header is not None and cluster not in (None, contents.header.cluster):
            raise JournalCorrupt(name, 0, f"it belongs to another cluster, {contents.header.cluster.hex()}")
        if begins and contents.frames:
            _check_begin(name, contents.frames[0].record, taken)
            begins = False
        for frame in contents.frames:
            yield frame.record
        ended = len(data) < length
        # A frame may be longer than what was read.
        length = length * 2 if contents.position == position else _CHUNK_BYTES
        position = contents.position
        if ended:
            break
    if position is None or not position.sealed:
        raise JournalCorrupt(name, contents.end, contents.torn or "the end of the snapshot is missing")
    if (position.frames, position.offset, position.chain) != (taken.frames, taken.nbytes, taken.end_chain):
        problem = f"its marker tells of {taken.frames} records in {taken.nbytes} bytes, with another check value"
        raise JournalCorrupt(name, position.offset, problem)


def open_journal(store: ConditionalStore) -> tuple[Snapshot | None, JournalReader]:
    """Find where reading a journal begins.

    Parameters
    ----------
    store
        Where it is.

    Returns
    -------
    Snapshot, JournalReader
        The newest snapshot that is sound, or None; and a reader of what came after it.

    Raises
    ------
    JournalTooNew
        If a newer release wrote the snapshot.
    StoreError
        If the store cannot be read.
    """
    snapshot, problems = newest_snapshot(store)
    for problem in problems:
        logger.error("A snapshot is damaged and passed over: %s", problem)
    return snapshot, JournalReader(store, base=snapshot.taken if snapshot else None)


def _check_begin(name: str, record: Record, taken: SnapshotTaken) -> None:
    if not isinstance(record, SnapshotBegun):
        raise JournalCorrupt(name, 0, f"it begins with {type(record).__name__} and not with SnapshotBegun")
    said = record.lsn, record.chain, record.epoch, record.seq
    if said != (taken.lsn, taken.chain, taken.epoch, taken.seq):
        raise JournalCorrupt(name, 0, f"it is of LSN {record.lsn}, its marker tells of LSN {taken.lsn}")


def read_marker(store: ConditionalStore, name: str) -> SnapshotTaken:
    """Read the marker of a snapshot, or raise `JournalCorrupt`."""
    stored = store.get(name)
    if stored is None:
        # It was there when the store was listed: a newer reign let go of it.
        raise JournalCorrupt(name, 0, "the marker of the snapshot is missing")
    try:
        frame = decode_frame(stored.data, 0, lsn=FIRST_LSN, chain=FIRST_CHAIN, name=name)
    except (FrameCorrupt, FrameTorn) as error:
        raise JournalCorrupt(name, 0, error.reason) from error
    record = frame.record
    lsn, _ = names.lsn_and_epoch_of_snapshot(name)
    if not isinstance(record, SnapshotTaken) or record.lsn != lsn or frame.end != len(stored.data):
        raise JournalCorrupt(name, 0, f"it is no marker of a snapshot of LSN {lsn}")
    return record
