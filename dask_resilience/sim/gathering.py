"""The time between a scheduler's first words to its members and its opening: who came, and with what."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from dask_resilience.failover.barrier import (
    Barrier,
    BarrierTerms,
    Event,
    MemberDropped,
    MemberExpected,
    MemberKind,
    MemberProvenGone,
    MemberReturned,
    Open,
    TimePassed,
)
from dask_resilience.sim.loop import Process
from dask_resilience.types import Address
from dask_resilience.views import Inventory


class Gathering:
    """Drives the barrier, and keeps inventories true until they are planned with.

    Parameters
    ----------
    process
        The scheduler's.
    terms
        The graces.
    refuses
        Tells whether an address refuses connections.
    on_open
        Called once, when the barrier opens.
    """

    def __init__(
        self,
        process: Process,
        *,
        terms: BarrierTerms,
        refuses: Callable[[Process, Address], bool],
        on_open: Callable[[], None],
    ) -> None:
        self.inventories: dict[Address, Inventory] = {}
        self._process = process
        self._refuses = refuses
        self._on_open = on_open
        self._barrier = Barrier(terms)
        self._opened = False

    def begin(self, *, workers: Iterable[Address], clients: Iterable[str]) -> None:
        """Expect members, and let time count."""
        for address in workers:
            self._barrier.step(MemberExpected(kind=MemberKind.WORKER, member=address))
            self._process.later(self._process.loop.between(0.1, 1.0), self._probe, address)
        for client in clients:
            self._barrier.step(MemberExpected(kind=MemberKind.CLIENT, member=client))
        self._time_passed()

    def worker_returned(self, inventory: Inventory) -> None:
        """Note what a worker holds."""
        self.inventories[inventory.worker] = inventory
        self._step(MemberReturned(kind=MemberKind.WORKER, member=inventory.worker))

    def worker_dropped(self, address: Address) -> None:
        """Wait for a worker again."""
        self.inventories.pop(address, None)
        self._step(MemberDropped(kind=MemberKind.WORKER, member=address))

    def client_returned(self, client: str) -> None:
        """Note that a client said what it wants."""
        self._step(MemberReturned(kind=MemberKind.CLIENT, member=client))

    def client_dropped(self, client: str) -> None:
        """Wait for a client again."""
        self._step(MemberDropped(kind=MemberKind.CLIENT, member=client))

    def amend(self, address: Address, key: str, run_id: int | None, what: str) -> None:
        """Something happened on a worker between its return and the plan: its inventory follows."""
        was = self.inventories[address]
        memory, running, erred = dict(was.memory), dict(was.running), dict(was.erred)
        running.pop(key, None)
        if what == "memory":
            memory[key] = 8
        elif what == "erred" and run_id is not None:
            erred[key] = run_id
        self.inventories[address] = Inventory(worker=address, memory=memory, running=running, erred=erred)

    def _step(self, event: Event) -> None:
        if self._opened:
            return
        [action] = self._barrier.step(event)
        if isinstance(action, Open):
            self._opened = True
            self._process.loop.note(self._process, "opens without", *action.given_up_workers, *action.given_up_clients)
            self._on_open()
        else:
            self._process.later(action.until_seconds - self._process.loop.now_seconds, self._time_passed)

    def _time_passed(self) -> None:
        self._step(TimePassed(now_seconds=self._process.loop.now_seconds))

    def _probe(self, address: Address) -> None:
        if not self._opened and address not in self.inventories:
            if self._refuses(self._process, address):
                self._step(MemberProvenGone(kind=MemberKind.WORKER, member=address))
            self._process.later(1.0, self._probe, address)
