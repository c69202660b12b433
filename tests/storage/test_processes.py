"""Real processes: killed at each step, stopped across a takeover, racing for the rule."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support import until

from dask_resilience import failpoints
from dask_resilience.storage import open_store
from dask_resilience.storage.leadership import newest_epoch
from dask_resilience.storage.local_store import LocalStore
from dask_resilience.storage.object_store import ConditionalStore
from dask_resilience.storage.takeover import leader
from tests.storage.acting import Ruler, read, verify

SCRIPT = Path(__file__).with_name("ruler_process.py")


class Process:
    """A ruler in a process of its own, and what it said."""

    def __init__(self, store, *, ttl_seconds=30.0, segment_bytes=600, records=0, failpoint="", storage_options=None):
        command = [sys.executable, str(SCRIPT), str(store), str(ttl_seconds), str(segment_bytes), str(records)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                failpoints.VARIABLE: failpoint,
                "RULER_STORAGE_OPTIONS": json.dumps(storage_options or {}),
            },
        )
        self.said: list[str] = []
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self):
        for line in self.process.stdout:
            self.said.append(line.strip())

    def wait_for(self, start):
        until(lambda: self.line(start) or self.ended(), what=f"{start!r} in {self.said}")
        assert self.line(start), self.said
        return self

    def line(self, start):
        return next((line for line in self.said if line.startswith(start)), None)

    def ended(self):
        return self.process.poll() is not None and not self._thread.is_alive()

    def code(self):
        code = self.process.wait(timeout=30)
        self._thread.join()
        return code

    def append(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def signal(self, number):
        self.process.send_signal(number)
        return self

    def stopped(self):
        return "\nState:\tT" in Path(f"/proc/{self.process.pid}/status").read_text()

    def end(self):
        self.process.stdin.close()
        assert self.code() == 0, self.said

    @property
    def acked(self):
        return [int(line.split()[1]) for line in self.said if line.startswith("acked")]

    @property
    def epoch(self):
        return int(self.line("rules").split()[1])


@pytest.fixture
def start(store):
    """Start processes; whatever happens, they end with the test."""
    started = []

    def starts(**kwargs):
        started.append(Process(store, **kwargs))
        return started[-1]

    yield starts
    for each in started:
        each.process.kill()
        each.code()
        each.process.stdin.close()
        each.process.stdout.close()


def recovers(store, acked):
    """A third scheduler takes over at once, and finds all that was acked and a sound store."""
    opened = store if isinstance(store, ConditionalStore) else LocalStore(store)
    before = read(opened)
    assert [logged.lsn for logged in before] == list(range(1, len(before) + 1))
    assert len(before) >= max(acked, default=0)
    assert not verify(opened).damaged
    third = Ruler(opened).append(3).settled()
    assert third.leadership.next_lsn == len(before) + 1
    third.release()
    after = read(opened)
    assert after[: len(before)] == before
    assert len(after) == len(before) + 4
    assert not verify(opened).damaged


JOURNAL = sorted(name for name in failpoints.NAMES if name.startswith("journal."))
TAKEOVER = sorted(name for name in failpoints.NAMES if name.startswith("takeover."))


# At the first pass nothing but the header, or the record that starts the epoch, can be there.
@pytest.mark.parametrize(
    ("name", "nth"),
    [*((name, 4) for name in JOURNAL), *((f"journal.after-{step}", 1) for step in ("open", "write", "sync"))],
)
def test_killed_while_writing(store, start, name, nth):
    killed = start(records=-1, failpoint=f"{name}=kill@{nth}")
    assert killed.code() == -signal.SIGKILL, killed.said
    recovers(store, killed.acked)


@pytest.mark.parametrize("name", TAKEOVER)
def test_killed_while_taking_over(store, start, name):
    Ruler(LocalStore(store)).append(5).settled().release()
    killed = start(records=2, failpoint=f"{name}=kill")
    assert killed.code() == -signal.SIGKILL, killed.said
    recovers(store, killed.acked or [6])


def test_killed_at_any_moment(store, start):
    acked = 0
    for _ in range(4):
        killed = start(records=-1)
        until(lambda: len(killed.acked) > 30)  # noqa: B023
        killed.signal(signal.SIGKILL).code()
        acked = max(killed.acked)
    recovers(store, [acked])
    assert newest_epoch(LocalStore(store)) == 5


def test_a_dead_holder_is_not_waited_for(store, start):
    """With a TTL of ten minutes, a wait would be noticed."""
    first = start(ttl_seconds=600).wait_for("acked 1")
    second = start(ttl_seconds=600).wait_for("waiting for epoch 1, held by process")
    assert str(first.process.pid) in second.line("waiting")
    assert "rules" not in second.said
    first.signal(signal.SIGKILL)
    # It is a zombie now, which nobody has waited for: dead all the same.
    second.wait_for("acked")
    assert second.epoch == 2
    second.end()
    first.code()


def test_a_holder_that_releases_is_not_waited_for(store, start):
    first = start(ttl_seconds=600).wait_for("acked 1")
    second = start(ttl_seconds=600).wait_for("waiting for epoch 1")
    first.end()
    second.wait_for("acked")
    second.end()
    assert second.epoch == 2


@pytest.mark.parametrize("failpoint", ["", *(f"journal.{at}=stop@20" for at in ("after-write", "after-sync"))])
def test_a_holder_that_was_stopped_acks_nothing_afterwards(store, start, failpoint):
    first = start(ttl_seconds=0.6, records=-1, failpoint=failpoint)
    until(lambda: first.stopped() if failpoint else len(first.acked) > 20)
    if not failpoint:
        first.signal(signal.SIGSTOP)
        until(first.stopped)
    second = start(ttl_seconds=0.6).wait_for("acked")
    acked = list(first.acked)
    assert second.epoch == 2
    first.signal(signal.SIGCONT)
    assert first.code() == 3, first.said[-5:]
    # What it found durable and without a fence before it was stopped, it may still tell: one commit at most.
    assert [lsn for lsn in first.acked if lsn not in acked] in ([], [len(acked) + 1])
    assert max(first.acked) < int(second.line("rules").split()[2])
    assert first.said[-1].startswith("fenced 1 2")
    second.append()
    until(lambda: len(second.acked) >= 2)
    second.end()
    opened = LocalStore(store)
    logged = read(opened)
    assert [each.lsn for each in logged] == list(range(1, len(logged) + 1))
    assert not verify(opened).damaged


@pytest.mark.parametrize("at", ["after-lease", "after-fence", "after-log-read"])
def test_a_takeover_that_was_stopped_is_overtaken(store, start, at):
    first = start(ttl_seconds=0.6, failpoint=f"takeover.{at}=stop")
    until(first.stopped)
    second = start(ttl_seconds=0.6, records=3)
    until(lambda: len(second.acked) >= 4)
    first.signal(signal.SIGCONT)
    if at == "after-lease":
        # It had raised no fence, so it stands by again.
        first.wait_for("waiting for epoch")
        second.end()
        first.wait_for("acked")
        first.end()
    else:
        assert first.code() == 3
        assert first.acked == []
        second.end()
    assert not verify(LocalStore(store)).damaged
    assert len(read(LocalStore(store))) == (5 if at == "after-lease" else 4)


def test_standbys_race_and_each_epoch_has_one_ruler(store, start):
    first = start(ttl_seconds=600).wait_for("acked 1")
    standbys = [start(ttl_seconds=600).wait_for("waiting") for _ in range(4)]
    epochs = [1]
    first.signal(signal.SIGKILL)
    for _ in range(4):
        until(lambda: [each for each in standbys if each.acked])
        [ruler] = [each for each in standbys if each.acked]
        epochs.append(ruler.epoch)
        assert leader(open_store(str(store), existing=True)).epoch in (ruler.epoch, ruler.epoch - 1)
        standbys.remove(ruler)
        ruler.signal(signal.SIGKILL)
    first.code()
    assert epochs == sorted(set(epochs))
    assert len(read(LocalStore(store))) == 5
    assert not verify(LocalStore(store)).damaged
