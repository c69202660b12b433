"""Objects in the memory of this process, for tests and for trying things out."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, field

from dask_resilience.storage.object_backend import Fault, Fetched, Page, RequestFailed

#: Small, so that tests see more than one page.
_PAGE = 100


@dataclass(slots=True)
class _Shelf:
    lock: threading.Lock = field(default_factory=threading.Lock)
    objects: dict[str, Fetched] = field(default_factory=dict)
    versions: itertools.count[int] = field(default_factory=lambda: itertools.count(1))


_SHELVES: dict[str, _Shelf] = {}
_MAKING = threading.Lock()


def is_known(name: str) -> bool:
    """Tell whether a memory store of this name was opened in this process."""
    return name in _SHELVES


class MemoryBackend:
    """The memory store of one name: all that are opened under it see the same objects.

    Parameters
    ----------
    name
        What follows ``memory://``.
    """

    def __init__(self, name: str) -> None:
        with _MAKING:
            self._shelf = _SHELVES.setdefault(name, _Shelf())

    async def open(self) -> None:
        """Need nothing."""

    async def put(self, key: str, data: bytes, *, token: str | None, write_id: str) -> None:
        """Write an object that still is what `token` stands for, or that must not exist (None)."""
        shelf = self._shelf
        with shelf.lock:
            present = shelf.objects.get(key)
            if token != (None if present is None else present.token):
                raise RequestFailed(Fault.REFUSED, "the condition does not hold")
            shelf.objects[key] = Fetched(data=bytes(data), token=str(next(shelf.versions)), write_id=write_id)

    async def get(self, key: str, *, end: int | None = None) -> Fetched:
        """Read an object, or its bytes before `end`."""
        with self._shelf.lock:
            found = self._shelf.objects.get(key)
        if found is None:
            raise RequestFailed(Fault.ABSENT, "no such object")
        return Fetched(data=found.data[:end], token=found.token, write_id=found.write_id)

    async def list(self, prefix: str, *, after: str = "", more: str | None = None) -> Page:
        """List the objects whose keys begin with a prefix and come behind a key, a page at a time."""
        start = max(after, more or "")
        with self._shelf.lock:
            found = sorted(key for key in self._shelf.objects if key.startswith(prefix) and key > start)[:_PAGE]
            entries = [(key, len(self._shelf.objects[key].data)) for key in found]
        return Page(entries=entries, more=found[-1] if len(found) == _PAGE else None)

    async def delete(self, key: str) -> None:
        """Remove an object, if there is one."""
        with self._shelf.lock:
            self._shelf.objects.pop(key, None)

    async def close(self) -> None:
        """Keep the objects: they live as long as the process."""
