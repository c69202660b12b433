"""A store that is slow, fails, loses replies, tears tails, and can be out of reach.

`Disk` holds the truth. A process sees it through a `StoreView`, which takes virtual time around each operation, so
that a process can die or be overtaken before the effect, between effect and reply, and in the middle of an append.
Growing objects know how much of them is durable: when their host crashes the rest is torn.
"""

from __future__ import annotations

import builtins
import errno
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from dask_resilience.errors import StoreError
from dask_resilience.sim.loop import Loop, Process
from dask_resilience.sim.strand import die_if_killed, pause
from dask_resilience.storage.object_store import AppendHandle, ConditionalStore, Outcome, Stored

T = TypeVar("T")

#: Name of the store's host, for partitions.
STORE_HOST: Final = "store"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreTerms:
    """How bad the store is.

    Parameters
    ----------
    latency_seconds
        Each operation takes up to this long.
    trouble
        Probability that an operation fails.
    timeout_seconds
        How long an operation takes to fail when the store is out of reach.
    """

    latency_seconds: float = 0.01
    trouble: float = 0.0
    timeout_seconds: float = 1.0


@dataclass(slots=True)
class _Object:
    data: bytearray
    durable_bytes: int
    #: Host whose memory holds the bytes that are not durable.
    host: str = ""


@dataclass(slots=True)
class Disk:
    """What is stored.

    Parameters
    ----------
    loop
        Draws how tails tear.
    """

    loop: Loop
    objects: dict[str, _Object] = field(default_factory=dict)

    def crash(self, host: str) -> None:
        """Lose what a host had written and not synced, to a random length, or leave zeros of it."""
        for name, found in self.objects.items():
            unsynced = len(found.data) - found.durable_bytes
            if found.host != host or not unsynced:
                continue
            kept = found.durable_bytes + self.loop.rng.randrange(unsynced + 1)
            zeros = self.loop.rng.randrange(len(found.data) - kept + 1) if self.loop.chance(0.3) else 0
            self.loop.note("torn", name, len(found.data), "->", kept, "zeros", zeros)
            found.data[kept:] = bytes(zeros)
            # A file system that came back has made its mind up.
            found.durable_bytes = len(found.data)


def _token(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


class StoreView(ConditionalStore):
    """The store as one process sees it.

    Parameters
    ----------
    disk
        The truth.
    process
        Who looks.
    terms
        How bad it is.
    reaches
        Tells whether a process reaches a host.
    """

    def __init__(
        self, disk: Disk, *, process: Process, terms: StoreTerms, reaches: Callable[[Process, str], bool]
    ) -> None:
        self._disk = disk
        self._process = process
        self._terms = terms
        self._reaches = reaches

    @property
    def url(self) -> str:
        """Name it in errors."""
        return "sim://store"

    def create(self, name: str, data: bytes) -> Outcome:
        """Write an object that must not exist."""
        return self._conditional(lambda: self._create(name, data))

    def compare_and_swap(self, name: str, data: bytes, token: str) -> Outcome:
        """Replace an object that still is what the token stands for."""
        return self._conditional(lambda: self._swap(name, data, token))

    def get(self, name: str) -> Stored | None:
        """Read an object."""
        return self._plain(lambda: self._get(name))

    def list(self, prefix: str) -> builtins.list[str]:
        """Names that begin with the prefix, sorted."""
        return self._plain(lambda: sorted(name for name in self._disk.objects if name.startswith(prefix)))

    def delete(self, name: str) -> None:
        """Remove an object."""
        self._plain(lambda: self._disk.objects.pop(name, None))

    def exists(self, name: str) -> bool:
        """Tell whether there is an object."""
        return self._plain(lambda: name in self._disk.objects)

    def read_from(self, name: str, offset: int, *, length: int = -1) -> bytes | None:
        """Read an object from an offset on."""
        return self._plain(lambda: self._read(name, offset, length))

    def settle(self, name: str, length: int) -> None:
        """Make the first bytes of a growing object durable."""
        self._plain(lambda: self._settle(name, length))

    def open_append(self, name: str, header: bytes) -> AppendHandle | Outcome:
        """Create an object that grows. Ambiguous means here: it is there, and perhaps not for long."""
        outcome = self._conditional(lambda: self._create(name, header), faults=("reply", "busy"))
        return _Appending(self, self._disk.objects[name]) if outcome is Outcome.OK else outcome

    def reach(self) -> None:
        """Take the way to the store: time, and perhaps no arrival."""
        die_if_killed()
        pause(self._terms.latency_seconds * self._disk.loop.rng.random())
        if not self._reaches(self._process, STORE_HOST):
            pause(self._terms.timeout_seconds)
            raise StoreError(self.url, "cannot be reached")

    def return_home(self) -> None:
        """Take the way back."""
        pause(self._terms.latency_seconds * self._disk.loop.rng.random())

    def trouble(self) -> bool:
        """Draw whether something goes wrong."""
        return self._disk.loop.chance(self._terms.trouble)

    def draw(self, options: Sequence[Any]) -> Any:
        """Draw what goes wrong."""
        return self._disk.loop.rng.choice(options)

    def _conditional(
        self, effect: Callable[[], Outcome], *, faults: Sequence[str] = ("before", "reply", "busy")
    ) -> Outcome:
        self.reach()
        fault = self.draw(faults) if self.trouble() else None
        if fault == "busy":
            outcome = Outcome.RETRY
        elif fault == "before":
            outcome = Outcome.AMBIGUOUS
        else:
            outcome = effect()
        self.return_home()
        return Outcome.AMBIGUOUS if fault == "reply" else outcome

    def _plain(self, effect: Callable[[], T]) -> T:
        self.reach()
        if self.trouble():
            raise StoreError(self.url, "had a moment of trouble")
        result = effect()
        self.return_home()
        return result

    def _create(self, name: str, data: bytes) -> Outcome:
        if name in self._disk.objects:
            return Outcome.EXISTS
        self._disk.objects[name] = _Object(bytearray(data), len(data), self._process.host)
        return Outcome.OK

    def _swap(self, name: str, data: bytes, token: str) -> Outcome:
        found = self._disk.objects.get(name)
        if found is None or _token(found.data) != token:
            return Outcome.CONFLICT
        self._disk.objects[name] = _Object(bytearray(data), len(data), self._process.host)
        return Outcome.OK

    def _get(self, name: str) -> Stored | None:
        found = self._disk.objects.get(name)
        return None if found is None else Stored(data=bytes(found.data), token=_token(found.data))

    def _read(self, name: str, offset: int, length: int) -> bytes | None:
        found = self._disk.objects.get(name)
        if found is None:
            return None
        return bytes(found.data[offset : None if length < 0 else offset + length])

    def _settle(self, name: str, length: int) -> None:
        found = self._disk.objects.get(name)
        if found is None:
            raise StoreError(self.url, f"{name} is missing")
        if length > len(found.data):
            raise StoreError(self.url, f"{name} is shorter than {length} bytes")
        found.durable_bytes = max(found.durable_bytes, length)


class _Appending(AppendHandle):
    """A segment that is being written."""

    def __init__(self, view: StoreView, found: _Object) -> None:
        self._view = view
        self._found = found
        self._size_bytes = len(found.data)

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def write(self, buffers: Sequence[bytes | memoryview]) -> None:
        data = b"".join(bytes(buffer) for buffer in buffers)
        self._reach()
        half = self._view.draw(range(len(data) + 1))
        self._found.data += data[:half]
        self._view.return_home()  # time passes between the halves, so a death tears the write
        if self._view.trouble():
            raise OSError(errno.EIO, "the write failed in the middle")
        self._found.data += data[half:]
        self._size_bytes += len(data)

    def sync(self) -> None:
        self._reach()
        length = len(self._found.data)
        if self._view.trouble():
            if self._view.draw((True, False)):
                self._found.durable_bytes = length
            raise OSError(errno.EIO, "the sync failed")
        self._found.durable_bytes = max(self._found.durable_bytes, length)
        self._view.return_home()

    def close(self) -> None:
        return

    def _reach(self) -> None:
        try:
            self._view.reach()
        except StoreError as error:
            raise OSError(errno.EIO, error.problem) from error
