"""Reading the journal, from its first record to its end and on as it grows.

What counts, and what does not
------------------------------
Epochs. An epoch counts once its `EpochStarted` is whole. That record says where the log before it ends: the sealed
end. So the log is found backwards, from the newest epoch that started, and read forwards. Bytes behind a sealed end
and epochs that no sealed end points to are ignored for ever: a writer that was fenced may still append them.

Segments. A record is in the log under one LSN. After a failed write or sync the writer trusts its segment no more:
it opens the next one, whose header says from which LSN it goes on, and writes again what was not acked. So **in a
segment that has a successor, records from the successor's first LSN on do not count, and what stands there may be
torn or damaged.** They are written again, the same to the byte, in the successor. What lies before must be whole, so
a damaged acked record shows as a gap, and a gap is corruption.

Tails. Behind the last good frame of the last segment, a torn frame is what a crash leaves. It is ignored where no
later epoch sealed the segment.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from dask_resilience.errors import JournalCorrupt, ResilienceError
from dask_resilience.journal.records import Record, SealedEnd, SnapshotTaken
from dask_resilience.journal.segment import (
    FIRST_CHAIN,
    FIRST_LSN,
    Position,
    SegmentContents,
    SegmentHeader,
    handover_problem,
    read_segment,
    scan_segment,
)
from dask_resilience.storage import names
from dask_resilience.storage.cluster_object import read_cluster
from dask_resilience.storage.log_map import LogMap, Stretch, header_problem, read_header
from dask_resilience.storage.object_store import ConditionalStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """One record of the log.

    Parameters
    ----------
    lsn
        Its number, one more than that of the record before it.
    epoch
        The epoch in which it was written.
    record
        What it says.
    """

    lsn: int
    epoch: int
    record: Record


class ReadBeyondSeal(ResilienceError):
    """A follower read records that were never acked and that the new epoch left out.

    What was built from them is wrong by those records: start again with a new reader. It happens to a standby that
    follows a live log when the old scheduler was stopped in the middle of a group commit.

    Parameters
    ----------
    read, sealed
        LSN of the last record that was read, and of the last that counts.
    """

    def __init__(self, read: int, sealed: int) -> None:
        super().__init__(f"read up to LSN {read}, but the log was sealed at {sealed}; start again with a new reader")
        self.read = read
        self.sealed = sealed


class JournalReader:
    """Reads a store's journal in order; each call goes on where the last stopped.

    Parameters
    ----------
    store
        Where the journal is. Nothing is written to it.
    base
        A snapshot; what it covers is not read. None reads from the first record on.

    Examples
    --------
    >>> import tempfile
    >>> from dask_resilience.storage.local_store import LocalStore
    >>> list(JournalReader(LocalStore(tempfile.mkdtemp())).read())
    []
    """

    def __init__(self, store: ConditionalStore, *, base: SnapshotTaken | None = None) -> None:
        self._store = store
        self._map = LogMap(store)
        self._base = base
        self._cluster: bytes | None = None
        #: The segment that is being read, and where in it. None before the first and between segments.
        self._at: tuple[int, int] | None = (base.epoch, base.seq) if base else None
        self._position: Position | None = None
        #: The LSN that comes next, and the chain value behind the record before it.
        self._lsn = base.lsn + 1 if base else FIRST_LSN
        self._chain = base.chain if base else FIRST_CHAIN
        #: Bytes that were read of segments, header and all.
        self.read_bytes = 0

    @property
    def next_lsn(self) -> int:
        """LSN of the record that the next call starts with."""
        return self._lsn

    @property
    def place(self) -> tuple[int, int, int, int] | None:
        """LSN of the last record that was read, the chain value behind it, and its epoch and segment."""
        return None if self._at is None else (self._lsn - 1, self._chain, *self._at)

    def read(self) -> Iterator[Logged]:
        """Read what is in the log and was not read yet.

        Yields
        ------
        Logged
            In order of LSN, each once.

        Raises
        ------
        JournalCorrupt
            If a byte is not what was written where no crash explains it, or something is missing.
        JournalTooNew
            If a newer release wrote the journal.
        ReadBeyondSeal
            If a follower read what a later epoch left out.
        StoreError
            If the store cannot be read.
        """
        self._map.refresh()
        yield from self._read(self._map.stretches(since=self._at))

    def read_to(self, sealed: SealedEnd | None) -> Iterator[Logged]:
        """Read what is in the log up to a sealed end, which the store need not know yet.

        Parameters
        ----------
        sealed
            `Leadership.sealed` of a scheduler that took over: None when there was no log.

        Yields
        ------
        Logged
            As `read`, which see for what is raised.
        """
        self._map.refresh()
        yield from self._read(self._map.stretches_to(sealed, since=self._at))

    def _read(self, stretches: list[Stretch]) -> Iterator[Logged]:
        if stretches and self._cluster is None:
            self._cluster = self._cluster_bytes()
        for stretch in self._remaining(stretches):
            yield from self._read_stretch(stretch)

    def _cluster_bytes(self) -> bytes:
        cluster = read_cluster(self._store)
        if cluster is None:
            raise JournalCorrupt(names.CLUSTER, 0, "there is a log, but the object that says whose it is is missing")
        return uuid.UUID(cluster.cluster_id).bytes

    def _remaining(self, stretches: list[Stretch]) -> list[Stretch]:
        """Drop what was read, and notice when what was read does not count."""
        if self._at is None:
            return stretches
        epoch, seq = self._at
        if self._base is not None and self._lsn == self._base.lsn + 1 and epoch not in {s.epoch for s in stretches}:
            raise JournalCorrupt(names.segment(epoch, seq), 0, "the segment is missing, and a snapshot goes on from it")
        for number, stretch in enumerate(stretches):
            if stretch.epoch != epoch:
                continue
            if stretch.sealed is not None and self._lsn - 1 > stretch.sealed[3]:
                raise ReadBeyondSeal(self._lsn - 1, stretch.sealed[3])
            if stretch.sealed is not None and seq > stretch.sealed[1]:
                # In a segment that does not count, yet behind no record that does not: go back to the one that does.
                self._at, self._position = (epoch, stretch.sealed[1]), None
            return stretches[number:]
        raise ReadBeyondSeal(self._lsn - 1, max((s.sealed[3] for s in stretches if s.sealed), default=0))

    def _read_stretch(self, stretch: Stretch) -> Iterator[Logged]:
        epoch, seqs = stretch.epoch, stretch.seqs
        if self._at is not None and self._at[0] == epoch:
            seqs = tuple(seq for seq in seqs if seq >= self._at[1])
        for seq, successor in zip(seqs, [*seqs[1:], None], strict=True):
            if self._at != (epoch, seq):
                self._at, self._position = (epoch, seq), None
            name = names.segment(epoch, seq)
            base = 0 if self._position is None else self._position.offset
            data = self._store.read_from(name, base)
            if data is None:
                raise JournalCorrupt(name, 0, "the segment is missing")
            self.read_bytes += len(data)
            if successor is not None:
                next_header = read_header(self._store, epoch, successor)
                contents = self._read_before(name, data, next_header)
                stop = next_header.first_lsn
            else:
                contents = self._read_last(name, data, stretch.sealed)
                stop = None
            self._check_header(name, contents)
            yield from self._take(name, epoch, contents, stop)

    def _read_before(self, name: str, data: bytes, successor: SegmentHeader) -> SegmentContents:
        """Read a segment of which only what lies before its successor's first LSN must be whole."""
        contents, fault = scan_segment(data, name=name, after=self._position)
        if contents.position is None:
            raise fault or JournalCorrupt(name, contents.end, contents.torn or "the segment has no header")
        problem = handover_problem(contents.position.header, successor, reached=contents.position.lsn)
        if problem:
            raise fault or JournalCorrupt(name, contents.end, contents.torn or problem)
        return contents

    def _read_last(self, name: str, data: bytes, sealed: SealedEnd | None) -> SegmentContents:
        if sealed is None:
            return read_segment(data, name=name, after=self._position)
        if self._position is not None and self._position.offset > sealed[2]:
            # A follower went by the sealed end over bytes that hold no record: a footer.
            return read_segment(b"", name=name, after=self._position)
        contents = read_segment(data, name=name, until=sealed[2], after=self._position)
        if contents.position is not None and contents.position.lsn - 1 != sealed[3]:
            problem = f"sealed behind LSN {sealed[3]}, but LSN {contents.position.lsn - 1} is there"
            raise JournalCorrupt(name, contents.end, problem)
        return contents

    def _check_header(self, name: str, contents: SegmentContents) -> None:
        if contents.header is None:
            # A segment is given its name after its header is durable, so no crash explains this.
            raise JournalCorrupt(name, 0, contents.torn or "the segment has no header")
        if self._position is not None:
            return
        epoch, seq = names.epoch_and_seq_of_segment(name)
        assert self._cluster is not None, "a segment is read before the cluster object"
        problem = header_problem(
            contents.header, cluster=self._cluster, epoch=epoch, seq=seq, lsn=self._lsn, chain=self._chain
        )
        if problem:
            raise JournalCorrupt(name, 0, problem)

    def _take(self, name: str, epoch: int, contents: SegmentContents, stop: int | None) -> Iterator[Logged]:
        """Yield the new records; those read before must be the same again."""
        for frame in contents.frames:
            if stop is not None and frame.lsn >= stop:
                break
            if frame.lsn < self._lsn:
                if frame.lsn == self._lsn - 1 and frame.chain != self._chain:
                    raise JournalCorrupt(name, frame.end, "a record was written again with other contents")
                continue
            self._lsn, self._chain = frame.lsn + 1, frame.chain
            yield Logged(lsn=frame.lsn, epoch=epoch, record=frame.record)
        # With a successor, records that do not count may have been passed over; a sealed end may yet make them count.
        self._position = contents.position if stop is None else None
