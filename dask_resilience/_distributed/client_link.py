"""A client that keeps its futures while the scheduler is replaced.

Three things make that safe:

* Every message that must not be lost goes into the *outbox* with a sequence number and stays there until the scheduler
  says that it is durable. The number is given under the lock that also guards the reference counts, so the
  set of wanted keys and the outbox can be read as one consistent picture.
* After a loss the client *joins* again: it hands over the picture, the scheduler applies what it had not yet applied,
  drops what is no longer wanted, and says which keys it does not know or must compute again.
* Futures are only touched by that answer, never by the loss itself.
"""

from __future__ import annotations

import asyncio
import logging
import warnings
from functools import cached_property
from time import monotonic
from typing import Any

import dask.config
import distributed
from dask.typing import no_default
from dask.utils import parse_timedelta
from distributed.batched import BatchedSend
from distributed.client import futures_of
from distributed.comm import CommClosedError, connect
from distributed.core import PooledRPCCall
from distributed.objects import SchedulerInfo
from distributed.utils import in_async_call
from distributed.versions import VersionMismatchWarning, get_versions

from dask_resilience._distributed.client_calls import Numbers
from dask_resilience._distributed.client_outbox import Outbox, as_stock
from dask_resilience._distributed.leader import Compass, Ruler
from dask_resilience._distributed.rpc import FollowingRPC, call_once, drop_connections
from dask_resilience.errors import CallInterrupted, SchedulerGone
from dask_resilience.settings import Settings
from dask_resilience.storage.open_store import check_url

logger = logging.getLogger("distributed.resilience")

#: Stream messages that must reach the journal once, whatever happens to the connection.
_DURABLE_OPS = frozenset(
    {"update-graph", "cancel-keys", "client-desires-keys", "queue_release", "queue-future-release"}
)
#: What a client says with each new stream anyway.
_RESTATED_OPS = frozenset({"client-releases-keys", "subscribe-topic", "unsubscribe-topic"})
#: Answers of the scheduler to a join that has to wait for its recovery.
_JOIN_ANSWER_SECONDS = 600.0
#: The status of a client that works, or looks for its scheduler.
_OPEN = ("running", "connecting")
#: How long closing waits for the acks of what was just submitted.
_CLOSE_DRAIN_SECONDS = 5.0


class ClientLink:
    """The link of one client, as `FollowingRPC` sees it."""

    def __init__(self, client: ResilientClient) -> None:
        self._client = client

    @property
    def address(self) -> str:
        compass = self._client._compass
        assert compass is not None
        return compass.address

    @property
    def numbers(self) -> Numbers | None:
        ruler = self._client._ruler
        return None if ruler is None or not ruler.resilient else self._client._numbers

    async def up(self) -> None:
        client = self._client
        if client._joined.is_set() or client.status not in ("connecting", "running"):
            return
        try:
            await asyncio.wait_for(client._joined.wait(), client._patience_seconds)
        except TimeoutError:
            raise SchedulerGone(f"no scheduler came back within {client._patience_seconds:g} s") from None

    def suspect(self, address: str) -> None:
        if address == self.address:
            drop_connections(self._client.rpc, address)


class ResilientClient(distributed.Client):
    """The overrides behind :class:`dask_resilience.Client`."""

    def __init__(self, address: Any = None, **kwargs: Any) -> None:
        settings = Settings.load()
        self._patience_seconds = settings.client.patience_seconds
        self._poll_seconds = settings.leader_poll_seconds
        check_url(settings.store)
        self._store_url = settings.store
        self._storage_options = settings.storage_options
        self._on_worker: str = kwargs.pop("on_worker", "")
        self._outbox = Outbox()
        self._cluster_ended = False
        self._compass: Any = None  # a Compass once the first scheduler is known
        self._ruler: Ruler | None = None
        #: Topics that are subscribed to: when the event that was heard last was logged, None if nothing is known.
        self._topics: dict[str, float | None] = {}
        self._following: FollowingRPC | None = None
        self._joined = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        super().__init__(address, **kwargs)

    @cached_property
    def _numbers(self) -> Numbers:
        return Numbers(self.id)

    # Connecting

    async def _start(self, timeout: Any = distributed.client.no_default, **kwargs: Any) -> Any:
        self._stream_handlers["resilience-ack"] = self._handle_ack
        self._stream_handlers["resilience-closed"] = self._handle_cluster_closed
        self._stream_handlers["resilience-subscribed"] = self._handle_subscribed
        return await super()._start(timeout=timeout, **kwargs)

    async def _ensure_connected(self, timeout: Any = None) -> None:
        if self.scheduler is None or self._connecting_to_scheduler:
            return
        if self.scheduler_comm and not self.scheduler_comm.closed():
            return
        if self._compass is None:
            self._compass = Compass(
                str(self.scheduler.address),
                connection_args=self.connection_args,
                store_url=self._store_url,
                storage_options=self._storage_options,
            )
        if self._following is None or self.scheduler is not self._following:
            # The client of a task was given that of its worker, which does not number calls.
            pool = self.scheduler.pool if isinstance(self.scheduler, PooledRPCCall) else self.rpc
            self._following = FollowingRPC(pool, ClientLink(self), self._serializers, self._deserializers)
            self.scheduler = self._following
        limit = parse_timedelta(timeout if timeout is not None else self._timeout, "s")
        if self._ruler is not None:
            await self._connect(limit)
            return
        # The first time nobody else tries again when the scheduler dies between its answer and our registration.
        deadline = monotonic() + max(limit, self._patience_seconds if self._on_worker else 0.0)
        while True:
            try:
                await self._connect(max(1.0, deadline - monotonic()))
            except SchedulerGone:
                raise
            except OSError:
                if self._compass.epoch == 0 or monotonic() >= deadline:
                    raise
                await asyncio.sleep(0.05)
            else:
                return

    async def _connect(self, limit: float) -> None:
        """Find the ruling scheduler, hand over the picture, and begin the stream."""
        ruler = await self._find(limit)
        if self._ruler is not None and (not ruler.resilient or ruler.cluster != self._compass.cluster):
            raise SchedulerGone(f"another cluster answers at {ruler.address}")
        first = self._ruler is None
        self._ruler = ruler
        self._compass.follow(ruler)
        if not ruler.resilient:
            self._outbox.clear()
            self._dispatch(await self._register(ruler, limit))
            logger.warning(
                "The scheduler at %s keeps no journal, so futures end with it: start it with "
                "`--preload dask_resilience.preload`, or call dask_resilience.install(client)",
                ruler.address,
            )
        else:
            with self._refcount_lock:
                wants = list(self.refcount)
                outbox = self._outbox.unacked()
                handed = self._outbox.last_number
            answer = await self._join(ruler, wants, outbox)
            rest = await self._register(ruler, limit)
            if not first:
                self._reconcile(answer)
                logger.warning("Found the scheduler at %s, epoch %d; going on", ruler.address, ruler.epoch)
            self._send_what_came_meanwhile(wants, handed)
            for topic, last in list(self._topics.items()):
                self._send_to_scheduler_safe(
                    {"op": "subscribe-topic", "topic": topic, "client": self.id, "after": last}
                )
            self._dispatch(rest)
            self._cluster_ended = False
        self._joined.set()
        if ruler.resilient and (self._watching is None or self._watching.done()):
            self._watching = asyncio.create_task(self._watch_leader(), name="resilience-watch")

    async def _register(self, ruler: Ruler, limit_seconds: float) -> list[dict[str, Any]]:
        """As stock, but messages that ride along with the first one are kept."""
        self._connecting_to_scheduler = True
        try:
            comm = await connect(ruler.address, timeout=limit_seconds, **self.connection_args)
            comm.name = "Client->Scheduler"
            await self._update_scheduler_info()
            await comm.write({"op": "register-client", "client": self.id, "reply": False, "versions": get_versions()})
            first, *rest = await asyncio.wait_for(comm.read(), max(limit_seconds, 5.0))
        finally:
            self._connecting_to_scheduler = False
        assert first["op"] == "stream-start"
        if first.get("error"):
            raise ImportError(first["error"])
        if first.get("warning"):
            warnings.warn(VersionMismatchWarning(first["warning"]), stacklevel=2)
        bcomm = BatchedSend(interval="10ms", loop=self.loop)
        bcomm.start(comm)
        self.scheduler_comm = bcomm
        self.status = "running"
        for msg in self._pending_msg_buffer:
            self._send_to_scheduler(msg)
        self._pending_msg_buffer.clear()
        return rest

    def _dispatch(self, msgs: list[dict[str, Any]]) -> None:
        for msg in msgs:
            handler: Any = self._stream_handlers.get(msg.pop("op"))
            if handler is not None:
                handler(**msg)

    def _send_what_came_meanwhile(self, wants: list[Any], handed: int) -> None:
        """Send what happened between the picture that the join carried and the new stream.

        Graphs go before releases: a later graph may depend on a key that was let go right after it was submitted, and
        that nobody else holds.
        """
        with self._refcount_lock:
            later = self._outbox.unacked(after=handed)
            held = dict.fromkeys([*wants, *(key for msg in later for key in msg.get("keys", ()))])
            released = [key for key in held if key not in self.refcount]
        for msg in later:
            self._send_to_scheduler_safe(msg)
        if released:
            self._send_to_scheduler_safe({"op": "client-releases-keys", "keys": released, "client": self.id})

    async def _scheduler_became_resilient(self) -> None:
        """The scheduler that we are connected to keeps a journal from now on."""
        ruler = await self._find(self._timeout)
        if ruler.resilient and self.scheduler_comm is not None:
            with self._refcount_lock:
                self._ruler = ruler
                wants = list(self.refcount)
            self._compass.follow(ruler)
            # Through the door that every returning client takes: the scheduler ends the old stream, the report loop
            # notices, and comes back as one that keeps its futures.
            self._joined.clear()
            await self._join(ruler, wants, [])
            await asyncio.wait_for(self._joined.wait(), self._timeout)

    async def _find(self, limit_seconds: float) -> Ruler:
        deadline = monotonic() + limit_seconds
        pause = 0.02
        while True:
            ruler = await self._compass.find(answer_seconds=max(limit_seconds, 5.0))
            if ruler is not None:
                return ruler
            if monotonic() >= deadline:
                raise OSError(
                    f"Timed out trying to connect to {self._compass.address} after {limit_seconds:g} s: "
                    "no scheduler answers there or at the address in the leader record"
                )
            await asyncio.sleep(pause)
            pause = min(pause * 1.3, 0.5)

    async def _join(self, ruler: Ruler, wants: list[Any], outbox: list[dict[str, Any]]) -> dict[str, Any]:
        """Hand over what this client wants and what was not acked; the answer comes when the scheduler serves."""
        answer = await call_once(
            ruler.address,
            "resilience-join",
            connection_args=self.connection_args,
            timeout_seconds=5.0,
            answer_seconds=_JOIN_ANSWER_SECONDS,
            client=self.id,
            worker=self._on_worker,
            wants=wants,
            outbox=outbox,
        )
        if answer["status"] != "OK":
            raise OSError(answer["message"])
        return dict(answer)

    def _reconcile(self, answer: dict[str, Any]) -> None:
        """Bring the futures in line with what the new scheduler holds."""
        for key in answer["unknown"]:
            state = self.futures.get(key)
            if state is not None:
                state.cancel(
                    reason="lost-in-failover",
                    msg="Neither the journal nor a living worker had it. Scattered data dies with its last worker.",
                )
        for key in answer["pending"]:
            state = self.futures.get(key)
            if state is not None and state.status in ("finished", "lost"):
                state.reset()
        for key in set(answer["known"]).difference(answer["erred"]):
            # It was retried, although nobody may have said so.
            state = self.futures.get(key)
            if state is not None and state.status == "error":
                state.reset()
        # Results and errors of the rest are reported as for any key that a client begins to want.
        self._send_to_scheduler_safe({"op": "client-desires-keys", "keys": answer["known"], "client": self.id})

    async def _update_scheduler_info(self, n_workers: int = 0) -> None:
        """As stock, but never waits for a scheduler that is gone: reconnecting calls it too."""
        if self.status not in _OPEN or self._compass is None:
            return
        try:
            identity = await call_once(
                self._compass.address,
                "identity",
                connection_args=self.connection_args,
                timeout_seconds=2.0,
                answer_seconds=self._timeout,
                n_workers=n_workers,
            )
        except (OSError, TimeoutError):
            logger.debug("Unable to query scheduler for identity")
        else:
            self._scheduler_identity = SchedulerInfo(identity)

    async def _reconnect(self) -> None:
        if self._ruler is None or not self._ruler.resilient:
            self._joined.clear()
            self._ruler = None
            await super()._reconnect()
            return
        logger.warning("Lost the scheduler at %s; keeping %d futures", self._compass.address, len(self.futures))
        self.status = "connecting"
        self.scheduler_comm = None
        self._joined.clear()
        drop_connections(self.rpc, self._compass.address)
        # A cluster that was closed is not expected back; stock looks for another one for as long.
        patience = min(self._timeout, self._patience_seconds) if self._cluster_ended else self._patience_seconds
        deadline = monotonic() + patience
        while self.status == "connecting" and monotonic() < deadline:
            try:
                await self._ensure_connected(timeout=min(self._timeout, max(1.0, deadline - monotonic())))
            except SchedulerGone as error:
                logger.error("%s; the futures of this client are cancelled", error)  # noqa: TRY400 - no defect
                break
            except (OSError, TimeoutError, CommClosedError) as error:
                logger.debug("Not connected yet: %s", error)
                await asyncio.sleep(0.05)
            except ImportError:
                await self._close()
                return
            else:
                return
        if self.status == "connecting":
            self._give_up(patience)
            await self._close()

    def _give_up(self, patience_seconds: float) -> None:
        for state in self.futures.values():
            state.cancel(
                reason="scheduler-connection-lost",
                msg=f"No scheduler of this cluster came back within {patience_seconds:g} s.",
            )
        self.futures.clear()

    def _handle_cluster_closed(self) -> None:
        """The scheduler ends in order, and with it what was asked of it."""
        self._cluster_ended = True
        for state in self.futures.values():
            state.cancel(reason="cluster-closed", msg="The cluster was closed.")
        self.futures.clear()
        self._outbox.clear()

    async def _watch_leader(self) -> None:
        """A stopped scheduler keeps its sockets open: only the leader record tells that it was replaced."""
        while self.status in _OPEN:
            await asyncio.sleep(self._poll_seconds)
            if self.status == "running" and self._compass is not None and await self._compass.overtaken():
                comm = self.scheduler_comm.comm if self.scheduler_comm else None
                if comm is not None:
                    logger.warning("A newer scheduler rules; leaving the one at %s", self._compass.address)
                    comm.abort()

    # Retrying

    async def _retry(self, futures: Any) -> None:
        """As stock, but the answer neither undoes what the stream said meanwhile nor is forgotten in a failover."""
        if self._ruler is None or not self._ruler.resilient:
            await super()._retry(futures)
            return
        scheduler: Any = self.scheduler
        keys = {future.key for future in futures_of(futures)}
        while keys:
            errors = {key: self.futures[key].exception for key in keys if key in self.futures}
            epoch = self._compass.epoch
            try:
                retried = await scheduler.retry(keys=list(keys), client=self.id)
                for key, error in errors.items():
                    state = self.futures.get(key)
                    # One that has failed once more has another exception.
                    if key in retried and state is not None and state.status == "error" and state.exception is error:
                        state.retry()
                await scheduler.resilience_committed()
                if self._compass.epoch == epoch:
                    return
            except CallInterrupted:
                await self._joined.wait()
                if self.status != "running":
                    raise
            # Whoever was asked is gone. What was not made durable still shows its error.
            keys = {key for key in keys if key in self.futures and self.futures[key].status == "error"}

    # Sending

    def _send_to_scheduler(self, msg: dict[str, Any]) -> None:
        plain = self._ruler is not None and not self._ruler.resilient
        if msg["op"] == "subscribe-topic":
            self._topics.setdefault(msg["topic"], None)
            msg = {**msg, "after": None}
        elif msg["op"] == "unsubscribe-topic":
            self._topics.pop(msg["topic"], None)
        if msg["op"] not in _DURABLE_OPS or "seq" in msg or plain:
            if msg["op"] == "client-releases-keys":
                self._outbox.let_go(msg["keys"])
            super()._send_to_scheduler(msg)
            return
        # The same lock guards the reference counts: whoever reads both sees a key with its graph, or neither.
        with self._refcount_lock:
            super()._send_to_scheduler(self._outbox.add(msg, origin=self.id))

    def _send_to_scheduler_safe(self, msg: dict[str, Any]) -> None:
        if self.status in ("running", "closing"):
            if self.scheduler_comm is None:
                return
            if self._ruler is not None and not self._ruler.resilient:
                msg = as_stock(msg)
            try:
                self.scheduler_comm.send(msg)
            except CommClosedError:
                # What must not be lost is in the outbox or among the wanted keys, and goes with the next join.
                logger.debug("Message %s waits for the next scheduler", msg["op"])
        elif self._ruler is None:
            super()._send_to_scheduler_safe(msg)
        elif msg["op"] not in _DURABLE_OPS and msg["op"] not in _RESTATED_OPS:
            self._pending_msg_buffer.append(msg)

    def _handle_ack(self, seq: int) -> None:
        with self._refcount_lock:
            self._outbox.acked(seq)

    def _handle_subscribed(self, topic: str, last: float) -> None:
        if topic in self._topics and self._topics[topic] is None:
            self._topics[topic] = last

    async def _handle_event(self, topic: str, event: Any) -> None:
        if topic in self._topics:
            self._topics[topic] = event[0]
        await super()._handle_event(topic, event)

    def close(self, timeout: Any = no_default) -> Any:
        """Close this client, as Dask does, after what it just submitted is durable, or after a few seconds."""
        # Dask's own `close` says that it closes before `_close` is called, and then nothing is sent again.
        if self.status in _OPEN:
            if self.asynchronous:
                return self._drain_and_close(timeout)
            if not self._is_finalizing():
                # On the loop: what was just submitted is on its way there.
                self.sync(self._drain)
        return super().close(timeout)

    async def _drain_and_close(self, timeout: Any) -> None:
        await self._drain()
        await super().close(timeout)

    async def _close(self, fast: bool = False) -> None:
        if not fast and self.status in _OPEN:
            await self._drain()
        if self._watching is not None and self._watching is not asyncio.current_task():
            self._watching.cancel()
        self._joined.set()
        await super()._close(fast=fast)
        if self._compass is not None:
            await self._compass.close()

    async def _drain(self) -> None:
        """Wait briefly for acks: a graph that was fired and forgotten right before the exit should be durable."""
        deadline = monotonic() + _CLOSE_DRAIN_SECONDS
        while self._outbox and monotonic() < deadline and self.status in _OPEN:  # noqa: ASYNC110 - rare and brief
            await asyncio.sleep(0.01)
        if self._outbox:
            logger.warning("Closing although no scheduler has acked the last %d messages", len(self._outbox))


def client_for_worker(worker: Any, timeout: float | None) -> Any:
    """The client of tasks on `worker`, as `Worker._get_client` makes it, but one that survives."""
    if timeout is None:
        timeout = dask.config.get("distributed.comm.timeouts.connect")
    return ResilientClient(
        worker.scheduler,
        loop=worker.loop,
        security=worker.security,
        set_as_default=True,
        asynchronous=in_async_call(worker.loop),
        direct_to_workers=True,
        name="worker",
        on_worker=worker.contact_address or worker.address,
        timeout=parse_timedelta(timeout, "s"),
    )
