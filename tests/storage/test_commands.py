"""``dask resilience`` on a store in each kind of place, and on one that is damaged there."""

from __future__ import annotations

import json
import uuid

import dask
import pytest
from click.testing import CliRunner

from dask_resilience.cli import resilience
from dask_resilience.storage import names, open_store
from tests.storage.acting import Ruler, dead
from tests.storage.servers import new_place


@pytest.fixture(params=["local", "memory", "moto", "seaweedfs", "fake_gcs"])
def place(request, store):
    """The URL of a store with two epochs and five records, reached as the configuration says."""
    options = {}
    if request.param == "local":
        url = str(store)
    elif request.param == "memory":
        url = f"memory://{uuid.uuid4().hex}/a"
    else:
        server = request.getfixturevalue(request.param)
        url, options = new_place(server), server.options()
    opened = open_store(url, storage_options=options)
    first = Ruler(opened, holder=dead()).append(2).settled()
    first.leadership.publish("tcp://a:1")
    assert first.writer.close()
    second = Ruler(opened).append(1).settled()
    assert second.writer.close()
    with dask.config.set({"resilience.storage-options": options}):
        yield url
    opened.close()


def run(*arguments):
    return CliRunner().invoke(resilience, arguments)


def test_verify_and_inspect(place):
    done = run("verify", place, "-o", "json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["sound"], told["findings"], told["epochs"], told["records"]) == (True, [], 2, 5)
    done = run("inspect", place)
    assert done.exit_code == 0, done.output
    assert [line.split()[3] for line in done.stdout.splitlines()] == [
        "EpochStarted",
        "ClientLeft",
        "ClientLeft",
        "EpochStarted",
        "ClientLeft",
    ]


def test_what_is_damaged_there_is_told(place):
    opened = open_store(place, existing=True, storage_options=dask.config.get("resilience.storage-options"))
    found = opened.get(names.LEADER)
    opened.compare_and_swap(names.LEADER, found.data.replace(b"tcp", b"tcq"), found.token)
    opened.close()
    done = run("verify", place, "-o", "json")
    assert done.exit_code == 1
    (finding,) = json.loads(done.stdout)["findings"]
    assert (finding["level"], finding["name"]) == ("damage", names.LEADER)


def test_a_place_without_a_journal(place):
    done = run("verify", f"{place}/nothing")
    assert done.exit_code == 2
    assert "no such directory" in done.stderr or "there is no journal here" in done.stderr
