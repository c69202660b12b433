"""A live scheduler in this process, without workers."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
from distributed import Scheduler

from dask_resilience._distributed.scheduler_clients import Clients
from dask_resilience._distributed.scheduler_gate import Gate
from dask_resilience._distributed.scheduler_ledger import Ledger
from dask_resilience._distributed.scheduler_once import Once
from dask_resilience._distributed.scheduler_queues import Queues
from dask_resilience._distributed.scheduler_shared import Shared
from dask_resilience._distributed.scheduler_tap import Tap
from dask_resilience._distributed.scheduler_topics import Topics
from dask_resilience._distributed.scheduler_workers import Workers
from dask_resilience._distributed.task_notes import TaskNotes


class Reign:
    """A rule whose lease is as sure as the test says."""

    cluster, epoch, store_url = "us", 1, "file:///nowhere"

    def __init__(self):
        self.sure = True

    def valid(self):
        return self.sure

    def member_returned(self, member):
        """Nobody recovers."""


class Log:
    """A journal in memory that is durable as far as the test says."""

    pending_bytes = 0

    def __init__(self):
        self.records = []
        self.hurried = 0

    def append(self, record):
        self.records.append(record)
        return len(self.records)

    def hurry(self):
        self.hurried += 1


class Stream:
    """What a scheduler says to a client."""

    def __init__(self):
        self.sent = []

    def send(self, *msgs):
        self.sent += msgs

    def acks(self):
        return [msg["seq"] for msg in self.sent if msg["op"] == "resilience-ack"]

    async def close(self):
        """Nothing to close."""

    def abort(self):
        """Nothing to break."""


class Seat:
    """A scheduler that serves, with everything that hangs on it."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.log, self.reign, self.stream = Log(), Reign(), Stream()
        self.ledger = Ledger(
            scheduler, self.log, pending_limit_bytes=1 << 20, commit_interval_seconds=0.001, last_seq={}
        )
        self.tap = Tap(scheduler, self.ledger, retried=TaskNotes(), first_runs=TaskNotes())
        self.tap.attach()
        self.gate = Gate(scheduler, self.reign)
        self.workers = Workers(scheduler, self.gate, link_grace_seconds=1)
        self.clients = Clients(scheduler, self.gate, grace_seconds=1)
        self.workers.attach(self.tap)
        self.clients.attach(self.ledger)
        Shared(scheduler).attach(self.ledger)
        self.once = Once()
        self.queues = Queues(scheduler, self.once)
        self.queues.attach(self.ledger)
        self.topics = Topics(scheduler, self.once)
        self.topics.attach(self.ledger)
        self.gate.attach()
        self.gate.serving.set()
        scheduler.client_comms["c"] = self.stream

    def records(self, kind):
        return [record for record in self.log.records if isinstance(record, kind)]


@pytest.fixture
def seat():
    """An async context manager that yields a seat."""

    @asynccontextmanager
    async def make():
        async with Scheduler(host="127.0.0.1", port=0, dashboard_address=":0") as scheduler:
            yield Seat(scheduler)

    return make
