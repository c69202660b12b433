"""A whole cluster for one seed: who is there, what goes wrong, and how it ends."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final
from unittest import mock

from dask_resilience.failover.lease_record import HolderIdentity, HostFacts
from dask_resilience.failover.recovery import RecoveryPlan
from dask_resilience.sim.check import broken_promises
from dask_resilience.sim.client import Client
from dask_resilience.sim.faults import Faults
from dask_resilience.sim.history import History
from dask_resilience.sim.loop import Loop, Process
from dask_resilience.sim.network import Link, Network, NetworkTerms
from dask_resilience.sim.scheduler import Scheduler
from dask_resilience.sim.store import Disk, StoreTerms, StoreView
from dask_resilience.sim.strand import Strand
from dask_resilience.sim.virtual import VirtualThreading, VirtualTime
from dask_resilience.sim.worker import Worker
from dask_resilience.storage import journal_writer, leadership, lease_driver, retention, snapshots, takeover
from dask_resilience.types import Address

#: Longer than a takeover takes, with all of its graces.
_SETTLING_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What one run is like.

    Parameters
    ----------
    gentle
        Only schedulers and the store fail.
    schedulers, workers, clients
        How many of each.
    faults
        How many things go wrong.
    busy_seconds
        How long clients act and things go wrong.
    calm_seconds
        How long the cluster has at most to come to an end afterwards.
    ttl_seconds
        Of the lease.
    segment_bytes
        After how much a segment of the journal is full.
    durable
        Probability that a result gets a durable copy.
    snapshot_seconds
        How often a scheduler has a snapshot taken; None for never.
    """

    gentle: bool
    schedulers: int = 2
    workers: int = 3
    clients: int = 2
    faults: int = 5
    busy_seconds: float = 40.0
    calm_seconds: float = 600.0
    ttl_seconds: float = 4.0
    segment_bytes: int = 2000
    durable: float = 0.1
    snapshot_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one run ended.

    Parameters
    ----------
    seed
        Repeats it.
    digest
        Stands for all that happened.
    broken
        Descriptions of broken promises.
    reached
        How often each kind of thing happened.
    events
        How many events there were.
    trace
        The last lines of the trace.
    """

    seed: int
    digest: str
    broken: Sequence[str]
    reached: Counter[str]
    events: int
    trace: Sequence[str]


class Cluster:
    """All of one run.

    Parameters
    ----------
    seed
        Decides everything.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.loop = loop = Loop(seed)
        rng = loop.rng
        self.terms = Terms(
            gentle=seed % 2 == 0, schedulers=rng.randint(1, 3), workers=rng.randint(1, 4), clients=rng.randint(1, 3),
            faults=rng.randint(1, 8), segment_bytes=rng.choice((600, 2000, 1 << 20)),
            snapshot_seconds=rng.choice((None, 1.0, 4.0)),
        )  # fmt: skip
        self.history = History(gentle=self.terms.gentle)
        self.time = VirtualTime(loop)
        rough = 0.0 if self.terms.gentle else rng.choice((0.0, 0.002, 0.01))
        self.network = Network(loop, NetworkTerms(loss=rough, repetition=rng.choice((0.0, 0.1))))
        self._disk = Disk(loop)
        self._store_terms = StoreTerms(trouble=rng.choice((0.0, 0.0, 0.03)))
        self.durable: dict[str, None] = {}
        self._scheduler_numbers = iter(range(1, 1_000_000))
        self._schedulers: dict[int, Scheduler] = {}
        self._numbers: dict[Process, int] = {}
        #: Processes that schedulers started.
        self._helpers: dict[Process, None] = {}
        self._workers: dict[Address, Worker] = {}
        self._clients: dict[str, Client] = {}
        #: Frees that were sent and have not arrived: (worker, key).
        self._frees: Counter[tuple[Address, str]] = Counter()
        #: Messages about a key that a worker sent and that have not arrived.
        self._news: Counter[tuple[Link, str]] = Counter()
        self._over = False
        self.faults = Faults(self, count=self.terms.faults)

    def run(self) -> Outcome:
        """Run to the end and judge. What is raised on the way breaks a promise, too."""
        with self._stand_ins():
            try:
                self._live()
            except Exception as error:  # noqa: BLE001 -- whatever the code under simulation raises is a finding
                place = traceback.extract_tb(error.__traceback__)[-1]
                self.breach("no_crash", f"{error!r} at {place.name}, line {place.lineno} of {place.filename}")
            self._end_all()
        return Outcome(
            seed=self.seed, digest=self.loop.digest(), broken=broken_promises(self.history),
            reached=self.history.reached, events=self.loop.events, trace=tuple(self.loop.trace),
        )  # fmt: skip

    def _live(self) -> None:
        for number in range(self.terms.schedulers):
            self._start_scheduler(f"host{number}")
        for number in range(self.terms.workers):
            self._start_worker(f"worker{number}")
        for number in range(self.terms.clients):
            name = f"client{number}"
            process = Process(self.loop, name=name, host=name)
            self._clients[name] = Client(self, process, operations=self.loop.rng.randint(5, 25))
        self.loop.run(until_seconds=self.terms.busy_seconds)
        self._calm_down()
        # Whoever thinks that all is well may yet hear that it is not.
        self.loop.run(until_seconds=self.loop.now_seconds + _SETTLING_SECONDS)
        while not self._quiet() and self.loop.now_seconds < self.terms.busy_seconds + self.terms.calm_seconds:
            self.loop.run(until_seconds=self.loop.now_seconds + 5.0)
        self._look_at_the_end()

    def _end_all(self) -> None:
        """Unwind every strand: nothing of this run outlives it."""
        self._over = True
        for process in [*(scheduler.process for scheduler in self._schedulers.values()), *self._helpers]:
            process.kill()
        self.loop.run(until_seconds=self.loop.now_seconds)

    @contextmanager
    def _stand_ins(self) -> Iterator[None]:
        """Put virtual time, threads and failpoints into the code under simulation."""
        threads = VirtualThreading(self._present_process)
        with ExitStack() as stack:
            for module, name, stand_in in (
                (journal_writer, "threading", threads),
                (journal_writer, "time", self.time),
                (journal_writer, "failpoint", self.faults.passed),
                (lease_driver, "threading", threads),
                (lease_driver, "look_up", self._look_up),
                (leadership, "threading", threads),
                (takeover, "failpoint", self.faults.passed),
                (snapshots, "failpoint", self.faults.passed),
                (retention, "failpoint", self.faults.passed),
            ):
                stack.enter_context(mock.patch.object(module, name, stand_in))
            yield

    def _present_process(self) -> Process:
        strand = Strand.current()
        process = self.loop.acting if strand is None else strand.process
        assert process is not None, "somebody acts"
        return process

    # Who is there.

    def view(self, process: Process) -> StoreView:
        """Give a process its view of the store. Members only read, and at once: their trouble is the network's."""
        terms = self._store_terms if process in self._numbers or process in self._helpers else StoreTerms()
        return StoreView(self._disk, process=process, terms=terms, reaches=self.network.reaches)

    def _start_scheduler(self, host: str) -> None:
        number = next(self._scheduler_numbers)
        process = Process(self.loop, name=f"scheduler{number}@{host}", host=host)
        self._numbers[process] = number
        process.on_death.append(lambda: self._restart(number, host))
        self._schedulers[number] = Scheduler(self, process)

    def start_helper(self, name: str, parent: Process) -> Process:
        """Start a process beside another one. It outlives it for a moment, until it notices."""
        helper = Process(self.loop, name=name, host=parent.host)
        self._helpers[helper] = None
        parent.on_death.append(lambda: self.loop.later(self.loop.between(0.0, 3.0), helper.kill))
        return helper

    def _restart(self, number: int, host: str) -> None:
        del self._schedulers[number]
        if not self._over:
            self.loop.later(self.loop.between(0.1, 4.0), self._start_scheduler, host)

    def _start_worker(self, name: str) -> None:
        process = Process(self.loop, name=name, host=name)
        self._workers[name] = Worker(self, process)

    def identity(self, process: Process) -> HolderIdentity:
        """Tell processes of schedulers apart."""
        number = self._numbers[process]
        return HolderIdentity(host=process.host, boot_id=process.host, pid_namespace="sim", pid=number, started_ticks=1)

    def _look_up(self, pid: int) -> HostFacts:
        """Tell what the host of the present process knows about a pid."""
        host = self._present_process().host
        found = self._schedulers.get(pid)
        started = 1 if found is not None and found.process.host == host else None
        return HostFacts(host=host, boot_id=host, pid_namespace="sim", pid=pid, started_ticks=started)

    def living_workers(self) -> list[Worker]:
        """List the workers that are alive."""
        return [worker for worker in self._workers.values() if worker.process.alive]

    def leader_process(self) -> Process | None:
        """Find the process of an open scheduler, or of any."""
        ranked = sorted(self._schedulers.values(), key=lambda found: (not found.open, self._numbers[found.process]))
        return ranked[0].process if ranked else None

    def standby_process(self) -> Process | None:
        """Find the process of a scheduler that does not serve."""
        waiting = [found.process for found in self._schedulers.values() if not found.open]
        return self.loop.rng.choice(waiting) if waiting else None

    def some_worker(self) -> Process | None:
        """Draw a living worker."""
        living = self.living_workers()
        return self.loop.rng.choice(living).process if living else None

    def some_client(self) -> Process | None:
        """Draw a living client."""
        living = [client.process for client in self._clients.values() if client.process.alive]
        return self.loop.rng.choice(living) if living else None

    def member_hosts(self) -> list[str]:
        """List the hosts of members."""
        return [*self._workers, *self._clients]

    def scheduler_hosts(self) -> list[str]:
        """List the hosts of schedulers."""
        return [f"host{number}" for number in range(self.terms.schedulers)]

    def end(self, process: Process, *, crash: bool) -> None:
        """Kill a process, or let its whole host lose what it had not synced."""
        if crash:
            # Every scheduler of the host dies with it.
            for found in [*(s.process for s in self._schedulers.values()), *self._helpers]:
                if found.host == process.host:
                    found.kill()
            self._disk.crash(process.host)
        process.kill()

    # What the invariants want to know.

    def breach(self, name: str, what: str) -> None:
        """Note that something is wrong by itself."""
        self.loop.note("BREACH", name, what)
        self.history.breaches.append((name, what))

    def planned(self, plan: RecoveryPlan) -> None:
        """Count what plans contain."""
        for field in (
            "adopt_erred",
            "adopt_memory",
            "load",
            "lost",
            "adopt_running",
            "report_erred",
            "recompute",
            "forget",
        ):
            self.history.reached[f"plan.{field}"] += len(getattr(plan, field))

    def computing(self, scheduler: Scheduler, address: Address, key: str) -> None:
        """Look whether what is computed was there: a worker that this scheduler knows has it, or runs it."""
        self.loop.note(scheduler.process, "computes", key, "at", address)
        for name in scheduler.workers:
            worker = self._workers[name]
            link = scheduler.workers[name]
            # What is on its way in either direction, nobody can know yet.
            under_way = self._frees[name, key] or self._news[link, key]
            fresh = worker.process.alive and link is worker.link and not link.broken and not under_way
            if fresh and key in worker.memory:
                self.breach("no_result_again", f"{key} is computed at {address}, and {name} has it")
            if fresh and key in worker.running:
                self.breach("no_run_twice", f"{key} is computed at {address}, and {name} runs it")

    def freeing(self, scheduler: Scheduler, address: Address, keys: Sequence[Any]) -> None:
        """Count a free that is under way."""
        if not scheduler.workers[address].broken:
            for key in keys:
                self._frees[address, key] += 1

    def freed(self, worker: Worker, key: str) -> None:
        """Count a free that arrived."""
        self._frees[worker.process.name, key] -= 1

    def news_sent(self, worker: Worker, key: str) -> None:
        """Count a message of a worker about a key."""
        if worker.link is not None and not worker.link.broken:
            self._news[worker.link, key] += 1

    def news_arrived(self, link: Link, key: str) -> None:
        """Count a message of a worker about a key that arrived."""
        self._news[link, key] -= 1

    def really_holds(self, address: Address, key: str) -> bool:
        """Tell whether a worker has a result and will keep it."""
        return key in self._workers[address].memory and not self._frees[address, key]

    def fetch(self, worker: Worker, address: Address, key: str) -> bool:
        """Tell whether a worker can copy a result from another."""
        there = self._workers[address]
        return there.process.alive and key in there.memory and self.network.reaches(worker.process, there.process)

    def run_started(self, worker: Worker, key: str) -> None:
        """Count a run of a task's own function.

        One that starts before the joining of its worker or client is durable does not count: a scheduler that takes
        over then knows nothing of them, waits for neither, and may open before they come.
        """
        self.loop.note(worker.process, "runs", key)
        client = key.partition("-")[0]
        scheduler = worker.link.peer(worker) if worker.link is not None else None
        if isinstance(scheduler, Scheduler) and not scheduler.expects_for_good(worker.process.name, client):
            self.history.reached["run before a joining was durable"] += 1
        else:
            self.history.runs[key] += 1

    def result_made(self, key: str) -> None:
        """Draw whether a result gets a durable copy."""
        if self.loop.chance(self.terms.durable):
            self.durable[key] = None

    # The end.

    def _calm_down(self) -> None:
        """Let nothing go wrong any more, and see to it that somebody is there."""
        self.loop.note("calm")
        self.network.heal()
        self.network.terms = NetworkTerms()
        self.faults.disarm()
        for scheduler in self._schedulers.values():
            scheduler.process.proceed()
        for worker in self._workers.values():
            worker.process.proceed()
        if not self.living_workers():
            self._start_worker("replacement")

    def _quiet(self) -> bool:
        living = [client for client in self._clients.values() if client.process.alive]
        return not any(client.outbox or "pending" in client.futures.values() for client in living)

    def _look_at_the_end(self) -> None:
        there = {key for worker in self.living_workers() for key in worker.memory}
        for name, client in self._clients.items():
            if client.process.alive:
                self.history.endings += [(name, key, state, key in there) for key, state in client.futures.items()]
                self.history.unacked.append((name, list(client.outbox)))
        self.history.reached["epochs"] += len(self.history.recoveries)
        self.history.reached["acks"] += len(self.history.acks)
        self.history.reached["runs"] += sum(self.history.runs.values())
