from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_resilience.errors import JournalCorrupt, JournalTooNew
from dask_resilience.journal.codec import FOOTER, FrameTorn, seal_frame
from dask_resilience.journal.records import ClientLeft, EpochStarted
from dask_resilience.journal.segment import (
    HEADER_BYTES,
    MAGIC,
    SegmentHeader,
    decode_header,
    encode_header,
    read_segment,
    scan_segment,
)
from tests.journal.stores import CLUSTER, NONCE, RECORDS, Writer, flip, small_store
from tests.journal.test_codec import frame_of
from tests.strategies import any_record

FIXTURES = Path(__file__).parents[1] / "fixtures" / "journal-v1"
HEADER = SegmentHeader(cluster=CLUSTER, epoch=7, seq=3, nonce=NONCE, first_lsn=5, chain=9)

ids = st.binary(min_size=16, max_size=16)
u64 = st.integers(0, 2**64 - 1)


def header_of(*, version=1, length=HEADER_BYTES, extra=b"", magic=MAGIC):
    """A header by the letter of the specification, without the encoder."""
    body = struct.pack("<8sHH16sQQ16sQI", magic, version, length, CLUSTER, 7, 3, NONCE, 5, 9) + extra
    return body + struct.pack("<I", google_crc32c.value(body)) + b"\xa5"


def open_segment():
    writer = Writer()
    writer.start(1, None)
    for record in RECORDS:
        writer.append(record)
    return writer


def sealed_segment():
    writer = open_segment()
    writer.seal()
    return writer.segments[writer.name]


@given(
    header=st.builds(
        SegmentHeader, cluster=ids, epoch=u64, seq=u64, nonce=ids, first_lsn=u64, chain=st.integers(0, 2**32 - 1)
    )
)
def test_what_was_written_is_read(header):
    assert decode_header(encode_header(header) + b"more", name="log/a") == header


def test_the_header_is_that_of_the_specification():
    assert encode_header(HEADER) == header_of()
    assert len(header_of()) == HEADER_BYTES


def test_ids_have_sixteen_bytes():
    with pytest.raises(ValueError, match="16 bytes each"):
        SegmentHeader(cluster=b"short", epoch=7, seq=3, nonce=NONCE, first_lsn=5, chain=9)


@pytest.mark.parametrize("behind", [b"", bytes(50), b"\x01"])
def test_any_flipped_bit_of_a_header_is_found(behind):
    data = encode_header(HEADER)
    for bit in range(len(data) * 8):
        with pytest.raises(JournalCorrupt):
            decode_header(flip(data, bit) + behind, name="log/a")


def test_a_header_that_is_not_all_there_is_torn():
    data = encode_header(HEADER)
    for cut in range(len(data)):
        with pytest.raises(FrameTorn):
            decode_header(data[:cut], name="log/a")
        with pytest.raises(FrameTorn):
            decode_header(data[:cut] + bytes(300), name="log/a")
        contents = read_segment(data[:cut], name="log/a")
        assert (contents.header, contents.position, contents.end, contents.frames) == (None, None, 0, ())
        assert contents.torn


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (header_of(magic=b"PK\x03\x04aaaa"), "no segment"),
        (header_of(version=0), "version 0"),
        (header_of(length=HEADER_BYTES + 1, extra=b"a"), "78 bytes, not 77"),
        (header_of(length=3), "end mark"),
        (header_of(length=60_000), "end mark"),
    ],
)
def test_a_header_that_nobody_writes_is_corrupt(data, problem):
    with pytest.raises(JournalCorrupt, match=problem):
        decode_header(data, name="log/a")


def test_a_newer_header_is_refused_whatever_it_adds():
    for data in (header_of(version=2), header_of(version=3, length=HEADER_BYTES + 5, extra=b"later")):
        with pytest.raises(JournalTooNew, match=r"log/a has journal format [23], this release reads up to 1"):
            read_segment(data, name="log/a")


def test_a_sealed_segment_is_read():
    data = sealed_segment()
    contents = read_segment(data, name="log/a")
    assert [frame.record for frame in contents.frames][1:] == list(RECORDS)
    assert [frame.lsn for frame in contents.frames] == [1, 2, 3, 4, 5]
    assert (contents.end, contents.sealed, contents.torn) == (len(data), True, None)


@given(records=st.lists(any_record, max_size=6), cuts=st.lists(st.integers(0, 10_000), max_size=4), seal=st.booleans())
def test_reading_goes_on_where_it_stopped(records, cuts, seal):
    writer = Writer()
    writer.open(1, 0)
    for record in records:
        writer.append(record)
    if seal:
        writer.seal()
    data = writer.segments[writer.name]
    whole = read_segment(data, name="log/a")
    frames, position = [], None
    for cut in [*sorted(cuts), len(data)]:
        contents = read_segment(data[position.offset if position else 0 : cut], name="log/a", after=position)
        frames += contents.frames
        position = contents.position
    assert tuple(frames) == whole.frames
    assert position == whole.position
    assert contents.sealed == whole.sealed == seal
    assert read_segment(b"", name="log/a", after=position).sealed == seal


def test_a_segment_cut_at_any_byte_ends_behind_its_last_whole_record():
    writer = open_segment()
    data = writer.segments[writer.name]
    ends = [*(offset for _, offset, _, _ in writer.places), len(data)]
    for cut in range(HEADER_BYTES, len(data)):
        contents = read_segment(data[:cut], name="log/a")
        assert contents.end == max(end for end in ends if end <= cut)
        assert (contents.torn is None) == (cut in ends)
        zeroed = read_segment(data[:cut] + bytes(700), name="log/a")
        # A record that ends in zeros was whole only with its end mark.
        assert zeroed.end == contents.end
        assert zeroed.torn
        with pytest.raises(JournalCorrupt, match="sealed length"):
            read_segment(data[:cut], name="log/a", until=len(data))


def test_bytes_behind_the_sealed_end_are_ignored():
    writer = open_segment()
    data = writer.segments[writer.name]
    _, until, lsn, _ = writer.places[3]
    for rest in (data[until:], b"\xff" * 9, b""):
        contents = read_segment(data[:until] + rest, name="log/a", until=until)
        assert (contents.end, contents.position.lsn, contents.torn) == (until, lsn, None)
    with pytest.raises(JournalCorrupt, match="is not the end of a record"):
        read_segment(data, name="log/a", until=until - 1)
    with pytest.raises(JournalCorrupt, match="is longer than the segment"):
        read_segment(data, name="log/a", until=len(data) + 1)
    half = read_segment(data[: until - 1], name="log/a").position
    assert read_segment(data[half.offset :], name="log/a", until=until, after=half).end == until


def test_a_flipped_bit_is_found_where_it_is():
    data = sealed_segment()
    ends = [offset for _, offset, _, _ in open_segment().places]
    for bit in range(0, len(data) * 8, 5):
        with pytest.raises(JournalCorrupt) as corrupt:
            read_segment(flip(data, bit), name="log/a")
        start = max([end for end in ends if end <= bit // 8], default=0)
        assert corrupt.value.offset in (start, read_segment(data, name="log/a").frames[-1].end)


def test_a_fault_is_at_its_place_in_the_segment_also_when_reading_goes_on():
    writer = open_segment()
    data = writer.segments[writer.name]
    _, offset, _, _ = writer.places[3]
    position = read_segment(data[: offset - 1], name="log/a").position
    contents, fault = scan_segment(flip(data, offset * 8 + 40)[position.offset :], name="log/a", after=position)
    assert fault.offset == contents.end == offset
    assert [frame.lsn for frame in contents.frames] == [3]


def test_nothing_follows_a_footer():
    data = sealed_segment()
    for more in (b"\x00", frame_of(13, {"client": "c"}, lsn=6)):
        with pytest.raises(JournalCorrupt, match="bytes follow the footer"):
            read_segment(data + more, name="log/a")
        with pytest.raises(JournalCorrupt, match="bytes follow the footer"):
            read_segment(more, name="log/a", after=read_segment(data, name="log/a").position)


@pytest.mark.parametrize(
    ("footer", "problem"),
    [
        (b"\x90", "the footer cannot be read"),
        (b"\x80", "counts None records"),
        (b"\x82\xa6frames\x05\xa6nbytes\x01", "counts 5 records in 1 bytes"),
    ],
)
def test_a_footer_that_does_not_fit_is_corrupt(footer, problem):
    writer = open_segment()
    data = writer.segments[writer.name]
    buffers, _ = seal_frame(FOOTER, [footer], lsn=writer.lsn, chain=writer.chain)
    with pytest.raises(JournalCorrupt, match=problem):
        read_segment(data + b"".join(buffers), name="log/a")


def test_a_record_from_a_newer_release_is_refused_and_what_came_before_is_told():
    writer = open_segment()
    data = writer.segments[writer.name]
    data += frame_of(500, {}, lsn=writer.lsn, chain=writer.chain)
    with pytest.raises(JournalTooNew, match="type 500"):
        read_segment(data, name="log/a")
    contents, fault = scan_segment(data, name="log/a")
    assert isinstance(fault, JournalTooNew)
    assert len(contents.frames) == 5


def write_fixture(folder):
    """Write a small store, as was once done for the fixture of version 1."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in small_store().segments.items():
        (folder / name.replace("/", "_")).write_bytes(data)


def read_fixture(folder):
    stored = [path.read_bytes() for path in sorted(folder.glob("log_*"))]
    return [frame.record for data in stored for frame in read_segment(data, name="log/a").frames]


def test_version_1_is_read_for_ever(tmp_path):
    write_fixture(tmp_path)
    # Today's bytes may hold fields that came later; what they say is the same.
    assert read_fixture(FIXTURES) == read_fixture(tmp_path)
    assert [record for record in read_fixture(FIXTURES) if not isinstance(record, EpochStarted)] == [
        RECORDS[0],
        RECORDS[1],
        RECORDS[3],
        RECORDS[2],
    ]


def test_the_fixture_of_version_1_never_changes():
    # Stores of that version do not either: write a new fixture beside it instead.
    digest = hashlib.sha256()
    for path in sorted(FIXTURES.glob("log_*")):
        digest.update(path.read_bytes())
    assert digest.hexdigest() == "2a036a98e4f5358bfd888fa1520abd019240c26ef733771a24951ed755409f70"


def test_a_header_alone_is_an_empty_segment():
    contents = read_segment(encode_header(HEADER), name="log/a")
    assert (contents.header, contents.frames, contents.torn, contents.sealed) == (HEADER, (), None, False)
    assert contents.position.lsn == HEADER.first_lsn
    buffers = frame_of(13, {"client": "c"}, lsn=5, chain=9)
    assert read_segment(buffers, name="log/a", after=contents.position).frames[0].record == ClientLeft(client="c")
