"""The way in: ``dask scheduler --preload dask_resilience.preload``, and the same for ``dask worker``.

A plain function configured by `dask.config`, since only one preload may take command-line arguments and other
packages' preloads do. Importing it registers the readiness route, because Dask reads its list of routes right after it
imported the preloads; and it imports all that is needed, because an exception in `dask_setup` would only be logged.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import dask.config
from distributed import Nanny, Scheduler, Worker

import dask_resilience.settings  # noqa: F401 - the defaults have to be in dask.config before anybody asks
from dask_resilience.errors import ResilienceError
from dask_resilience.plugins.scheduler import setup_scheduler
from dask_resilience.plugins.worker import setup_worker

logger = logging.getLogger("distributed.resilience")

_ROUTES = "dask_resilience.dashboards.routes"


def _register_route() -> None:
    # Appended, not set: setting the key would replace Dask's own routes.
    routes = dask.config.get("distributed.scheduler.http.routes")
    if _ROUTES not in routes:
        routes.append(_ROUTES)


_register_route()


async def dask_setup(server: Any) -> None:
    """Called by Dask when the server is about to serve."""
    if isinstance(server, Scheduler):
        await setup_scheduler(server)
    elif isinstance(server, Worker):
        try:
            setup_worker(server)
        except ResilienceError as error:
            logger.critical("%s", error)
            if "distributed.cli.dask_worker" in sys.modules and server.nanny is None:
                os._exit(3)
            raise
    elif not isinstance(server, Nanny):
        logger.warning("dask_resilience.preload does nothing on a %s", type(server).__name__)
