"""Objects that grow, on stores whose objects do not: a head under the object's own name, and parts below `.parts/`.

The head holds a line that says so, with a random identity and a checksum, and the header. Part *n* is created, never
overwritten, after part *n - 1* was; so the parts that are there are a prefix of what was written, and one that is
missing before another is a loss. The identity is in the name of each part, so parts of an object that was deleted are
never taken for those of the next one of its name. Parts do not change, so their sizes are remembered.
"""

from __future__ import annotations

import asyncio
import errno
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import google_crc32c

from dask_resilience.errors import JournalCorrupt, StoreError
from dask_resilience.storage import names
from dask_resilience.storage.object_store import AppendHandle, Outcome
from dask_resilience.storage.remote_requests import Requests

#: What every head begins with, whatever its version.
GROWN = b"dask-resilience grown "

_FORM = 1

#: The line of the form that is written is 71 bytes long.
_LONGEST_LINE = 200

#: Objects whose sizes of parts are remembered.
_REMEMBERED = 64

#: More at once is written as several parts, so that a part fits into the deadline of a request.
PART_BYTES = 8 << 20

#: Parts that are read at the same time. Fewer than a backend has connections, so that the renewal of a lease never
#: waits for a long replay.
_AT_ONCE = 24

_LAST_PART = 999_999

_ERRNO = {Outcome.DENIED: errno.EACCES, Outcome.FULL: errno.ENOSPC}


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What stands under the name of an object that grows.

    Parameters
    ----------
    identity
        32 random hexadecimal digits.
    header
        Its first bytes.
    """

    identity: str
    header: bytes

    def encode(self) -> bytes:
        """Turn it into bytes."""
        line = b"%b%d %b" % (GROWN, _FORM, self.identity.encode())
        return b"%b %08x\n%b" % (line, google_crc32c.value(line), self.header)

    @classmethod
    def decode(cls, data: bytes, *, url: str, name: str) -> Head | None:
        """Read it back; None for an object that does not grow.

        With another identity the object would have no parts, and what they hold would be missing without a trace:
        hence the checksum.
        """
        if not data.startswith(GROWN):
            return None
        end = data.find(b"\n", 0, _LONGEST_LINE)
        line, _, check = data[: max(end, 0)].rpartition(b" ")
        if check != b"%08x" % google_crc32c.value(line):
            raise JournalCorrupt(name, 0, "the line that names the parts of the object does not check")
        form, _, identity = line.removeprefix(GROWN).partition(b" ")
        if form != b"%d" % _FORM:
            raise StoreError(url, f"{name} has a form that this release does not know. Install a newer dask-resilience")
        return cls(identity=identity.decode("latin-1"), header=data[end + 1 :])


class GrownObjects:
    """Reads the parts of objects.

    Parameters
    ----------
    requests
        To the store.
    key
        Gives the key of a name.
    """

    def __init__(self, requests: Requests, key: Callable[[str], str]) -> None:
        self._requests = requests
        self._key = key
        self._slots = asyncio.Semaphore(_AT_ONCE)
        #: By name and identity: where the head and each part end.
        self._ends: OrderedDict[tuple[str, str], list[int]] = OrderedDict()

    async def read(self, name: str, head: Head, *, start: int, stop: int | None) -> bytes:
        """Read bytes, to the end when `stop` is None."""
        ends, found = await self._measure(name, head, until=stop)
        stop = ends[-1] if stop is None else min(stop, ends[-1])
        if start >= stop:
            return b""
        first, last = bisect_right(ends, start), bisect_right(ends, stop - 1)
        numbers = range(first, last + 1)
        pieces = await asyncio.gather(*(self._piece(name, head, number, ends, found) for number in numbers))
        begins = ends[first - 1] if first else 0
        return b"".join(pieces)[start - begins : stop - begins]

    async def size(self, name: str, head: Head) -> int:
        """Tell how many bytes there are."""
        ends, _ = await self._measure(name, head, until=None)
        return ends[-1]

    async def delete(self, name: str) -> None:
        """Remove the parts of everything that was ever created under a name."""
        async for page in self._requests.pages(self._key(names.all_parts(name))):
            await asyncio.gather(*(self._remove(key) for key, _ in page.entries))

    async def _remove(self, key: str) -> None:
        async with self._slots:
            await self._requests.delete(key)

    async def _measure(self, name: str, head: Head, *, until: int | None) -> tuple[list[int], dict[int, bytes]]:
        """Tell where the head and each part end, as far as a number of bytes; and parts that were read by that.

        Listed for the sizes and for holes, and then asked for the next part by its name, so that nothing depends on
        a listing that shows what was created last.
        """
        ends = list(self._ends.get((name, head.identity), (len(head.header),)))
        found: dict[int, bytes] = {}
        if until is not None and ends[-1] >= until:
            return ends, found
        after = self._key(names.part(name, head.identity, len(ends) - 1))
        async for page in self._requests.pages(self._key(names.parts(name, head.identity)), after=after):
            for key, size in page.entries:
                try:
                    number = names.number_of_part(key)
                except ValueError:
                    continue
                while len(ends) < number:
                    # The listing may be wrong, so it is looked for before it is told to be missing.
                    if not await self._append_next(name, head, ends, found):
                        raise JournalCorrupt(name, ends[-1], f"part {len(ends)} is missing, part {number} is there")
                ends.append(ends[-1] + size)
            if until is not None and ends[-1] >= until:
                break
        else:
            while await self._append_next(name, head, ends, found):
                pass
        self._remember(name, head, ends)
        return ends, found

    async def _append_next(self, name: str, head: Head, ends: list[int], found: dict[int, bytes]) -> bool:
        number = len(ends)
        part = await self._requests.get(self._key(names.part(name, head.identity, number)))
        if part is None:
            return False
        found[number] = part.data
        ends.append(ends[-1] + len(part.data))
        return True

    def _remember(self, name: str, head: Head, ends: list[int]) -> None:
        key = (name, head.identity)
        # Another call may have seen more meanwhile.
        if len(ends) >= len(self._ends.get(key, ())):
            self._ends[key] = ends
        self._ends.move_to_end(key)
        while len(self._ends) > _REMEMBERED:
            self._ends.popitem(last=False)

    async def _piece(self, name: str, head: Head, number: int, ends: list[int], found: dict[int, bytes]) -> bytes:
        if number == 0:
            return head.header
        if number in found:
            return found[number]
        size = ends[number] - ends[number - 1]
        async with self._slots:
            part = await self._requests.get(self._key(names.part(name, head.identity, number)), nbytes=size)
        if part is None:
            raise JournalCorrupt(name, ends[number - 1], f"part {number} is missing")
        if len(part.data) != size:
            problem = f"part {number} has {len(part.data)} bytes, and {size} were listed"
            raise JournalCorrupt(name, ends[number - 1], problem)
        return part.data


class Run(Protocol):
    """Waits for what is done on the I/O thread of a store."""

    def __call__(self, coroutine: Coroutine[Any, Any, Outcome], /) -> Outcome:
        """Return what it returns."""


class GrownAppendHandle(AppendHandle):
    """Appends to an object that was just created: what is written since the last sync is created as the next part.

    Parameters
    ----------
    name
        Of the object.
    head
        What was created under it.
    requests, key
        As for `GrownObjects`.
    run
        Runs a request and waits for it.
    """

    def __init__(self, name: str, head: Head, *, requests: Requests, key: Callable[[str], str], run: Run) -> None:
        self._name = name
        self._head = head
        self._requests = requests
        self._key = key
        self._run = run
        self._size_bytes = len(head.header)
        self._number = 0
        self._waiting: list[bytes] = []
        self._broken = False

    @property
    def size_bytes(self) -> int:
        """Bytes handed to the object so far, the header included."""
        return self._size_bytes

    def write(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Append all bytes, in order."""
        if self._broken:
            raise OSError(errno.EIO, f"{self._name} was given up after a failure, or closed")
        for buffer in buffers:
            if size := len(data := bytes(buffer)):
                self._waiting.append(data)
                self._size_bytes += size

    def sync(self) -> None:
        """Return when everything that was written is durable."""
        if self._broken:
            raise OSError(errno.EIO, f"{self._name} was given up after a failure, or closed")
        data, self._waiting = b"".join(self._waiting), []
        # Until it is known to be there; a part is not tried again by another call of ours.
        self._broken = True
        for start in range(0, len(data), PART_BYTES):
            self._create(data[start : start + PART_BYTES])
        self._broken = False

    def _create(self, data: bytes) -> None:
        self._number += 1
        if self._number > _LAST_PART:
            raise OSError(errno.EFBIG, f"{self._name} has {_LAST_PART} parts already")
        part = names.part(self._name, self._head.identity, self._number)
        try:
            outcome = self._run(self._requests.put(self._key(part), data, token=None))
        except StoreError as error:
            raise OSError(errno.EIO, str(error)) from error
        if outcome is not Outcome.OK:
            raise OSError(_ERRNO.get(outcome, errno.EIO), f"part {self._number} of {self._name}: {outcome.value}")

    def close(self) -> None:
        """Let go of what was not synced. May be called twice."""
        self._broken = True
        self._waiting.clear()
