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
_ADVICE_REMOTE = {
    Outcome.DENIED: "Give these credentials the right to read, write, list and delete below this URL",
    Outcome.FULL: "Raise the quota of the bucket, or point resilience.store at another",
    Outcome.RETRY: "It was busy or out of reach all the time: check the network, the endpoint and its health, and wait",
}
_CHECK_REMOTE = "Check the network, the endpoint and the health of the store"
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
    remote = "://" in url and not url.startswith("file://")
    advice, check = (_ADVICE_REMOTE, _CHECK_REMOTE) if remote else (_ADVICE, _CHECK)
    if isinstance(cause, Outcome):
        return StoreError(url, f"cannot be {attempt} ({cause.value}). {advice.get(cause, check)}")
    outcome = outcome_of(cause)
    return StoreError(url, f"cannot be {attempt}: {cause}. {check if outcome is None else advice[outcome]}")
