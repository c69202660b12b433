"""Calls that count once, however often they are made.

A client that does not get an answer makes its call again, and cannot know whether the first one counted. So it numbers
its calls, and says with each the smallest number whose answer it still lacks: everything below is *settled*. What a
call came to is kept until it is settled, which bounds what is kept by the calls that a client has under way at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from dask_resilience.journal import records

T = TypeVar("T")


class Call(NamedTuple):
    """One call, the same each time that it is made.

    Parameters
    ----------
    client
        Who calls.
    number
        Its number, larger than those of all calls that the client made before; from 1.
    settled
        The answers to all calls with a smaller number have arrived, or nobody waits for them any more.
    """

    client: str
    number: int
    settled: int


@dataclass(slots=True)
class _OfClient(Generic[T]):
    settled: int = 0
    handed: dict[int, list[T]] = field(default_factory=dict)


class Calls(Generic[T]):
    """What the calls of each client came to, until they are settled.

    Examples
    --------
    >>> calls = Calls()
    >>> calls.note(Call("c", 1, 1), "item")
    >>> calls.handed(Call("c", 1, 1))
    ('item',)
    >>> calls.hear(Call("c", 2, 2))
    >>> calls.counted(Call("c", 1, 1)), calls.is_over(Call("c", 1, 1))
    (False, True)
    """

    def __init__(self) -> None:
        self._clients: dict[str, _OfClient[T]] = {}

    def hear(self, call: Call) -> None:
        """Take note of what is settled."""
        of_client = self._clients.setdefault(call.client, _OfClient())
        if call.settled > of_client.settled:
            of_client.settled = call.settled
            for number in [number for number in of_client.handed if number < call.settled]:
                del of_client.handed[number]

    def is_over(self, call: Call) -> bool:
        """Whether nobody waits for it: a copy of it that was long under way must not count any more."""
        of_client = self._clients.get(call.client)
        return of_client is not None and call.number < of_client.settled

    def counted(self, call: Call) -> bool:
        """Whether it has changed something already."""
        of_client = self._clients.get(call.client)
        return of_client is not None and call.number in of_client.handed

    def handed(self, call: Call) -> tuple[T, ...]:
        """Tell what it was handed already."""
        of_client = self._clients.get(call.client)
        return tuple(of_client.handed.get(call.number, ())) if of_client is not None else ()

    def note(self, call: Call, *items: T) -> None:
        """It counted, and was handed `items` more."""
        self.hear(call)
        if not self.is_over(call):
            self._clients[call.client].handed.setdefault(call.number, []).extend(items)

    def forget(self, client: str) -> None:
        """A client is gone for good."""
        self._clients.pop(client, None)

    def clear(self) -> None:
        """Forget everybody."""
        self._clients.clear()

    def __iter__(self) -> Iterator[tuple[Call, tuple[T, ...]]]:
        for client, of_client in self._clients.items():
            for number, items in of_client.handed.items():
                yield Call(client, number, of_client.settled), tuple(items)

    def all_over(self) -> Iterator[Call]:
        """The last call of each client none of whose calls is open: a late copy of it must still not count."""
        for client, of_client in self._clients.items():
            if not of_client.handed and of_client.settled > 1:
                yield Call(client, of_client.settled - 1, of_client.settled)


def call_of(record: records.QueueChanged | records.EventLogged | records.CallAnswered) -> Call | None:
    """The call that a record says to have counted; None where there was none that could be repeated."""
    return Call(record.client, record.number, record.settled) if record.number else None


def call_records(calls: Calls[bytes]) -> Iterator[records.CallAnswered]:
    """Records that lead to the same state of `calls`."""
    for call, items in calls:
        yield records.CallAnswered(client=call.client, number=call.number, settled=call.settled, items=items)
    for call in calls.all_over():
        yield records.CallAnswered(client=call.client, number=call.number, settled=call.settled, items=())
