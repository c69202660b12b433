from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_resilience.journal.records import ClientLeft, EpochStarted
from dask_resilience.journal.segment import HEADER_BYTES
from dask_resilience.journal.verify import Finding, verify_store
from tests.journal.stores import RECORDS, Writer, flip, name, small_store
from tests.journal.test_codec import frame_of
from tests.strategies import any_record

FIXTURES = Path(__file__).parents[1] / "fixtures" / "journal-v1"
FIRST, SECOND, NEWER = name(1, 0), name(1, 1), name(4, 0)
STORE = small_store().segments


def verify(segments, **arguments):
    return verify_store(segments.items() if isinstance(segments, dict) else segments, **arguments)


def told(report):
    return [(finding.level, finding.name, finding.offset) for finding in report.findings]


def only(report):
    (finding,) = report.findings
    return finding


def test_a_sound_store():
    report = verify(STORE)
    assert report.findings == ()
    assert not report.damaged
    assert (report.segments, report.records, report.epochs, report.last_lsn) == (3, 6, 2, 6)
    assert verify(list(STORE.items())[::-1]) == report


def test_an_empty_store():
    report = verify({})
    assert (report.findings, report.segments, report.records, report.epochs, report.last_lsn) == ((), 0, 0, 0, None)


def test_the_fixture_of_version_1():
    stored = {path.name.replace("_", "/"): path.read_bytes() for path in FIXTURES.glob("log_*")}
    report = verify(stored)
    assert report.findings == ()
    assert (report.records, report.last_lsn) == (6, 6)


@given(
    epochs=st.lists(
        st.tuples(st.integers(1, 3), st.lists(st.none() | any_record.filter(lambda r: type(r) is not EpochStarted))),
        max_size=3,
    ),
    seal=st.booleans(),
)
def test_what_a_writer_writes_is_sound(epochs, seal):
    writer, epoch, sealed = Writer(), 0, None
    for step, records in epochs:
        epoch += step
        writer.start(epoch, sealed)
        for record in records:
            if record is None:
                writer.roll()
            else:
                writer.append(record)
        if seal:
            writer.seal()
        sealed = writer.sealed_end
    report = verify(writer.segments)
    assert report.findings == ()
    assert report.records == writer.lsn - 1
    assert report.last_lsn == (writer.lsn - 1 or None)


def test_every_flipped_bit_of_a_sealed_store_is_found():
    footer = len(STORE[FIRST]) - len(small_footer())
    for each, data in STORE.items():
        for bit in range(len(data) * 8):
            report = verify(STORE | {each: flip(data, bit)})
            assert report.findings, (each, bit)
            # The footer of a segment that has a successor holds nothing that a recovery needs.
            assert report.damaged or (each == FIRST and bit // 8 >= footer), (each, bit)


def small_footer():
    writer = Writer()
    writer.start(1, None)
    writer.append(RECORDS[0])
    before = len(writer.segments[writer.name])
    writer.seal()
    return writer.segments[writer.name][before:]


def test_every_flipped_bit_of_an_open_store_is_damage():
    data = small_store(sealed=False).segments
    for bit in range(len(data[NEWER]) * 8):
        assert verify(data | {NEWER: flip(data[NEWER], bit)}).damaged, bit


@pytest.mark.parametrize("tail", [b"", bytes(1), bytes(1000)])
def test_a_torn_tail_is_a_note_in_the_newest_epoch_only(tail):
    writer = small_store(sealed=False)
    store = writer.segments
    whole = {offset for each, offset, _, _ in writer.places if each == NEWER} | {len(store[NEWER])}
    for cut in range(HEADER_BYTES, len(store[NEWER])):
        report = verify(store | {NEWER: store[NEWER][:cut] + tail})
        expected = [] if cut in whole and not tail else [("note", NEWER, max(end for end in whole if end <= cut))]
        assert told(report) == expected
    for each in (FIRST, SECOND):
        for cut in range(len(store[each])):
            report = verify(store | {each: store[each][:cut] + tail})
            assert report.findings
            assert report.damaged or (each == FIRST and cut >= len(store[FIRST]) - len(small_footer()))


def test_a_torn_header_is_damage():
    # A segment appears under its name when its header is whole.
    for cut in (0, 20, HEADER_BYTES - 1):
        assert told(verify(STORE | {NEWER: STORE[NEWER][:cut]})) == [("damage", NEWER, 0)]


def test_an_epoch_that_was_torn_before_its_first_record_holds_nothing():
    writer = small_store()
    first = writer.places[3][1]
    for cut in (HEADER_BYTES, first + 1):
        report = verify(STORE | {NEWER: STORE[NEWER][:cut]})
        assert not report.damaged
        assert (report.records, report.last_lsn) == (3, 3)
    # The log ends in the epoch before it, and there a tail may be torn.
    report = verify(STORE | {NEWER: STORE[NEWER][:HEADER_BYTES], SECOND: STORE[SECOND][:-1]})
    assert told(report) == [("note", SECOND, HEADER_BYTES)]
    assert report.last_lsn == 2


def test_an_epoch_sealed_before_its_first_record_holds_nothing():
    writer = small_store(sealed=False)
    lsn, chain = writer.places[3][2:]
    torn = writer.segments | {NEWER: writer.segments[NEWER][:HEADER_BYTES]}
    writer.lsn, writer.chain = lsn, chain
    writer.start(5, (4, 0, HEADER_BYTES, lsn - 1))
    report = verify(torn | {name(5, 0): writer.segments[name(5, 0)]})
    assert report.findings == ()
    assert report.records == 4
    # The same when its writer, fenced by then, wrote that record after all.
    report = verify(writer.segments)
    assert told(report) == [("note", NEWER, HEADER_BYTES)]
    assert report.records == 4


def test_a_missing_segment():
    for missing in (FIRST, SECOND):
        report = verify({each: data for each, data in STORE.items() if each != missing})
        assert told(report) == [("damage", missing, 0)]
        assert "missing" in only(report).problem
    # The newest one leaves no trace but the lost records: only a later epoch could tell.
    assert not verify({each: data for each, data in STORE.items() if each != NEWER}).damaged
    assert told(verify({NEWER: STORE[NEWER]})) == [("damage", SECOND, 0)]


def test_a_long_gap_is_told_once():
    writer = Writer()
    writer.start(1, None)
    writer.seal()
    writer.open(1, 10**18)
    report = verify(writer.segments)
    assert "999999999999999999 segments in a row" in only(report).problem


def test_a_missing_epoch_between():
    writer = small_store()
    writer.start(6, writer.sealed_end)
    store = {each: data for each, data in writer.segments.items() if each != NEWER}
    assert told(verify(store)) == [("damage", NEWER, 0)]


def test_swapped_segments():
    report = verify(STORE | {FIRST: STORE[SECOND], SECOND: STORE[FIRST]})
    assert told(report) == [("damage", FIRST, 0), ("damage", SECOND, 0)]
    assert "was written as segment 1 of epoch 1" in report.findings[0].problem


def test_a_duplicated_segment():
    report = verify([*STORE.items(), (SECOND, STORE[SECOND])])
    assert told(report) == [("damage", SECOND, 0)]
    copied = verify(STORE | {name(4, 1): STORE[SECOND]})
    assert told(copied) == [("damage", name(4, 1), 0)]


def test_swapped_missing_and_repeated_records():
    writer = Writer()
    writer.start(1, None)
    for record in RECORDS:
        writer.append(record)
    data = writer.segments[FIRST]
    at = [*(offset for _, offset, _, _ in writer.places), len(data)]
    frames = [data[start:end] for start, end in pairwise(at)]
    for order in ([0, 2, 1, 3, 4], [0, 2, 3, 4], [0, 1, 1, 2, 3, 4], [1, 2, 3, 4], [0, 1, 2, 4]):
        assert verify({FIRST: data[: at[0]] + b"".join(frames[index] for index in order)}).damaged


def test_foreign_segments():
    foreign = small_store(cluster=b"f" * 16).segments
    report = verify(STORE | {SECOND: foreign[SECOND]})
    assert told(report) == [("damage", SECOND, 0)]
    assert "another cluster" in only(report).problem
    assert verify(STORE, cluster=bytes(range(16))).findings == ()
    assert len(verify(foreign, cluster=bytes(range(16))).findings) == 3


def test_a_segment_of_another_log_of_the_same_cluster():
    other = Writer()
    other.start(1, None)
    other.append(ClientLeft(client="other"))
    other.roll()
    other.append(RECORDS[1])
    report = verify(STORE | {SECOND: other.segments[SECOND]})
    assert ("damage", SECOND, 0) in told(report)
    assert "chain values differ" in report.findings[0].problem
    late = Writer()
    late.lsn = 9
    late.start(1, None)
    assert "starts at LSN 9, but 1 comes next" in only(verify(late.segments)).problem


def test_other_names_are_noted():
    assert told(verify(STORE | {"log/0000000001/.tmp": b""})) == [("note", "log/0000000001/.tmp", 0)]


def test_bytes_behind_a_sealed_end_are_noted_whatever_they_are():
    late = Writer()
    late.lsn, late.chain = 4, 7
    late.start(2, (1, 1, len(STORE[SECOND]), 3))
    for store, where in [
        (STORE | {SECOND: STORE[SECOND] + b"\xffgarbage"}, (SECOND, len(STORE[SECOND]))),
        (STORE | {name(1, 2): b"garbage"}, (name(1, 2), 0)),
        (STORE | {name(2, 0): late.segments[name(2, 0)]}, (name(2, 0), 0)),
        (STORE | {name(3, 5): b""}, (name(3, 5), 0)),
        (STORE | {name(0, 0): b""}, (name(0, 0), 0)),
    ]:
        report = verify(store)
        assert told(report) == [("note", *where)]
        assert "ignored" in only(report).problem
        assert (report.records, report.last_lsn) == (6, 6)


def test_a_sealed_end_that_is_not_there():
    length = len(STORE[SECOND])
    for end, problem in [
        ((1, 1, length - 1, 3), "is not the end of a record"),
        ((1, 1, length + 1, 3), "is longer than the segment"),
        ((1, 1, length, 2), "behind LSN 2, but LSN 3 is here"),
        ((1, 2, length, 3), "missing"),
        ((4, 0, length, 3), "cannot open epoch 4"),
    ]:
        writer = small_store()
        writer.lsn, writer.chain = 4, writer.places[3][3]
        writer.start(4, end)
        report = verify(writer.segments)
        assert report.damaged, end
        assert any(problem in finding.problem for finding in report.findings), report.findings


def test_a_torn_or_damaged_record_before_the_sealed_end_is_told_with_its_cause():
    report = verify(STORE | {SECOND: flip(STORE[SECOND], 8 * HEADER_BYTES + 300)})
    assert only(report).problem == "the record, or what came before it, is not what was written"
    assert "of the" in only(verify(STORE | {SECOND: STORE[SECOND][:-1]})).problem


def given_up(*, behind):
    """An epoch whose writer gave its first segment up, behind two records that count."""
    writer = Writer()
    writer.start(1, None)
    writer.append(RECORDS[0])
    place = len(writer.segments[FIRST])
    writer.append(RECORDS[1])
    writer.back_to(writer.places[-1])
    writer.segments[FIRST] = behind(writer.segments[FIRST], place)
    writer.open(1, 1)
    writer.append(RECORDS[1])
    writer.append(RECORDS[2])
    return writer, place


@pytest.mark.parametrize(
    "behind",
    [
        lambda data, place: data,
        lambda data, place: data[:place],
        lambda data, place: data[:-3],
        lambda data, place: data[:-3] + bytes(30),
        lambda data, place: flip(data, place * 8),
    ],
)
def test_what_a_writer_gave_up_does_not_count(behind):
    writer, place = given_up(behind=behind)
    report = verify(writer.segments)
    assert told(report) == [("note", FIRST, place)]
    assert (report.records, report.last_lsn) == (4, 4)


def test_what_counts_in_a_segment_that_was_given_up_must_be_whole():
    for behind in (lambda data, place: data[: place - 1], lambda data, place: flip(data, place * 8 - 9)):
        writer, _ = given_up(behind=behind)
        assert ("damage", FIRST) in [each[:2] for each in told(verify(writer.segments))]


def test_an_epoch_whose_first_segment_was_given_up_at_once():
    for cut in (HEADER_BYTES, -1, None):
        writer = small_store(sealed=False)
        writer.back_to(writer.places[3])
        writer.segments[NEWER] = writer.segments[NEWER][:cut]
        writer.open(4, 1)
        writer.append(EpochStarted(epoch=4, cluster="c", holder="h", versions={}, sealed=(1, 1, len(STORE[SECOND]), 3)))
        report = verify(writer.segments)
        assert told(report) == [("note", NEWER, HEADER_BYTES)]
        assert report.records == 4


def test_what_was_given_up_first_and_started_again_behind_the_sealed_end():
    # Fenced in between: what the next epoch sealed is the segment that was given up, not the one that followed.
    writer = small_store(sealed=False)
    end = (4, 0, writer.places[4][1], 4)
    chain = writer.places[4][3]
    writer.back_to(writer.places[3])
    writer.open(4, 1)
    writer.append(EpochStarted(epoch=4, cluster="c", holder="again", versions={}, sealed=(1, 1, len(STORE[SECOND]), 3)))
    writer.lsn, writer.chain = 5, chain
    writer.start(6, end)
    report = verify(writer.segments)
    assert {finding.level for finding in report.findings} == {"note"}
    assert {finding.name for finding in report.findings} == {NEWER, name(4, 1)}
    assert (report.records, report.last_lsn) == (5, 5)


def test_a_segment_that_starts_before_the_one_it_follows():
    writer = small_store()
    writer.lsn = 2
    writer.open(4, 1)
    assert "starts at LSN 2" in verify(writer.segments).findings[0].problem


def test_damage_around_a_header_that_cannot_be_read():
    writer = Writer()
    writer.start(1, None)
    writer.roll()
    writer.append(RECORDS[0])
    writer.roll()
    store = writer.segments | {SECOND: b"x" * 100}
    assert told(verify(store)) == [("damage", SECOND, 0)]
    store[FIRST] = flip(store[FIRST], 8 * HEADER_BYTES)
    assert told(verify(store)) == [("damage", FIRST, HEADER_BYTES), ("damage", SECOND, 0)]


def test_an_epoch_is_opened_once_and_first():
    writer = Writer()
    writer.open(1, 0)
    writer.append(RECORDS[0])
    assert "does not begin" in only(verify(writer.segments)).problem

    opening = EpochStarted(epoch=1, cluster="c", holder="h", versions={}, sealed=None)
    for roll in (False, True):
        writer = Writer()
        writer.start(1, None)
        if roll:
            writer.roll()
        writer.append(opening)
        assert "stands inside" in only(verify(writer.segments)).problem

    writer = Writer()
    writer.open(2, 0)
    writer.append(opening)
    assert "cannot open epoch 2" in only(verify(writer.segments)).problem


def test_a_newer_release_is_told():
    writer = small_store(sealed=False)
    newer = frame_of(500, {}, lsn=writer.lsn, chain=writer.chain)
    report = verify(writer.segments | {NEWER: writer.segments[NEWER] + newer})
    assert "Install a newer" in only(report).problem


def test_a_finding_is_one_line():
    finding = Finding(level="note", name=FIRST, offset=5, problem="what")
    assert str(finding) == f"note: {FIRST} at byte 5: what"
