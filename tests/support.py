"""What tests on real clusters share."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pytest


def and_long(first, *more):
    """Parameters of which the first is tried with each change, and the others by `make chaos`."""
    return [first, *only_long(*more)]


def only_long(*values):
    """Parameters that are tried by `make chaos`."""
    return [pytest.param(value, marks=pytest.mark.long) for value in values]


class RunLog:
    """What ran: each call of a task made by `task` appends one line, in one write, from whichever process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def task(self, *, seconds: float = 0.0, gate: Path | None = None):
        """A function of one argument that logs its run, waits, and returns twice its argument.

        It is defined here, inside, so that it travels by value: workers cannot import test modules.
        """
        path = str(self.path)
        gate_path = str(gate) if gate is not None else None

        def run(x, *dependencies):
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(fd, f"{x!r}\n".encode())
            os.close(fd)
            time.sleep(seconds)
            while gate_path is not None and not os.path.exists(gate_path):  # noqa: PTH110
                time.sleep(0.01)
            return x * 2

        return run

    def hold(self, *, gate: Path, after: int):
        """An identity function that logs its call and, once more than `after` are logged, waits for the gate."""
        path, gate_path = str(self.path), str(gate)

        def hold(x):
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
            os.write(fd, b"x\n")
            calls = os.fstat(fd).st_size // 2
            os.close(fd)
            while calls > after and not os.path.exists(gate_path):  # noqa: PTH110
                time.sleep(0.01)
            return x

        return hold

    def calls(self) -> int:
        """How often anything ran."""
        return sum(self.counts().values())

    def counts(self) -> Counter:
        """How often each argument ran."""
        if not self.path.exists():
            return Counter()
        return Counter(self.path.read_text().split())

    def assert_each_once(self, expected) -> None:
        """Every one of `expected` ran, and ran once."""
        counts = self.counts()
        assert counts == Counter({repr(x): 1 for x in expected}), {k: n for k, n in counts.items() if n != 1}


def until(condition, *, seconds: float = 30.0, what: str = "", soft: bool = False) -> None:
    """Wait until `condition()` is true; fail after `seconds`, or go on if `soft`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if soft and time.monotonic() >= deadline:
            return
        assert time.monotonic() < deadline, f"not within {seconds} s: {what or condition}"
        time.sleep(0.02)


def fail_over(cluster, client=None) -> None:
    """Kill the scheduler, start it again at the same address, and wait until it serves."""
    cluster.kill_scheduler()
    cluster.restart_scheduler()
    cluster.wait_scheduler_ready()
    if client is not None:
        validate(client)


def validate(client) -> None:
    """Dask's own check of the scheduler's state."""
    client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.validate_state())


def all_durable(client) -> None:
    """Return when all that the scheduler has recorded so far is in the journal."""
    client.sync(client.scheduler.resilience_committed)


def resilience_status(client) -> dict:
    """What the scheduler tells of its recovery."""
    return client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.resilience.status())
