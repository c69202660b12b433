"""When a snapshot is taken, by whom, and what is removed afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, Final

import dask.config

from dask_resilience.errors import ResilienceError
from dask_resilience.storage.object_store import ConditionalStore
from dask_resilience.storage.retention import Removed, retain

logger = logging.getLogger("distributed.resilience")

_PROCESS: Final = "dask_resilience.plugins.snapshot_process"
#: How often to look whether the journal has grown enough.
_LOOK_SECONDS: Final = 0.25
#: A process that takes longer hangs.
_LIMIT_SECONDS: Final = 3600.0
#: Of what it says when it fails, so much is told.
_TOLD_CHARACTERS: Final = 2000


class Snapshots:
    """Has a snapshot taken whenever the journal has grown enough, and removes what it stands for.

    The journal that a recovery reads is then as long as the state is large, or `after_bytes`, and the work of all
    snapshots together is as much as that of writing the journal.

    Parameters
    ----------
    store
        Where the journal is.
    epoch
        The reign.
    after_bytes
        The least growth.
    grown_bytes
        How long the journal is behind the last snapshot as this reign begins.
    durable
        Tells the last LSN that is acked, and how many bytes this reign has made durable.
    tell
        Called with what happened, for subscribers of events.
    """

    def __init__(
        self,
        store: ConditionalStore,
        *,
        epoch: int,
        after_bytes: int,
        grown_bytes: int,
        durable: Callable[[], tuple[int, int]],
        tell: Callable[[dict[str, Any]], None],
    ) -> None:
        self._store = store
        self._epoch = epoch
        self._after_bytes = after_bytes
        #: What this reign had made durable at the last snapshot; less than nothing for what was there before it.
        self._since = -grown_bytes
        self._last_bytes = 0
        self._durable = durable
        self._tell = tell
        self._process: asyncio.subprocess.Process | None = None
        self._removing: asyncio.Future[Removed] | None = None
        #: What the last one was, for people.
        self.last: dict[str, Any] | None = None

    def due(self) -> bool:
        """Whether the journal has grown enough."""
        return self._durable()[1] - self._since >= max(self._after_bytes, self._last_bytes)

    async def run(self) -> None:
        """Take snapshots until cancelled."""
        try:
            while True:
                await asyncio.sleep(_LOOK_SECONDS)
                if self.due():
                    await self.take()
        finally:
            # Who cancels this closes the store next, which a thread must not be using then.
            if self._removing is not None:
                await asyncio.wait({self._removing})

    async def take(self) -> None:
        """Take one now. A failure is told and changes nothing: the journal goes on."""
        lsn, durable_bytes = self._durable()
        # After a failure too the next is due when the journal has grown as much again.
        self._since = durable_bytes
        try:
            taken = await asyncio.wait_for(self._take(lsn), _LIMIT_SECONDS)
            self._removing = asyncio.ensure_future(asyncio.to_thread(retain, self._store))
            removed = await asyncio.shield(self._removing)
        except Exception as error:  # noqa: BLE001 - whatever it is, the next one is tried, and this one told of
            logger.warning("No snapshot of the journal at LSN %d, which goes on growing: %s", lsn, error)
            self._tell({"action": "snapshot-failed", "lsn": lsn, "error": str(error)})
            return
        finally:
            await self._end_process()
        self.took(taken, durable_bytes)
        self.last = taken | {"segments_removed": removed.segments, "snapshots_removed": removed.snapshots}
        logger.info("Snapshot: %s", self.last)
        self._tell({"action": "snapshot", **self.last})

    def took(self, taken: dict[str, Any], durable_bytes: int) -> None:
        """A snapshot was taken when so much was durable: count anew."""
        self._since, self._last_bytes = durable_bytes, taken["bytes"]

    async def _take(self, lsn: int) -> dict[str, Any]:
        # Credentials may be in the configuration, which other users must not see: not in the arguments.
        environment = os.environ | {
            "DASK_INTERNAL_INHERIT_CONFIG": dask.config.serialize(dask.config.global_config),
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),  # noqa: PTH109
        }
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # what lies in the working directory is not to be imported
            "-m",
            _PROCESS,
            self._store.url,
            str(lsn),
            str(self._epoch),
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await self._process.communicate()
        if self._process.returncode:
            said = err.decode(errors="replace")[-_TOLD_CHARACTERS:].strip()
            raise ResilienceError(f"its process ended with {self._process.returncode}: {said}")
        taken: dict[str, Any] = json.loads(out.splitlines()[-1])
        return taken

    async def _end_process(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
