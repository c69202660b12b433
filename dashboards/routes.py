"""``/resilience/ready``: may this scheduler be given work?

Dask's own ``/health`` answers 200 as soon as the process listens, also while its state is still being rebuilt. A load
balancer, a Kubernetes readiness probe or a script that starts clients asks here instead.
"""

from __future__ import annotations

import json
from typing import Any

from distributed.http.utils import RequestHandler


class ReadyHandler(RequestHandler):
    """Answers 200 when the scheduler has recovered and serves, 503 before, 404 where resilience is not installed.

    It reads ``scheduler.resilience``: its ``ready`` and what its ``status()`` tells of epoch and phase.
    """

    def get(self) -> None:
        """Answer with a JSON object that has ``ready`` and, where known, what explains it."""
        resilience = getattr(self.server, "resilience", None)
        if resilience is None:
            hint = "resilience is not installed in this scheduler; start it with --preload dask_resilience.preload"
            self._answer(404, {"ready": False, "hint": hint})
            return
        ready = bool(resilience.ready)
        self._answer(200 if ready else 503, {**resilience.status(), "ready": ready})

    def _answer(self, code: int, body: dict[str, Any]) -> None:
        self.set_status(code)
        self.set_header("Content-Type", "application/json")
        self.set_header("Cache-Control", "no-store")
        self.write(json.dumps(body, default=str))


#: What ``distributed.scheduler.http.routes`` takes a module's routes from.
routes: list[tuple[str, type[RequestHandler], dict[str, Any]]] = [("resilience/ready", ReadyHandler, {})]
