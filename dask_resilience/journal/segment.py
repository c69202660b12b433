"""A segment: a header, frames, and a footer once it is sealed.

`read_segment` reads a whole segment or goes on in one that grows: the `position` of what was read is where the next
call starts, given the bytes from there on.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Final

import google_crc32c
import msgpack  # type: ignore[import-untyped]  # it ships no types

from dask_resilience.errors import JournalCorrupt, JournalTooNew
from dask_resilience.journal.codec import (
    END_MARK,
    FOOTER,
    FORMAT_VERSION,
    Frame,
    FrameCorrupt,
    FrameTorn,
    RawFrame,
    only_zeros,
    open_frame,
    read_record,
    seal_frame,
)
from dask_resilience.journal.payload import unpack_map

#: LSN of the first record of a log, and the chain value before it.
FIRST_LSN: Final = 1
FIRST_CHAIN: Final = 0
MAGIC: Final = b"\x89DRJ\r\n\x1a\n"
#: Bytes before the first frame.
HEADER_BYTES: Final = 77

_PREFIX: Final = struct.Struct("<8sHH")
_FIELDS: Final = struct.Struct("<16sQQ16sQI")
_CRC: Final = struct.Struct("<I")


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentHeader:
    """What a segment says about itself.

    Parameters
    ----------
    version
        Format version.
    cluster
        Id of the cluster, 16 bytes.
    epoch
        Of the writer.
    seq
        Number of the segment in its epoch, from 0.
    nonce
        16 random bytes by which the writer knows its own object.
    first_lsn
        LSN of the first record in it.
    chain
        The chain value before that record.
    """

    version: int = FORMAT_VERSION
    cluster: bytes
    epoch: int
    seq: int
    nonce: bytes
    first_lsn: int
    chain: int

    def __post_init__(self) -> None:
        if len(self.cluster) != 16 or len(self.nonce) != 16:
            raise ValueError("cluster and nonce must have 16 bytes each")


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where reading a segment stopped, and goes on.

    Parameters
    ----------
    header
        Of the segment.
    offset
        Of the next frame, in bytes from the segment's start.
    lsn
        Of the next record.
    chain
        The chain value there.
    frames
        Count of records before.
    sealed
        Whether the footer was read: nothing may follow.
    """

    header: SegmentHeader
    offset: int
    lsn: int
    chain: int
    frames: int
    sealed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentContents:
    """What one call of `read_segment` found.

    Parameters
    ----------
    header
        None as long as the header itself is not there.
    frames
        Records read by this call. Their `end` counts from the segment's start.
    end
        Offset behind the last good frame, the footer included.
    sealed
        Whether the footer was read.
    torn
        Why reading stopped before the end of the data, or None.
    position
        Where the next call or the next segment goes on, or None without a header.
    """

    header: SegmentHeader | None
    frames: tuple[Frame, ...]
    end: int
    sealed: bool
    torn: str | None
    position: Position | None


def encode_header(header: SegmentHeader) -> bytes:
    """Encode the header, `HEADER_BYTES` long."""
    encoded = _PREFIX.pack(MAGIC, header.version, HEADER_BYTES) + _FIELDS.pack(
        header.cluster, header.epoch, header.seq, header.nonce, header.first_lsn, header.chain
    )
    return encoded + _CRC.pack(google_crc32c.value(encoded)) + END_MARK


def decode_header(data: bytes, *, name: str) -> SegmentHeader:
    """Read the header at the start of a segment.

    Parameters
    ----------
    data
        The segment's bytes.
    name
        Of the segment, for errors.

    Raises
    ------
    FrameTorn
        The data ends inside the header, or zeros are left of its end and all that follows.
    JournalCorrupt
        The header is not what was written.
    JournalTooNew
        A newer release wrote the segment.
    """
    if len(data) < HEADER_BYTES:
        raise FrameTorn(0, f"{len(data)} of the {HEADER_BYTES} bytes of the segment's header are there")
    magic, version, length = _PREFIX.unpack_from(data)
    if only_zeros(data, HEADER_BYTES - len(END_MARK)):
        raise FrameTorn(0, "zeros are left of the end of the segment's header, and nothing follows it")
    if magic != MAGIC:
        raise JournalCorrupt(name, 0, "this is no segment of a journal")
    end_of_crc = length - len(END_MARK)
    start_of_crc = end_of_crc - _CRC.size
    if start_of_crc < _PREFIX.size or data[end_of_crc:length] != END_MARK:
        raise JournalCorrupt(name, 0, "the header does not end in its end mark")
    if google_crc32c.value(bytes(data[:start_of_crc])) != _CRC.unpack_from(data, start_of_crc)[0]:
        raise JournalCorrupt(name, 0, "the header does not check")
    # Only now: a flipped bit in the version is corruption, not a newer format.
    if version > FORMAT_VERSION:
        raise JournalTooNew(name, version, FORMAT_VERSION)
    if version < 1:
        raise JournalCorrupt(name, 0, f"segments of version {version} were never written")
    if length != HEADER_BYTES:
        raise JournalCorrupt(name, 0, f"the header says it has {length} bytes, not {HEADER_BYTES}")
    cluster, epoch, seq, nonce, first_lsn, chain = _FIELDS.unpack_from(data, _PREFIX.size)
    return SegmentHeader(
        version=version, cluster=cluster, epoch=epoch, seq=seq, nonce=nonce, first_lsn=first_lsn, chain=chain
    )


def succession_problem(header: SegmentHeader, *, cluster: bytes, epoch: int, seq: int, lsn: int, chain: int) -> str:
    """Say why this header cannot come next in the log.

    Parameters
    ----------
    header
        Of the segment in question.
    cluster
        Id that the store has.
    epoch, seq
        What the segment's name says.
    lsn, chain
        Next LSN and chain value at the end of the segment before it.

    Returns
    -------
    str
        What is wrong; empty when it does come next.
    """
    if header.cluster != cluster:
        return f"it belongs to another cluster, {header.cluster.hex()}, not {cluster.hex()}"
    if (header.epoch, header.seq) != (epoch, seq):
        return f"it was written as segment {header.seq} of epoch {header.epoch}"
    if header.first_lsn != lsn:
        return f"it starts at LSN {header.first_lsn}, but {lsn} comes next"
    if header.chain != chain:
        return "it does not continue the segment before it: the chain values differ"
    return ""


def handover_problem(header: SegmentHeader, successor: SegmentHeader, *, reached: int) -> str:
    """Say why a segment cannot end where its successor begins.

    In a segment with a successor the records before the successor's first LSN count, and nothing else. Whatever
    stands behind that place, torn and damaged frames too, was given up by the writer and is written again.

    Parameters
    ----------
    header, successor
        Of the segment and of the next one in its epoch.
    reached
        The LSN behind the last record of the segment that checks.

    Returns
    -------
    str
        What is wrong; empty when all that counts is there.
    """
    if successor.first_lsn < header.first_lsn:
        return f"the segment begins at LSN {header.first_lsn}, but the next starts at LSN {successor.first_lsn}"
    if successor.first_lsn > reached:
        return f"the segment ends at LSN {reached - 1}, the next begins at {successor.first_lsn}"
    return ""


def encode_footer(*, frames: int, nbytes: int, lsn: int, chain: int) -> bytes:
    """Encode the frame that seals a segment.

    Parameters
    ----------
    frames
        Count of records in the segment.
    nbytes
        Length of the segment so far: header and frames.
    lsn
        Of the next record; the footer uses none up.
    chain
        The chain value after the last record. The footer does not change it: the next segment starts from it too.

    Returns
    -------
    bytes
        To append.
    """
    buffers, _ = seal_frame(FOOTER, [msgpack.packb({"frames": frames, "nbytes": nbytes})], lsn=lsn, chain=chain)
    return b"".join(buffers)


def read_segment(data: bytes, *, name: str, until: int | None = None, after: Position | None = None) -> SegmentContents:
    """Read and check a segment, or what was appended to it.

    Parameters
    ----------
    data
        The segment's bytes, from `after.offset` on where `after` is given.
    name
        Of the segment, for errors.
    until
        Length at which a later epoch sealed it. Bytes behind are ignored; what is before must be whole.
    after
        `position` of an earlier call. None reads from the start.

    Raises
    ------
    JournalCorrupt
        A byte is not what was written, or something is missing that must be there.
    JournalTooNew
        A newer release wrote the segment.
    """
    base = after.offset if after else 0
    contents, fault = scan_segment(data if until is None else data[: max(until - base, 0)], name=name, after=after)
    if fault:
        raise fault
    if until is not None and contents.end != until:
        problem = "is longer than the segment" if base + len(data) < until else "is not the end of a record"
        raise JournalCorrupt(name, contents.end, f"the sealed length of {until} bytes {problem}")
    return contents


def scan_segment(
    data: bytes, *, name: str, after: Position | None = None
) -> tuple[SegmentContents, JournalCorrupt | JournalTooNew | None]:
    """Read up to the first fault and return it instead of raising; else as `read_segment`."""
    base = after.offset if after else 0
    offset = 0
    if after is None:
        unread = SegmentContents(header=None, frames=(), end=0, sealed=False, torn=None, position=None)
        try:
            header = decode_header(data, name=name)
        except FrameTorn as error:
            return replace(unread, torn=error.reason), None
        except (JournalCorrupt, JournalTooNew) as error:
            return unread, error
        offset, lsn, chain, count, sealed = HEADER_BYTES, header.first_lsn, header.chain, 0, False
    else:
        header, lsn, chain, count, sealed = after.header, after.lsn, after.chain, after.frames, after.sealed

    frames: list[Frame] = []
    torn: str | None = None
    fault: JournalCorrupt | JournalTooNew | None = None
    try:
        while offset < len(data):
            raw = _open_unless_sealed(data, offset, lsn=lsn, chain=chain, name=name, sealed=sealed)
            if raw.number == FOOTER:
                _check_footer(raw, offset, frames=count, nbytes=base + offset)
                sealed = True
            else:
                frame = read_record(raw, offset, name=name)
                frames.append(replace(frame, end=base + frame.end) if base else frame)
                count += 1
                lsn, chain = lsn + 1, raw.chain
            offset = raw.end
    except FrameTorn as error:
        torn = error.reason
    except FrameCorrupt as error:
        fault = JournalCorrupt(name, base + error.offset, error.reason)
    except JournalTooNew as error:
        fault = error
    end = base + offset
    position = Position(header=header, offset=end, lsn=lsn, chain=chain, frames=count, sealed=sealed)
    return SegmentContents(
        header=header, frames=tuple(frames), end=end, sealed=sealed, torn=torn, position=position
    ), fault


def _open_unless_sealed(data: bytes, offset: int, *, lsn: int, chain: int, name: str, sealed: bool) -> RawFrame:
    if sealed:
        raise FrameCorrupt(offset, "bytes follow the footer")
    return open_frame(data, offset, lsn=lsn, chain=chain, name=name)


def _check_footer(raw: RawFrame, offset: int, *, frames: int, nbytes: int) -> None:
    try:
        footer = unpack_map(raw.payload)
    except ValueError as error:
        raise FrameCorrupt(offset, f"the footer cannot be read: {error}") from error
    if footer.get("frames") != frames or footer.get("nbytes") != nbytes:
        raise FrameCorrupt(
            offset,
            f"the footer counts {footer.get('frames')} records in {footer.get('nbytes')} bytes, "
            f"but {frames} in {nbytes} bytes are there",
        )
