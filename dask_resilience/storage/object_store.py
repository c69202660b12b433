"""The store that a cluster trusts: few operations, each with an outcome that a caller can decide on."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


class Outcome(enum.Enum):
    """What became of a write."""

    #: Done and durable.
    OK = "ok"
    #: Not done: the name is taken.
    EXISTS = "exists"
    #: Not done: the object changed since it was read, or is gone.
    CONFLICT = "conflict"
    #: Not done: the store was busy. Try again.
    RETRY = "retry"
    #: Perhaps done: read it back before anything else.
    AMBIGUOUS = "ambiguous"
    #: Not done: no permission to write.
    DENIED = "denied"
    #: Not done: no space.
    FULL = "full"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """An object as it was read.

    Parameters
    ----------
    data
        Its bytes.
    token
        Stands for exactly these bytes in `ConditionalStore.compare_and_swap`.
    """

    data: bytes
    token: str


class AppendHandle(ABC):
    """A journal segment that is being written. One thread uses it at a time.

    Any failure raises `OSError`, and nothing is then known about what of the unsynced bytes is in the file. The
    handle must not be used for anything but `close` afterwards: after a failed fsync the system may have dropped the
    bytes and forgotten that they were not written, so that the next fsync succeeds without them.
    """

    @property
    @abstractmethod
    def size_bytes(self) -> int:
        """Bytes handed to the file so far, the header included."""

    @abstractmethod
    def write(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Append all bytes, in order."""

    @abstractmethod
    def sync(self) -> None:
        """Return when everything that was written is durable."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the file without making anything durable. May be called twice."""


class ConditionalStore(ABC):
    """Objects under names, written under conditions that hold across processes.

    Names are made by `dask_resilience.storage.names`. Reads see every write that was answered with `Outcome.OK`
    before. Failures that a caller cannot decide on raise `StoreError`.
    """

    @property
    @abstractmethod
    def url(self) -> str:
        """Where it is: for people, and for other processes to open it by."""

    @property
    def of_this_process(self) -> bool:
        """Whether no other process can open it."""
        return False

    @abstractmethod
    def create(self, name: str, data: bytes) -> Outcome:
        """Write an object that must not exist: of any number of callers exactly one gets `Outcome.OK`."""

    @abstractmethod
    def get(self, name: str) -> Stored | None:
        """Read an object; None when there is none. Never a part of one."""

    @abstractmethod
    def compare_and_swap(self, name: str, data: bytes, token: str) -> Outcome:
        """Replace an object that still is what `token` stands for."""

    @abstractmethod
    def list(self, prefix: str) -> list[str]:
        """Names that begin with the prefix, sorted."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove an object; nothing happens when there is none."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Tell whether there is an object, as cheaply as the store can. Never answers False out of ignorance."""

    @abstractmethod
    def open_append(self, name: str, header: bytes) -> AppendHandle | Outcome:
        """Create an object that grows; it never exists without its header. An `Outcome` says why there is none."""

    @abstractmethod
    def read_from(self, name: str, offset: int, *, length: int = -1) -> bytes | None:
        """Read an object, growing ones included, from a byte offset on; None when there is none.

        A negative length reads the rest.
        """

    @abstractmethod
    def settle(self, name: str, length: int) -> None:
        """Make the first `length` bytes of a growing object durable, whoever wrote them and whatever failed then."""

    def close(self) -> None:  # noqa: B027 - a store need not hold anything
        """Let go of what is held open; the store must not be used any more. May be called twice."""
