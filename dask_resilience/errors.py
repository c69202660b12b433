"""Errors, few, each saying what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_NAMED_KEYS = 3


class ResilienceError(Exception):
    """Base of everything that this package raises."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors travel from schedulers and workers to clients. By default one would be made again by calling its
        # class with the message alone, which is not what the constructors here take.
        return _made_again, (type(self), self.args, self.__dict__)


def _made_again(kind: type[ResilienceError], args: tuple[Any, ...], fields: dict[str, Any]) -> ResilienceError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(fields)
    return error


class ConfigError(ResilienceError, ValueError):
    """A setting is unknown, malformed, or contradicts another.

    Parameters
    ----------
    key
        The full configuration key, such as ``resilience.failover.grace``.
    problem
        What is wrong and what to write instead.
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key = key
        self.problem = problem


class UnsupportedDask(ResilienceError):
    """The installed distributed differs from what this release was built against.

    Parameters
    ----------
    version
        The installed version of distributed.
    differences
        One line for each internal that is missing or has another signature.
    """

    def __init__(self, version: str, differences: Sequence[str]) -> None:
        listed = "\n".join(f"  - {line}" for line in differences)
        super().__init__(
            f"distributed {version} is not supported by this release of dask-resilience:\n{listed}\n"
            "Install a supported distributed, or a newer dask-resilience; the README names the range."
        )
        self.version = version
        self.differences = tuple(differences)


class StoreError(ResilienceError):
    """The store cannot be reached, read or written.

    Parameters
    ----------
    url
        The store.
    problem
        What failed, and what to do.
    """

    def __init__(self, url: str, problem: str) -> None:
        super().__init__(f"{url}: {problem}")
        self.url = url
        self.problem = problem


class JournalCorrupt(ResilienceError):
    """A byte of the journal is not what was written, in a place where no crash explains it.

    Parameters
    ----------
    segment
        Name of the object.
    offset
        Byte offset in it.
    problem
        What is wrong there.
    """

    def __init__(self, segment: str, offset: int, problem: str) -> None:
        super().__init__(
            f"{segment} at byte {offset}: {problem}. Nothing was changed. Run `dask resilience verify` on the store, "
            "and restore the segment from a copy or start on a new, empty store."
        )
        self.segment = segment
        self.offset = offset
        self.problem = problem


class JournalTooNew(ResilienceError):
    """The journal was written by a newer release; reading on could lose what it added.

    Parameters
    ----------
    segment
        Name of the object.
    version
        Its format version.
    supported
        The newest version that this release reads.
    """

    def __init__(self, segment: str, version: int, supported: int) -> None:
        super().__init__(
            f"{segment} has journal format {version}, this release reads up to {supported}. "
            "Install a newer dask-resilience, or use another store."
        )
        self.segment = segment
        self.version = version
        self.supported = supported


class ChangeTooNew(ResilienceError):
    """A record of the journal is about something that this release does not know; going on could lose it.

    Parameters
    ----------
    record
        Name of its class.
    what
        What it says it is about.
    """

    def __init__(self, record: str, what: str) -> None:
        super().__init__(
            f"the journal has a {record} record about {what!r}, which this release does not know. "
            "Install a newer dask-resilience, or use another store."
        )
        self.record = record
        self.what = what


class WrongCluster(ResilienceError):
    """The store belongs to another cluster.

    Parameters
    ----------
    url
        The store.
    expected, found
        The configured cluster name and the one in the store.
    """

    def __init__(self, url: str, expected: str, found: str) -> None:
        super().__init__(
            f"{url} belongs to cluster {found!r}, but resilience.cluster is {expected!r}. "
            "Point resilience.store at this cluster's own prefix, or correct resilience.cluster."
        )
        self.url = url
        self.expected = expected
        self.found = found


class Fenced(ResilienceError):
    """Another scheduler rules this cluster now; this one must stop.

    Parameters
    ----------
    epoch
        Our epoch.
    newer
        The epoch that replaced it.
    """

    def __init__(self, epoch: int, newer: int) -> None:
        super().__init__(f"epoch {newer} rules this cluster; this scheduler had epoch {epoch} and stops")
        self.epoch = epoch
        self.newer = newer


class NotRecovered(ResilienceError):
    """The scheduler could not rebuild its state and does not serve an empty one instead."""


class SnapshotRefused(ResilienceError):
    """A snapshot would not be the whole state, so none is taken; the journal goes on."""


class GraphUnreadable(ResilienceError):
    """A journalled graph cannot be unpickled by this scheduler's environment.

    Parameters
    ----------
    keys
        Keys that the client asked for. The first few are kept: each of them gets this error, and a client that asked
        for all of a large graph would be sent the square of their number.
    problem
        The cause, which names the missing module where there is one.
    """

    def __init__(self, keys: Sequence[object], problem: str) -> None:
        self.keys = tuple(keys[:_NAMED_KEYS])
        shown = ", ".join(map(repr, self.keys)) + (", ..." if len(keys) > _NAMED_KEYS else "")
        super().__init__(
            f"the graph of {shown} was journalled but cannot be read by this scheduler: {problem}. "
            "Install the same environment as the client's on the scheduler and submit the graph again."
        )
        self.problem = problem


class SchedulerGone(ResilienceError, OSError):
    """No scheduler came back within the patience of this member."""


class CallInterrupted(ResilienceError, OSError):
    """The scheduler died during a call that must not be repeated blindly.

    Parameters
    ----------
    operation
        The remote operation.
    """

    def __init__(self, operation: str) -> None:
        super().__init__(
            f"the scheduler was replaced during {operation!r}, which may or may not have run. "
            "Check its effect and call again."
        )
        self.operation = operation
