"""What ran where, written by the tasks themselves, and the count of what ran twice because of the scheduler.

A task appends one line when it starts and one when it ends, each with a single ``write`` to a file opened with
``O_APPEND``: the kernel puts the lines of all processes into one order, and the death of a process loses none that was
written. The demo appends a line before each kill.

A later start of a task counts against the scheduler when the run before it

* has ended, or was still running,
* in a process that the demo had not killed before the later start.

This is strict, because in the demo such a process still holds the result or still computes it: the client keeps every
future, so nothing is released; replicas are not reduced, so a result stays where it was computed; memory has no
limit, so nothing else ends a worker. A worker that shuts itself down because the scheduler is gone is not killed by the
demo, so what it takes along is counted. Not counted are runs whose worker the demo killed: those results are
really gone, and nobody but that fault is to blame.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Happening = Literal["start", "end", "scheduler-killed", "worker-killed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """One line of the run log.

    Parameters
    ----------
    happening
        What it reports.
    task
        The task; empty for a kill.
    pid
        The process that ran the task, or that is killed.
    at_seconds
        ``time.monotonic``, which all processes of a host share.
    """

    happening: Happening
    task: str
    pid: int
    at_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeat:
    """A run that follows another run of the same task.

    Parameters
    ----------
    task
        The task.
    run
        Number of the run, from 2.
    earlier_pid, pid
        The processes of the run before and of this one.
    earlier_ended
        Whether the run before had ended.
    because_of
        What is to blame.
    """

    task: str
    run: int
    earlier_pid: int
    pid: int
    earlier_ended: bool
    because_of: Literal["scheduler", "worker"]


class RunLog:
    """Appends to a run log and reads it.

    Parameters
    ----------
    path
        The file; it is made by the first line.

    Examples
    --------
    >>> import tempfile
    >>> log = RunLog(Path(tempfile.mkdtemp()) / "runs")
    >>> log.append("start", task="a"); log.append("end", task="a")
    >>> [line.happening for line in log.lines()]
    ['start', 'end']
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, happening: Happening, *, task: str = "", pid: int | None = None) -> None:
        """Append one line; it survives the death of this process from then on."""
        line = LogLine(happening=happening, task=task, pid=pid or os.getpid(), at_seconds=time.monotonic())
        data = json.dumps(asdict(line)).encode() + b"\n"
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            written = os.write(handle, data)
        finally:
            os.close(handle)
        if written != len(data):
            raise OSError(f"{self.path}: only {written} of {len(data)} bytes were appended; is the disk full?")

    def lines(self) -> list[LogLine]:
        """Read all lines, in the order in which they were written."""
        if not self.path.exists():
            return []
        parsed: Iterable[dict[str, Any]] = map(json.loads, self.path.read_bytes().splitlines())
        return [LogLine(**fields) for fields in parsed]


def find_repeats(lines: Sequence[LogLine]) -> list[Repeat]:
    """Find every run after the first and its cause, as defined at the top of this module.

    Examples
    --------
    >>> line = lambda happening, task, pid: LogLine(happening=happening, task=task, pid=pid, at_seconds=0.0)
    >>> story = [line("start", "a", 1), line("start", "b", 2), line("worker-killed", "", 2)]
    >>> story += [line("start", "b", 3), line("scheduler-killed", "", 9), line("start", "a", 3)]
    >>> [(repeat.task, repeat.because_of) for repeat in find_repeats(story)]
    [('b', 'worker'), ('a', 'scheduler')]
    """
    killed: set[int] = set()
    ended: set[tuple[str, int]] = set()
    runs: dict[str, list[int]] = {}
    repeats = []
    for line in lines:
        if line.happening == "worker-killed":
            killed.add(line.pid)
        elif line.happening == "end":
            ended.add((line.task, line.pid))
        elif line.happening == "start":
            earlier = runs.setdefault(line.task, [])
            if earlier:
                repeats.append(
                    Repeat(
                        task=line.task,
                        run=len(earlier) + 1,
                        earlier_pid=earlier[-1],
                        pid=line.pid,
                        earlier_ended=(line.task, earlier[-1]) in ended,
                        because_of="worker" if earlier[-1] in killed else "scheduler",
                    )
                )
            earlier.append(line.pid)
    return repeats


def twice_because_of_the_scheduler(lines: Sequence[LogLine]) -> int:
    """Count the tasks that ran more than once because of the scheduler."""
    return len({repeat.task for repeat in find_repeats(lines) if repeat.because_of == "scheduler"})
