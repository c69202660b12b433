"""A scheduler that never serves: a place for a state to be built in."""

from __future__ import annotations

from typing import Any

import dask
from distributed.scheduler import Scheduler


class HeadlessScheduler(Scheduler):
    """A scheduler that listens nowhere and loads no preloads. It needs a running event loop, and no `close`."""

    def __init__(self) -> None:
        with dask.config.set({"distributed.scheduler.preload": [], "distributed.scheduler.http.routes": []}):
            super().__init__(dashboard=False, validate=False)

    def start_http_server(self, *args: Any, **kwargs: Any) -> None:
        """Open no port."""
