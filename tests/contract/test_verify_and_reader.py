"""`verify` calls damage exactly what the scheduler's own reader refuses, and both count the same records."""

from __future__ import annotations

import tempfile
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_resilience.errors import JournalCorrupt, JournalTooNew
from dask_resilience.journal.segment import HEADER_BYTES
from dask_resilience.journal.verify import verify_store
from dask_resilience.storage import names, open_store
from dask_resilience.storage.cluster_object import Cluster, _encode
from dask_resilience.storage.journal_reader import JournalReader
from tests.journal.stores import CLUSTER, RECORDS, Writer, flip, name


def journal(*, again=False, second_epoch=False):
    """Three segments of one epoch, of which the second is given up behind one record; at will more."""
    writer = Writer()
    writer.start(1, None)
    for record in RECORDS:
        writer.append(record)
    writer.roll()
    writer.append(RECORDS[0])
    writer.append(RECORDS[1])
    writer.back_to(writer.places[-1])
    writer.open(1, writer.seq + 1)
    if again:
        # The same place is given up once more, without a record.
        writer.open(1, writer.seq + 1)
    writer.append(RECORDS[1])
    writer.append(RECORDS[2])
    if second_epoch:
        writer.start(3, writer.sealed_end)
        writer.append(RECORDS[3])
    return writer.segments


SHAPES = [
    {},
    {"again": True},
    {"second_epoch": True},
    {"again": True, "second_epoch": True},
]


def read(segments):
    """What the reader of a scheduler that starts makes of it: the count of records, or None if it refuses."""
    with tempfile.TemporaryDirectory() as directory:
        store = open_store(directory)
        store.create(names.CLUSTER, _encode(Cluster(cluster_id=str(uuid.UUID(bytes=CLUSTER)), name=None)))
        for each, data in segments.items():
            path = Path(directory) / each
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        try:
            return len(list(JournalReader(store).read()))
        except (JournalCorrupt, JournalTooNew):
            return None


def agree(segments):
    report = verify_store(segments.items(), cluster=CLUSTER)
    count = read(segments)
    assert report.damaged == (count is None), (count, report.findings)
    if count is not None:
        assert report.records == count


@pytest.mark.parametrize("shape", SHAPES)
def test_on_what_a_writer_leaves_behind(shape):
    segments = journal(**shape)
    agree(segments)
    assert read(segments) == 8 + 2 * ("second_epoch" in shape)


@st.composite
def broken(draw):
    """A journal in which one segment was cut, changed, extended or lost."""
    segments = journal(**draw(st.sampled_from(SHAPES)))
    victim = draw(st.sampled_from(sorted(segments)))
    data = segments[victim]
    how = draw(st.sampled_from(["cut", "cut, zeros", "flip", "zeros", "junk", "lost", "early"]))
    # A segment never appears without its header.
    place = draw(st.integers(HEADER_BYTES, len(data)))
    if how == "cut":
        segments[victim] = data[:place]
    elif how == "cut, zeros":
        segments[victim] = data[:place] + bytes(len(data) - place)
    elif how == "flip":
        segments[victim] = flip(data, draw(st.integers(0, 8 * len(data) - 1)))
    elif how == "zeros":
        segments[victim] = data + bytes(draw(st.integers(1, 40)))
    elif how == "junk":
        segments[victim] = data + draw(st.binary(min_size=1, max_size=40))
    elif how == "lost":
        del segments[victim]
    else:
        # A successor that goes back behind the beginning of the segment before it: no writer does that.
        last = max(seq for each in segments for seq in [int(each[-20:])] if each.startswith(names.segments(1)))
        writer = Writer()
        writer.start(1, None)
        writer.append(RECORDS[0])
        writer.open(1, last + 1)
        writer.append(RECORDS[1])
        segments[name(1, last + 1)] = writer.segments[name(1, last + 1)]
    return segments


@given(broken())
@settings(max_examples=200)
def test_on_whatever_happens_to_a_segment(segments):
    agree(segments)
