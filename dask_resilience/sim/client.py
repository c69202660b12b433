"""A client: it submits, releases, keeps what is not acked, and restates what it wants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dask_resilience.sim.books import SimTask
from dask_resilience.sim.loop import Process
from dask_resilience.sim.member import Member
from dask_resilience.sim.network import Message

if TYPE_CHECKING:
    from dask_resilience.sim.cluster import Cluster


class Client(Member):
    """See `Member`."""

    def __init__(self, cluster: Cluster, process: Process, *, operations: int) -> None:
        self.futures: dict[str, str] = {}
        self.outbox: dict[int, dict[str, Any]] = {}
        self._seq = 0
        self._made = 0
        super().__init__(cluster, process)
        for _ in range(operations):
            process.later(cluster.loop.between(0.0, cluster.terms.busy_seconds), self._act)

    def joining(self) -> dict[str, Any]:
        """Bring what was not acked, then all that is wanted."""
        return {
            "op": "join_client",
            "client": self.process.name,
            "outbox": [dict(message) for message in self.outbox.values()],
            "wants": list(self.futures),
        }

    def _act(self) -> None:
        rng = self.cluster.loop.rng
        held = list(self.futures)
        drawn = rng.random()
        if held and drawn < 0.25:
            self._release(rng.choice(held))
        elif drawn < 0.4:
            self._scatter()
        else:
            self._submit(held)

    def _submit(self, held: list[str]) -> None:
        rng = self.cluster.loop.rng
        tasks: dict[str, SimTask] = {}
        for _ in range(rng.randint(1, 6)):
            possible = [*held, *tasks]
            dependencies = rng.sample(possible, min(len(possible), rng.randint(0, 3)))
            tasks[self._new_key("t")] = SimTask(dependencies=tuple(dependencies), fails=rng.random() < 0.06)
        keys = [key for key in tasks if rng.random() < 0.4] or [list(tasks)[-1]]
        self._send(op="graph", tasks=tasks, keys=keys)

    def _scatter(self) -> None:
        """Put data on a worker, then tell; a client without any worker in reach does not get that far."""
        workers = [worker for worker in self.cluster.living_workers() if worker.link is not None]
        if workers and self.link is not None:
            key, worker = self._new_key("d"), self.cluster.loop.rng.choice(workers)
            worker.put(key)
            self._send(op="scatter", keys=[key], worker=worker.process.name)

    def _release(self, key: str) -> None:
        del self.futures[key]
        self.process.loop.note(self.process, "releases", key)
        self.tell("release", client=self.process.name, keys=[key])

    def _send(self, **message: Any) -> None:
        self._seq += 1
        numbered = {**message, "client": self.process.name, "seq": self._seq}
        self.outbox[self._seq] = numbered
        self.futures.update(dict.fromkeys(message["keys"], "pending"))
        self.process.loop.note(self.process, "sends", self._seq, message["op"], *message["keys"])
        op = numbered.pop("op")
        self.tell(op, repeatable=True, **numbered)
        numbered["op"] = op

    def _new_key(self, kind: str) -> str:
        self._made += 1
        return f"{self.process.name}-{kind}{self._made}"

    def _on_ack(self, message: Message) -> None:
        for seq in [seq for seq in self.outbox if seq <= message["seq"]]:
            del self.outbox[seq]

    def _on_status(self, message: Message) -> None:
        for key, state in message["states"].items():
            if key in self.futures:
                self.futures[key] = state
