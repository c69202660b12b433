"""The readiness route, asked over HTTP on Dask's own scheduler."""

from __future__ import annotations

import asyncio
import json

import dask
import pytest
from distributed import Scheduler
from tornado.httpclient import AsyncHTTPClient

from dask_resilience.dashboards import routes


class Recovery:
    """What the route reads, at a moment that the test chooses."""

    def __init__(self):
        self.ready = False

    def status(self):
        if self.ready:
            return {"phase": "serving", "epoch": 4, "address": "tcp://10.0.0.1:8786"}
        return {"phase": "replaying", "epoch": 4}


async def ask(scheduler):
    url = f"http://127.0.0.1:{scheduler.http_server.port}/resilience/ready"
    answer = await AsyncHTTPClient(force_instance=True).fetch(url, raise_error=False)
    return answer, json.loads(answer.body)


@pytest.fixture
def on_a_scheduler():
    """Run a coroutine function with a scheduler whose HTTP server has the route."""

    def run(story):
        async def main():
            known = dask.config.get("distributed.scheduler.http.routes")
            with dask.config.set({"distributed.scheduler.http.routes": [*known, routes.__name__]}):
                scheduler = Scheduler(port=0, dashboard_address="127.0.0.1:0", dashboard=False)
                async with scheduler:
                    await story(scheduler)

        asyncio.run(main())

    return run


def test_503_until_recovered_then_200(on_a_scheduler):
    async def story(scheduler):
        scheduler.resilience = Recovery()
        answer, body = await ask(scheduler)
        assert answer.code == 503
        assert body == {"ready": False, "phase": "replaying", "epoch": 4}

        scheduler.resilience.ready = True
        answer, body = await ask(scheduler)
        assert answer.code == 200
        assert body == {"ready": True, "phase": "serving", "epoch": 4, "address": "tcp://10.0.0.1:8786"}
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.headers["Cache-Control"] == "no-store"

    on_a_scheduler(story)


def test_404_where_it_is_not_installed(on_a_scheduler):
    async def story(scheduler):
        answer, body = await ask(scheduler)
        assert answer.code == 404
        assert body["ready"] is False
        assert "--preload dask_resilience.preload" in body["hint"]

    on_a_scheduler(story)
