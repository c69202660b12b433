"""From a URL to a store that was found to keep its promises."""

from __future__ import annotations

import contextlib
import secrets
from urllib.parse import unquote, urlsplit

from dask_resilience.errors import StoreError
from dask_resilience.storage import names
from dask_resilience.storage.local_store import LocalStore
from dask_resilience.storage.object_store import ConditionalStore, Outcome
from dask_resilience.storage.trouble import store_error

_SCHEMES = ("", "file", "local")


def open_store(url: str, *, existing: bool = False) -> ConditionalStore:
    """Open a store and probe it.

    Parameters
    ----------
    url
        A path, ``file:///path`` or ``local:///path``.
    existing
        Only look at a store that is there, without creating or probing anything: for members that read the leader
        record.

    Returns
    -------
    ConditionalStore
        Ready for use.

    Raises
    ------
    StoreError
        If the URL is not supported, the store cannot be used, or it does not keep its promises.

    Examples
    --------
    >>> import tempfile
    >>> open_store(tempfile.mkdtemp()).list("")
    []
    """
    path = _path(url)
    store = LocalStore(path, create=not existing)
    if not existing:
        probe(store)
    return store


def check_url(url: str | None) -> None:
    """Refuse a store that no scheduler could use, without looking for it: it need not be in reach from here.

    Parameters
    ----------
    url
        ``resilience.store``; None passes.

    Raises
    ------
    StoreError
        If the URL is not supported.

    Examples
    --------
    >>> check_url("file:///mnt/shared/prod")
    """
    if url is not None:
        _path(url)


def _path(url: str) -> str:
    if not url:
        raise StoreError(url, "resilience.store is empty; give it a directory")
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES:
        raise StoreError(
            url,
            f"this release keeps its journal in a local (or shared, POSIX) directory, not in {parts.scheme!r}. "
            "Give resilience.store a path or file:///path",
        )
    if not parts.scheme:
        return url
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise StoreError(url, f"write {parts.scheme}:///absolute/path, with three slashes")
    return unquote(parts.path)


def probe(store: ConditionalStore) -> None:
    """Check the two promises on which everything rests, with an object of its own.

    Parameters
    ----------
    store
        Any store.

    Raises
    ------
    StoreError
        If it cannot be written, or accepts a second create or a stale swap.
    """
    name = f"{names.PROBE}/{secrets.token_hex(16)}"
    try:
        _expect(store, "create", store.create(name, b"first"), Outcome.OK)
        _expect(store, "second create", store.create(name, b"second"), Outcome.EXISTS)
        read = store.get(name)
        if read is None or read.data != b"first":
            raise StoreError(store.url, "does not return what was written. Use another file system")
        _expect(store, "swap", store.compare_and_swap(name, b"third", read.token), Outcome.OK)
        _expect(store, "stale swap", store.compare_and_swap(name, b"fourth", read.token), Outcome.CONFLICT)
        if isinstance(store, LocalStore):
            store.remove_leftovers(name)
    finally:
        with contextlib.suppress(StoreError):
            store.delete(name)


def _expect(store: ConditionalStore, operation: str, outcome: Outcome, wanted: Outcome) -> None:
    if outcome is wanted:
        return
    if outcome in (Outcome.DENIED, Outcome.FULL, Outcome.RETRY):
        raise store_error(store.url, "written", outcome)
    raise StoreError(
        store.url,
        f"answered {outcome.value!r} to a {operation} and must answer {wanted.value!r}, so two schedulers could both "
        "rule. Use a file system with POSIX semantics (local, or NFS 4 with locking)",
    )
