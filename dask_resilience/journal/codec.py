"""From a record to a frame and back.

A frame is a head of 24 bytes, the payload, and an end mark; see ``docs/reference/journal-format.md``. Its CRC extends
the CRC of the frame before it, so each frame vouches for the whole log up to it.

Reading tells a *torn* frame, which a crash during an append explains, from a *corrupt* one, which nothing explains.
The head's own check makes the length trustworthy, so "the data ends inside this frame" is a fact and not a flipped
bit of the length. The end mark is never zero, so a frame of which zeros are left was not written whole.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import google_crc32c

from dask_resilience.errors import JournalTooNew, ResilienceError
from dask_resilience.journal.payload import from_payload, to_payload
from dask_resilience.journal.records import REGISTRY, Record

#: Version of the format that is written, and the newest that is read.
FORMAT_VERSION: Final = 1
#: Type number of the frame that seals a segment. No record has it.
FOOTER: Final = 0
#: Last byte of each frame and each segment header. Four bits from zero, so no flip makes one of the other.
END_MARK: Final = b"\xa5"
#: Bytes before the payload.
FRAME_HEAD_BYTES: Final = 24

_MAX_PAYLOAD_BYTES: Final = 0xFFFF_FFFF
_HEAD: Final = struct.Struct("<HHIQ")
_CHECKS: Final = struct.Struct("<II")
_NUMBERS: Final = {cls: number for number, cls in REGISTRY.items()}
_ZEROS: Final = bytes(1 << 16)


class FrameTorn(ResilienceError):
    """The data ends inside this frame, or zeros are left of its end: what a crash during an append leaves.

    Parameters
    ----------
    offset
        Where the frame starts.
    reason
        What is missing.
    """

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"torn at byte {offset}: {reason}")
        self.offset = offset
        self.reason = reason


class FrameCorrupt(ResilienceError):
    """The frame is not what was written, and no crash explains it.

    Parameters
    ----------
    offset
        Where the frame starts.
    reason
        What is wrong.
    """

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"corrupt at byte {offset}: {reason}")
        self.offset = offset
        self.reason = reason


class RecordRefused(ResilienceError, ValueError):
    """A record cannot be journalled; nothing was written.

    Parameters
    ----------
    record
        Name of its class.
    problem
        Why.
    """

    def __init__(self, record: str, problem: str) -> None:
        super().__init__(f"{record} cannot be journalled: {problem}")
        self.record = record
        self.problem = problem


class RecordTooNew(JournalTooNew):
    """A frame has a type that this release does not know; reading on could lose what it says.

    Parameters
    ----------
    segment
        Name of the object.
    offset
        Where the frame starts.
    number
        The type.
    """

    def __init__(self, segment: str, offset: int, number: int) -> None:
        super().__init__(segment, FORMAT_VERSION, FORMAT_VERSION)
        self.offset = offset
        self.number = number
        message = (
            f"{segment} at byte {offset} has a record of type {number}, which this release does not know. "
            "Install a newer dask-resilience, or use another store."
        )
        self.args = (message,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A frame that was read and checked.

    Parameters
    ----------
    record
        What it holds.
    lsn
        Its place in the log.
    chain
        The chain value after it.
    end
        Offset of the byte behind it.
    """

    record: Record
    lsn: int
    chain: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RawFrame:
    """A frame that was checked but whose payload was not read; fields as in `Frame`."""

    number: int
    payload: bytes
    lsn: int
    chain: int
    end: int


def encode_frame(record: Record, *, lsn: int, chain: int) -> tuple[list[bytes], int]:
    """Encode a record as the frame that follows `chain`.

    Parameters
    ----------
    record
        What to write.
    lsn
        Its LSN: one more than that of the record before it.
    chain
        The chain value after the frame before it.

    Returns
    -------
    buffers : list of bytes
        The frame, to be written one after the other. Large raw data is among them as it came, not copied.
    chain : int
        The chain value after this frame.

    Raises
    ------
    RecordRefused
        A field has the wrong type, holds what the format cannot express, or the record is larger than 4 GiB.

    Examples
    --------
    >>> from dask_resilience.journal.records import ClientLeft
    >>> buffers, chain = encode_frame(ClientLeft(client="c"), lsn=1, chain=0)
    >>> decode_frame(b"".join(buffers), 0, lsn=1, chain=0).record
    ClientLeft(client='c')
    """
    try:
        number = _NUMBERS[type(record)]
        pieces = to_payload(record)
    except KeyError:
        raise RecordRefused(type(record).__name__, "it is no record of the journal") from None
    except (TypeError, ValueError, OverflowError, struct.error) as error:
        raise RecordRefused(type(record).__name__, str(error)) from error
    return seal_frame(number, pieces, lsn=lsn, chain=chain)


def seal_frame(number: int, pieces: list[bytes], *, lsn: int, chain: int) -> tuple[list[bytes], int]:
    """Put head and end mark around a payload given in pieces; else as `encode_frame`."""
    length = sum(map(len, pieces))
    if length > _MAX_PAYLOAD_BYTES:
        raise RecordRefused(REGISTRY[number].__name__, f"{length} bytes are more than one record can hold (4 GiB)")
    head = _HEAD.pack(FORMAT_VERSION, number, length, lsn)
    chain = google_crc32c.extend(chain, head)
    for piece in pieces:
        chain = google_crc32c.extend(chain, piece)
    head += _CHECKS.pack(google_crc32c.value(head), chain)
    if len(pieces) == 1:
        return [head + pieces[0] + END_MARK], chain
    # The first piece is small: it ends where the first large one begins.
    return [head + pieces[0], *pieces[1:], END_MARK], chain


def decode_frame(data: bytes, offset: int, *, lsn: int, chain: int, name: str = "the journal") -> Frame:
    """Read the record at `offset`.

    Parameters
    ----------
    data
        Bytes up to the end of what was written.
    offset
        Where the frame starts in `data`.
    lsn
        The LSN that it must have.
    chain
        The chain value after the frame before it.
    name
        Of the segment, for errors.

    Raises
    ------
    FrameTorn
        The data ends inside the frame, or zeros are left of its end and all that follows.
    FrameCorrupt
        The frame is not what was written.
    JournalTooNew
        A newer release wrote it.
    """
    raw = open_frame(data, offset, lsn=lsn, chain=chain, name=name)
    if raw.number == FOOTER:
        raise FrameCorrupt(offset, "the footer of the segment is here, where a record was expected")
    return read_record(raw, offset, name=name)


def read_record(raw: RawFrame, offset: int, *, name: str) -> Frame:
    """Read the payload of a checked frame that is not a footer; else as `decode_frame`."""
    if raw.number not in REGISTRY:
        raise RecordTooNew(name, offset, raw.number)
    try:
        record = from_payload(raw.number, raw.payload)
    except ValueError as error:
        raise FrameCorrupt(offset, str(error)) from error
    return Frame(record=record, lsn=raw.lsn, chain=raw.chain, end=raw.end)


def open_frame(data: bytes, offset: int, *, lsn: int, chain: int, name: str) -> RawFrame:
    """Check the frame at `offset` without reading its payload; else as `decode_frame`."""
    payload_start = offset + FRAME_HEAD_BYTES
    if len(data) < payload_start:
        raise FrameTorn(offset, f"{len(data) - offset} of the {FRAME_HEAD_BYTES} bytes of a frame's head are there")
    head = bytes(data[offset : offset + _HEAD.size])
    version, number, length, found_lsn = _HEAD.unpack(head)
    head_check, crc = _CHECKS.unpack_from(data, offset + _HEAD.size)
    if google_crc32c.value(head) != head_check:
        if only_zeros(data, payload_start):
            raise FrameTorn(offset, "the head of a frame does not check and nothing follows it")
        raise FrameCorrupt(offset, "the head of the frame does not check")
    if version > FORMAT_VERSION:
        raise JournalTooNew(name, version, FORMAT_VERSION)
    if version < 1:
        raise FrameCorrupt(offset, f"frames of version {version} were never written")
    if found_lsn != lsn:
        raise FrameCorrupt(offset, f"the record has LSN {found_lsn}, but {lsn} comes next")
    mark = payload_start + length
    if len(data) <= mark:
        raise FrameTorn(offset, f"{len(data) - offset} of the {mark + 1 - offset} bytes of a frame are there")
    if data[mark : mark + 1] != END_MARK:
        if only_zeros(data, mark):
            raise FrameTorn(offset, "zeros are left of the end of a frame, and nothing follows it")
        raise FrameCorrupt(offset, "the frame does not end in its end mark")
    payload = bytes(data[payload_start:mark])
    found = google_crc32c.extend(google_crc32c.extend(chain, head), payload)
    if found != crc:
        raise FrameCorrupt(offset, "the record, or what came before it, is not what was written")
    return RawFrame(number=number, payload=payload, lsn=lsn, chain=found, end=mark + 1)


def only_zeros(data: bytes, start: int) -> bool:
    """Whether nothing but zeros, or nothing at all, is left from `start` on."""
    for offset in range(start, len(data), len(_ZEROS)):
        rest = data[offset : offset + len(_ZEROS)]
        if rest != _ZEROS[: len(rest)]:
            return False
    return True
