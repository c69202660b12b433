"""`install`: survive from now on, on a cluster that already runs."""

from __future__ import annotations

import warnings
from typing import Any

import distributed
from distributed.diagnostics.plugin import SchedulerPlugin, WorkerPlugin

from dask_resilience._distributed.pinned import check_supported

_ONLY_BY_PRELOAD = (
    "dask_resilience.install covers what is submitted from now on. Graphs, futures, scattered data, plugins, and what "
    "is shared by name (variables, queues, locks) from before are not in the journal and end with this scheduler, and "
    "its replacement has to be started with `dask scheduler --preload dask_resilience.preload` on the store {store}. "
    "Start the scheduler with the preload to have everything from the beginning, a standby, and the readiness route."
)


class _OnScheduler(SchedulerPlugin):
    name = "resilience-install"
    idempotent = True

    async def start(self, scheduler: Any) -> None:
        check_supported()
        from dask_resilience.plugins.scheduler import install_on_scheduler

        await install_on_scheduler(scheduler)


class _OnWorker(WorkerPlugin):
    name = "resilience-install"
    idempotent = True

    async def setup(self, worker: Any) -> None:
        check_supported()
        from dask_resilience.plugins.worker import setup_worker

        if getattr(worker, "resilience", None) is None:
            await setup_worker(worker).learn()


def install(client: distributed.Client) -> dict[str, Any]:
    """Let a running cluster survive the death of its scheduler from now on.

    Parameters
    ----------
    client
        A client of the cluster, synchronous. A `dask_resilience.Client` keeps its futures from now on; for a plain one
        make a `dask_resilience.Client` afterwards.

    Returns
    -------
    dict
        ``store`` (its URL), ``cluster``, ``epoch``, and ``limits``: what could only be had by preload.

    Warns
    -----
    UserWarning
        With the same limits.

    Raises
    ------
    ResilienceError
        If the store cannot be used, holds the journal of a cluster that did not end, or this Dask is not supported.

    Examples
    --------
    >>> from dask.distributed import Client
    >>> import dask_resilience
    >>> with Client("tcp://127.0.0.1:8786") as plain:  # doctest: +SKIP
    ...     dask_resilience.install(plain)
    >>> client = dask_resilience.Client("tcp://127.0.0.1:8786")  # doctest: +SKIP
    """
    client.register_plugin(_OnScheduler())
    client.register_plugin(_OnWorker())
    scheduler: Any = client.scheduler
    described: dict[str, Any] = client.sync(scheduler.identity, n_workers=0)["resilience"]
    become = getattr(client, "_scheduler_became_resilient", None)
    if become is not None:
        client.sync(become)
    limits = _ONLY_BY_PRELOAD.format(store=described["store"])
    warnings.warn(limits, UserWarning, stacklevel=2)
    return {**{name: described[name] for name in ("store", "cluster", "epoch")}, "limits": limits}
