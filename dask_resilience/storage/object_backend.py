"""What a remote store is asked for: single requests, sent once, that fail in a few ways that matter.

A backend translates. It sends each request once, within no deadline of its own, and says what the answer means;
`Requests` decides what is sent again and what came of it in the end.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Fault(enum.Enum):
    """Why a request was not done."""

    #: Answered: the condition does not hold (412).
    REFUSED = "refused"
    #: Answered: there is no such object.
    ABSENT = "absent"
    #: Not done: busy, or never reached. Send it again.
    BUSY = "busy"
    #: Perhaps done: the reply was lost, or says that something broke on the way.
    UNSURE = "unsure"
    #: Answered: no permission.
    DENIED = "denied"
    #: Answered: no space.
    FULL = "full"


class RequestFailed(Exception):
    """A request was not answered by success. Never leaves this package's storage.

    Parameters
    ----------
    fault
        What that means.
    detail
        What the store or the network said.
    """

    def __init__(self, fault: Fault, detail: str) -> None:
        super().__init__(f"{fault.value}: {detail}")
        self.fault = fault
        self.detail = detail


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """An object, or a range of it.

    Parameters
    ----------
    data
        The bytes.
    token
        Stands for the version of the object in `ObjectBackend.put`.
    write_id
        Of the request that wrote it; empty where the store does not tell.
    """

    data: bytes
    token: str
    write_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A part of a listing.

    Parameters
    ----------
    entries
        Key and size in bytes of each object, in the order of keys.
    more
        Where the next page begins; None behind the last.
    """

    entries: Sequence[tuple[str, int]]
    more: str | None


class ObjectBackend(Protocol):
    """Requests to one bucket. Keys are full keys, the store's prefix included.

    Each method sends one request. It raises `RequestFailed`, or `StoreError` where sending again is no use and a
    person must act: no such bucket, wrong region, no or expired credentials.
    """

    async def open(self) -> None:
        """Make what requests need, so that none is late because of it. Sends nothing to the bucket."""

    async def put(self, key: str, data: bytes, *, token: str | None, write_id: str) -> None:
        """Write an object that still is what `token` stands for, or that must not exist (None)."""

    async def get(self, key: str, *, end: int | None = None) -> Fetched:
        """Read an object, or its bytes before `end`."""

    async def list(self, prefix: str, *, after: str = "", more: str | None = None) -> Page:
        """List the objects whose keys begin with a prefix and come behind a key, a page at a time."""

    async def delete(self, key: str) -> None:
        """Remove an object; `Fault.ABSENT` or success when there is none."""

    async def close(self) -> None:
        """Let go of connections."""


def fault_of_status(status: int) -> Fault | None:
    """Translate an HTTP status; None for what is no matter of trying again.

    Examples
    --------
    >>> fault_of_status(412), fault_of_status(503), fault_of_status(504)
    (<Fault.REFUSED: 'refused'>, <Fault.BUSY: 'busy'>, <Fault.UNSURE: 'unsure'>)
    >>> fault_of_status(400)
    """
    if status in (401, 403):
        return Fault.DENIED
    if status in (408, 409, 425, 429, 503):
        return Fault.BUSY
    if status == 507:
        return Fault.FULL
    if status >= 500:
        return Fault.UNSURE
    return {404: Fault.ABSENT, 412: Fault.REFUSED}.get(status)
