"""How a process or a cluster refuses to start or to go on.

Dask logs an exception of a preload and starts without it: a scheduler would serve without a journal, and a worker would
die with its scheduler. So a process that Dask's command line started is ended with a code of its own, and a server
inside somebody else's program fails its start.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any, Final, NoReturn

import click
from distributed.diagnostics.plugin import SchedulerPlugin

from dask_resilience.errors import ResilienceError

logger = logging.getLogger("distributed.resilience")

#: Exit code of a process that was fenced, could not recover, or cannot do what it is configured for.
EXIT_CODE: Final = 3


def owns_process() -> bool:
    """Whether this process exists to run a scheduler or a worker, rather than a user's program with a cluster in it.

    To be asked in the thread of the event loop: Dask's commands run it in the main thread, inside of their call.
    """
    context = click.get_current_context(silent=True)
    callback = context.command.callback if context is not None else None
    return callback is not None and callback.__module__.startswith("distributed.cli.")


def tell(error: BaseException) -> None:
    """Log why."""
    if isinstance(error, ResilienceError):
        logger.critical("%s", error)
    else:
        logger.critical("Resilience could not start", exc_info=error)


def end_process() -> NoReturn:
    """End this process with `EXIT_CODE`, whatever else runs in it."""
    logging.shutdown()
    sys.stderr.flush()
    os._exit(EXIT_CODE)


class _RefuseStart(SchedulerPlugin):
    name = "resilience-refused"

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def start(self, scheduler: Any) -> None:
        raise self.error


def refuse_scheduler(scheduler: Any, error: Exception) -> None:
    """Let the start of `scheduler` fail by `error`."""
    tell(error)
    if owns_process():
        end_process()
    scheduler.add_plugin(_RefuseStart(error), name=_RefuseStart.name)


def refuse_worker(worker: Any, error: Exception) -> None:
    """Let the start of `worker` fail by `error`. Its nanny, if it has one, ends by that too."""
    tell(error)
    if worker.nanny is None and owns_process():
        end_process()

    async def refuse() -> None:
        raise error

    worker._register_with_scheduler = refuse
