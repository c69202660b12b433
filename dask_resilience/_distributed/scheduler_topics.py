"""What members log under topics of their own is recorded; who subscribes is told what it missed.

Dask itself logs under ``all``, ``scheduler`` and the addresses and ids of members, and much. That tells what one
scheduler saw, and ends with it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from distributed.protocol.pickle import dumps, loads
from distributed.scheduler import Scheduler

from dask_resilience._distributed.scheduler_ledger import Ledger
from dask_resilience._distributed.scheduler_once import Once, fields_of_turn
from dask_resilience.journal import records
from dask_resilience.journal.topics import TopicStates

#: Topics of Dask's own, apart from those of single members.
_OF_DASK = frozenset(
    {
        "all",
        "invalid-worker-task-state",
        "invalid-worker-transition",
        "scheduler",
        "worker-fail-hard",
        "worker-get-client",
    }
)


class Topics:
    """The event log of one scheduler.

    Parameters
    ----------
    scheduler
        A live scheduler; some of its handlers are replaced.
    once
        Its numbered calls.
    """

    ledger: Ledger

    def __init__(self, scheduler: Scheduler, once: Once) -> None:
        self.scheduler: Any = scheduler
        self._once = once

    def restore(self, states: TopicStates) -> None:
        """Bring back what the journal holds, before what this scheduler logged already."""
        for name, events in states.events.items():
            topic = self.scheduler._broker._topics[name]
            topic.events.extendleft(map(loads, reversed(events)))
            topic.count += states.counts[name]

    def attach(self, ledger: Ledger) -> None:
        """Record events from now on."""
        self.ledger = ledger
        handlers, stream = self.scheduler.handlers, self.scheduler.stream_handlers
        handlers["log_event"] = ledger.durable_call(self._log_event(handlers["log_event"]))
        stream["log-event"] = self._log_worker_event(stream["log-event"])
        stream["subscribe-topic"] = self._subscribe_topic(stream["subscribe-topic"])

    def _record(self, topic: Any) -> None:
        names = [topic] if isinstance(topic, str) else topic
        lasting = tuple(name for name in names if self._lasts(name))
        if lasting and (events := self.scheduler._broker._topics[lasting[0]].events):
            self.ledger.record(records.EventLogged(topics=lasting, event=dumps(events[-1]), **fields_of_turn()))

    def _lasts(self, topic: str) -> bool:
        return topic not in _OF_DASK and "://" not in topic and topic not in self.scheduler.clients

    def _log_event(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        async def log_event(topic: Any, msg: Any, request: Any = None) -> None:
            def run() -> None:
                stock(topic=topic, msg=msg)
                self._record(topic)
                self._once.note()

            await self._once.run(request, run)

        return log_event

    def _log_worker_event(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stock)
        def log_worker_event(worker: str, topic: Any, msg: Any) -> None:
            stock(worker=worker, topic=topic, msg=msg)
            self._record(topic)

        return log_worker_event

    def _subscribe_topic(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """A client that subscribes again says which event it heard last, and hears those after it."""

        @wraps(stock)
        def subscribe_topic(topic: str, client: str, **more: Any) -> None:
            stock(topic=topic, client=client)
            if "after" not in more:
                return
            events = list(self.scheduler._broker._topics[topic].events)
            if more["after"] is None:
                last = events[-1][0] if events else 0.0
                self.scheduler.client_send(client, {"op": "resilience-subscribed", "topic": topic, "last": last})
                return
            for event in _later(events, more["after"]):
                self.scheduler.client_send(client, {"op": "event", "topic": topic, "event": event})

        return subscribe_topic


def _later(events: list[Any], last: float) -> list[Any]:
    """Events after the one that was heard last. Clocks of schedulers differ, so its place counts if it is there."""
    for place in range(len(events) - 1, -1, -1):
        if events[place][0] == last:
            return events[place + 1 :]
    return [event for event in events if event[0] > last]
