from __future__ import annotations

import re
import struct
from dataclasses import fields
from pathlib import Path

import google_crc32c
import msgpack
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dask_resilience.errors import JournalTooNew
from dask_resilience.journal import codec, payload
from dask_resilience.journal.codec import FrameCorrupt, FrameTorn, RecordRefused, RecordTooNew, decode_frame
from dask_resilience.journal.records import (
    REGISTRY,
    ClientLeft,
    EpochStarted,
    ErrorsCleared,
    GraphSubmitted,
    KeysReleased,
    KeysWanted,
    Record,
    TaskErred,
)
from tests.strategies import any_record, by_class

SPECIFICATION = Path(__file__).parents[2] / "docs" / "reference" / "journal-format.md"
RELEASED = KeysReleased(client="c", keys=("x", ("y", 0)))


def encode(record, *, lsn=1, chain=0):
    buffers, chain = codec.encode_frame(record, lsn=lsn, chain=chain)
    return b"".join(buffers), chain


def frame_of(number, named, *, version=1, lsn=1, chain=0):
    """A frame by the letter of the specification, without the codec."""
    body = msgpack.packb(named) if isinstance(named, dict) else named
    head = struct.pack("<HHIQ", version, number, len(body), lsn)
    crc = google_crc32c.extend(chain, head + body)
    return head + struct.pack("<II", google_crc32c.value(head), crc) + body + b"\xa5"


def test_every_record_has_a_number_a_strategy_and_a_line_in_the_specification():
    assert set(REGISTRY.values()) == set(by_class)
    # A class with slots is made twice, so by name.
    assert {cls.__name__ for cls in Record.__subclasses__()} == {cls.__name__ for cls in by_class}
    assert 0 not in REGISTRY
    lines = re.findall(r"^\| (\d+) \| `(\w+)` \| (.*) \|$", SPECIFICATION.read_text(), re.MULTILINE)
    assert {int(number): name for number, name, _ in lines} == {n: c.__name__ for n, c in REGISTRY.items()}
    for number, _, columns in lines:
        assert re.findall(r"`(\w+)`", columns) == [field.name for field in fields(REGISTRY[int(number)])]


@given(record=any_record, lsn=st.integers(1, 2**64 - 1), chain=st.integers(0, 2**32 - 1), before=st.binary(max_size=3))
def test_what_was_written_is_read(record, lsn, chain, before):
    data, after = encode(record, lsn=lsn, chain=chain)
    frame = decode_frame(before + data + b"more", len(before), lsn=lsn, chain=chain)
    assert frame.record == record
    assert type(frame.record) is type(record)
    assert (frame.lsn, frame.chain, frame.end) == (lsn, after, len(before + data))


@given(record=any_record)
def test_the_bytes_are_those_of_the_specification(record):
    numbers = {cls: number for number, cls in REGISTRY.items()}
    named = {field.name: getattr(record, field.name) for field in fields(record)}
    assert encode(record)[0] == frame_of(numbers[type(record)], named)


def test_large_raw_data_is_not_copied():
    big, bigger = bytes(5000), bytes(100_000)
    graph = GraphSubmitted(client="c", seq=1, stimulus_id="s", keys=("x",), frames=(b"small", big, bigger), rest=big)
    buffers, _ = codec.encode_frame(graph, lsn=1, chain=0)
    assert [id(each) for each in buffers if len(each) >= 5000] == [id(big), id(bigger), id(big)]
    assert decode_frame(b"".join(buffers), 0, lsn=1, chain=0).record == graph
    # A view is taken over once: its owner may change it before it is written.
    owner = bytearray(bigger)
    viewed = GraphSubmitted(
        client="c", seq=1, stimulus_id="s", keys=(), frames=(memoryview(owner), bytearray(b"a")), rest=memoryview(b"r")
    )
    buffers, _ = codec.encode_frame(viewed, lsn=1, chain=0)
    owner[0] = 1
    assert decode_frame(b"".join(buffers), 0, lsn=1, chain=0).record.frames == (bigger, b"a")


def test_large_records_are_read():
    for count in (15, 16, 2**16):
        frames = tuple(b"%d" % index for index in range(count))
        graph = GraphSubmitted(
            client="c", seq=1, stimulus_id="s", keys=tuple(range(count)), frames=frames, rest=bytes(2 << 20)
        )
        assert decode_frame(encode(graph)[0], 0, lsn=1, chain=0).record == graph
    scattered = KeysReleased(client="c" * (2 << 20), keys=tuple(range(200_000)))
    assert decode_frame(encode(scattered)[0], 0, lsn=1, chain=0).record == scattered


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (KeysReleased(client="c", keys="x"), "keys is str, not tuple"),
        (KeysReleased(client=b"c", keys=["x"]), "client is bytes, not str, keys is list"),
        (KeysReleased(client="c", keys=(2**64,)), "Integer value out of range"),
        (KeysReleased(client="\ud800", keys=()), "surrogates"),
        (KeysReleased(client="c", keys=({1},)), "can not serialize"),
        (TaskErred(key="x", blame=None, error=None), "blame is NoneType"),
        (object(), "it is no record"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(record, problem):
    with pytest.raises(RecordRefused, match=problem):
        codec.encode_frame(record, lsn=1, chain=0)


@pytest.mark.parametrize(
    "make", [lambda keys: ErrorsCleared(keys=keys), lambda keys: TaskErred(key=keys[0], blame="b", error=b"")]
)
def test_the_limit_of_nesting_is_the_same_on_both_sides(make):
    written = 0
    key = "x"
    for _ in range(1030):
        key = (key,)
        try:
            data, _ = encode(make((key,)))
        except RecordRefused:
            break
        written += 1
    else:
        raise AssertionError("there is no limit")
    assert written > 1000
    assert decode_frame(data, 0, lsn=1, chain=0).record


def test_a_record_larger_than_its_length_field_is_refused(monkeypatch):
    monkeypatch.setattr(codec, "_MAX_PAYLOAD_BYTES", 10)
    with pytest.raises(RecordRefused, match="more than one record can hold"):
        codec.encode_frame(RELEASED, lsn=1, chain=0)
    with pytest.raises(struct.error):
        payload._bin_header(1 << 32)


@pytest.mark.parametrize("sealed", [(1, 2, 3), (1, 2, 3, "4"), (1, 2, 3, True)])
def test_a_sealed_end_has_four_numbers(sealed):
    with pytest.raises(ValueError, match="sealed must be"):
        EpochStarted(epoch=1, cluster="c", holder="h", versions={}, sealed=sealed)


def test_frames_are_bytes():
    with pytest.raises(ValueError, match="each of frames"):
        GraphSubmitted(client="c", seq=1, stimulus_id="s", keys=(), frames=(5,), rest=b"")


def test_a_frame_cut_at_any_byte_is_torn():
    data, _ = encode(RELEASED)
    for cut in range(len(data)):
        with pytest.raises(FrameTorn) as torn:
            decode_frame(data[:cut], 0, lsn=1, chain=0)
        assert torn.value.offset == 0
        assert torn.value.reason


@pytest.mark.parametrize("more", [0, 1, 23, 24, 25, 100, 200_000])
def test_a_frame_whose_tail_is_zeros_is_torn(more):
    data, _ = encode(RELEASED)
    for cut in range(len(data)):
        zeroed = data[:cut] + bytes(len(data) - cut + more)
        with pytest.raises(FrameTorn):
            decode_frame(zeroed, 0, lsn=1, chain=0)
        if cut % 9 == 0:
            # Something was written behind it, and that is not how appends tear.
            with pytest.raises(FrameCorrupt):
                decode_frame(zeroed + b"\x01", 0, lsn=1, chain=0)


@pytest.mark.parametrize("record", [RELEASED, ClientLeft(client="")])
@pytest.mark.parametrize("behind", [b"", bytes(100), encode(RELEASED)[0]])
def test_a_flipped_bit_in_a_whole_frame_is_never_taken_for_a_torn_tail(record, behind):
    data, _ = encode(record, chain=7)
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameCorrupt):
            decode_frame(bytes(flipped) + behind, 0, lsn=1, chain=7)


def test_a_frame_out_of_its_place_is_corrupt():
    data, _ = encode(RELEASED, lsn=5, chain=7)
    with pytest.raises(FrameCorrupt, match="LSN 5, but 6 comes next"):
        decode_frame(data, 0, lsn=6, chain=7)
    with pytest.raises(FrameCorrupt, match="LSN 5, but 6"):
        decode_frame(data[:-1], 0, lsn=6, chain=7)
    with pytest.raises(FrameCorrupt, match="what came before it"):
        decode_frame(data, 0, lsn=5, chain=8)


@given(first=any_record, left_out=any_record, record=any_record)
def test_the_chain_finds_a_missing_record_even_when_the_lsn_fits(first, left_out, record):
    _, before = encode(first, lsn=1)
    _, between = encode(left_out, lsn=2, chain=before)
    data, _ = encode(record, lsn=2, chain=between)
    assume(between != before)
    with pytest.raises(FrameCorrupt, match="what came before it"):
        decode_frame(data, 0, lsn=2, chain=before)


def test_newer_versions_and_unknown_types_are_refused():
    with pytest.raises(JournalTooNew) as newer:
        decode_frame(frame_of(4, {}, version=2), 0, lsn=1, chain=0, name="log/a")
    assert (newer.value.segment, newer.value.version, newer.value.supported) == ("log/a", 2, 1)
    with pytest.raises(RecordTooNew, match="at byte 3 has a record of type 999") as unknown:
        decode_frame(b"abc" + frame_of(999, {}), 3, lsn=1, chain=0, name="log/a")
    assert (unknown.value.segment, unknown.value.offset, unknown.value.number) == ("log/a", 3, 999)


def test_a_field_that_came_later_has_its_default_in_older_journals():
    data = frame_of(3, {"client": "c", "seq": 1, "keys": ["x"]})
    assert decode_frame(data, 0, lsn=1, chain=0).record == KeysWanted(client="c", seq=1, keys=("x",), origin="")


def test_unknown_fields_are_ignored():
    data = frame_of(13, {"client": "c", "since": 5, b"raw": {("a", 1): None}})
    assert decode_frame(data, 0, lsn=1, chain=0).record == ClientLeft(client="c")


@pytest.mark.parametrize(
    ("number", "named", "problem"),
    [
        (13, {}, "ClientLeft lacks client"),
        (13, {"client": 5}, "ClientLeft.client is of type int"),
        (1, {"epoch": 1, "cluster": "", "holder": "", "versions": {}, "sealed": [1]}, "sealed must be"),
        (13, msgpack.packb(["client"]), "not a map"),
        (13, b"\xc1", "not MessagePack"),
        (13, b"", "not MessagePack"),
        (13, b"\x81\x80\x01", "not MessagePack: unhashable"),
        (13, msgpack.packb({"client": "c"}) + b"\x00", "not MessagePack"),
        (0, {}, "the footer"),
    ],
)
def test_a_payload_that_is_not_its_record_is_corrupt(number, named, problem):
    with pytest.raises(FrameCorrupt, match=problem):
        decode_frame(frame_of(number, named), 0, lsn=1, chain=0)


def test_frames_of_version_zero_are_corrupt():
    with pytest.raises(FrameCorrupt, match="version 0"):
        decode_frame(frame_of(13, {"client": ""}, version=0), 0, lsn=1, chain=0)
