"""What a journal amounts to: tasks, who wants them, and who is expected. Folded from records alone."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from dask_resilience.journal.records import (
    ClientJoined,
    ClientLeft,
    DataScattered,
    GraphSubmitted,
    KeysReleased,
    KeysWanted,
    Record,
    TaskErred,
    WorkerJoined,
    WorkerLeft,
)
from dask_resilience.types import Address, Key
from dask_resilience.views import TaskView


@dataclass(frozen=True, slots=True, kw_only=True)
class SimTask:
    """A task: what it depends on, whether it has a run spec, and whether its function raises."""

    dependencies: tuple[str, ...] = ()
    computable: bool = True
    fails: bool = False


def pack_graph(tasks: Mapping[str, SimTask]) -> bytes:
    """Write a graph as the `rest` of a `GraphSubmitted`."""
    return json.dumps({key: [task.dependencies, task.fails] for key, task in tasks.items()}).encode()


@dataclass(slots=True)
class Books:
    """The folded journal, and the live one too: a scheduler applies each record that it appends."""

    tasks: dict[str, SimTask] = field(default_factory=dict)
    wants: dict[str, dict[str, None]] = field(default_factory=dict)
    last_seq: dict[str, int] = field(default_factory=dict)
    erred: set[str] = field(default_factory=set)
    workers: dict[Address, None] = field(default_factory=dict)

    def apply(self, record: Record) -> None:  # noqa: C901 -- one case a record
        """Take one record into account."""
        match record:
            case GraphSubmitted(client=client, seq=seq, keys=keys, rest=rest):
                for key, (dependencies, fails) in json.loads(rest).items():
                    self.tasks.setdefault(key, SimTask(dependencies=tuple(dependencies), fails=fails))
                self._want(client, seq, keys)
            case KeysWanted(client=client, seq=seq, keys=keys):
                self._want(client, seq, keys)
            case KeysReleased(client=client, keys=keys):
                for key in keys:
                    self.wants.get(client, {}).pop(str(key), None)
                self._forget()
            case DataScattered(nbytes=nbytes):
                for key in nbytes:
                    self.tasks.setdefault(str(key), SimTask(computable=False))
            case TaskErred(key=key):
                self.erred.add(str(key))
            case ClientJoined(client=client):
                self.wants.setdefault(client, {})
            case ClientLeft(client=client):
                self.wants.pop(client, None)
                self._forget()
            case WorkerJoined(address=address):
                self.workers[address] = None
            case WorkerLeft(address=address):
                self.workers.pop(address, None)

    def wanted(self) -> dict[str, None]:
        """Keys that somebody wants, in a fixed order."""
        return {key: None for keys in self.wants.values() for key in keys if key in self.tasks}

    def views(self, wanted: Collection[str]) -> dict[Key, TaskView]:
        """Show the tasks as deciding code sees them."""
        return {
            key: TaskView(
                dependencies=task.dependencies,
                wanted=key in wanted,
                computable=task.computable,
                erred=key in self.erred,
            )
            for key, task in self.tasks.items()
        }

    def _want(self, client: str, seq: int, keys: Collection[Key]) -> None:
        self.wants.setdefault(client, {}).update(dict.fromkeys(map(str, keys)))
        self.last_seq[client] = seq

    def _forget(self) -> None:
        """Drop what nobody wants and nothing depends on, over and over."""
        wanted = self.wanted()
        while True:
            needed = {key for task in self.tasks.values() for key in task.dependencies}
            idle = [key for key in self.tasks if key not in wanted and key not in needed]
            if not idle:
                return
            for key in idle:
                del self.tasks[key]
                self.erred.discard(key)
