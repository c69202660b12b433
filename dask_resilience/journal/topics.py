"""What was logged under the topics of users, by the journal."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from dask_resilience.journal import records
from dask_resilience.journal.calls import Calls, call_of
from dask_resilience.types import Key


class TopicStates:
    """The last events of each topic.

    Parameters
    ----------
    calls
        Takes which calls counted.
    maxlen
        How many events of a topic are kept; None for all.

    Attributes
    ----------
    events : dict
        Topic to its last events, each the pickled time and message.
    counts : dict
        Topic to how many there were in all.
    """

    def __init__(self, calls: Calls[bytes], maxlen: int | None) -> None:
        self._calls = calls
        self._maxlen = maxlen
        self.events: dict[Key, deque[bytes]] = {}
        self.counts: dict[Key, int] = {}

    def apply(self, record: records.EventLogged) -> None:
        """Apply a record."""
        for topic in record.topics:
            self.events.setdefault(topic, deque(maxlen=self._maxlen)).append(record.event)
            self.counts[topic] = self.counts.get(topic, 0) + record.count
        if (call := call_of(record)) is not None:
            self._calls.note(call)

    def clear(self) -> None:
        """Forget everything."""
        self.events.clear()
        self.counts.clear()

    def as_records(self) -> Iterator[records.EventLogged]:
        """Records that lead to the same state, apart from that of the calls."""
        for topic, events in self.events.items():
            for number, event in enumerate(events):
                # The first one stands for those that are no longer kept, too.
                count = 1 if number else self.counts[topic] - len(events) + 1
                yield records.EventLogged(topics=(topic,), event=event, count=count)
