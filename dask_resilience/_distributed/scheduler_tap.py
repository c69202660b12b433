"""Taps the inputs of a live scheduler for the journal, and tells clients what became durable.

An input is recorded *before* the scheduler's own code applies it, and scheduling does not wait. What the scheduler
does because of an input is not recorded, since a replay does it again; only what a replay cannot work out is: failures
of tasks, suspicion, retries that were used up.

Nothing here runs for a task that is submitted, runs and succeeds, apart from its graph's one record.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, MutableMapping
from functools import wraps
from time import time
from typing import Any, Protocol

from distributed.protocol.pickle import dumps
from distributed.scheduler import Scheduler, TaskState

from dask_resilience.failpoints import failpoint
from dask_resilience.journal import records
from dask_resilience.types import Key

logger = logging.getLogger("distributed.resilience")

_FIRE_AND_FORGET = "fire-and-forget"


class Log(Protocol):
    """What the tap needs of a journal writer."""

    @property
    def pending_bytes(self) -> int:
        """What waits for the disk."""

    def append(self, record: records.Record) -> int:
        """Queue `record`; its LSN is durable some time later."""

    def hurry(self) -> None:
        """Make it durable without gathering more."""


class Tap:
    """Hangs between a scheduler and the messages that reach it.

    Parameters
    ----------
    scheduler
        A live scheduler; some of its bound attributes and handlers are replaced.
    log
        Where records go.
    pending_limit_bytes
        More than this waiting for the disk, and clients' streams wait too.
    commit_interval_seconds
        How long releases may be gathered into one record.
    last_seq
        The last message of each client that the journal holds, from the replay.
    retried
        The last run of a task whose failure was answered with a retry, from the replay.
    first_runs
        The first run that counts of a task whose key had another meaning before, from the replay.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        log: Log,
        *,
        pending_limit_bytes: int,
        commit_interval_seconds: float,
        last_seq: dict[str, int],
        retried: MutableMapping[TaskState, int],
        first_runs: MutableMapping[TaskState, int],
    ) -> None:
        self.scheduler: Any = scheduler
        self.log = log
        self.last_seq = last_seq
        self.retried = retried
        self.first_runs = first_runs
        self._pending_limit_bytes = pending_limit_bytes
        self._commit_interval_seconds = max(commit_interval_seconds, 0.001)
        self._acks: deque[tuple[int, str, int]] = deque()
        self._acked: dict[str, int] = {}
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._releases: dict[str, list[Key]] = {}
        self._release_timer: asyncio.TimerHandle | None = None
        self._last_lsn = 0
        self._durable_lsn = 0
        self._room = asyncio.Event()
        self._detached = False
        self._expects_actors = False

    def attach(self) -> None:
        """Put the tap in."""
        s = self.scheduler
        stream = s.stream_handlers
        stream["update-graph"] = self._update_graph(stream["update-graph"])
        stream["client-desires-keys"] = self._client_desires_keys(stream["client-desires-keys"])
        stream["client-releases-keys"] = self._client_releases_keys(stream["client-releases-keys"])
        stream["cancel-keys"] = self._cancel_keys(stream["cancel-keys"])
        stream["task-erred"] = self._task_erred(stream["task-erred"])

        s.client_desires_keys = self._owner_desires(s.client_desires_keys)
        s.client_releases_keys = self._owner_releases(s.client_releases_keys)
        s._client_releases_keys = self._released_by_completion(s._client_releases_keys)
        s.update_data = self._update_data(s.update_data)
        stream["update-data"] = s.update_data
        s.handlers["update_data"] = self.durable_call(s.update_data)
        s.handlers["scatter"] = self.durable_call(s.handlers["scatter"])
        s.handlers["resilience_committed"] = self.committed
        s.handlers["restart"] = self._restart(s.handlers["restart"])
        s.set_restrictions = self._set_restrictions(s.set_restrictions)
        s.handlers["set_restrictions"] = s.set_restrictions
        for kind in ("scheduler", "worker", "nanny"):
            register, unregister = f"register_{kind}_plugin", f"unregister_{kind}_plugin"
            s.handlers[register] = self._plugin_registered(kind, s.handlers[register])
            s.handlers[unregister] = self._plugin_unregistered(kind, s.handlers[unregister])
        self._attach_transitions()

    def _attach_transitions(self) -> None:
        """Failures are rare, so only their rows of the table are replaced; all other transitions cost what they did."""
        s = self.scheduler
        table = dict(s._TRANSITIONS_TABLE)
        for start, finish in list(table):
            if finish == "erred":
                table[start, finish] = self._into_erred(table[start, finish])
            elif start == "erred" and finish == "released":
                table[start, finish] = self._out_of_erred(table[start, finish])
        s._TRANSITIONS_TABLE = table
        if any(ts.actor for ts in s.tasks.values()):
            self.expect_actors()

    def expect_actors(self) -> None:
        """Record from now on which actors come to be. Clusters without actors do not pay for it."""
        if self._expects_actors:
            return
        self._expects_actors = True
        s = self.scheduler
        rows = s._TRANSITIONS_TABLE.items()
        s._TRANSITIONS_TABLE = {
            row: self._into_memory(transition) if row[1] == "memory" else transition for row, transition in rows
        }

    def detach(self) -> None:
        """Record and ack nothing any more; what the scheduler does from now on is its end."""
        self._detached = True

    # Recording and acking

    def record(self, record: records.Record, *, client: str = "", seq: int = 0) -> int:
        """Append `record`, and once it is durable ack message `seq` of `client`."""
        if self._detached:
            return self._last_lsn
        if self._releases:
            self.flush_releases()
        lsn = self.log.append(record)
        self._last_lsn = lsn
        if seq:
            self.last_seq[client] = seq
            self._acks.append((lsn, client, seq))
        return lsn

    def record_at_once(self, record: records.Record) -> None:
        """Append what a successor should know although this scheduler may die in the next moment."""
        self.record(record)
        self.log.hurry()

    def ack_again(self, client: str, seq: int) -> None:
        """A message came twice: its ack may have been lost."""
        self._acks.append((self._last_lsn, client, seq))
        self.durable(self._durable_lsn)

    def durable(self, lsn: int) -> None:
        """Everything up to `lsn` is durable and was so before any fence."""
        self._durable_lsn = max(self._durable_lsn, lsn)
        acked: dict[str, int] = {}
        while self._acks and self._acks[0][0] <= self._durable_lsn:
            _, client, seq = self._acks.popleft()
            acked[client] = seq
        self._acked |= acked
        for client in acked:
            self.send_ack(client)
        while self._waiters and self._waiters[0][0] <= self._durable_lsn:
            waiter = self._waiters.popleft()[1]
            if not waiter.done():
                waiter.set_result(None)
        self._room.set()

    def send_ack(self, client: str) -> None:
        """Tell `client` what is durable. Without a stream it is told when it has one."""
        if (seq := self._acked.get(client)) is not None:
            self.scheduler.client_send(client, {"op": "resilience-ack", "seq": seq})

    def forget_client(self, client: str) -> None:
        """`client` is gone for good."""
        self.last_seq.pop(client, None)
        self._acked.pop(client, None)

    async def committed(self) -> None:
        """Return when all that was recorded so far is durable."""
        self.flush_releases()
        if self._last_lsn <= self._durable_lsn or self._detached:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((self._last_lsn, waiter))
        self.log.hurry()
        await waiter

    async def room(self) -> None:
        """Back-pressure: return when the journal has caught up far enough."""
        while self.log.pending_bytes > self._pending_limit_bytes:
            self._room.clear()
            await self._room.wait()

    def seen(self, client: str, seq: int) -> bool:
        """Whether message `seq` of `client` was applied before."""
        return bool(seq) and seq <= self.last_seq.get(client, 0)

    # Releases come one key at a time, so they are gathered; any other record puts them down first, to keep the order.

    def _release(self, client: str, keys: Iterable[Key]) -> None:
        self._releases.setdefault(client, []).extend(keys)
        if self._release_timer is None:
            loop = asyncio.get_running_loop()
            self._release_timer = loop.call_later(self._commit_interval_seconds, self.flush_releases)

    def flush_releases(self) -> None:
        """Record the releases gathered so far."""
        if self._release_timer is not None:
            self._release_timer.cancel()
            self._release_timer = None
        gathered, self._releases = self._releases, {}
        if self._detached:
            return
        for client, keys in gathered.items():
            self._last_lsn = self.log.append(records.KeysReleased(client=client, keys=tuple(keys)))

    # Stream messages of clients

    def _update_graph(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        async def update_graph(client: str, seq: int = 0, origin: str = "", **msg: Any) -> None:
            if self.seen(client, seq):
                self.ack_again(client, seq)
                return
            await self.room()
            failpoint("graph.before-record")
            record = graph_record(client, seq, msg)
            self.record(record, client=client, seq=seq)
            failpoint("graph.after-record")
            msg["stimulus_id"] = record.stimulus_id
            again = msg.pop("again", ())
            if again:
                self._let_go(client, again, record.stimulus_id)
                first_run = next(TaskState._run_id_iterator)
            if msg.get("actors"):
                self.expect_actors()
            await stock(client=client, **msg)
            for key in again:
                if (ts := self.scheduler.tasks.get(key)) is not None:
                    self.first_runs[ts] = first_run
            failpoint("graph.after-apply")

        return update_graph

    def _let_go(self, client: str, keys: list[Key], stimulus_id: str) -> None:
        """A key that its client uses again was let go before, also where that message was lost with a link."""
        held = self.scheduler.clients.get(client)
        tasks = self.scheduler.tasks
        if held is not None and any((ts := tasks.get(key)) is not None and ts in held.wants_what for key in keys):
            self.scheduler.client_releases_keys(keys=keys, client=client, stimulus_id=stimulus_id)

    def _client_desires_keys(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def client_desires_keys(keys: list[Key], client: str, seq: int = 0, origin: str = "") -> None:
            if seq and self.seen(origin, seq):
                self.ack_again(origin, seq)
                return
            if seq or not self._wants_all(client, keys):
                record = records.KeysWanted(client=client, seq=seq, keys=tuple(keys), origin=origin)
                self.record(record, client=origin, seq=seq)
            stock(keys=keys, client=client)

        return client_desires_keys

    def _wants_all(self, client: str, keys: Iterable[Key]) -> bool:
        cs = self.scheduler.clients.get(client)
        tasks = self.scheduler.tasks
        return cs is not None and all((ts := tasks.get(key)) is not None and ts in cs.wants_what for key in keys)

    def _client_releases_keys(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def client_releases_keys(keys: list[Key], client: str, stimulus_id: str | None = None) -> None:
            self._release(client, keys)
            stock(keys=keys, client=client, stimulus_id=stimulus_id)

        return client_releases_keys

    def _cancel_keys(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def cancel_keys(
            keys: list[Key], client: str, force: bool, reason: str, msg: str, seq: int = 0, origin: str = ""
        ) -> None:
            if self.seen(client, seq):
                self.ack_again(client, seq)
                return
            record = records.KeysCancelled(client=client, seq=seq, keys=tuple(keys), force=force)
            self.record(record, client=client, seq=seq)
            stock(keys=keys, client=client, force=force, reason=reason, msg=msg)

        return cancel_keys

    # What owners other than clients do: variables, queues and published datasets hold keys too.

    def _owner_desires(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def client_desires_keys(keys: list[Key], client: str) -> None:
            owner = client not in self.scheduler.client_comms and client != _FIRE_AND_FORGET
            if keys and owner and not self._wants_all(client, keys):
                self.record(records.KeysWanted(client=client, seq=0, keys=tuple(keys)))
            stock(keys=keys, client=client)

        return client_desires_keys

    def _owner_releases(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def client_releases_keys(keys: list[Key], client: str, stimulus_id: str | None = None) -> None:
            if client not in self.scheduler.client_comms and keys:
                self._release(client, keys)
            stock(keys=keys, client=client, stimulus_id=stimulus_id)

        return client_releases_keys

    def _released_by_completion(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """A task that was fired and forgotten is let go by its completion, which is not recorded otherwise."""

        def _client_releases_keys(keys: list[Key], cs: Any, recommendations: dict[Key, str]) -> None:
            if cs.client_key == _FIRE_AND_FORGET:
                self._release(_FIRE_AND_FORGET, keys)
            stock(keys=keys, cs=cs, recommendations=recommendations)

        return _client_releases_keys

    # Calls

    def _update_data(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def update_data(*, who_has: Any, nbytes: dict[Key, int], client: str | None = None) -> None:
            sizes = {key: nbytes.get(key, -1) for key in who_has}
            self.record(records.DataScattered(client=client or "", nbytes=sizes))
            stock(who_has=who_has, nbytes=nbytes, client=client)

        return update_data

    def durable_call(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """Answer only when what the call recorded is durable."""

        @wraps(stock)
        async def call(*args: Any, **kwargs: Any) -> Any:
            result = stock(*args, **kwargs)
            if asyncio.iscoroutine(result):
                result = await result
            await self.committed()
            return result

        return call

    def _restart(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        async def restart(*args: Any, **kwargs: Any) -> Any:
            for cs in list(self.scheduler.clients.values()):
                if cs.wants_what:
                    self._release(cs.client_key, [ts.key for ts in cs.wants_what])
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
                self.record(records.RestrictionsSet(workers=lasting))
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
            self.record(records.PluginRegistered(kind=kind, name=name or "", plugin=packed))
            await self.committed()
            return result

        return register

    def _plugin_unregistered(self, kind: Any, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        async def unregister(*args: Any, name: str, **kwargs: Any) -> Any:
            result = stock(*args, name=name, **kwargs)
            if asyncio.iscoroutine(result):
                result = await result
            self.record(records.PluginUnregistered(kind=kind, name=name))
            await self.committed()
            return result

        return unregister

    # What a replay cannot work out

    def _task_erred(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def handle_task_erred(key: Key, stimulus_id: str, **msg: Any) -> None:
            ts = self.scheduler.tasks.get(key)
            before = ts.retries if ts is not None else 0
            stock(key=key, stimulus_id=stimulus_id, **msg)
            if ts is not None and ts.retries != before:
                self.will_retry(ts, msg["run_id"])

        return handle_task_erred

    def will_retry(self, ts: TaskState, run_id: int) -> None:
        """The failure of a run was answered with a retry. Its worker may bring the same failure once more."""
        self.retried[ts] = run_id
        self.record(records.RetriesLeft(counts={ts.key: ts.retries}, runs={ts.key: run_id}))

    def suspected(self, tasks: Iterable[TaskState]) -> None:
        """Record how often `tasks` were on a worker that died."""
        counts: dict[Any, int] = {ts.key: ts.suspicious for ts in tasks if ts.suspicious}
        if counts:
            self.record(records.TasksSuspected(counts=counts))

    def _into_erred(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        def transition(state: Any, key: Key, stimulus_id: str, **kwargs: Any) -> Any:
            out = stock(state, key, stimulus_id, **kwargs)
            ts = state.tasks.get(key)
            if ts is not None and ts.state == "erred":
                self.record(error_record(ts))
            return out

        return transition

    def _into_memory(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        def transition(state: Any, key: Key, stimulus_id: str, **kwargs: Any) -> Any:
            out = stock(state, key, stimulus_id, **kwargs)
            ts = state.tasks.get(key)
            if ts is not None and ts.actor and ts.state == "memory":
                self.record(records.ActorsMade(keys=(key,)))
            return out

        return transition

    def _out_of_erred(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        def transition(state: Any, key: Key, stimulus_id: str, **kwargs: Any) -> Any:
            self.record(records.ErrorsCleared(keys=(key,)))
            return stock(state, key, stimulus_id, **kwargs)

        return transition


def graph_record(client: str, seq: int, msg: dict[str, Any]) -> records.GraphSubmitted:
    """The record of an ``update-graph`` message, whose graph stays serialized as it came."""
    graph = msg["expr_ser"]
    rest = {name: value for name, value in msg.items() if name not in ("op", "expr_ser", "keys", "seq", "origin")}
    rest["header"] = graph.header
    # Graphs that came further apart than their `fifo_timeout` run one after the other, after a replay as well.
    rest["received"] = time()
    if msg.get("again"):
        # Runs with a smaller id belong to what these keys meant before.
        rest["first_run"] = next(TaskState._run_id_iterator)
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
        return graph_record(client, msg["seq"], msg)
    if msg["op"] == "cancel-keys":
        return records.KeysCancelled(
            client=client, seq=msg["seq"], keys=tuple(msg["keys"]), force=bool(msg.get("force"))
        )
    return records.KeysWanted(client=msg.get("client", client), seq=msg["seq"], keys=tuple(msg["keys"]), origin=client)


def error_record(ts: TaskState) -> records.TaskErred:
    """The record of a task that failed; the error itself goes with the task that is to blame."""
    blame = ts.exception_blame
    error = None
    if blame is None or blame is ts:
        error = dumps((ts.exception, ts.traceback, ts.exception_text, ts.traceback_text, sorted(ts.erred_on or ())))
    return records.TaskErred(key=ts.key, blame=blame.key if blame is not None else ts.key, error=error)
