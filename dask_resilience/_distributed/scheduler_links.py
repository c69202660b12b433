"""A worker whose link breaks while the scheduler lives.

Stock takes a broken link for the worker's death. Here the worker stays a member for a moment, paused, unless its
address refuses connections: it is about to register again, as a new member with an inventory. Then the old membership
ends and the new one begins *in one turn of the event loop*, and what the old one held is not given up in between:

* a task that is being removed with the old membership and that the worker still has is set aside,
* the new membership takes what it brought, as any late worker does,
* and what is left goes the way that stock would have sent it.

Should anything suspend between the two, a plugin that waits for instance, the rest is settled before the next turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic, time
from typing import Any

from distributed.core import Status

from dask_resilience._distributed.inventory import Holdings
from dask_resilience._distributed.rpc import is_refused
from dask_resilience.types import Address, Key

#: How the scheduler's stimuli begin that say: the link is broken, and nothing else is known.
_LINK_BROKE = ("handle-worker-cleanup-", "worker-send-comm-fail-", "send-all-comm-fail-")
_PROBE_SECONDS = 0.1


class Links:
    """Knows which members may come back, and waits for them.

    Parameters
    ----------
    scheduler
        A live scheduler.
    grace_seconds
        How long a worker that is not provably gone may take to register again. It usually takes a few hundredths of a
        second; where hosts vanish without a word, this much is lost once.
    """

    def __init__(self, scheduler: Any, *, grace_seconds: float) -> None:
        self.scheduler = scheduler
        self.grace_seconds = grace_seconds
        #: Workers that register again by themselves.
        self.returning: set[Address] = set()
        self._awaited: dict[Address, Any] = {}

    async def keeps(self, address: Address, stimulus_id: str) -> bool:
        """Whether the removal of a worker is off: it came back, or somebody waits for it already."""
        if not stimulus_id.startswith(_LINK_BROKE):
            return False
        ws = self.scheduler.workers.get(address)
        if ws is None:
            return True
        stream = self.scheduler.stream_comms[address]
        if stream.comm is None or not stream.comm.closed():
            return True  # that was the link of an older membership
        # One that closes has said so before.
        leaves = ws.status in (Status.closing, Status.closed)
        if leaves or address not in self.returning or self.scheduler.status != Status.running:
            return False
        if self._awaited.get(address) is ws:
            return True
        self._awaited[address] = ws
        try:
            return await self._comes_back(ws)
        finally:
            if self._awaited.get(address) is ws:
                del self._awaited[address]

    async def _comes_back(self, ws: Any) -> bool:
        s = self.scheduler
        s.handle_worker_status_change("paused", ws, f"resilience-link-broke-{time()}")
        deadline = monotonic() + self.grace_seconds
        while monotonic() < deadline and s.status == Status.running:
            if await is_refused(ws.address, connection_args=s.connection_args):
                break
            if s.workers.get(ws.address) is not ws:
                return True
            await asyncio.sleep(_PROBE_SECONDS)
        return s.workers.get(ws.address) is not ws


class Handover:
    """What the old membership of a worker held, until its new one has taken what it brought.

    Parameters
    ----------
    scheduler
        A live scheduler.
    held
        What the worker brings.
    """

    def __init__(self, scheduler: Any, held: Holdings) -> None:
        self.scheduler = scheduler
        self._held = held
        self._aside: dict[Key, str] = {}

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Within, the first transitions are those of the removal."""
        s = self.scheduler
        stock = s.transitions

        def transitions(recommendations: dict[Key, str], stimulus_id: str) -> None:
            s.transitions = stock
            stock(self._rest(recommendations, stimulus_id), stimulus_id)

        s.transitions = transitions
        # Runs before anything else does, unless this turn goes on until the new membership begins.
        asyncio.get_running_loop().call_soon(self.settle)
        try:
            yield
        finally:
            s.transitions = stock

    def _rest(self, recommendations: dict[Key, str], stimulus_id: str) -> dict[Key, str]:
        held = self._held
        rest: dict[Key, str] = {}
        for key, finish in recommendations.items():
            ts = self.scheduler.tasks[key]
            if ts.state == "memory" and key in held.memory and (not ts.actor or key in held.actors):
                self._aside[key] = finish
            elif ts.state == "processing" and (key in held.memory or key in held.running or key in held.erred):
                follow, _, _ = self.scheduler._transition(key, finish, stimulus_id)
                if follow.get(key) == "waiting":
                    del follow[key]
                    self._aside[key] = "waiting"
                rest.update(follow)
            else:
                rest[key] = finish
        return rest

    def settle(self) -> None:
        """The new membership has what it brought: the rest goes on without it."""
        aside, self._aside = self._aside, {}
        recommendations: dict[Key, str] = {}
        for key, finish in aside.items():
            ts = self.scheduler.tasks.get(key)
            if ts is None:
                continue
            if ts.state == "memory" and not ts.who_has:
                recommendations[key] = finish
            elif ts.state == "memory":
                # What was given back while this result had no holder waits for it.
                for dependent in ts.waiters or ():
                    if dependent.state == "waiting" and ts in dependent.waiting_on:
                        dependent.waiting_on.discard(ts)
                        if not dependent.waiting_on:
                            recommendations[dependent.key] = "processing"
            elif ts.state == "released" and (ts.waiters or ts.who_wants):
                recommendations[key] = "waiting"
        if recommendations:
            self.scheduler.transitions(recommendations, f"resilience-handover-{time()}")
