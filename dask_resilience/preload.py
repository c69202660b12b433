"""The way in: ``dask scheduler --preload dask_resilience.preload``, and the same for ``dask worker``.

With ``--preload-nanny dask_resilience.preload`` nannies outlive a scheduler that dies while they start, too.

A plain function configured by `dask.config`, since only one preload may take command-line arguments and other
packages' preloads do. Importing it registers the readiness route, because Dask reads its list of routes right after it
imported the preloads; and it imports all that is needed, because an exception in `dask_setup` would only be logged.
"""

from __future__ import annotations

import logging
from typing import Any

import dask.config
from distributed import Nanny, Scheduler, Worker

from dask_resilience._distributed.pinned import check_supported
from dask_resilience._distributed.refusal import end_process, owns_process, refuse_worker, tell
from dask_resilience.errors import ResilienceError
from dask_resilience.settings import Settings
from dask_resilience.storage.open_store import check_url

logger = logging.getLogger("distributed.resilience")

# Before the seam is imported, which would fail by the first missing name and not name the others. With a nanny, the
# command line imports this module too: its process ends at once, instead of starting workers that cannot start.
try:
    check_supported()
    if owns_process():
        check_url(Settings.load().store)
except ResilienceError as refused:
    tell(refused)
    if owns_process():
        end_process()
    raise

from dask_resilience.plugins.scheduler import setup_scheduler  # noqa: E402
from dask_resilience.plugins.worker import setup_nanny, setup_worker  # noqa: E402

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
        except Exception as error:  # noqa: BLE001 - whatever it is, nobody else would tell
            refuse_worker(server, error)
    elif isinstance(server, Nanny):
        setup_nanny(server)
    else:
        logger.warning("dask_resilience.preload does nothing on a %s", type(server).__name__)
