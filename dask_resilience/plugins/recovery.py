"""What happens between the replay of the journal and the first call that is served."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import time
from typing import Any

from distributed.scheduler import Scheduler

from dask_resilience._distributed import scheduler_adopt
from dask_resilience._distributed.scheduler_clients import Clients, Joining
from dask_resilience._distributed.scheduler_queues import QUEUE_MESSAGES
from dask_resilience._distributed.scheduler_replay import Replay
from dask_resilience._distributed.scheduler_tap import Tap, record_of
from dask_resilience._distributed.scheduler_workers import Workers
from dask_resilience.failover.barrier import BarrierTerms
from dask_resilience.failpoints import failpoint
from dask_resilience.journal import records
from dask_resilience.plugins.gathering import Gathering
from dask_resilience.types import Key

logger = logging.getLogger("distributed.resilience")


class Recovery:
    """Gathers the members of a scheduler that took over, plans once, and lets everyone in.

    Parameters
    ----------
    scheduler
        The scheduler, filled by the replay.
    replay
        What the journal said.
    tap
        Takes what the journal must hear of it.
    workers, clients
        The members, attached.
    owners
        Whoever holds keys and is no client: variables, queues and published datasets.
    epoch
        Number of the reign that begins.
    terms
        How long to wait for whom.

    Attributes
    ----------
    outcome : dict
        What was adopted, for people; filled when all is enacted.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        replay: Replay,
        tap: Tap,
        workers: Workers,
        clients: Clients,
        owners: frozenset[str],
        epoch: int,
        terms: BarrierTerms,
    ) -> None:
        self._scheduler: Any = scheduler
        self._replay = replay
        self._tap = tap
        self._workers = workers
        self._clients = clients
        self._owners = owners
        self._epoch = epoch
        self._gathering = Gathering(
            terms,
            workers=replay.workers,
            clients={
                client: replay.client_workers.get(client) for client, resilient in replay.clients.items() if resilient
            },
            connection_args=scheduler.connection_args,
        )
        self.outcome: dict[str, Any] = {}

    def member_returned(self, member: str) -> None:
        """A worker's address or a client's id is back."""
        if member in self._workers.parked:
            self._gathering.worker_returned(member, nanny=self._workers.nannies.get(member) or None)
        else:
            self._gathering.client_returned(member)

    async def run(self, serve: Callable[[], None]) -> None:
        """Gather, plan and enact; then call `serve` in the turn of the event loop in which the last worker is in."""
        begun = time()
        scheduler_adopt.fence_run_ids(self._epoch)
        for name, plugin in (self._replay.scheduler_plugins | self._replay.loaded_modules).items():
            if name not in self._replay.scheduler_plugins:
                continue
            try:
                await Scheduler.register_scheduler_plugin(
                    self._scheduler, plugin=plugin, name=name or None, idempotent=True
                )
            except Exception:
                logger.exception("Scheduler plugin %s could not be started again", name)
        self._replay.read_again()
        opened = await self._gathering.wait()
        if opened.given_up_workers or opened.given_up_clients:
            logger.warning(
                "Opening without workers %s and clients %s", opened.given_up_workers, opened.given_up_clients
            )
        failpoint("recovery.after-gather")
        await self._hear_clients()
        failpoint("recovery.after-clients")
        self._enact(begun, serve)

    async def _hear_clients(self) -> None:
        """Apply what clients had sent and nobody acked, and let go of what nobody wants any more."""
        heard: dict[str, Joining] = {}
        # A client that joins, or joins again, while another one is heard is heard too.
        while unheard := {c: joining for c, joining in self._clients.joining.items() if heard.get(c) is not joining}:
            for client, joining in unheard.items():
                for sent in joining.outbox:
                    await asyncio.sleep(0)
                    self._apply_unacked(client, dict(sent))
                self._clients.restate(client, joining.wants)
            heard |= unheard
        # Owners that did not come back would never let go.
        known = {*self._replay.clients, *self._scheduler.clients}
        for client in known - {*heard, *self._owners, "fire-and-forget"}:
            if client not in self._scheduler.clients:
                # It wanted nothing, but would be waited for again.
                self._tap.ledger.record(records.ClientLeft(client=client))
                self._tap.ledger.forget_client(client)
            self._clients.forget(client)

    def _apply_unacked(self, client: str, msg: dict[str, Any]) -> None:
        seq = msg["seq"]
        if self._tap.ledger.seen(client, seq):
            self._tap.ledger.ack_again(client, seq)
            return
        if msg["op"] in QUEUE_MESSAGES:
            # The queues are there already, and record what becomes of them.
            self._scheduler.stream_handlers[msg.pop("op")](**{"client": client, **msg})
            return
        record = record_of(client, msg)
        self._tap.ledger.record(record, client=client, seq=seq)
        self._replay.apply(record)
        if msg.get("actors"):
            self._tap.outcomes.expect_actors()

    def _enact(self, begun: float, serve: Callable[[], None]) -> None:
        """In one turn of the event loop: plan, let the workers in, and serve."""
        holdings = self._workers.returned()
        for address in self._replay.workers:
            if address not in holdings:
                self._tap.ledger.record(records.WorkerLeft(address=address))
        scheduler_adopt.fence_shuffles(self._epoch, holdings.values())
        self._let_go_of_finished(holdings.values())
        scheduler_adopt.err_lost_actors(
            self._scheduler, self._replay.actors_made, holdings.values(), self._tap.ledger.record
        )
        plan = scheduler_adopt.plan(self._scheduler, holdings, self._tap, self._replay.born)
        failpoint("recovery.after-plan")
        adoption = scheduler_adopt.Adoption(self._scheduler, holdings, plan, self._tap)
        self.outcome = {
            "workers_back": len(holdings),
            "clients_back": len(self._clients.joining),
            "tasks_adopted_in_memory": len(plan.adopt_memory),
            "tasks_adopted_running": len(plan.adopt_running),
            "tasks_to_recompute": len(plan.recompute),
            "tasks_lost": len(plan.lost),
        }

        def enacted() -> None:
            adoption.finish()
            failpoint("recovery.before-serving")
            self.outcome["seconds_to_gather"] = round(time() - begun, 4)
            serve()

        self._workers.let_in(adoption, enacted)

    def _let_go_of_finished(self, holdings: Any) -> None:
        """A task that was fired, forgotten and finished must not run again because its release was not yet durable."""
        cs = self._scheduler.clients["fire-and-forget"]
        finished: dict[Key, int] = {}
        for held in holdings:
            for key, run_id in held.finished.items():
                finished[key] = max(run_id, finished.get(key, run_id))
        first_runs = self._tap.first_runs
        done = [
            ts.key
            for ts in cs.wants_what
            if finished.get(ts.key, -1) >= first_runs.get(ts, 0) and ts.who_wants == {cs} and not ts.dependents
        ]
        if done:
            self._scheduler.client_releases_keys(keys=done, client="fire-and-forget")
