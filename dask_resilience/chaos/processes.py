"""A real Dask cluster on this machine: scheduler, workers and their nannies as processes that may be killed."""

from __future__ import annotations

import json
import re
import shutil
import signal
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dask_resilience.chaos.loopback import HOST, free_port, http_get
from dask_resilience.chaos.owned_process import MemberError, OwnedProcess, wait_until

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

__all__ = ["PRELOAD", "Cluster", "MemberError", "SchedulerProcess", "WorkerProcess", "free_port", "wait_until"]

#: Makes schedulers and workers resilient.
PRELOAD = "dask_resilience.preload"

#: Variable that names the store.
_STORE = "DASK_RESILIENCE__STORE"

#: The name of a worker on Dask's page of workers, in the cell beside its address.
_WORKER_ROW = re.compile(r"/worker/[^<]*</a></td>\s*<td> (.*?) </td>")
_START_ATTEMPTS = 5
#: How long members that are asked to end may take.
_GENTLE_SECONDS = 6.0
_READY_PATIENCE_SECONDS = 60.0
_MAX_RESTARTS = 50
_WARM_IMPORTS = ("distributed.cli.dask_scheduler", "distributed.shuffle", "dask.dataframe", "dask.array", "dask.bag")


class SchedulerProcess(OwnedProcess):
    """``python -m dask scheduler`` on loopback.

    Parameters
    ----------
    port
        Port to serve on.
    http_port
        Port of its pages; by default a free one.
    protocol
        ``tcp`` or ``tls``; certificates come by the environment.
    store
        URL or path of the journal's store; None for stock Dask.
    preload
        Module to preload; None for stock Dask.
    parked
        Import everything and wait for `go`: a warm replacement for a process that still holds the address.
    log, name, environment
        As in `OwnedProcess`.
    """

    def __init__(
        self,
        port: int,
        *,
        log: Path,
        http_port: int | None = None,
        protocol: str = "tcp",
        store: str | None = None,
        preload: str | None = None,
        parked: bool = False,
        name: str = "scheduler",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.port = port
        self.http_port = http_port or free_port()
        self.address = f"{protocol}://{HOST}:{port}"
        self.resilient = preload is not None
        arguments = ["scheduler", "--host", HOST, "--port", str(port), "--no-dashboard"]
        arguments += ["--dashboard-address", f"{HOST}:{self.http_port}"]
        arguments += ["--protocol", protocol] if protocol != "tcp" else []
        arguments += ["--preload", preload] if preload else []
        warm = (*_WARM_IMPORTS, *filter(None, [preload])) if parked else ()
        super().__init__(
            arguments,
            name=name,
            log=log,
            environment={**({_STORE: store} if store else {}), **(environment or {})},
            parked_imports=warm,
        )

    def json(self, page: str) -> dict[str, Any] | None:
        """Return ``/json/{page}.json``, such as ``counts``, or None when it does not answer."""
        answer = http_get(self.http_port, f"/json/{page}.json")
        if answer is None or answer[0] != 200:
            return None
        content: dict[str, Any] = json.loads(answer[1])
        return content

    def ready_status(self) -> int | None:
        """Return the HTTP status of ``/resilience/ready``: 200 open, 503 recovering or standing by; None if silent."""
        answer = http_get(self.http_port, "/resilience/ready")
        return answer[0] if answer else None

    def readiness(self) -> dict[str, Any] | None:
        """Return what ``/resilience/ready`` tells, or None if it is silent."""
        answer = http_get(self.http_port, "/resilience/ready")
        if answer is None or answer[0] not in (200, 503):
            return None
        content: dict[str, Any] = json.loads(answer[1])
        return content

    def is_ready(self) -> bool:
        """Whether this very process serves at its address and, when resilient, has opened."""
        if not self.alive:
            return False
        if not self.resilient:
            return f"Scheduler {self.address} " in self._workers_page()
        told = self.readiness()
        return told is not None and told.get("ready", False) and told.get("address") == self.address

    def wait_ready(self, *, timeout_seconds: float = _READY_PATIENCE_SECONDS) -> None:
        """Wait until it serves."""
        self.await_condition(self.is_ready, "ready", timeout_seconds=timeout_seconds)

    def wait_standing_by(self, *, timeout_seconds: float = _READY_PATIENCE_SECONDS) -> None:
        """Wait until it answers 503: loaded, and without the lease."""
        self.await_condition(lambda: self.ready_status() == 503, "standing by", timeout_seconds=timeout_seconds)

    def worker_names(self) -> set[str]:
        """Return the names of the workers that are registered."""
        if self.resilient:
            return set((self.readiness() or {}).get("workers", ()))
        return set(_WORKER_ROW.findall(self._workers_page()))

    def _workers_page(self) -> str:
        # /json/identity.json has all of this too, and fails as soon as a worker reports the metrics of a span.
        answer = http_get(self.http_port, "/info/main/workers.html")
        return answer[1].decode() if answer is not None and answer[0] == 200 else ""


class WorkerProcess(OwnedProcess):
    """``python -m dask worker`` on loopback, with its nanny or without.

    Parameters
    ----------
    address
        Address of the scheduler.
    nanny
        Whether a nanny watches over it; both are in one process group.
    name
        Name of the member.
    store, preload, log, environment
        As in `SchedulerProcess`.
    nthreads
        Task threads.
    memory_limit
        As Dask writes it; ``"0"`` for none.
    """

    def __init__(
        self,
        address: str,
        *,
        nanny: bool,
        log: Path,
        name: str = "worker",
        store: str | None = None,
        preload: str | None = None,
        nthreads: int = 1,
        memory_limit: str = "0",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        arguments = ["worker", address, "--host", HOST, "--nthreads", str(nthreads), "--name", name]
        arguments += ["--nanny" if nanny else "--no-nanny", "--no-dashboard", "--dashboard-address", f"{HOST}:0"]
        arguments += ["--memory-limit", memory_limit, "--local-directory", str(log.parent / f"{name}-files")]
        arguments += ["--preload", preload] if preload else []
        arguments += ["--preload-nanny", preload] if preload and nanny else []
        super().__init__(
            arguments,
            name=name,
            log=log,
            environment={**({_STORE: store} if store else {}), **(environment or {})},
        )

    def wait_ready(self, scheduler: SchedulerProcess, *, timeout_seconds: float = _READY_PATIENCE_SECONDS) -> None:
        """Wait until the scheduler has registered it."""
        self.await_condition(
            lambda: self.name in scheduler.worker_names(), "registered", timeout_seconds=timeout_seconds
        )


class Cluster:
    """A scheduler and workers as processes, in a temporary directory.

    Parameters
    ----------
    n_workers, nthreads, nanny, memory_limit
        How many workers, task threads in each, whether nannies watch over them, and how much memory each may use.
    protocol
        ``tcp`` or ``tls``; certificates come by `environment`.
    resilient
        Preload `PRELOAD` everywhere, on a store in the directory or where `environment` says; otherwise stock Dask.
    warm_replacement
        Keep a parked scheduler process that takes the address over when the scheduler dies.
    supervise
        Replace a dead scheduler at once: by a standby if there is one, else at the same address, as systemd or
        Kubernetes would.
    directory
        Where logs and the store go, and stay; by default a temporary one that is removed at the end.
    environment
        Variables of every member, such as ``DASK_RESILIENCE__FAILOVER__GRACE``, on top of this process' own.

    Attributes
    ----------
    environment
        Variables of the members that are started from now on.
    address, store
        Of the scheduler; the store is None for stock Dask.
    scheduler, workers, standbys
        The processes.
    gentle
        Set it to have the members asked to end before they are killed at the end: for who measures them.

    Examples
    --------
    >>> with Cluster(n_workers=1, resilient=False) as cluster:
    ...     cluster.scheduler.is_ready(), len(cluster.scheduler.worker_names())
    (True, 1)
    """

    def __init__(
        self,
        *,
        n_workers: int = 2,
        resilient: bool,
        warm_replacement: bool = False,
        supervise: bool = False,
        nthreads: int = 1,
        nanny: bool = True,
        protocol: str = "tcp",
        memory_limit: str = "0",
        directory: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.resilient = resilient
        self.gentle = False
        self.directory = directory or Path(tempfile.mkdtemp(prefix="dask-resilience-"))
        self.environment = dict(environment or {})
        self.store = self.environment.get(_STORE, str(self.directory / "store")) if resilient else None
        self.workers: list[WorkerProcess] = []
        self.standbys: list[SchedulerProcess] = []
        self.restarts = 0
        self._n_workers, self._nthreads, self._nanny = n_workers, nthreads, nanny
        self._memory_limit = memory_limit
        self._protocol = protocol
        self._warm_replacement, self._supervise = warm_replacement, supervise
        self._remove_directory = directory is None
        self._preload = PRELOAD if resilient else None
        self._lock = threading.RLock()
        self._closing = False
        self._parked: SchedulerProcess | None = None
        self._serial = 0

    # ------------------------------------------------------------------ life

    def __enter__(self) -> Self:
        try:
            self._start_scheduler()
            for _ in range(self._n_workers):
                self.add_worker()
            self.wait_workers(self._n_workers)
            self.park_replacement()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask_to_end(self, members: Sequence[OwnedProcess]) -> None:
        """Give members the chance to end by themselves, the scheduler's clean end being that of its workers."""
        for process in members:
            process.send(signal.SIGCONT)
            process.send(signal.SIGTERM)
        wait_until(lambda: not any(process.alive for process in members), timeout_seconds=_GENTLE_SECONDS)

    def close(self) -> None:
        """Kill every process of the cluster and remove the directory if it is ours to remove."""
        with self._lock:
            self._closing = True
            members: list[OwnedProcess] = [*self.workers, *self.standbys]
            members += [process for process in (self._parked, getattr(self, "scheduler", None)) if process]
        if self.gentle:
            self._ask_to_end(members)
        for process in members:
            process.send(signal.SIGKILL)
        for process in members:
            process.close()
        if self._remove_directory:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _start_scheduler(self) -> None:
        for attempt in range(_START_ATTEMPTS):
            self.scheduler = self._new_scheduler(free_port(), free_port())
            self.scheduler.start()
            try:
                self.scheduler.wait_ready()
                break
            except MemberError:
                taken = "address already in use" in self.scheduler.log_tail(lines=200).lower()
                if not taken or attempt == _START_ATTEMPTS - 1:
                    raise
        self.address = self.scheduler.address

    def _new_scheduler(self, port: int, http_port: int, *, parked: bool = False) -> SchedulerProcess:
        self._serial += 1
        name = f"scheduler-{self._serial}"
        scheduler = SchedulerProcess(
            port,
            http_port=http_port,
            protocol=self._protocol,
            store=self.store,
            preload=self._preload,
            parked=parked,
            name=name,
            log=self.directory / f"{name}.log",
            environment=self.environment,
        )
        scheduler.on_exit = self._scheduler_exited
        return scheduler

    # ------------------------------------------------------------- schedulers

    def park_replacement(self, *, wait: bool = True) -> None:
        """Have a warm replacement, if this cluster keeps one; wait until it has imported all, or only start it."""
        if not self._warm_replacement:
            return
        with self._lock:
            if self._closing:
                return
            if self._parked is None or not self._parked.alive:
                self._parked = self._new_scheduler(self.scheduler.port, self.scheduler.http_port, parked=True).start()
            parked = self._parked
        if wait:
            parked.wait_parked()

    def start_standby(self) -> SchedulerProcess:
        """Start a second scheduler on other ports and the same store; return when it stands by for the lease."""
        standby = self._new_scheduler(free_port(), free_port())
        self.standbys.append(standby)
        standby.start().wait_standing_by()
        return standby

    def promote_standby(self) -> SchedulerProcess:
        """Call the oldest living standby the scheduler from now on; it takes the lease by itself."""
        with self._lock:
            self.standbys = [standby for standby in self.standbys if standby.alive]
            if not self.standbys:
                raise MemberError("cluster", "has no standby; start one before the scheduler dies")
            self.scheduler = self.standbys.pop(0)
            return self.scheduler

    def kill_scheduler(self, number: int = signal.SIGKILL) -> float:
        """Kill the scheduler; return the moment in seconds of ``time.monotonic``."""
        return self.scheduler.kill(number)

    def restart_scheduler(self) -> SchedulerProcess:
        """Start a scheduler at the dead one's address and on its store, from the parked process if there is one."""
        with self._lock:
            if self._closing:
                raise MemberError("cluster", "is closing and starts no scheduler")
            if self.scheduler.alive:
                raise MemberError(self.scheduler.name, "still lives; kill it before the restart")
            replacement, self._parked = self._parked, None
            if replacement is not None and replacement.alive:
                replacement.go()
            else:
                replacement = self._new_scheduler(self.scheduler.port, self.scheduler.http_port).start()
            self.scheduler = replacement
            self.restarts += 1
            return replacement

    def _scheduler_exited(self, process: OwnedProcess) -> None:
        with self._lock:
            if not self._supervise or self._closing or process is not self.scheduler or self.restarts >= _MAX_RESTARTS:
                return
            if any(standby.alive for standby in self.standbys):
                self.promote_standby()
            else:
                self.restart_scheduler()

    def wait_scheduler_ready(self, *, timeout_seconds: float = _READY_PATIENCE_SECONDS) -> SchedulerProcess:
        """Wait until the present scheduler serves, whichever process that is by then; return it."""

        def present_is_ready() -> bool:
            return self.scheduler.is_ready()

        if not wait_until(present_is_ready, timeout_seconds=timeout_seconds):
            tail = self.scheduler.log_tail()
            raise MemberError(self.scheduler.name, f"was not ready in {timeout_seconds} seconds", tail)
        return self.scheduler

    # ---------------------------------------------------------------- workers

    def add_worker(self) -> WorkerProcess:
        """Start one more worker, without waiting for it."""
        name = f"worker-{len(self.workers)}"
        worker = WorkerProcess(
            self.address,
            nanny=self._nanny,
            name=name,
            store=self.store,
            preload=self._preload,
            nthreads=self._nthreads,
            memory_limit=self._memory_limit,
            log=self.directory / f"{name}.log",
            environment=self.environment,
        )
        self.workers.append(worker)
        return worker.start()

    def wait_workers(self, count: int, *, timeout_seconds: float = _READY_PATIENCE_SECONDS) -> None:
        """Wait until the scheduler has at least that many workers."""
        if not wait_until(lambda: len(self.scheduler.worker_names()) >= count, timeout_seconds=timeout_seconds):
            tails = "\n".join(f"--- {worker.name}\n{worker.log_tail(5)}" for worker in self.workers)
            raise MemberError("cluster", f"had not {count} workers in {timeout_seconds} seconds", tails)

    def kill_worker(self, index: int, number: int = signal.SIGKILL) -> float:
        """Kill a worker with its nanny; return the moment in seconds of ``time.monotonic``."""
        return self.workers[index].kill(number)

    def alive_workers(self) -> int:
        """Return how many worker processes live."""
        return sum(worker.alive for worker in self.workers)
