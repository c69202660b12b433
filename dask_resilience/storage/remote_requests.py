"""Requests sent until it is known what came of them, or until the time is up.

How a write is decided
----------------------
Each write carries a random id, which the store keeps beside the bytes. A request whose reply was lost is sent again
under the same condition, which cannot do it twice. When the condition then does not hold, the object is read:

=================  =======================  ==========================================================
the object has     after a clean answer     after a lost reply
=================  =======================  ==========================================================
our write id       `OK`                     `OK`: our own first request, which also the HTTP library may
                                            have sent again without telling
another, create    `EXISTS`                 `EXISTS`
another, swap      `CONFLICT`               `AMBIGUOUS`: ours may have been there and been swapped away
=================  =======================  ==========================================================

A name that is free and an object that is unchanged prove nothing after a lost reply, since the request may still be
under way; so they are tried again, and are `AMBIGUOUS` when the time is up. A store that does not return write ids is
judged by the bytes, after a lost reply only: callers put nonces into what they create.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from dask_resilience.errors import StoreError
from dask_resilience.storage.object_backend import Fault, Fetched, ObjectBackend, Page, RequestFailed
from dask_resilience.storage.object_store import Outcome
from dask_resilience.storage.retrying import RetryTerms

logger = logging.getLogger("distributed.resilience")

_Result = TypeVar("_Result")

#: What is allowed for the bytes of an object whose size is not known before it is read.
_USUAL_BYTES = 1 << 20

_GIVEN_UP = {Fault.DENIED: Outcome.DENIED, Fault.FULL: Outcome.FULL}


class Requests:
    """Operations on a backend, each with an end.

    Parameters
    ----------
    backend
        Sends single requests.
    url
        Of the store, for messages.
    terms
        How often and how long.
    jitter
        Returns random numbers from 0 to 1.
    """

    def __init__(
        self,
        backend: ObjectBackend,
        *,
        url: str,
        terms: RetryTerms,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._backend = backend
        self._url = url
        self._terms = terms
        self._jitter = jitter

    async def put(self, key: str, data: bytes, *, token: str | None) -> Outcome:
        """Create an object (`token` is None) or swap it, and tell what came of it."""
        write_id = secrets.token_hex(16)
        tries = _Tries(self._terms, self._jitter)
        unsure = refused = False
        while not refused:
            try:
                async with tries.within(len(data)):
                    await self._backend.put(key, data, token=token, write_id=write_id)
                return Outcome.OK
            except (RequestFailed, TimeoutError) as error:
                failed = tries.failed(error)
            if failed.fault in _GIVEN_UP:
                logger.warning("%s: %s was not written: %s", self._url, key, failed)
                return Outcome.AMBIGUOUS if unsure else _GIVEN_UP[failed.fault]
            unsure = unsure or failed.fault is Fault.UNSURE
            refused = failed.fault in (Fault.REFUSED, Fault.ABSENT)
            if not refused and not await tries.pause():
                logger.warning("%s: %s was tried for %.1f s: %s", self._url, key, tries.elapsed_seconds(), failed)
                break
        if not refused and not unsure:
            return Outcome.RETRY
        return await self._decided(key, data, token=token, write_id=write_id, unsure=unsure)

    async def _decided(self, key: str, data: bytes, *, token: str | None, write_id: str, unsure: bool) -> Outcome:
        """Read what is there after the condition did not hold, or the time was up after a lost reply."""
        try:
            found = await self.get(key)
        except StoreError:
            return Outcome.AMBIGUOUS
        if found is not None and _ours(found, write_id, data if unsure else None):
            return Outcome.OK
        if token is None and found is not None:
            return Outcome.EXISTS
        if unsure:
            return Outcome.AMBIGUOUS
        # A name that was taken and is free again: the next try may have it.
        return Outcome.RETRY if token is None else Outcome.CONFLICT

    async def get(self, key: str, *, end: int | None = None, nbytes: int = _USUAL_BYTES) -> Fetched | None:
        """Read an object or its first bytes; None when there is none."""
        return await self._until_answered(f"read ({key})", lambda: self._backend.get(key, end=end), nbytes=nbytes)

    async def pages(self, prefix: str, *, after: str = "") -> AsyncIterator[Page]:
        """List in the order of keys."""
        more: str | None = None
        while True:
            page = await self._until_answered(
                f"listed ({prefix})",
                lambda start=more: self._backend.list(prefix, after=after, more=start),  # type: ignore[misc]
                nbytes=_USUAL_BYTES,
            )
            if page is None:
                return
            yield page
            more = page.more
            if more is None:
                return

    async def delete(self, key: str) -> None:
        """Remove an object, if there is one."""
        await self._until_answered(f"deleted ({key})", lambda: self._backend.delete(key), nbytes=0)

    async def close(self) -> None:
        """Let go of connections."""
        await self._backend.close()

    async def _until_answered(
        self, attempt: str, send: Callable[[], Awaitable[_Result]], *, nbytes: int
    ) -> _Result | None:
        tries = _Tries(self._terms, self._jitter)
        while True:
            try:
                async with tries.within(nbytes):
                    return await send()
            except (RequestFailed, TimeoutError) as error:
                failed = tries.failed(error)
            if failed.fault is Fault.ABSENT:
                return None
            if failed.fault is Fault.DENIED:
                problem = (
                    f"cannot be {attempt}: permission denied ({failed.detail}). Give these credentials the right to "
                    "read, write, list and delete below this URL"
                )
                raise StoreError(self._url, problem)
            if not await tries.pause():
                problem = (
                    f"cannot be {attempt}: no good answer for {tries.elapsed_seconds():.1f} s, last: {failed.detail}. "
                    "Check the network, the endpoint and the health of the store"
                )
                raise StoreError(self._url, problem)


class _Tries:
    """The clock and the counts of one operation."""

    def __init__(self, terms: RetryTerms, jitter: Callable[[], float]) -> None:
        self._terms = terms
        self._jitter = jitter
        self._started = time.monotonic()
        self._failures = 0
        self._timeouts = 0

    def elapsed_seconds(self) -> float:
        return time.monotonic() - self._started

    def within(self, nbytes: int) -> asyncio.Timeout:
        return asyncio.timeout(self._terms.deadline_seconds(nbytes, timeouts=self._timeouts))

    def failed(self, error: RequestFailed | TimeoutError) -> RequestFailed:
        self._failures += 1
        if isinstance(error, RequestFailed):
            return error
        self._timeouts += 1
        return RequestFailed(Fault.UNSURE, "no answer within the deadline of a request")

    async def pause(self) -> bool:
        """Wait for the next try; False when there is none."""
        pause = self._terms.pause_seconds(self._failures, jitter=self._jitter(), elapsed_seconds=self.elapsed_seconds())
        if pause is None:
            return False
        await asyncio.sleep(pause)
        return True


def _ours(found: Fetched, write_id: str, data: bytes | None) -> bool:
    return found.write_id == write_id if found.write_id else found.data == data
