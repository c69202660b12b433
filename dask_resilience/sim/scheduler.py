"""A scheduler: it waits for the lease, replays, gathers, plans, opens, and acks what is durable.

The takeover, the leadership and its keeper, the writer, the reader, the barrier and the plans are the real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from dask_resilience.errors import Fenced, StoreError
from dask_resilience.failover.barrier import BarrierTerms
from dask_resilience.failover.invariants import Facts, broken
from dask_resilience.failover.recovery import plan_late, plan_recovery
from dask_resilience.journal.records import (
    ClientJoined,
    DataScattered,
    EpochStarted,
    GraphSubmitted,
    KeysReleased,
    KeysWanted,
    Record,
    TaskErred,
    WorkerJoined,
    WorkerLeft,
)
from dask_resilience.sim.books import Books, pack_graph
from dask_resilience.sim.engine import Engine
from dask_resilience.sim.gathering import Gathering
from dask_resilience.sim.history import Ack, Recovery
from dask_resilience.sim.loop import Process
from dask_resilience.sim.network import Link, Message
from dask_resilience.sim.snapshots import Snapshots, read_all
from dask_resilience.sim.strand import Strand
from dask_resilience.sim.virtual import VirtualEvent
from dask_resilience.storage.journal_writer import JournalWriter
from dask_resilience.storage.leadership import LeaseKeeper
from dask_resilience.storage.takeover import Leadership, rule
from dask_resilience.types import Address, Key
from dask_resilience.views import Inventory

if TYPE_CHECKING:
    from dask_resilience.sim.cluster import Cluster

BEAT_SECONDS: Final = 1.0
GRACES: Final = BarrierTerms(worker_grace_seconds=10.0, client_grace_seconds=6.0)


class Scheduler:
    """One scheduler process, from its start to its death.

    Parameters
    ----------
    cluster
        Where it belongs.
    process
        Where it runs.
    """

    def __init__(self, cluster: Cluster, process: Process) -> None:
        self.cluster = cluster
        self.process = process
        self.workers: dict[Address, Link] = {}
        self.clients: dict[str, Link] = {}
        self.open = False
        self._listening = False
        self._store = cluster.view(process)
        self._books = Books()
        self._unacked: list[tuple[int, str, int]] = []
        self._told: dict[str, dict[str, str]] = {}
        #: LSN under which a member joined in this epoch.
        self._joined: dict[str, int] = {}
        self._leadership: Leadership
        self._writer: JournalWriter
        self._engine: Engine
        self._gathering: Gathering
        cluster.network.listen(self)
        self._in_strand(self._take_over)

    # Ruling. These run in strands, and come back to the process's events by `later`.

    def _in_strand(self, target: Callable[[], None]) -> None:
        def run() -> None:
            try:
                target()
            except (StoreError, Fenced) as error:
                self.process.loop.note(self.process, "gives up:", type(error).__name__)
                self.process.kill()

        Strand(self.process, run).start()

    def _take_over(self) -> None:
        leadership = rule(
            self._store,
            address=self.process.name,
            ttl_seconds=self.cluster.terms.ttl_seconds,
            cluster="sim",
            holder=self.cluster.identity(self.process),
            clock=self.cluster.time,
            stop=VirtualEvent(),  # type: ignore[arg-type]  # a stand-in
        )
        LeaseKeeper(leadership, on_lost=lambda _: self.process.kill()).start()
        records = tuple(read_all(self._store, leadership))
        self.process.later(0.0, self._replay, leadership, records)

    def _replay(self, leadership: Leadership, records: tuple[tuple[int, Record], ...]) -> None:
        self.process.loop.note(self.process, "rules epoch", leadership.epoch, "with", len(records), "records")
        self._leadership = leadership
        self.cluster.history.recoveries.append(
            Recovery(epoch=leadership.epoch, sealed=leadership.sealed, records=records)
        )
        for _, record in records:
            self._books.apply(record)
        run_ids = iter(range(leadership.epoch << 32, (leadership.epoch + 1) << 32))
        self._engine = Engine(
            books=self._books,
            next_run_id=lambda: next(run_ids),
            durable=self.cluster.durable,
            send=self._send_worker,
            fail=lambda key, blame: self._append(TaskErred(key=key, blame=blame, error=None)),
        )
        self._writer = JournalWriter(
            self._store,
            leadership,
            commit_interval_seconds=0.05,
            segment_bytes=self.cluster.terms.segment_bytes,
            on_durable=lambda lsn: self.process.later(0.0, self._durable, lsn),
            on_failure=self._writer_failed,
        )
        started = EpochStarted(
            epoch=leadership.epoch, cluster="sim", holder=self.process.name, versions={}, sealed=leadership.sealed
        )
        self._append(started)

    def _writer_failed(self, error: Exception) -> None:
        if isinstance(error, Fenced):
            self.process.kill()

    def _durable(self, lsn: int) -> None:
        if not self._listening:
            # The epoch has begun: now members may hear of it.
            self._listening = True
            self._in_strand(lambda: self._leadership.publish(self.process.name))
            self._gather()
        while self._unacked and self._unacked[0][0] <= lsn:
            place, client, seq = self._unacked.pop(0)
            self._ack(client, seq, place)

    def _ack(self, client: str, seq: int, lsn: int | None) -> None:
        if client in self.clients:
            self.cluster.history.acks.append(Ack(epoch=self._leadership.epoch, client=client, seq=seq, lsn=lsn))
            self._send_client(client, {"op": "ack", "seq": seq}, repeatable=True)

    def _append(self, record: Record) -> int:
        lsn = self._writer.append(record)
        self._books.apply(record)
        return lsn

    # Gathering.

    def _gather(self) -> None:
        self._beat()
        self._gathering = Gathering(
            self.process, terms=GRACES, refuses=self.cluster.network.refuses, on_open=self._plan
        )
        self._gathering.begin(workers=tuple(self._books.workers), clients=tuple(self._books.wants))

    def _plan(self) -> None:
        if not self._leadership.valid():
            self.process.later(0.1, self._plan)
            return
        wanted = self._books.wanted()
        facts = Facts(
            tasks=self._books.views(wanted),
            inventories=[self._gathering.inventories[address] for address in self.workers],
            durable=set(self.cluster.durable),
        )
        plan = plan_recovery(facts.tasks, facts.inventories, durable=facts.durable)
        self.cluster.planned(plan)
        for name in broken(facts, plan):
            self.cluster.breach("sound_plans", f"epoch {self._leadership.epoch}: {name}")
        for address in [address for address in self._books.workers if address not in self.workers]:
            self._append(WorkerLeft(address=address))
        self._engine.workers = dict.fromkeys(self.workers)
        self._engine.enact(plan)
        self.open = True
        Snapshots(self.cluster, self.process, self._leadership, lambda: self._writer.durable_lsn)
        self._settle()

    # Serving.

    def _settle(self) -> None:
        if not self.open:
            return
        if not self._leadership.valid():
            self.process.later(0.1, self._settle)
            return
        self._engine.settle()
        for client in self.clients:
            self._report(client)

    def _report(self, client: str) -> None:
        told, states = self._told.setdefault(client, {}), {}
        for key in self._books.wants.get(client, ()):
            state = self._state_for_client(key)
            if told.get(key) != state:
                told[key] = states[key] = state
        if states:
            self._send_client(client, {"op": "status", "states": states})

    def _state_for_client(self, key: str) -> str:
        if key not in self._books.tasks:
            self.cluster.breach("known_wants", f"{key} is wanted and unknown")
        if key in self._engine.who_has:
            return "finished"
        if key in self._books.erred:
            return "erred"
        return "lost" if key in self._engine.lost else "pending"

    def _beat(self) -> None:
        if self._leadership.valid():
            for link in (*self.workers.values(), *self.clients.values()):
                link.send(self, {"op": "beat"})
        self.process.later(BEAT_SECONDS, self._beat)

    def _send_worker(self, address: Address, message: dict[str, Any]) -> None:
        if message["op"] == "compute":
            self.cluster.computing(self, address, message["key"])
        elif message["op"] == "free":
            self.cluster.freeing(self, address, message["keys"])
        self.workers[address].send(self, message)

    def _send_client(self, client: str, message: dict[str, Any], *, repeatable: bool = False) -> None:
        if client in self.clients:
            self.clients[client].send(self, message, repeatable=repeatable)

    # Links.

    def accept(self, link: Link) -> bool:  # noqa: ARG002 -- any member is welcome
        """Take members once the epoch has begun."""
        return self._listening and self._leadership.valid()

    def receive(self, link: Link, message: Message) -> None:
        """Take a message, unless this scheduler must not act; then its link ends."""
        if not self._leadership.valid():
            link.close()
            return
        getattr(self, f"_on_{message['op']}")(link, message)
        self._settle()

    def expects_for_good(self, *members: str) -> bool:
        """Tell whether every successor will wait for these members: their joining is durable."""
        return all(self._joined.get(member, 0) <= self._writer.durable_lsn for member in members)

    def link_broken(self, link: Link) -> None:
        """Miss a member."""
        for client in [client for client, found in self.clients.items() if found is link]:
            del self.clients[client]
            self._told.pop(client, None)
            self._gathering.client_dropped(client)
        for address in [address for address, found in self.workers.items() if found is link]:
            del self.workers[address]
            if self.open:
                self._engine.remove_worker(address)
                if self._leadership.valid():
                    self._append(WorkerLeft(address=address))
            self._gathering.worker_dropped(address)
        self._settle()

    def _on_join_worker(self, link: Link, message: Message) -> None:
        inventory: Inventory = message["inventory"]
        address = inventory.worker
        if address in self.workers:
            self.link_broken(self.workers[address])  # its end comes later than its successor
        self.workers[address] = link
        if address not in self._books.workers:
            self._joined[address] = self._append(WorkerJoined(address=address, name=address, nanny=None))
        link.send(self, {"op": "welcome", "epoch": self._leadership.epoch})
        if not self.open:
            self._gathering.worker_returned(inventory)
            return
        self.cluster.history.reached["late worker"] += 1
        needed = self._engine.needed()
        states: dict[Key, str] = {key: self._engine.state(key, needed) for key in self._books.tasks}
        plan = plan_late(self._books.views(needed), states, inventory)
        self._engine.workers[address] = None
        self._engine.enact_late(address, plan)

    def _on_join_client(self, link: Link, message: Message) -> None:
        client = message["client"]
        self.clients[client] = link
        self._told.pop(client, None)
        link.send(self, {"op": "welcome", "epoch": self._leadership.epoch})
        if client not in self._books.wants:
            self._joined[client] = self._append(ClientJoined(client=client, resilient=True))
        # What was not acked first: it may need what the client has let go of since.
        for unacked in message["outbox"]:
            self._submit(unacked)
        released = [key for key in self._books.wants[client] if key not in message["wants"]]
        if released:
            self._append(KeysReleased(client=client, keys=tuple(released)))
        self._gathering.client_returned(client)

    def _on_graph(self, _link: Link, message: Message) -> None:
        self._submit({**message, "op": "graph"})

    def _on_scatter(self, _link: Link, message: Message) -> None:
        self._submit({**message, "op": "scatter"})

    def _submit(self, message: Message) -> None:
        client, seq, keys = message["client"], message["seq"], tuple(message["keys"])
        last = self._books.last_seq.get(client, 0)
        if seq <= last:
            self.cluster.history.reached["repeated message"] += 1
            if all((client, seq) != (c, s) for _, c, s in self._unacked):
                self._ack(client, seq, None)
            return
        if seq != last + 1:
            self.cluster.breach("messages_in_order", f"{client}/{seq} came after {last}")
        if message["op"] == "scatter":
            self._append(DataScattered(client=client, nbytes=dict.fromkeys(keys, 8)))
            lsn = self._append(KeysWanted(client=client, seq=seq, keys=keys))
            self._take_data(message["worker"], keys)
        else:
            lsn = self._append(
                GraphSubmitted(
                    client=client, seq=seq, stimulus_id="", keys=keys, frames=(), rest=pack_graph(message["tasks"])
                )
            )
        self._unacked.append((lsn, client, seq))

    def _take_data(self, address: Address, keys: tuple[str, ...]) -> None:
        if self.open and address in self.workers:
            for key in keys:
                if self.cluster.really_holds(address, key):
                    self._engine.who_has.setdefault(key, {})[address] = None

    def _on_release(self, _link: Link, message: Message) -> None:
        self._append(KeysReleased(client=message["client"], keys=tuple(message["keys"])))

    def _on_finished(self, link: Link, message: Message) -> None:
        self._from_worker(link, message, "memory")

    def _on_replica(self, link: Link, message: Message) -> None:
        self._from_worker(link, message, "memory")

    def _on_erred(self, link: Link, message: Message) -> None:
        self._from_worker(link, message, "erred")

    def _on_missing(self, link: Link, message: Message) -> None:
        self._from_worker(link, message, "missing")

    def _from_worker(self, link: Link, message: Message, what: str) -> None:
        address = next((address for address, found in self.workers.items() if found is link), None)
        if address is None:
            return
        key, run_id = message["key"], message.get("run_id")
        self.cluster.news_arrived(link, key)
        if not self.open:
            self.cluster.history.reached["inventory amended"] += 1
            self._gathering.amend(address, key, run_id, what)
        elif what == "memory":
            self._engine.finished(address, key, run_id)
        elif what == "erred":
            self._engine.erred(address, key, run_id)
        elif self._engine.processing.get(key) == (address, run_id):
            del self._engine.processing[key]
