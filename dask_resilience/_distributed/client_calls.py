"""The numbers of calls that count once; see `dask_resilience.journal.calls`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Numbers:
    """Numbers the calls of one client.

    Parameters
    ----------
    client
        Its id.

    Examples
    --------
    >>> numbers = Numbers("c")
    >>> with numbers.next() as first, numbers.next() as second:
    ...     numbers.request(second)
    ('c', 2, 1)
    """

    def __init__(self, client: str) -> None:
        self._client = client
        self._last = 0
        self._under_way: dict[int, None] = {}

    @contextmanager
    def next(self) -> Iterator[int]:
        """Give a number to a call that is under way within."""
        self._last += 1
        number = self._last
        self._under_way[number] = None
        try:
            yield number
        finally:
            del self._under_way[number]

    def request(self, number: int) -> tuple[str, int, int]:
        """What the call says of itself: the client, its number, and the smallest one without an answer."""
        return self._client, number, next(iter(self._under_way))
