"""A worker: it holds results, runs tasks, and comes back with an inventory."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

from dask_resilience.sim.loop import Process
from dask_resilience.sim.member import Member
from dask_resilience.sim.network import Message
from dask_resilience.types import Key
from dask_resilience.views import Inventory

if TYPE_CHECKING:
    from dask_resilience.sim.cluster import Cluster

THREADS: Final = 2


class Worker(Member):
    """See `Member`."""

    def __init__(self, cluster: Cluster, process: Process) -> None:
        self.memory: dict[Key, int] = {}
        self.running: dict[Key, int] = {}
        self.erred: dict[Key, int] = {}
        self._ready: deque[Message] = deque()
        super().__init__(cluster, process)

    def joining(self) -> dict[str, Any]:
        """Bring the inventory."""
        inventory = Inventory(
            worker=self.process.name, memory=dict(self.memory), running=dict(self.running), erred=dict(self.erred)
        )
        return {"op": "join_worker", "inventory": inventory}

    def left_alone(self) -> None:
        """Give back what has not started."""
        self._ready.clear()

    def _report(self, op: str, key: str, **fields: Any) -> None:
        self.cluster.news_sent(self, key)
        self.tell(op, key=key, **fields)

    def _on_compute(self, message: Message) -> None:
        key = message["key"]
        if key in self.memory:
            self._report("finished", key, run_id=message["run_id"])
            return
        self._ready.append(message)
        self._start_next()

    def _on_free(self, message: Message) -> None:
        for key in message["keys"]:
            self.cluster.freed(self, key)
            for held in (self.memory, self.running, self.erred):
                held.pop(key, None)
            self._ready = deque(waiting for waiting in self._ready if waiting["key"] != key)
        self._start_next()

    def _start_next(self) -> None:
        while self._ready and len(self.running) < THREADS:
            message = self._ready.popleft()
            key, run_id = message["key"], message["run_id"]
            for dependency, holders in message["dependencies"].items():
                if dependency not in self.memory and not any(
                    self.cluster.fetch(self, at, dependency) for at in holders
                ):
                    self._report("missing", key, run_id=run_id)
                    break
                if dependency not in self.memory:
                    self.memory[dependency] = 8
                    self._report("replica", dependency)
            else:
                self.erred.pop(key, None)
                self.running[key] = run_id
                if not message["load"]:
                    self.cluster.run_started(self, key)
                seconds = self.cluster.loop.between(0.05, self.cluster.loop.rng.choice((0.5, 3.0, 8.0)))
                self.process.later(seconds, self._finish, key, run_id, message["fails"] and not message["load"])

    def _finish(self, key: str, run_id: int, fails: bool) -> None:  # noqa: FBT001 -- an event's argument
        if self.running.get(key) != run_id:
            return  # cancelled
        del self.running[key]
        if fails:
            self.erred[key] = run_id
            self._report("erred", key, run_id=run_id)
        else:
            self.memory[key] = 8
            self.cluster.result_made(key)
            self._report("finished", key, run_id=run_id)
        self._start_next()

    def put(self, key: str) -> None:
        """Take scattered data."""
        self.memory[key] = 8
