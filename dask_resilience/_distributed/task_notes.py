"""Numbers that go with a task, and not with its key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import ReferenceType, ref

from distributed.scheduler import TaskState

from dask_resilience.types import Key


class TaskNotes:
    """A number for each of some tasks, as long as the scheduler has the task.

    Tasks of Dask are equal when their keys are, so a dictionary of tasks would give a new task what was noted of one
    that is forgotten.
    """

    def __init__(self) -> None:
        self._notes: dict[Key, tuple[ReferenceType[TaskState], int]] = {}

    def __len__(self) -> int:
        return len(self._notes)

    def __setitem__(self, ts: TaskState, number: int) -> None:
        key: Any = ts.key

        def gone(reference: ReferenceType[TaskState]) -> None:
            if (noted := self._notes.get(key)) is not None and noted[0] is reference:
                del self._notes[key]

        self._notes[key] = ref(ts, gone), number

    def get(self, ts: TaskState, default: int) -> int:
        """Tell the number of this very task."""
        noted = self._notes.get(ts.key)
        return noted[1] if noted is not None and noted[0]() is ts else default

    def items(self) -> Iterator[tuple[TaskState, int]]:
        """Tell all."""
        for reference, number in list(self._notes.values()):
            if (ts := reference()) is not None:
                yield ts, number
