"""From a URL to a store that was found to keep its promises."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Mapping
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from dask_resilience.errors import StoreError
from dask_resilience.storage import memory_backend, names
from dask_resilience.storage.local_store import LocalStore
from dask_resilience.storage.object_backend import ObjectBackend
from dask_resilience.storage.object_store import ConditionalStore, Outcome
from dask_resilience.storage.remote_store import RemoteStore
from dask_resilience.storage.retrying import RetryTerms
from dask_resilience.storage.trouble import store_error

_LOCAL = ("", "file", "local")

#: Schemes of remote stores, and the one that is shown.
_REMOTE = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "memory": "memory"}


def open_store(
    url: str, *, existing: bool = False, storage_options: Mapping[str, Any] | None = None
) -> ConditionalStore:
    """Open a store and probe it.

    Parameters
    ----------
    url
        A path, ``file:///path``, ``local:///path``, ``s3://bucket/prefix`` (or ``s3a``), ``gs://bucket/prefix`` (or
        ``gcs``), or ``memory://name``, which lives as long as the process.
    existing
        Only look at a store that is there, without creating or probing anything: for members that read the leader
        record.
    storage_options
        Arguments of ``s3fs.S3FileSystem`` or ``gcsfs.GCSFileSystem``, such as credentials; not used for others.

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
    >>> open_store("memory://example").url
    'memory://example'
    """
    parts = _checked(url)
    if parts.scheme in _LOCAL:
        store: ConditionalStore = LocalStore(_path(url, parts), create=not existing)
    else:
        store = _remote(url, parts, existing=existing, options=storage_options or {})
    try:
        if not existing:
            # Reads tell what is wrong with a bucket or its credentials better than the outcome of a write.
            store.exists(names.CLUSTER)
            probe(store)
    except BaseException:
        store.close()
        raise
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
    >>> check_url("s3://bucket/prod")
    """
    if url is not None:
        _checked(url)


def _checked(url: str) -> SplitResult:
    if not url:
        raise StoreError(url, "resilience.store is empty; give it a directory or a URL")
    try:
        parts = urlsplit(url)
    except ValueError as error:
        shown = f"{url.partition('://')[0]}://..."
        raise StoreError(shown, f"is no URL ({error}). Write scheme://bucket/prefix, or a path") from None
    if parts.scheme in _LOCAL:
        if parts.scheme and (parts.netloc not in ("", "localhost") or parts.query or parts.fragment):
            raise StoreError(url, f"write {parts.scheme}:///absolute/path, with three slashes")
        return parts
    if parts.scheme not in _REMOTE:
        raise StoreError(
            url,
            f"the scheme {parts.scheme!r} is not supported. Give resilience.store a path, file:///path, "
            "s3://bucket/prefix, gs://bucket/prefix or memory://name",
        )
    if "@" in parts.netloc or parts.query:
        # Not shown: it may hold a secret, and the URL of a store is told to every member.
        shown = f"{parts.scheme}://..."
        raise StoreError(shown, "a store's URL holds no credentials and no query. Use resilience.storage-options")
    if not parts.netloc or parts.fragment or any(part in ("", ".", "..") for part in _prefix(parts)):
        raise StoreError(url, f"write {parts.scheme}://bucket/prefix, without empty, '.' or '..' parts")
    return parts


def _path(url: str, parts: SplitResult) -> str:
    return unquote(parts.path) if parts.scheme else url


def _prefix(parts: SplitResult) -> list[str]:
    stripped = parts.path.removeprefix("/").removesuffix("/")
    return stripped.split("/") if stripped else []


def _remote(url: str, parts: SplitResult, *, existing: bool, options: Mapping[str, Any]) -> RemoteStore:
    prefix = "".join(f"{part}/" for part in _prefix(parts))
    shown = f"{_REMOTE[parts.scheme]}://{parts.netloc}/{prefix}".removesuffix("/")
    if _REMOTE[parts.scheme] != "memory":
        # A member asks others where the store is out of its reach; it must not wait for it as a scheduler does.
        terms = RetryTerms(total_seconds=3.0) if existing else RetryTerms()
        return RemoteStore(shown, _bucket(shown, parts, options), prefix=prefix, terms=terms)
    if existing and not memory_backend.is_known(parts.netloc):
        raise StoreError(url, "there is no such memory store in this process, and others' memory is not in reach")
    return RemoteStore(shown, memory_backend.MemoryBackend(parts.netloc), prefix=prefix)


def _bucket(shown: str, parts: SplitResult, options: Mapping[str, Any]) -> ObjectBackend:
    kind = _REMOTE[parts.scheme]
    extra, library = {"s3": ("s3", "s3fs"), "gs": ("gcs", "gcsfs")}[kind]
    try:
        if kind == "s3":
            from dask_resilience.storage.s3_backend import S3Backend

            return S3Backend(shown, parts.netloc, options)
        from dask_resilience.storage.gcs_backend import GcsBackend

        return GcsBackend(shown, parts.netloc, options)
    except ImportError as error:
        problem = f"{library} is needed for {kind}:// and cannot be imported ({error}). "
        raise StoreError(shown, f"{problem}Run: pip install 'dask-resilience[{extra}]'") from error


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
            raise StoreError(store.url, "does not return what was written. Use another store")
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
    if outcome is Outcome.AMBIGUOUS:
        raise store_error(store.url, f"written ({operation})", outcome)
    raise StoreError(
        store.url,
        f"answered {outcome.value!r} to a {operation} and must answer {wanted.value!r}, so two schedulers could both "
        "rule. Use a file system with POSIX semantics (local, or NFS 4 with locking), or an object store that obeys "
        "conditional writes",
    )
