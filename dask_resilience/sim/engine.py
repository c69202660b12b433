"""Dask's scheduler reduced to what matters here: what is needed, ready, freed, failed or lost."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from dask_resilience.failover.recovery import LatePlan, RecoveryPlan
from dask_resilience.sim.books import Books
from dask_resilience.types import Address


@dataclass(slots=True)
class Engine:
    """States of tasks, and the messages to workers that follow from them.

    Parameters
    ----------
    books
        Tasks and wants.
    next_run_id
        Gives a new number for each run.
    durable
        Keys with a durable copy.
    send
        Sends a message to a worker.
    fail
        Journals that a key failed, given what is to blame.
    """

    books: Books
    next_run_id: Callable[[], int]
    durable: Collection[str]
    send: Callable[[Address, dict[str, Any]], None]
    fail: Callable[[str, str], object]
    workers: dict[Address, None] = field(default_factory=dict)
    who_has: dict[str, dict[Address, None]] = field(default_factory=dict)
    processing: dict[str, tuple[Address, int]] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    #: Those of `processing` that load a durable copy and need no dependencies.
    loading: set[str] = field(default_factory=set)

    def state(self, key: str, needed: Collection[str]) -> str:
        """Name Dask's state of a key that is known."""
        if key in self.who_has:
            return "memory"
        if key in self.processing:
            return "processing"
        if key in self.books.erred or key in self.lost:
            return "erred"
        return "waiting" if key in needed else "released"

    def needed(self) -> dict[str, None]:
        """Walk from what is wanted to what is needed for it."""
        needed: dict[str, None] = {}
        stack = list(self.books.wanted())
        while stack:
            key = stack.pop()
            if key not in needed and key in self.books.tasks:
                needed[key] = None
                stack.extend(self._needs(key))
        return needed

    def settle(self) -> None:
        """Do all that follows from the present facts: fail, free, compute."""
        self._name_losses()
        needed = self.needed()
        for key in [key for key in self.who_has if key not in needed]:
            for address in self.who_has.pop(key):
                self.send(address, {"op": "free", "keys": [key]})
        for key in [key for key in self.processing if key not in needed]:
            self.send(self.processing.pop(key)[0], {"op": "free", "keys": [key]})
        self.lost &= needed.keys()
        for key in needed:
            if self.workers and self.state(key, needed) == "waiting" and self._ready(key):
                self._compute(key)

    def remove_worker(self, address: Address) -> None:
        """Forget a worker and what it had."""
        self.workers.pop(address, None)
        for key in list(self.who_has):
            self.who_has[key].pop(address, None)
            if not self.who_has[key]:
                del self.who_has[key]
        for key in [key for key, (at, _) in self.processing.items() if at == address]:
            del self.processing[key]

    def finished(self, address: Address, key: str, run_id: int | None) -> None:
        """Take a result; without a run id, one more replica."""
        if run_id is not None and self.processing.get(key) == (address, run_id):
            del self.processing[key]
            self.who_has[key] = {address: None}
        elif key in self.who_has:
            self.who_has[key][address] = None
        elif run_id is not None or self.processing.get(key, ("", 0))[0] != address:
            # Not where it is about to be computed: the free would overtake nothing and cancel that.
            self.send(address, {"op": "free", "keys": [key]})

    def erred(self, address: Address, key: str, run_id: int | None) -> None:
        """Take a failure, if it is one of the run that counts."""
        if self.processing.get(key) == (address, run_id):
            del self.processing[key]
            self.fail(key, key)
        else:
            self.send(address, {"op": "free", "keys": [key]})

    def enact(self, plan: RecoveryPlan) -> None:
        """Take over what a recovery plan adopts. What is to be computed follows by `settle`."""
        self.who_has = {str(key): dict.fromkeys(found) for key, found in plan.adopt_memory.items()}
        self.processing = {str(key): run for key, run in plan.adopt_running.items()}
        self.lost = {str(key) for key in plan.lost}
        self.loading.clear()
        for key in plan.report_erred:
            self.fail(str(key), str(key))
        for address, keys in plan.forget.items():
            self.send(address, {"op": "free", "keys": list(keys)})

    def enact_late(self, address: Address, plan: LatePlan) -> None:
        """Take over what a late worker brings."""
        for key in (*plan.add_replica, *plan.adopt_memory):
            self.who_has.setdefault(str(key), {})[address] = None
        for key, run_id in plan.adopt_running.items():
            self.processing[str(key)] = (address, run_id)
            self.loading.discard(str(key))
        for key in plan.report_erred:
            self.fail(str(key), str(key))
        if plan.forget:
            self.send(address, {"op": "free", "keys": list(plan.forget)})

    def _needs(self, key: str) -> tuple[str, ...]:
        if key in self.who_has or key in self.books.erred or key in self.lost:
            return ()
        if key in self.loading if key in self.processing else key in self.durable:
            return ()
        return self.books.tasks[key].dependencies

    def _name_losses(self) -> None:
        """Fail what depends on a failure or a loss, until nothing changes."""
        changed = True
        while changed:
            changed = False
            needed = self.needed()
            for key in needed:
                if self.state(key, needed) != "waiting" or key in self.durable:
                    continue
                bad = [d for d in self._needs(key) if d in self.books.erred or d in self.lost]
                if not self.books.tasks[key].computable:
                    self.lost.add(key)
                elif bad:
                    self.fail(key, bad[0])
                else:
                    continue
                changed = True

    def _ready(self, key: str) -> bool:
        return all(dependency in self.who_has for dependency in self._needs(key))

    def _compute(self, key: str) -> None:
        load = dict.fromkeys(self.workers, 0)
        for at, _ in self.processing.values():
            load[at] += 1
        address = min(load, key=lambda at: (load[at], at))
        holders = {dependency: list(self.who_has[dependency]) for dependency in self._needs(key)}
        run_id = self.next_run_id()
        self.processing[key] = (address, run_id)
        (self.loading.add if key in self.durable else self.loading.discard)(key)
        message = {"op": "compute", "key": key, "run_id": run_id, "dependencies": holders}
        task = self.books.tasks[key]
        self.send(address, {**message, "load": key in self.durable, "fails": task.fails})
