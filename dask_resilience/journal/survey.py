"""What one segment is by itself, in small: enough to judge a whole store without holding all of it in memory."""

from __future__ import annotations

from dataclasses import dataclass

from dask_resilience.errors import JournalCorrupt
from dask_resilience.journal.records import EpochStarted
from dask_resilience.journal.segment import HEADER_BYTES, SegmentHeader, scan_segment


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """One segment by itself, without its records.

    Parameters
    ----------
    name, epoch, seq, nbytes
        Its name, what the name says, and its length.
    header
        None where it cannot be read.
    ends, chains
        Where the log may end in it, and the chain value there: behind the header, each record, the footer.
    records
        Count of the records that check.
    sealed
        Whether it ends with its footer.
    end
        Where reading stopped.
    torn, fault
        Why, if that is before the end: what a crash explains, and what nothing does.
    opening
        Its first record, if that opens this epoch.
    oddities
        What is wrong with records that check: offset and problem.
    """

    name: str
    epoch: int
    seq: int
    nbytes: int
    header: SegmentHeader | None
    ends: list[int]
    chains: list[int]
    records: int
    sealed: bool
    end: int
    torn: str | None
    fault: str | None
    opening: EpochStarted | None
    oddities: list[tuple[int, str]]

    def lsn(self, index: int) -> int:
        """LSN of the next record at `ends[index]`, for a survey with a header."""
        assert self.header
        return self.header.first_lsn + min(index, self.records)


def survey_segment(name: str, epoch: int, seq: int, data: bytes) -> Survey:
    """Survey a segment, given its name, the epoch and number in that name, and its content."""
    contents, fault = scan_segment(data, name=name)
    ends, chains = [HEADER_BYTES], [contents.header.chain if contents.header else 0]
    opening: EpochStarted | None = None
    oddities: list[tuple[int, str]] = []
    for frame in contents.frames:
        record = frame.record
        if isinstance(record, EpochStarted):
            if len(ends) > 1:
                oddities.append((ends[-1], "a record that opens an epoch stands inside of it"))
            elif record.epoch != epoch or (record.sealed and record.sealed[0] >= epoch):
                oddities.append((ends[-1], f"the record cannot open epoch {epoch}: {record}"))
            else:
                opening = record
        ends.append(frame.end)
        chains.append(frame.chain)
    if contents.sealed and contents.position:
        ends.append(contents.end)
        chains.append(contents.position.chain)
    return Survey(
        name=name,
        epoch=epoch,
        seq=seq,
        nbytes=len(data),
        header=contents.header,
        ends=ends,
        chains=chains,
        records=len(contents.frames),
        sealed=contents.sealed,
        end=contents.end,
        torn=contents.torn,
        fault=(fault.problem if isinstance(fault, JournalCorrupt) else str(fault)) if fault else None,
        opening=opening,
        oddities=oddities,
    )
