"""One flipped bit, wherever it is in a store, is damage to `check_store`."""

from __future__ import annotations

import uuid
from itertools import pairwise

import pytest

from dask_resilience.journal.segment import scan_segment
from dask_resilience.storage import memory_backend, names, open_store
from dask_resilience.storage.store_check import check_store
from tests.journal.stores import flip
from tests.storage.acting import Ruler, dead, snapshot_at

#: What a store holds.
KINDS = {names.CLUSTER, names.LEASE, names.LEADER, "manifest", "log", "snapshot/", "snapshot-data"}


class Files:
    """The bytes of a local store."""

    step = 1

    def __init__(self, folder):
        self.store = open_store(str(folder))
        self.folder = folder

    def names(self):
        return self.store.list("")

    def read(self, name):
        return (self.folder / name).read_bytes()

    def write(self, name, data):
        (self.folder / name).write_bytes(data)


class Keys:
    """The bytes of a store in memory: heads and parts each by itself, as in a bucket."""

    #: Every third bit, which hits each byte twice or more.
    step = 3

    def __init__(self, folder):
        name = uuid.uuid4().hex
        self.store = open_store(f"memory://{name}")
        self.objects = memory_backend._SHELVES[name].objects

    def names(self):
        return list(self.objects)

    def read(self, name):
        return self.objects[name].data

    def write(self, name, data):
        found = self.objects[name]
        self.objects[name] = type(found)(data=data, token=found.token, write_id=found.write_id)


@pytest.fixture(params=[Files, pytest.param(Keys, marks=pytest.mark.long)], ids=["local", "memory"])
def place(request, store):
    """Two epochs: the first rolled once, and both were published; the last segment is open. And a snapshot."""
    made = request.param(store)
    first = Ruler(made.store, holder=dead(), segment_bytes=150)
    first.leadership.publish("tcp://a:1")
    first.append(2).settled()
    first.append(1).settled()
    assert first.writer.close()
    second = Ruler(made.store)
    second.leadership.publish("tcp://a:2")
    second.append(2).settled()
    snapshot_at(made.store, 1)
    yield made
    made.store.close()


def inner_footers(place):
    """From where on each object holds the footer of a segment that has a successor.

    Behind the last record that counts anything may stand, since a writer whose sync failed leaves its segment as it
    is. A footer that does not check is a note there, and nothing is lost with it.
    """
    found = {}
    segments = place.store.list(names.LOG)
    for name, successor in pairwise(segments):
        if names.epoch_and_seq_of_segment(name)[0] != names.epoch_and_seq_of_segment(successor)[0]:
            continue
        data = place.store.get(name).data
        contents, fault = scan_segment(data, name=name)
        assert fault is None
        assert contents.sealed
        footer = data[contents.frames[-1].end :]
        (holder,) = (each for each in place.names() if name in each and place.read(each).endswith(footer))
        found[holder] = len(place.read(holder)) - len(footer)
    assert found
    return found


def test_every_flipped_bit_is_found(place):
    assert check_store(place.store).findings == ()
    footers = inner_footers(place)
    found = place.names()
    kinds = {next(kind for kind in KINDS if name.removeprefix(names.PARTS).startswith(kind)) for name in found}
    assert kinds == KINDS
    missed = []
    for name in found:
        data = place.read(name)
        for bit in range(0, 8 * len(data), place.step):
            place.write(name, flip(data, bit))
            report = check_store(place.store)
            told = report.damaged or (report.findings and bit // 8 >= footers.get(name, len(data)))
            if not told:
                missed.append(f"bit {bit % 8} of byte {bit // 8} of {name}: {report.findings}")
        place.write(name, data)
    assert missed == []
    assert check_store(place.store).findings == ()
