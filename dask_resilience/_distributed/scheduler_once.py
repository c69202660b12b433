"""Calls that may come twice and count once, on a live scheduler."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from distributed.protocol.pickle import loads

from dask_resilience.journal.calls import Call, Calls


@dataclass(slots=True)
class Turn:
    """What the code of Dask runs for: a numbered call, and what is left of what it was handed before."""

    call: Call
    left: deque[Any] = field(default_factory=deque)


#: The numbered call for which this task of the event loop runs.
turn: ContextVar[Turn | None] = ContextVar("turn", default=None)


def fields_of_turn() -> dict[str, Any]:
    """The numbered call that runs here, as records have it."""
    mine = turn.get()
    return {} if mine is None else mine.call._asdict()


class Once:
    """Runs each numbered call once.

    A call that is made again while its first copy is still waiting waits with it. One that had its effect is answered
    from memory; one that collects several things goes on collecting.
    """

    def __init__(self) -> None:
        self.calls: Calls[Any] = Calls()
        self._running: dict[tuple[str, int], asyncio.Task[Any]] = {}

    def restore(self, calls: Calls[bytes]) -> None:
        """Bring back what the journal holds."""
        for call, items in calls:
            self.calls.note(call, *map(loads, items))

    def forget(self, client: str) -> None:
        """A client is gone for good: nothing more is handed to it."""
        self.calls.forget(client)
        self._abandon(client, None)

    def close(self) -> None:
        """End all that is waiting."""
        for running in list(self._running.values()):
            running.cancel()

    def note(self, *items: Any) -> None:
        """The call that runs here, if it has a number, has had its effect and was handed `items` more."""
        if (mine := turn.get()) is not None:
            self.calls.note(mine.call, *items)

    async def run(self, request: Sequence[Any] | None, function: Callable[[], Any], *, collects: bool = False) -> Any:
        """Run `function` for the call that `request` names.

        Parameters
        ----------
        request
            Client, number and settled, or None for a call that is not made again.
        function
            What does it, a coroutine function or a plain one.
        collects
            It is run again although it had its effect, and finds what it was handed in its `turn`.
        """
        if request is None:
            return await _result(function)
        call = Call(*request)
        self.calls.hear(call)
        self._abandon(call.client, call.settled)
        if self.calls.is_over(call):
            raise LookupError(f"nobody waits for call {call.number} of {call.client} any more")
        running = self._running.get(call[:2])
        if running is None:
            if not collects and self.calls.counted(call):
                return None
            running = asyncio.create_task(self._run(call, function))
            self._running[call[:2]] = running
        # If this copy is cut off, the task must go on for the next one.
        await asyncio.wait({running})
        if running.cancelled():
            raise LookupError(f"nobody waits for call {call.number} of {call.client} any more")
        return running.result()

    async def _run(self, call: Call, function: Callable[[], Any]) -> Any:
        turn.set(Turn(call, deque(self.calls.handed(call))))
        try:
            return await _result(function)
        finally:
            del self._running[call[:2]]

    def _abandon(self, client: str, settled: int | None) -> None:
        """Nobody waits for these: they must not take anything any more."""
        for (caller, number), running in list(self._running.items()):
            if caller == client and (settled is None or number < settled):
                running.cancel()


async def _result(function: Callable[[], Any]) -> Any:
    result = function()
    return await result if asyncio.iscoroutine(result) else result
