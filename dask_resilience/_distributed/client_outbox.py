"""What a client has sent and nobody has said to be durable."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from dask_resilience.types import Key

#: How many of the keys that were let go last are remembered.
_REMEMBERED_KEYS = 10_000


class Outbox:
    """Numbers messages and keeps them until they are acked.

    Not locked: its client holds the lock of its reference counts, so that keys and messages are one picture.
    """

    def __init__(self) -> None:
        self.last_number = 0
        self._unacked: OrderedDict[int, dict[str, Any]] = OrderedDict()
        self._let_go: OrderedDict[Key, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._unacked)

    def add(self, msg: dict[str, Any], *, origin: str) -> dict[str, Any]:
        """Number a message and keep it.

        A graph says which of its keys were let go before: they may mean something else now, and the message that let
        them go may be lost.
        """
        self.last_number += 1
        numbered = {**msg, "seq": self.last_number, "origin": origin}
        if msg["op"] == "update-graph" and (again := self._let_go.keys() & msg["keys"]):
            numbered["again"] = list(again)
            for key in again:
                del self._let_go[key]
        elif msg["op"] == "cancel-keys":
            self.let_go(msg["keys"])
        self._unacked[self.last_number] = numbered
        return numbered

    def let_go(self, keys: Iterable[Key]) -> None:
        """Remember that nobody here wants `keys` any more."""
        for key in keys:
            self._let_go[key] = None
        while len(self._let_go) > _REMEMBERED_KEYS:
            self._let_go.popitem(last=False)

    def unacked(self, *, after: int = 0) -> list[dict[str, Any]]:
        """Tell what is kept, in order, at will only what was added after a number."""
        return [msg for number, msg in self._unacked.items() if number > after]

    def acked(self, number: int) -> None:
        """Drop everything up to a number."""
        while self._unacked and next(iter(self._unacked)) <= number:
            self._unacked.popitem(last=False)

    def clear(self) -> None:
        """Drop everything."""
        self._unacked.clear()


def as_stock(msg: dict[str, Any]) -> dict[str, Any]:
    """The message as a stock scheduler knows it."""
    return {name: value for name, value in msg.items() if name not in ("seq", "origin", "again", "after")}
