"""The commands on real stores: what they print, how they exit, and that no traceback is shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from uuid import UUID

import pytest
from click.testing import CliRunner

from dask_resilience.cli import resilience
from dask_resilience.journal.checked_json import encode_checked
from dask_resilience.journal.codec import encode_frame
from dask_resilience.journal.records import (
    ClientJoined,
    ClientLeft,
    EpochStarted,
    KeysReleased,
    KeysWanted,
    SnapshotBegun,
)
from dask_resilience.journal.segment import HEADER_BYTES, SegmentHeader, encode_header
from dask_resilience.storage import names, open_store
from dask_resilience.storage.cluster_object import claim_cluster, read_cluster
from dask_resilience.storage.snapshots import open_journal, write_snapshot

RECORDS = [
    ClientJoined(client="Client-1", resilient=True),
    KeysWanted(client="Client-1", seq=1, keys=("total-0", ("chunk", 1, 2))),
    KeysReleased(client="Client-1", keys=("total-0",)),
]


@pytest.fixture
def journal(store: Path) -> Path:
    """Two epochs: the first has four records, the second goes on from its sealed end with two."""
    opened = open_store(str(store))
    cluster = UUID(claim_cluster(opened, name="prod").cluster_id).bytes
    lsn, chain, sealed = 1, 0, None
    for epoch, records in ((1, RECORDS), (2, [ClientLeft(client="Client-1")])):
        header = SegmentHeader(cluster=cluster, epoch=epoch, seq=0, nonce=bytes(16), first_lsn=lsn, chain=chain)
        data = encode_header(header)
        opening = EpochStarted(epoch=epoch, cluster="prod", holder="test", versions={"dask": "1"}, sealed=sealed)
        for record in [opening, *records]:
            buffers, chain = encode_frame(record, lsn=lsn, chain=chain)
            data += b"".join(buffers)
            lsn += 1
        opened.create(names.segment(epoch, 0), data)
        sealed = (epoch, 0, len(data), lsn - 1)
    return store


def segment(store: Path, epoch: int) -> Path:
    return store / names.segment(epoch, 0)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def run(*arguments):
    return CliRunner().invoke(resilience, [str(argument) for argument in arguments])


def test_verify_a_sound_journal(journal):
    done = run("verify", journal)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{journal.as_uri()}: sound; 2 segments, 2 epochs, 6 records, last LSN 6\n"


def test_verify_as_json(journal):
    done = run("verify", journal, "-o", "json")
    assert json.loads(done.stdout) == {
        "store": journal.as_uri(),
        "sound": True,
        "findings": [],
        "segments": 2,
        "records": 6,
        "epochs": 2,
        "last_lsn": 6,
        "snapshots": 0,
    }


def test_verify_takes_a_url(journal):
    assert run("verify", journal.as_uri()).exit_code == 0


def test_verify_names_the_damage(journal):
    flip(segment(journal, 1), HEADER_BYTES + 30)
    done = run("verify", journal)
    assert done.exit_code == 1
    assert "damage" in done.stdout
    assert ": damaged; 2 segments" in done.stdout

    done = run("verify", journal, "-o", "json")
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert told["sound"] is False
    assert told["findings"][0]["level"] == "damage"
    assert told["findings"][0]["name"] == names.segment(1, 0)
    assert told["findings"][0]["offset"] == HEADER_BYTES


def test_verify_names_a_damaged_object_beside_the_journal(journal):
    flip(journal / names.CLUSTER, 20)
    done = run("verify", journal, "-o", "json")
    assert done.exit_code == 1
    (finding,) = json.loads(done.stdout)["findings"]
    assert (finding["level"], finding["name"]) == ("damage", names.CLUSTER)


def test_a_journal_without_an_owner_is_damage(journal):
    (journal / names.CLUSTER).unlink()
    done = run("verify", journal)
    assert done.exit_code == 1
    assert "nothing says whose journal this is" in " ".join(done.stdout.split())


def test_a_torn_tail_is_a_note_and_sound(journal):
    newest = segment(journal, 2)
    newest.write_bytes(newest.read_bytes()[:-3])
    done = run("verify", journal)
    assert done.exit_code == 0
    assert "note" in done.stdout
    assert names.segment(2, 0) in done.stdout
    assert ": sound; " in done.stdout


def test_a_missing_segment_is_damage(journal):
    segment(journal, 1).unlink()
    assert run("verify", journal).exit_code == 1


def test_a_segment_of_another_cluster_is_damage(journal):
    (journal / names.CLUSTER).write_bytes(encode_checked({"id": str(UUID(int=7)), "name": "prod"}))
    done = run("verify", journal, "-o", "json")
    assert done.exit_code == 1
    assert "another cluster" in done.stdout


@pytest.mark.parametrize("command", ["verify", "inspect"])
@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("nowhere", "no such directory"),
        ("", "there is no journal here"),
        ("ftp://host/store", "'ftp'"),
    ],
)
def test_what_cannot_be_looked_at(command, place, says, tmp_path):
    done = run(command, place if "://" in place else tmp_path / place)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert says in done.stderr
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1


def test_inspect_lists_every_record(journal):
    done = run("inspect", journal)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert [line.split()[:4] for line in lines] == [
        ["1", "epoch", "1", "EpochStarted"],
        ["2", "epoch", "1", "ClientJoined"],
        ["3", "epoch", "1", "KeysWanted"],
        ["4", "epoch", "1", "KeysReleased"],
        ["5", "epoch", "2", "EpochStarted"],
        ["6", "epoch", "2", "ClientLeft"],
    ]
    assert "keys=['total-0', ('chunk', 1, 2)]" in lines[2]


@pytest.mark.parametrize(
    ("options", "lsns"),
    [
        (["--limit", "2"], [1, 2]),
        (["--type", "EpochStarted"], [1, 5]),
        (["--type", "epochstarted", "--limit", "1"], [1]),
        (["--type", "ClusterClosed"], []),
    ],
)
def test_inspect_selects(journal, options, lsns):
    done = run("inspect", journal, *options)
    assert done.exit_code == 0
    assert [int(line.split()[0]) for line in done.stdout.splitlines()] == lsns


def test_inspect_refuses_an_unknown_type(journal):
    done = run("inspect", journal, "--type", "Graph")
    assert done.exit_code == 2
    told = " ".join(done.stderr.split())
    assert "no records of type 'Graph'; there are " in told
    assert "ClientJoined" in told


def test_inspect_shows_what_it_can_before_the_damage(journal):
    newest = segment(journal, 2)
    flip(newest, newest.stat().st_size - 5)
    done = run("inspect", journal)
    assert done.exit_code == 1
    assert len(done.stdout.splitlines()) == 4
    assert done.stderr.startswith("Error: log/")
    assert "Traceback" not in done.output


@pytest.mark.parametrize("program", [["dask", "resilience"], ["dask-resilience"]])
def test_the_installed_programs(program, journal):
    command = [Path(sys.executable).parent / program[0], *program[1:], "verify", journal]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})
    assert (done.returncode, done.stderr) == (0, "")
    assert ": sound; " in done.stdout


def test_a_snapshot_is_inspected_before_what_came_after_it(journal):
    store = open_store(str(journal))
    _, reader = open_journal(store)
    for logged in reader.read():
        if logged.lsn == 4:
            break
    _, chain, epoch, seq = reader.place
    begun = SnapshotBegun(lsn=4, chain=chain, epoch=epoch, seq=seq, rest=b"")
    state = [ClientLeft(client="of the snapshot")]
    cluster = UUID(read_cluster(store).cluster_id).bytes
    write_snapshot(store, cluster=cluster, epoch=2, begun=begun, state=state)
    lines = run("inspect", journal).stdout.splitlines()
    assert [line.split()[:4] for line in lines] == [
        ["4", "snapshot", "SnapshotBegun", "lsn=4"],
        ["4", "snapshot", "ClientLeft", "client='of"],
        ["5", "epoch", "2", "EpochStarted"],
        ["6", "epoch", "2", "ClientLeft"],
    ]
    done = run("verify", journal)
    assert "1 snapshots, 2 segments" in done.stdout
