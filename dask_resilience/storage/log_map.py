"""Which segments make up the log: found backwards by the sealed ends, without reading all of it."""

from __future__ import annotations

from dataclasses import dataclass

from dask_resilience.errors import JournalCorrupt
from dask_resilience.journal.codec import FOOTER, FrameCorrupt, FrameTorn, decode_frame, open_frame
from dask_resilience.journal.records import EpochStarted, SealedEnd
from dask_resilience.journal.segment import (
    FIRST_CHAIN,
    FIRST_LSN,
    HEADER_BYTES,
    SegmentHeader,
    decode_header,
    succession_problem,
)
from dask_resilience.storage import names
from dask_resilience.storage.object_store import ConditionalStore

#: Enough for a header and the first record of an epoch; more is read when it is not.
_FIRST_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """The part of the log that one epoch wrote.

    Parameters
    ----------
    epoch
        Its number.
    seqs
        Its segments that count, in order.
    sealed
        Where a later epoch sealed it, in the last of `seqs`; None for the newest.
    """

    epoch: int
    seqs: tuple[int, ...]
    sealed: SealedEnd | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEnd:
    """Where a log ends and a new epoch goes on.

    Parameters
    ----------
    sealed
        What the new epoch records; None for an empty log.
    next_lsn
        LSN of the next record.
    chain
        The chain value before it.
    """

    sealed: SealedEnd | None
    next_lsn: int
    chain: int


class LogMap:
    """The segments of a store, and which of them count.

    Parameters
    ----------
    store
        Where they are.
    """

    def __init__(self, store: ConditionalStore) -> None:
        self._store = store
        self._seqs: dict[int, tuple[int, ...]] = {}
        self._started: dict[int, EpochStarted] = {}

    def refresh(self) -> None:
        """List the store's segments again. Names that are none of ours are left alone."""
        found: dict[int, list[int]] = {}
        for name in self._store.list(names.LOG):
            try:
                epoch, seq = names.epoch_and_seq_of_segment(name)
            except ValueError:
                continue
            found.setdefault(epoch, []).append(seq)
        self._seqs = {epoch: tuple(sorted(seqs)) for epoch, seqs in found.items()}

    def newest_started(self, *, before: int | None = None) -> int | None:
        """Tell the newest epoch whose first record is whole, at will among those below a number."""
        for epoch in sorted(self._seqs, reverse=True):
            if (before is None or epoch < before) and self._has_started(epoch):
                return epoch
        return None

    def _has_started(self, epoch: int) -> bool:
        # What a snapshot covers is removed from the oldest segment on, so one that goes on from others did start.
        return self._seqs[epoch][0] > 0 or self.started(epoch) is not None

    def stretches(self, *, since: tuple[int, int] | None = None) -> list[Stretch]:
        """Tell what makes up the log, oldest first; with `since`, from this segment of this epoch on."""
        newest = self.newest_started()
        return [] if newest is None else self._walk(newest, None, since)

    def stretches_to(self, sealed: SealedEnd | None, *, since: tuple[int, int] | None = None) -> list[Stretch]:
        """Tell what makes up the log up to a sealed end, else as `stretches`."""
        return [] if sealed is None else self._walk(sealed[0], sealed, since)

    def last_segment(self, epoch: int) -> int:
        """Tell the number of the newest segment of an epoch that has one."""
        return self._seqs[epoch][-1]

    def _walk(self, epoch: int, sealed: SealedEnd | None, since: tuple[int, int] | None) -> list[Stretch]:
        backwards: list[Stretch] = []
        while True:
            seqs = self._counting(epoch, sealed, since)
            backwards.append(Stretch(epoch=epoch, seqs=seqs, sealed=sealed))
            sealed = None if since is not None and epoch == since[0] else self._goes_on_from(epoch, seqs)
            if sealed is None or (since is not None and sealed[0] < since[0]):
                return backwards[::-1]
            epoch = sealed[0]

    def _counting(self, epoch: int, sealed: SealedEnd | None, since: tuple[int, int] | None) -> tuple[int, ...]:
        """Tell the segments of an epoch that count and are asked for, and notice when one of them is missing."""
        last = float("inf") if sealed is None else sealed[1]
        first = 0 if since is None or since[0] != epoch else min(since[1], last)
        seqs = tuple(seq for seq in self._seqs.get(epoch, ()) if first <= seq <= last)
        if sealed is not None and sealed[1] not in seqs:
            name = names.segment(epoch, sealed[1])
            raise JournalCorrupt(name, 0, "the segment is missing, and a later epoch goes on from it")
        for seq, found in enumerate(seqs or (-1,), int(first)):
            if found != seq:
                problem = "the segment is missing, a later one is there" if seqs else "the segment is missing"
                raise JournalCorrupt(names.segment(epoch, seq), 0, problem)
        return seqs

    def _goes_on_from(self, epoch: int, seqs: tuple[int, ...]) -> SealedEnd | None:
        """Tell where the log before an epoch ends; None for the first one."""
        started = self.started(epoch)
        if started is None:
            raise JournalCorrupt(names.segment(epoch, seqs[0]), HEADER_BYTES, "the epoch's first record is torn")
        sealed = started.sealed
        if sealed is not None and sealed[0] >= epoch:
            problem = f"epoch {epoch} says that it goes on from epoch {sealed[0]}"
            raise JournalCorrupt(names.segment(epoch, seqs[0]), HEADER_BYTES, problem)
        return sealed

    def started(self, epoch: int) -> EpochStarted | None:
        """Read the first record of an epoch; None when its writer did not get that far."""
        known = self._started.get(epoch)
        if known is not None:
            return known
        seqs = self._seqs[epoch]
        for seq, successor in zip(seqs, (*seqs[1:], None), strict=True):
            name = names.segment(epoch, seq)
            header = read_header(self._store, epoch, seq)
            try:
                record = self._first_record(name, header)
            except FrameTorn as error:
                torn, problem = True, str(error)
            except FrameCorrupt as error:
                torn, problem = False, str(error)
            else:
                if record.epoch != epoch:
                    raise JournalCorrupt(name, HEADER_BYTES, f"the record starts epoch {record.epoch}")
                self._started[epoch] = record
                return record
            if successor is None:
                if torn:
                    return None
                raise JournalCorrupt(name, HEADER_BYTES, problem)
            if read_header(self._store, epoch, successor).first_lsn > header.first_lsn:
                raise JournalCorrupt(name, HEADER_BYTES, problem)
            # The successor writes this record again, so what stands here does not count.
        return None

    def _first_record(self, name: str, header: SegmentHeader) -> EpochStarted:
        data = self._store.read_from(name, 0, length=_FIRST_BYTES) or b""
        try:
            frame = decode_frame(data, HEADER_BYTES, lsn=header.first_lsn, chain=header.chain, name=name)
        except FrameTorn:
            if len(data) < _FIRST_BYTES:
                raise
            data = self._store.read_from(name, 0) or b""
            frame = decode_frame(data, HEADER_BYTES, lsn=header.first_lsn, chain=header.chain, name=name)
        if not isinstance(frame.record, EpochStarted):
            problem = f"the epoch begins with {type(frame.record).__name__} and not with EpochStarted"
            raise JournalCorrupt(name, HEADER_BYTES, problem)
        return frame.record


def read_header(store: ConditionalStore, epoch: int, seq: int) -> SegmentHeader:
    """Read the header of a segment; it is there as soon as the segment has its name."""
    name = names.segment(epoch, seq)
    data = store.read_from(name, 0, length=HEADER_BYTES)
    if data is None:
        raise JournalCorrupt(name, 0, "the segment is missing")
    try:
        return decode_header(data, name=name)
    except FrameTorn as error:
        raise JournalCorrupt(name, 0, error.reason) from error


def header_problem(header: SegmentHeader, *, cluster: bytes, epoch: int, seq: int, lsn: int, chain: int) -> str:
    """Say why a header cannot come next; empty when it can.

    A segment may begin before `lsn`: then it writes again what its reader saw in the segment before.
    """
    if header.first_lsn < lsn:
        lsn, chain = header.first_lsn, header.chain
    return succession_problem(header, cluster=cluster, epoch=epoch, seq=seq, lsn=lsn, chain=chain)


def find_end(store: ConditionalStore, *, before: int) -> LogEnd:
    """Find where the log of the epochs below a number ends, by reading its last segment only.

    Call it after the fence of epoch `before` is there, or the end may move.

    Parameters
    ----------
    store
        Where the log is.
    before
        The new epoch.

    Raises
    ------
    JournalCorrupt
        If the last segment is damaged where no crash explains it.
    JournalTooNew
        If a newer release wrote it.
    """
    known = LogMap(store)
    known.refresh()
    epoch = known.newest_started(before=before)
    if epoch is None:
        return LogEnd(sealed=None, next_lsn=FIRST_LSN, chain=FIRST_CHAIN)
    seq = known.last_segment(epoch)
    name = names.segment(epoch, seq)
    header = read_header(store, epoch, seq)
    length, next_lsn, chain = _measure(name, store.read_from(name, 0) or b"", header)
    return LogEnd(sealed=(epoch, seq, length, next_lsn - 1), next_lsn=next_lsn, chain=chain)


def _measure(name: str, data: bytes, header: SegmentHeader) -> tuple[int, int, int]:
    """Check every frame without reading what it says: a takeover waits for this."""
    offset, lsn, chain = HEADER_BYTES, header.first_lsn, header.chain
    try:
        while offset < len(data):
            frame = open_frame(data, offset, lsn=lsn, chain=chain, name=name)
            offset = frame.end
            if frame.number == FOOTER:
                break
            lsn, chain = lsn + 1, frame.chain
    except FrameTorn:
        pass  # what a crash left; nothing of it was acked
    except FrameCorrupt as error:
        raise JournalCorrupt(name, error.offset, error.reason) from error
    return offset, lsn, chain
