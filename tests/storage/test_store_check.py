"""What `check_store` tells beside flipped bits."""

from __future__ import annotations

import json

import pytest

from dask_resilience.journal.checked_json import encode_checked
from dask_resilience.storage import names, open_store
from dask_resilience.storage.cluster_object import read_cluster
from dask_resilience.storage.leadership import leader
from dask_resilience.storage.memory_backend import _SHELVES
from dask_resilience.storage.store_check import check_store
from tests.storage.acting import Ruler

OTHER = "00000000-0000-0000-0000-000000000007"


@pytest.fixture
def opened(store):
    opened = open_store(str(store))
    Ruler(opened).settled().leadership.publish("tcp://a:1")
    yield opened
    opened.close()


def replace(store, name, data):
    store.compare_and_swap(name, data, store.get(name).token)


def only(store):
    (finding,) = check_store(store).findings
    return finding.level, finding.name, finding.problem


def fields(store, name):
    known = json.loads(store.get(name).data)
    return {field: value for field, value in known.items() if field not in ("version", "crc32c")}


@pytest.mark.parametrize("name", [names.CLUSTER, names.LEASE, names.LEADER, names.manifest(1)])
def test_an_object_of_version_1_is_read_and_noted(opened, name):
    before = read_cluster(opened), leader(opened)
    replace(opened, name, json.dumps({"version": 1, **fields(opened, name)}).encode())
    assert (read_cluster(opened), leader(opened)) == before
    level, told, problem = only(opened)
    assert (level, told) == ("note", name)
    assert "without a checksum" in problem


@pytest.mark.parametrize(
    ("name", "field"), [(names.LEASE, "cluster"), (names.LEADER, "cluster_id"), (names.manifest(1), "cluster")]
)
def test_an_object_of_another_cluster_is_damage(opened, name, field):
    replace(opened, name, encode_checked({**fields(opened, name), field: OTHER}))
    level, told, problem = only(opened)
    assert (level, told) == ("damage", name)
    assert OTHER in problem


def test_a_manifest_under_the_name_of_another_is_damage(opened):
    opened.create(names.manifest(2), opened.get(names.manifest(1)).data)
    assert only(opened) == (
        "damage",
        names.manifest(2),
        "it is not what was written: its name is that of another epoch",
    )


def test_an_object_of_a_newer_release_is_damage(opened):
    replace(opened, names.LEADER, b'{"version": 3}')
    assert "install a newer release" in only(opened)[2]


def test_a_segment_without_one_of_its_parts_is_told_with_its_cause():
    store = open_store("memory://store-check")
    ruler = Ruler(store).settled()
    for _ in range(2):
        ruler.append().settled()
    shelf = _SHELVES["store-check"].objects
    del shelf[min(key for key in shelf if key.startswith(names.PARTS))]
    level, name, problem = only(store)
    assert (level, name) == ("damage", names.segment(1, 0))
    assert "part 1 is missing" in problem
    store.close()
