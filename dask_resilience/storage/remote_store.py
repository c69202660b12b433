"""A store over single requests to a bucket; see ``docs/design/0003-object-stores.md``.

How each promise is kept:

create
    One conditional request, so of many callers one wins, and an object is never there in part.
compare_and_swap
    One request under the condition that the version that was read is still there.
durability
    The store answers when it is durable.
growing objects
    A conditional creation for each sync, see `grown_object`.
lost replies
    See `remote_requests`.

All requests run on one thread with a loop of its own; callers block.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from dask_resilience.errors import StoreError
from dask_resilience.storage import names
from dask_resilience.storage.grown_object import GROWN, GrownAppendHandle, GrownObjects, Head
from dask_resilience.storage.io_loop import IoLoop, LoopClosed
from dask_resilience.storage.object_backend import Fetched, ObjectBackend
from dask_resilience.storage.object_store import AppendHandle, ConditionalStore, Outcome, Stored
from dask_resilience.storage.remote_requests import Requests
from dask_resilience.storage.retrying import RetryTerms

_Result = TypeVar("_Result")


class RemoteStore(ConditionalStore):
    """Objects below a prefix of a bucket.

    Parameters
    ----------
    url
        Where that is, for people.
    backend
        Sends requests to the bucket; closed with the store.
    prefix
        What all keys begin with; empty, or ending with a slash.
    terms
        How long operations may take.
    jitter
        Returns random numbers from 0 to 1, for the waits between tries.

    Examples
    --------
    >>> from dask_resilience.storage.memory_backend import MemoryBackend
    >>> store = RemoteStore("memory://example", MemoryBackend("example"))
    >>> store.create("lease", b"mine"), store.create("lease", b"yours")
    (<Outcome.OK: 'ok'>, <Outcome.EXISTS: 'exists'>)
    >>> store.close()
    """

    def __init__(
        self,
        url: str,
        backend: ObjectBackend,
        *,
        prefix: str = "",
        terms: RetryTerms | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._url = url
        self._prefix = prefix
        self._requests = Requests(backend, url=url, terms=terms or RetryTerms(), jitter=jitter)
        self._grown = GrownObjects(self._requests, self._key)
        self._loop = IoLoop(f"store-{url}")
        try:
            self._loop.run(backend.open())
        except BaseException:
            self._loop.close()
            raise

    @property
    def url(self) -> str:
        """Where it is, for people."""
        return self._url

    @property
    def of_this_process(self) -> bool:
        """Whether no other process can open it."""
        return self._url.startswith("memory:")

    def create(self, name: str, data: bytes) -> Outcome:
        """Write an object that must not exist: of any number of callers exactly one gets `Outcome.OK`."""
        return self._run(self._requests.put(self._object(name), _plain(data), token=None))

    def get(self, name: str) -> Stored | None:
        """Read an object; None when there is none. Never a part of one."""
        return self._run(self._get(name))

    def compare_and_swap(self, name: str, data: bytes, token: str) -> Outcome:
        """Replace an object that still is what `token` stands for."""
        return self._run(self._requests.put(self._object(name), _plain(data), token=token))

    def list(self, prefix: str) -> list[str]:
        """Names that begin with the prefix, sorted."""
        names.check(f"{prefix}x")
        return [*self._run(self._list(prefix))]

    def delete(self, name: str) -> None:
        """Remove an object; nothing happens when there is none."""
        self._run(self._delete(name))

    def exists(self, name: str) -> bool:
        """Tell whether there is an object, by one request. Never answers False out of ignorance."""
        # Its first byte, not a HEAD: the answer to that says the same for a missing object and a missing bucket.
        return self._run(self._requests.get(self._object(name), end=1)) is not None

    def open_append(self, name: str, header: bytes) -> AppendHandle | Outcome:
        """Create an object that grows; it never exists without its header. An `Outcome` says why there is none."""
        head = Head(identity=secrets.token_hex(16), header=header)
        outcome = self._run(self._requests.put(self._object(name), head.encode(), token=None))
        if outcome is not Outcome.OK:
            return outcome
        return GrownAppendHandle(name, head, requests=self._requests, key=self._key, run=self._run)

    def read_from(self, name: str, offset: int, *, length: int = -1) -> bytes | None:
        """Read an object, growing ones included, from a byte offset on; None when there is none."""
        return self._run(self._read_from(name, offset, None if length < 0 else offset + length))

    def settle(self, name: str, length: int) -> None:
        """See that the first `length` bytes are there: what a remote store returns is durable."""
        self._run(self._settle(name, length))

    def close(self) -> None:
        """Let go of connections and end the thread; the store must not be used any more."""
        try:
            self._loop.run(self._requests.close())
        except LoopClosed:
            return
        self._loop.close()

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _object(self, name: str) -> str:
        return self._key(names.check(name))

    def _run(self, coroutine: Coroutine[Any, Any, _Result]) -> _Result:
        try:
            return self._loop.run(coroutine)
        except LoopClosed as error:
            raise StoreError(self._url, f"the store was closed ({error}); open it again") from error

    async def _head(self, name: str) -> tuple[Fetched, Head | None] | None:
        found = await self._requests.get(self._object(name))
        if found is None:
            return None
        return found, Head.decode(found.data, url=self._url, name=name)

    async def _get(self, name: str) -> Stored | None:
        found = await self._head(name)
        if found is None:
            return None
        fetched, head = found
        data = fetched.data if head is None else await self._grown.read(name, head, start=0, stop=None)
        return Stored(data=data, token=fetched.token)

    async def _read_from(self, name: str, start: int, stop: int | None) -> bytes | None:
        found = await self._head(name)
        if found is None:
            return None
        fetched, head = found
        if head is None:
            return fetched.data[start:stop]
        return await self._grown.read(name, head, start=start, stop=stop)

    async def _list(self, prefix: str) -> Sequence[str]:
        found: list[str] = []
        hidden = self._key(names.PARTS)
        after = ""
        while True:
            async for page in self._requests.pages(self._key(prefix), after=after):
                keys = [key for key, _ in page.entries]
                found += (key[len(self._prefix) :] for key in keys if not key.startswith(hidden))
                if keys and keys[-1].startswith(hidden):
                    # There may be millions of parts; go on behind all of them.
                    after = f"{hidden.removesuffix('/')}0"
                    break
            else:
                return sorted(name for name in found if not any(part.startswith(".") for part in name.split("/")))

    async def _delete(self, name: str) -> None:
        await self._requests.delete(self._object(name))
        # Behind it, so that it is never there without its parts.
        await self._grown.delete(name)

    async def _settle(self, name: str, length: int) -> None:
        found = await self._head(name)
        if found is None:
            raise StoreError(self._url, f"{name} is gone, {length} bytes of it were read before")
        fetched, head = found
        size = len(fetched.data) if head is None else await self._grown.size(name, head)
        if size < length:
            raise StoreError(self._url, f"{name} has {size} bytes, {length} were read from it before")


def _plain(data: bytes) -> bytes:
    if data.startswith(GROWN):
        raise ValueError("these bytes would be taken for an object that grows")
    return data
