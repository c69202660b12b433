"""What the operating system says about a store, in words that tell what to do."""

from __future__ import annotations

import errno

from dask_resilience.errors import StoreError
from dask_resilience.storage.object_store import Outcome

_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

_ADVICE = {
    Outcome.DENIED: "Give this user permission to write there, or point resilience.store at a folder where it has it",
    Outcome.FULL: "Free some space or raise the quota, or point resilience.store at a larger file system",
    Outcome.RETRY: "Another process holds the lock of the store and does not go on: continue or end it",
}
_CHECK = "Check that the file system is mounted and healthy, or point resilience.store at another folder"


def outcome_of(error: OSError) -> Outcome | None:
    """Translate what a caller can decide on; None for the rest.

    Examples
    --------
    >>> outcome_of(OSError(errno.ENOSPC, "No space left on device"))
    <Outcome.FULL: 'full'>
    """
    if error.errno in _DENIED:
        return Outcome.DENIED
    if error.errno in _FULL:
        return Outcome.FULL
    return None


def store_error(url: str, attempt: str, cause: OSError | Outcome) -> StoreError:
    """Describe a failure.

    Parameters
    ----------
    url
        The store.
    attempt
        What could not be done, as in "cannot be {attempt}".
    cause
        What the system or the store answered.

    Examples
    --------
    >>> print(store_error("file:///x", "written", Outcome.FULL))  # doctest: +ELLIPSIS
    file:///x: cannot be written (full). Free some space...
    """
    if isinstance(cause, Outcome):
        return StoreError(url, f"cannot be {attempt} ({cause.value}). {_ADVICE.get(cause, _CHECK)}")
    outcome = outcome_of(cause)
    return StoreError(url, f"cannot be {attempt}: {cause}. {_CHECK if outcome is None else _ADVICE[outcome]}")
