"""Failpoints: what the variable may say, and that each strikes at its turn."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

import dask_resilience
from dask_resilience import failpoints
from dask_resilience.clock import SystemClock
from dask_resilience.failpoints import arm, failpoint, parse
from dask_resilience.storage import names


@pytest.fixture
def struck(monkeypatch):
    signals = []
    monkeypatch.setattr(os, "kill", lambda pid, number: signals.append(number))
    yield signals
    arm({})


def test_the_variable_is_read():
    assert parse("") == {}
    assert parse(" journal.after-ack=kill ; journal.after-sync=stop@3;takeover.after-lease=stop:2;") == {
        "journal.after-ack": (signal.SIGKILL, 1),
        "journal.after-sync": (signal.SIGSTOP, 3),
        "takeover.after-lease": (signal.SIGSTOP, 2),
    }


@pytest.mark.parametrize(
    "text", ["x", "x=kill", "journal.after-ack=die", "journal.after-ack=kill@0", "journal.after-ack"]
)
def test_mistakes_are_told(text):
    with pytest.raises(ValueError, match=failpoints.VARIABLE):
        parse(text)


def test_it_strikes_once_at_its_turn(struck):
    arm(parse("journal.after-ack=kill@3;journal.after-sync=stop"))
    strikes = []
    for _ in range(5):
        failpoint("journal.after-ack")
        strikes.append(len(struck))
    assert strikes == [0, 0, 1, 1, 1]
    failpoint("journal.after-sync")
    assert struck == [signal.SIGKILL, signal.SIGSTOP]


def test_every_name_is_passed_somewhere_and_every_passed_name_is_known():
    package = Path(dask_resilience.__file__).parent
    passed = {
        name
        for path in package.rglob("*.py")
        if path.name != "failpoints.py"
        for name in re.findall(r"failpoint\(\s*\"([\w.-]+)\"", path.read_text())
    }
    assert passed == failpoints.NAMES


def test_names_of_objects_are_read_back_and_nothing_else_is():
    assert names.epoch_of_manifest(names.manifest(12)) == 12
    assert names.epoch_and_seq_of_segment(names.segment(3, 4)) == (3, 4)
    for name in ("manifest/1", "manifest/x", "lease"):
        with pytest.raises(ValueError, match=r"."):
            names.epoch_of_manifest(name)
    for name in ("log/1/2", "log/x", "log/0000000003/00000000000000000004/5", "log/0000000003"):
        with pytest.raises(ValueError, match=r"."):
            names.epoch_and_seq_of_segment(name)


def test_clocks_go_on():
    clock = SystemClock()
    before = clock.boot_seconds()
    assert clock.boot_seconds() >= before > 0
    assert clock.wall_seconds() > 1_700_000_000
