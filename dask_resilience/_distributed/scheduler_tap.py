"""Taps the inputs of a live scheduler for the journal.

An input is recorded *before* the scheduler's own code applies it, and scheduling does not wait. What the scheduler
does because of an input is not recorded, since a replay does it again; only what a replay cannot work out is
(`scheduler_outcomes`).

Nothing here runs for a task that is submitted, runs and succeeds, apart from its graph's one record.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import wraps
from time import time
from typing import Any

from distributed.protocol.pickle import dumps
from distributed.scheduler import Scheduler, TaskState

from dask_resilience._distributed.scheduler_ledger import Ledger
from dask_resilience._distributed.scheduler_outcomes import Outcomes
from dask_resilience._distributed.task_notes import TaskNotes
from dask_resilience.failpoints import failpoint
from dask_resilience.journal import records
from dask_resilience.types import Key

_FIRE_AND_FORGET = "fire-and-forget"


class Tap:
    """Hangs between a scheduler and the messages that reach it.

    Parameters
    ----------
    scheduler
        A live scheduler; some of its bound attributes and handlers are replaced.
    ledger
        Takes the records.
    retried
        The last run of a task whose failure was answered with a retry, from the replay.
    first_runs
        The first run that counts of a task whose key had another meaning before, from the replay.
    """

    def __init__(self, scheduler: Scheduler, ledger: Ledger, *, retried: TaskNotes, first_runs: TaskNotes) -> None:
        self.scheduler: Any = scheduler
        self.ledger = ledger
        self.outcomes = Outcomes(scheduler, ledger.record, retried)
        self.first_runs = first_runs

    def attach(self) -> None:
        """Put the tap in."""
        s = self.scheduler
        stream = s.stream_handlers
        stream["update-graph"] = self._update_graph(stream["update-graph"])
        stream["client-desires-keys"] = self._client_desires_keys(stream["client-desires-keys"])
        stream["client-releases-keys"] = self._client_releases_keys(stream["client-releases-keys"])
        stream["cancel-keys"] = self._cancel_keys(stream["cancel-keys"])

        s.client_desires_keys = self._owner_desires(s.client_desires_keys)
        s.client_releases_keys = self._owner_releases(s.client_releases_keys)
        s._client_releases_keys = self._released_by_completion(s._client_releases_keys)
        s.update_data = self._update_data(s.update_data)
        stream["update-data"] = s.update_data
        s.handlers["update_data"] = self.ledger.durable_call(s.update_data)
        s.handlers["scatter"] = self.ledger.durable_call(s.handlers["scatter"])
        s.handlers["resilience_committed"] = self.ledger.committed
        s.handlers["restart"] = self._restart(s.handlers["restart"])
        s.set_restrictions = self._set_restrictions(s.set_restrictions)
        s.handlers["set_restrictions"] = s.set_restrictions
        for kind in ("scheduler", "worker", "nanny"):
            register, unregister = f"register_{kind}_plugin", f"unregister_{kind}_plugin"
            s.handlers[register] = self._plugin_registered(kind, s.handlers[register])
            s.handlers[unregister] = self._plugin_unregistered(kind, s.handlers[unregister])
        self.outcomes.attach()

    # Stream messages of clients

    def _update_graph(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        async def update_graph(client: str, seq: int = 0, origin: str = "", **msg: Any) -> None:
            if self.ledger.seen(client, seq):
                self.ledger.ack_again(client, seq)
                return
            await self.ledger.room()
            failpoint("graph.before-record")
            first_run = next(TaskState._run_id_iterator)
            record = graph_record(client, seq, msg, first_run)
            self.ledger.record(record, client=client, seq=seq)
            failpoint("graph.after-record")
            msg["stimulus_id"] = record.stimulus_id
            again = msg.pop("again", ())
            reborn = self._let_go(client, again, record.stimulus_id) if again else ()
            if msg.get("actors"):
                self.outcomes.expect_actors()
            await stock(client=client, **msg)
            if reborn:
                note_first_run(self.scheduler, reborn, first_run, self.first_runs)
            failpoint("graph.after-apply")

        return update_graph

    def _let_go(self, client: str, keys: list[Key], stimulus_id: str) -> list[Key]:
        """A key that its client uses again was let go before, also where that message was lost with a link.

        Returns those that nobody else holds, and that mean something new from now on.
        """
        held = self.scheduler.clients.get(client)
        tasks = self.scheduler.tasks
        if held is not None and any((ts := tasks.get(key)) is not None and ts in held.wants_what for key in keys):
            self.scheduler.client_releases_keys(keys=keys, client=client, stimulus_id=stimulus_id)
        return [key for key in keys if key not in tasks]

    def _client_desires_keys(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def client_desires_keys(keys: list[Key], client: str, seq: int = 0, origin: str = "") -> None:
            if seq and self.ledger.seen(origin, seq):
                self.ledger.ack_again(origin, seq)
                return
            if seq or not self._wants_all(client, keys):
                record = records.KeysWanted(client=client, seq=seq, keys=tuple(keys), origin=origin)
                self.ledger.record(record, client=origin, seq=seq)
            stock(keys=keys, client=client)

        return client_desires_keys

    def _wants_all(self, client: str, keys: Iterable[Key]) -> bool:
        cs = self.scheduler.clients.get(client)
        tasks = self.scheduler.tasks
        return cs is not None and all((ts := tasks.get(key)) is not None and ts in cs.wants_what for key in keys)

    def _client_releases_keys(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def client_releases_keys(keys: list[Key], client: str, stimulus_id: str | None = None) -> None:
            self.ledger.release(client, keys)
            stock(keys=keys, client=client, stimulus_id=stimulus_id)

        return client_releases_keys

    def _cancel_keys(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def cancel_keys(
            keys: list[Key], client: str, force: bool, reason: str, msg: str, seq: int = 0, origin: str = ""
        ) -> None:
            if self.ledger.seen(client, seq):
                self.ledger.ack_again(client, seq)
                return
            record = records.KeysCancelled(client=client, seq=seq, keys=tuple(keys), force=force)
            self.ledger.record(record, client=client, seq=seq)
            stock(keys=keys, client=client, force=force, reason=reason, msg=msg)

        return cancel_keys

    # What owners other than clients do: variables, queues and published datasets hold keys too.

    def _owner_desires(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def client_desires_keys(keys: list[Key], client: str) -> None:
            owner = client not in self.scheduler.client_comms and client != _FIRE_AND_FORGET
            if keys and owner and not self._wants_all(client, keys):
                self.ledger.record(records.KeysWanted(client=client, seq=0, keys=tuple(keys)))
            stock(keys=keys, client=client)

        return client_desires_keys

    def _owner_releases(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def client_releases_keys(keys: list[Key], client: str, stimulus_id: str | None = None) -> None:
            if client not in self.scheduler.client_comms and keys:
                self.ledger.release(client, keys)
            stock(keys=keys, client=client, stimulus_id=stimulus_id)

        return client_releases_keys

    def _released_by_completion(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """A task that was fired and forgotten is let go by its completion, which is not recorded otherwise."""

        def _client_releases_keys(keys: list[Key], cs: Any, recommendations: dict[Key, str]) -> None:
            if cs.client_key == _FIRE_AND_FORGET:
                self.ledger.release(_FIRE_AND_FORGET, keys)
            stock(keys=keys, cs=cs, recommendations=recommendations)

        return _client_releases_keys

    # Calls

    def _update_data(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def update_data(*, who_has: Any, nbytes: dict[Key, int], client: str | None = None) -> None:
            sizes = {key: nbytes.get(key, -1) for key in who_has}
            self.ledger.record(records.DataScattered(client=client or "", nbytes=sizes))
            stock(who_has=who_has, nbytes=nbytes, client=client)

        return update_data

    def _restart(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        async def restart(*args: Any, **kwargs: Any) -> Any:
            for cs in list(self.scheduler.clients.values()):
                if cs.wants_what:
                    self.ledger.release(cs.client_key, [ts.key for ts in cs.wants_what])
            return await stock(*args, **kwargs)

        return restart

    def _set_restrictions(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def set_restrictions(worker: dict[Key, Any]) -> None:
            # P2P ties its outputs to workers and lets them go again; it does so anew after a failover.
            lasting = {
                key: (value,) if isinstance(value, str) else tuple(value or ())
                for key, value in worker.items()
                if not self._tied_by_shuffle(key)
            }
            if lasting:
                self.ledger.record(records.RestrictionsSet(workers=lasting))
            stock(worker)

        return set_restrictions

    def _tied_by_shuffle(self, key: Key) -> bool:
        ts = self.scheduler.tasks.get(key)
        return ts is not None and bool(ts.annotations) and "shuffle_original_restrictions" in ts.annotations

    def _plugin_registered(self, kind: Any, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        async def register(*args: Any, plugin: Any, name: str | None = None, **kwargs: Any) -> Any:
            result = await stock(*args, plugin=plugin, name=name, **kwargs)
            packed = plugin if isinstance(plugin, bytes) else dumps(plugin)
            self.ledger.record(records.PluginRegistered(kind=kind, name=name or "", plugin=packed))
            await self.ledger.committed()
            return result

        return register

    def _plugin_unregistered(self, kind: Any, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        async def unregister(*args: Any, name: str, **kwargs: Any) -> Any:
            result = stock(*args, name=name, **kwargs)
            if asyncio.iscoroutine(result):
                result = await result
            self.ledger.record(records.PluginUnregistered(kind=kind, name=name))
            await self.ledger.committed()
            return result

        return unregister


def note_first_run(scheduler: Any, keys: Iterable[Key], first_run: int, first_runs: TaskNotes) -> None:
    """Runs with a smaller id belong to what these keys meant before."""
    for key in keys:
        if (ts := scheduler.tasks.get(key)) is not None:
            first_runs[ts] = first_run


def graph_record(client: str, seq: int, msg: dict[str, Any], first_run: int | None) -> records.GraphSubmitted:
    """The record of an ``update-graph`` message, whose graph stays serialized as it came.

    `first_run` is smaller than the run ids of all tasks that the graph makes, and larger than those before it; None
    where nobody knows, because a scheduler that is gone may have made them.
    """
    graph = msg["expr_ser"]
    rest = {name: value for name, value in msg.items() if name not in ("op", "expr_ser", "keys", "seq", "origin")}
    rest["header"] = graph.header
    # Graphs that came further apart than their `fifo_timeout` run one after the other, after a replay as well.
    rest["received"] = time()
    if first_run is not None:
        rest["first_run"] = first_run
    return records.GraphSubmitted(
        client=client,
        seq=seq,
        stimulus_id=msg.get("stimulus_id") or f"update-graph-{client}-{seq}",
        keys=tuple(msg["keys"]),
        frames=tuple(graph.frames),
        rest=dumps(rest),
    )


def record_of(client: str, msg: dict[str, Any]) -> records.Record:
    """The record of a message that a client kept because nobody had acked it."""
    if msg["op"] == "update-graph":
        # A key that is used again must not get an old result, so its runs begin now, perhaps once more.
        return graph_record(client, msg["seq"], msg, next(TaskState._run_id_iterator) if msg.get("again") else None)
    if msg["op"] == "cancel-keys":
        return records.KeysCancelled(
            client=client, seq=msg["seq"], keys=tuple(msg["keys"]), force=bool(msg.get("force"))
        )
    return records.KeysWanted(client=msg.get("client", client), seq=msg["seq"], keys=tuple(msg["keys"]), origin=client)
