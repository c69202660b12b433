"""The demo's job: five questions to a dataframe, and a study of three runways by some hundred tasks of plain Python.

The study models each airport as one runway. For every week of the year one task reads the departures, one computes
how long the planes queue if a take-off occupies the runway for 20, 21, ... 139 seconds, and one adds the week to
the year's total, which makes three chains of 53 links. Each of these tasks notes its own runs in a `RunLog`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd

from dask_resilience.chaos.flights import ORIGINS, FlightFiles, Frame, Tables, dask_tables
from dask_resilience.chaos.queries import QUERIES, frame_difference
from dask_resilience.chaos.run_log import RunLog

if TYPE_CHECKING:
    from collections.abc import Sequence

_Value = TypeVar("_Value")

#: Total waiting time in seconds, by the seconds that one take-off occupies the runway.
Waiting = dict[int, int]

Departures = npt.NDArray[np.int64]

TAKE_OFF_SECONDS = tuple(range(20, 140))

#: Graphs submitted within this time are scheduled together, so that the frames and the study share the workers.
_TOGETHER = "60s"

_TASKS_PER_WEEK = 3


# ------------------------------------------------------------------------------------------------ tasks of user code


def recorded(function: Callable[..., _Value], log: str, task: str, *args: Any) -> _Value:
    """Call a function, and note its start and its end in the run log."""
    runs = RunLog(Path(log))
    runs.append("start", task=task)
    result = function(*args)
    runs.append("end", task=task)
    return result


def read_departures(path: str) -> Departures:
    """Return the minutes of the week at which planes want to leave, ascending."""
    return pd.read_parquet(path)["minute"].to_numpy(dtype=np.int64)


def study_runway(departures: Departures) -> Waiting:
    """Let the planes queue for the runway, one after the other."""
    minutes: list[int] = departures.tolist()
    waiting = {}
    for take_off_seconds in TAKE_OFF_SECONDS:
        free_at = total = 0
        for minute in minutes:
            ready_at = minute * 60
            starts_at = max(ready_at, free_at)
            total += starts_at - ready_at
            free_at = starts_at + take_off_seconds
        waiting[take_off_seconds] = total
    return waiting


def add_week(before: Waiting | None, week: Waiting) -> Waiting:
    """Add one week to the total of the weeks before it."""
    return {seconds: total + (before[seconds] if before else 0) for seconds, total in week.items()}


def waiting_at_once(departures: Departures) -> Waiting:
    """Compute what `study_runway` computes, by another way: the expected result.

    Notes
    -----
    Lindley's recursion for a single server, solved: the n-th start is
    ``max(ready[j] + (n - j) * take_off for j <= n)``, so ``start[n] - n * take_off`` is a running maximum.
    """
    ready = departures * 60
    number = np.arange(len(ready))
    waiting = {}
    for seconds in TAKE_OFF_SECONDS:
        starts = np.maximum.accumulate(np.maximum(ready, 0) - number * seconds) + number * seconds
        waiting[seconds] = int((starts - ready).sum())
    return waiting


# ----------------------------------------------------------------------------------------------------------- the job


@dataclass(slots=True, kw_only=True)
class Job:
    """The job on a cluster.

    Parameters
    ----------
    client
        A `distributed.Client` or a drop-in for it.
    files
        The data.
    log
        Where the tasks note their runs.

    Attributes
    ----------
    futures
        What was submitted, by name: a question's name, or ``study-EWR-07`` and the like.
    """

    client: Any
    files: FlightFiles
    log: RunLog
    futures: dict[str, Any] = field(default_factory=dict)
    _graphs: dict[str, Frame] = field(init=False)
    _weights: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        tables = dask_tables(self.files)
        self._graphs = {name: query(tables).optimize() for name, query in QUERIES.items()}
        self._weights = {name: len(graph.__dask_graph__()) for name, graph in self._graphs.items()}

    def submit_queries(self, names: Sequence[str]) -> None:
        """Ask some of the questions in `QUERIES`."""
        for name in names:
            self.futures[name] = self.client.compute(self._graphs[name], optimize_graph=False, fifo_timeout=_TOGETHER)

    def submit_weeks(self, weeks: Sequence[int]) -> None:
        """Study some weeks, which follow those that were submitted before."""
        pairs = [(origin, week) for week in weeks for origin in ORIGINS]
        read = self._map(read_departures, "read", pairs, [str(self.files.departures_path(*pair)) for pair in pairs])
        study = self._map(study_runway, "study", pairs, read)
        for (origin, week), studied in zip(pairs, study, strict=True):
            name = f"total-{origin}-{week:02d}"
            before = self.futures.get(f"total-{origin}-{week - 1:02d}")
            self.futures[name] = self.client.submit(
                recorded, add_week, str(self.log.path), name, before, studied, key=name, fifo_timeout=_TOGETHER
            )

    def _map(
        self, function: Callable[..., Any], stem: str, pairs: Sequence[tuple[str, int]], inputs: Sequence[Any]
    ) -> list[Any]:
        names = [f"{stem}-{origin}-{week:02d}" for origin, week in pairs]
        constants = [[function] * len(names), [str(self.log.path)] * len(names)]
        futures: list[Any] = self.client.map(recorded, *constants, names, inputs, key=names, fifo_timeout=_TOGETHER)
        self.futures.update(zip(names, futures, strict=True))
        return futures

    @property
    def total(self) -> int:
        """Number of tasks of the whole job, submitted or not."""
        return sum(self._weights.values()) + len(self.files.weeks) * len(ORIGINS) * _TASKS_PER_WEEK

    def finished(self) -> set[str]:
        """Return the names of the futures whose result is there."""
        return {name for name, future in self.futures.items() if future.status == "finished"}

    def done(self) -> int:
        """Return how many tasks are known to have finished: those of a question when its answer is there."""
        return sum(self._weights.get(name, 1) for name in self.finished())

    def failed(self) -> list[str]:
        """Return the names of the futures that erred or were cancelled; one whose worker died is computed again."""
        return [name for name, future in self.futures.items() if future.status in ("error", "cancelled")]

    def results(self) -> dict[str, Any]:
        """Gather everything that was submitted."""
        gathered: dict[str, Any] = self.client.gather(self.futures)
        return gathered


def expected_results(tables: Tables, files: FlightFiles) -> dict[str, Any]:
    """Compute the whole job in this process with pandas and NumPy, under the same names."""
    expected: dict[str, Any] = {name: query(tables) for name, query in QUERIES.items()}
    for origin in ORIGINS:
        total = None
        for week in files.weeks:
            departures = read_departures(str(files.departures_path(origin, week)))
            waiting = waiting_at_once(departures)
            total = add_week(total, waiting)
            suffix = f"{origin}-{week:02d}"
            expected |= {f"read-{suffix}": departures, f"study-{suffix}": waiting, f"total-{suffix}": total}
    return expected


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Compare results, exactly; return one line for each that differs."""
    lines = [f"{name}: missing" for name in sorted(expected.keys() - found.keys())]
    for name, value in found.items():
        if name not in expected:
            lines.append(f"{name}: not expected")
        elif isinstance(value, pd.DataFrame):
            difference = frame_difference(value, expected[name])
            lines += [f"{name}: {difference}"] if difference else []
        elif not (np.array_equal(value, expected[name]) if isinstance(value, np.ndarray) else value == expected[name]):
            lines.append(f"{name}: {str(value)[:60]} is not {str(expected[name])[:60]}")
    return lines
