"""A thread with an event loop of its own, on which all requests of one store run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class LoopClosed(RuntimeError):
    """The loop was closed, or the caller is its own thread, which would wait for ever."""


class IoLoop:
    """Runs coroutines for blocking callers, so that no loop of Dask ever does store I/O.

    Parameters
    ----------
    name
        Of the thread.

    Examples
    --------
    >>> loop = IoLoop("example")
    >>> loop.run(asyncio.sleep(0, "done"))
    'done'
    >>> loop.close()
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._live, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, _Result]) -> _Result:
        """Wait for a coroutine and return what it returns.

        Raises
        ------
        LoopClosed
            If it cannot run.
        """
        if self._loop.is_closed() or threading.current_thread() is self._thread:
            coroutine.close()
            raise LoopClosed("the I/O loop is closed, or waits for itself")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            # An interrupted caller: the request must not run on behind its back.
            future.cancel()
            raise

    def close(self) -> None:
        """End the thread. May be called twice, and on a thread that runs another loop."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _live(self) -> None:
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()
