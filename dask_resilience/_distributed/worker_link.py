"""A worker that outlives its scheduler.

Stock workers close when the stream to the scheduler ends. This one keeps its data and its running tasks, looks for
the scheduler that rules, and registers there **as a new member with an inventory**: nothing of the old session is
negotiated, because a worker that resumes an old session and a scheduler that has another one in mind is how
reconnection used to deadlock.

Between the inventory and the answer, messages are buffered and follow the registration; before the inventory they are
dropped, since the inventory says the same.
"""

from __future__ import annotations

import asyncio
import logging
import os
import weakref
from collections import OrderedDict, deque
from collections.abc import Mapping
from time import monotonic, time
from typing import Any

from distributed.batched import BatchedSend
from distributed.comm import connect
from distributed.core import Status
from distributed.versions import get_versions
from distributed.worker import Worker

from dask_resilience._distributed import inventory
from dask_resilience._distributed.leader import Compass, Ruler
from dask_resilience._distributed.rpc import FollowingRPC, drop_connections
from dask_resilience.errors import SchedulerGone
from dask_resilience.types import Key

logger = logging.getLogger("distributed.resilience")

#: Reasons for which a stock worker closes although only its scheduler is gone.
_SCHEDULER_GONE = frozenset({"worker-handle-scheduler-connection-broken", "worker-heartbeat-missing"})
_REMEMBERED_RUNS = 4096
_REMEMBERED_FAILURES = 64
_BUFFERED_EVENTS = 1000


class WorkerLink:
    """Keeps one live worker connected to whichever scheduler rules.

    Parameters
    ----------
    worker
        The worker; some of its bound attributes are replaced.
    store_url
        Where the leader record is; None to learn it from the scheduler.
    patience_seconds
        How long to look for a scheduler before closing as a stock worker does.
    poll_seconds
        How often to look at the leader record while connected.
    storage_options
        For `open_store`.
    """

    def __init__(
        self,
        worker: Worker,
        *,
        store_url: str | None,
        patience_seconds: float,
        poll_seconds: float,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.worker = worker
        self.patience_seconds = patience_seconds
        self.poll_seconds = poll_seconds
        self.compass = Compass(
            worker.scheduler.address,
            connection_args=worker.connection_args,
            store_url=store_url,
            storage_options=storage_options,
        )
        self.finished: OrderedDict[Key, int] = OrderedDict()
        self.failed: OrderedDict[Key, tuple[int, ...]] = OrderedDict()
        self._scattered: deque[Key] = deque(maxlen=_REMEMBERED_RUNS)
        self._connected = asyncio.Event()
        self._registering = False
        self._closing = False
        self._returning: asyncio.Task[None] | None = None
        self._events: deque[dict[str, Any]] = deque(maxlen=_BUFFERED_EVENTS)
        self._shuffle_run = 0
        self._stock_close = worker.close
        self._stock_batched_send = worker.batched_send
        self._stock_get_client = worker._get_client
        self._stock_update_data = worker.update_data
        self._watching: asyncio.Task[None] | None = None

    def attach(self) -> None:
        """Put this link between the worker and its scheduler."""
        worker: Any = self.worker
        worker.close = self._close
        worker.batched_send = self._batched_send
        worker._register_with_scheduler = self._register_first
        worker._get_client = self._get_client
        worker.update_data = worker.handlers["update_data"] = self._update_data
        worker.scheduler = FollowingRPC(worker.rpc, self)
        worker.resilience = self
        if worker.batched_stream.comm is not None and not worker.batched_stream.comm.closed():
            self._connected.set()
            self._watch()

    async def learn(self) -> None:
        """On a worker that is connected already: find out whom it serves."""
        ruler = await self.compass.find()
        if ruler is not None and ruler.resilient:
            self.compass.follow(ruler)
            self._watch()

    # The link, as FollowingRPC sees it

    #: It makes no calls that count once.
    numbers = None

    @property
    def address(self) -> str:
        return self.compass.address

    async def up(self) -> None:
        if self._connected.is_set() or self.worker.status in (Status.closing, Status.closed, Status.init):
            return
        try:
            await asyncio.wait_for(self._connected.wait(), self.patience_seconds)
        except TimeoutError:
            raise SchedulerGone(f"no scheduler came back within {self.patience_seconds:g} s") from None

    def suspect(self, address: str) -> None:
        """Nothing to do: the stream's end or the leader record will tell."""

    # Bound attributes of the worker

    def _batched_send(self, msg: dict[str, Any]) -> None:
        if msg["op"] == "task-finished":
            _remember(self.finished, msg["key"], msg["run_id"])
        elif msg["op"] == "task-erred":
            earlier = self.failed.get(msg["key"], ())
            _remember(self.failed, msg["key"], (*earlier, msg["run_id"])[-_REMEMBERED_FAILURES:])
        if self._registering:
            self.worker.batched_stream.send(msg)
        elif self._connected.is_set():
            self._stock_batched_send(msg)
        elif msg["op"] == "log-event":
            self._events.append(msg)

    def _update_data(self, data: Any, stimulus_id: str | None = None) -> Any:
        self._scattered.extend(data)
        return self._stock_update_data(data=data, stimulus_id=stimulus_id)

    async def _close(self, *args: Any, reason: str = "worker-close", **kwargs: Any) -> Any:
        worker = self.worker
        alive = worker.status in (Status.running, Status.paused, Status.closing_gracefully)
        if alive and not self._closing and reason in _SCHEDULER_GONE and not self._connected_to_plain():
            self._lost(reason)
            return None
        self._closing = True
        for task in (self._returning, self._watching):
            if task is not None and task is not asyncio.current_task():
                task.cancel()
        closed = await self._stock_close(*args, **{**kwargs, "reason": reason})
        await self.compass.close()
        return closed

    def _get_client(self, timeout: float | None = None) -> Any:
        """As stock, but a client that is made here survives as the worker does."""
        from distributed.client import default_client

        from dask_resilience._distributed.client_link import client_for_worker

        worker: Any = self.worker
        if worker._client is None or worker._client.status == "closed":
            worker._client = None
            try:
                default_client()
            except ValueError:
                worker._client = client_for_worker(worker, timeout)
                Worker._initialized_clients.add(worker._client)
        return self._stock_get_client(timeout)

    # Losing and finding

    def _connected_to_plain(self) -> bool:
        return not self.compass.cluster

    def _lost(self, reason: str) -> None:
        if self._returning is not None and not self._returning.done():
            return
        worker = self.worker
        logger.warning("Lost the scheduler at %s (%s); keeping data and running tasks", self.address, reason)
        self._connected.clear()
        self._registering = False
        for name in ("keep-alive", "heartbeat"):
            worker.periodic_callbacks[name].stop()
        comm = worker.batched_stream.comm
        if comm is not None and not comm.closed():
            comm.abort()
        drop_connections(worker.rpc, self.address)
        self._returning = asyncio.create_task(self._return(), name="resilience-return")

    async def _return(self) -> None:
        deadline = monotonic() + self.patience_seconds
        pause = 0.02
        while monotonic() < deadline and not self._closing:
            try:
                ruler = await self.compass.find()
                if ruler is not None:
                    if not ruler.resilient or ruler.cluster != self.compass.cluster:
                        logger.warning("Another cluster answers at %s; closing as a stock worker does", ruler.address)
                        break
                    if self.worker.status == Status.closing_gracefully and ruler.epoch == self.compass.epoch:
                        # It is not gone, it has let this worker go: nothing here is needed any more.
                        self._closing = True
                        await self._stock_close(reason="worker-handle-scheduler-connection-broken")
                        return
                    await self._register(ruler, deadline)
                    return
            except (OSError, TimeoutError) as error:
                logger.debug("Could not register yet: %s", error)
            except Exception:
                logger.exception("Could not register with the scheduler; trying again")
            await asyncio.sleep(pause)
            pause = min(pause * 1.3, 0.5)
        if not self._closing:
            logger.error("No scheduler within %g s; closing", self.patience_seconds)
            self._closing = True
            await self._stock_close(reason="worker-handle-scheduler-connection-broken")

    async def _register_first(self) -> None:
        """The first registration: as patient as a stock worker, but it follows the leader record."""
        worker = self.worker
        for name in ("keep-alive", "heartbeat"):
            worker.periodic_callbacks[name].stop()
        if worker.contact_address is None:
            worker.contact_address = worker.address
        waited = False
        while True:
            ruler = await self.compass.find()
            if ruler is not None:
                try:
                    await self._register(ruler, None)
                except OSError:
                    logger.info("Waiting to connect to: %26s", self.address)
                else:
                    return
            elif not waited:
                waited = True
                logger.info("Waiting for a scheduler at %s or in the leader record", self.address)
            await asyncio.sleep(0.1)

    async def _register(self, ruler: Ruler, deadline: float | None) -> None:
        worker = self.worker
        had_ruler = bool(self.compass.cluster)
        if had_ruler:
            self._forget_session()
        metrics = await self._metrics()
        startup = await worker.get_startup_information()
        comm = await connect(ruler.address, timeout=2, **worker.connection_args)
        try:
            comm.name = "Worker->Scheduler"
            comm._server = weakref.ref(worker)
            # No await between the inventory and the new buffer: what happens later is told by messages.
            holdings = inventory.take(
                worker,
                finished=self.finished,
                failed=self.failed,
                scattered=self._scattered,
                shuffle_run=self._shuffle_run,
                cluster=self.compass.cluster,
                epoch=self.compass.epoch,
            )
            worker.batched_stream = BatchedSend(interval="2ms", loop=worker.loop)
            self._registering = True
            if ruler.resilient:
                startup[inventory.FIELD] = holdings.pack()
            await comm.write(self._registration(metrics, startup), serializers=["msgpack"])
            sent = time()
            left = None if deadline is None else max(1.0, deadline - monotonic())
            response = await asyncio.wait_for(comm.read(deserializers=["msgpack"]), left)
        except BaseException:
            self._registering = False
            comm.abort()
            raise
        if response["status"] != "OK":
            self._registering = False
            comm.abort()
            message = response.get("message", repr(response))
            if had_ruler:
                raise OSError(message)
            raise ValueError(f"Unexpected response from register: {message}")
        if response.get("warning"):
            logger.warning(response["warning"])
        worker.scheduler_delay = response["time"] - (sent + time()) / 2

        self.compass.follow(ruler)
        worker.execution_state["scheduler"] = ruler.address
        worker.batched_stream.start(comm)
        self._registering = False
        self._connected.set()
        if not had_ruler:
            worker.status = Status.running
        for msg in self._events:
            worker.batched_stream.send(msg)
        self._events.clear()
        # A plugin that is sent again would be set up again, and would lose what it holds.
        await asyncio.gather(
            *(
                worker.plugin_add(name=name, plugin=plugin)
                for name, plugin in response["worker-plugins"].items()
                if name not in worker.plugins
            )
        )
        logger.info("Registered with the scheduler at %s, epoch %d", ruler.address, ruler.epoch)
        for name in ("keep-alive", "heartbeat"):
            worker.periodic_callbacks[name].start()
        worker.loop.add_callback(worker.handle_scheduler, comm)
        self._watch()

    def _registration(self, metrics: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        worker = self.worker
        return {
            "op": "register-worker",
            "reply": False,
            "address": worker.contact_address,
            "status": worker.status.name,
            "nthreads": worker.state.nthreads,
            "name": worker.name,
            "now": time(),
            "resources": worker.state.total_resources,
            "memory_limit": worker.memory_manager.memory_limit,
            "local_directory": worker.local_directory,
            "services": worker.service_ports,
            "nanny": worker.nanny,
            "pid": os.getpid(),
            "versions": get_versions(),
            "metrics": metrics,
            "extra": extra,
            "stimulus_id": f"worker-connect-{time()}",
            "server_id": worker.id,
        }

    async def _metrics(self) -> dict[str, Any]:
        # The spans extension asserts that a heartbeat has drained its digests before they are collected again. A beat
        # that was cut off has not, and a registration is none.
        spans = self.worker.extensions.get("spans")
        if spans is None:
            return await self.worker.get_metrics()
        spans.heartbeat()
        metrics = await self.worker.get_metrics()
        spans.heartbeat()
        return metrics

    def _forget_session(self) -> None:
        """Fail the P2P runs of the scheduler that is gone: their shards belong to a run that nobody leads any more."""
        shuffle = self.worker.extensions.get("shuffle")
        if shuffle is None:
            return
        runs = shuffle.shuffle_runs
        seen = [run.run_id for run in runs._active_runs.values()]
        seen += runs._stale_run_ids.values()
        self._shuffle_run = max([self._shuffle_run, *seen])
        for shuffle_id, run in list(runs._active_runs.items()):
            shuffle.shuffle_fail(
                shuffle_id=shuffle_id, run_id=run.run_id, message="The scheduler that led this shuffle is gone"
            )

    # A scheduler that is stopped rather than dead keeps its sockets open: only the leader record tells.

    def _watch(self) -> None:
        if self.compass.cluster and (self._watching is None or self._watching.done()):
            self._watching = asyncio.create_task(self._watch_leader(), name="resilience-watch")

    async def _watch_leader(self) -> None:
        while not self._closing:
            await asyncio.sleep(self.poll_seconds)
            if self._connected.is_set() and await self.compass.overtaken():
                logger.warning("A newer scheduler rules; leaving the one at %s", self.address)
                comm = self.worker.batched_stream.comm
                if comm is not None:
                    comm.abort()


def _remember(runs: OrderedDict[Key, Any], key: Key, value: Any) -> None:
    runs[key] = value
    runs.move_to_end(key)
    if len(runs) > _REMEMBERED_RUNS:
        runs.popitem(last=False)
