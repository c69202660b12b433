"""Requests to Google Cloud Storage, with the credentials and the session of gcsfs.

The requests are our own, after the JSON API (https://cloud.google.com/storage/docs/json_api/v1). gcsfs's small uploads
have a fixed MIME boundary, so data that holds it is cut off there without an error; its requests are repeated up to six
times, after which a creation finds its own object; and it tells errors by types that lose the answer.

Creations and swaps carry ``ifGenerationMatch``, which is 0 for an object that must not exist.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import aiohttp
import google.auth.exceptions
import google_crc32c

# Before gcsfs is imported: it asks by gRPC whether a bucket is of an experimental kind, and hangs for a minute where
# gRPC is not answered.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

from gcsfs.core import GCSFileSystem
from gcsfs.retry import HttpError

from dask_resilience.errors import StoreError
from dask_resilience.storage.object_backend import (
    Fault,
    Fetched,
    Page,
    RequestFailed,
    fault_of_status,
)

#: Metadata with this key holds the write id.
_WRITE = "dask-resilience-write"

_CREDENTIALS = (
    "Give some: token in resilience.storage-options, GOOGLE_APPLICATION_CREDENTIALS, or a service account of this host"
)

#: Reasons whose meaning the HTTP status does not tell.
_FAULTS = {
    "rateLimitExceeded": Fault.BUSY,
    "userRateLimitExceeded": Fault.BUSY,
    "quotaExceeded": Fault.FULL,
}


class GcsBackend:
    """One bucket.

    Parameters
    ----------
    url
        Of the store, for messages.
    bucket
        Its name.
    options
        Arguments of ``gcsfs.GCSFileSystem``, such as ``token``, ``project`` or ``endpoint_url``.
    """

    def __init__(self, url: str, bucket: str, options: Mapping[str, Any]) -> None:
        self._url = url
        self._bucket = bucket
        ours = {"asynchronous": True, "skip_instance_cache": True, "use_listings_cache": False}
        try:
            self._fs = GCSFileSystem(**{"project": "", **options, **ours})
        except (TypeError, ValueError) as error:
            raise StoreError(url, f"resilience.storage-options are not understood: {error}") from error
        except (google.auth.exceptions.GoogleAuthError, HttpError, OSError) as error:
            raise StoreError(url, f"there are no usable credentials: {error}. {_CREDENTIALS}") from error

    async def open(self) -> None:
        """Make the session."""
        await self._fs._set_session()

    async def put(self, key: str, data: bytes, *, token: str | None, write_id: str) -> None:
        """Write an object that still is what `token` stands for, or that must not exist (None)."""
        if token is not None and (not token.isdecimal() or int(token) == 0):
            # No generation; 0 would mean that the object must not exist.
            raise RequestFailed(Fault.REFUSED, "the token stands for no generation")
        described = {
            "name": key,
            "metadata": {_WRITE: write_id},
            # Compared by the store before it accepts the bytes.
            "crc32c": base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode(),
        }
        boundary = secrets.token_hex(16)
        body = b"".join(
            (
                f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n".encode(),
                json.dumps(described).encode(),
                f"\r\n--{boundary}\r\nContent-Type: application/octet-stream\r\n\r\n".encode(),
                data,
                f"\r\n--{boundary}--\r\n".encode(),
            )
        )
        _, answer = await self._call(
            "POST",
            f"{self._fs._location}/upload/storage/v1/b/{quote(self._bucket, safe='')}/o",
            params={"uploadType": "multipart", "ifGenerationMatch": token or "0"},
            headers={"Content-Type": f'multipart/related; boundary="{boundary}"'},
            data=body,
        )
        stored = int(json.loads(answer)["size"])
        if stored != len(data):
            raise StoreError(self._url, f"stored {stored} of the {len(data)} bytes of {key}. Use another store")

    async def get(self, key: str, *, end: int | None = None) -> Fetched:
        """Read an object, or its bytes before `end`."""
        selection = {} if end is None else {"Range": f"bytes=0-{end - 1}"}
        try:
            headers, data = await self._call("GET", self._object(key), params={"alt": "media"}, headers=selection)
        except _NothingInRange:
            return Fetched(data=b"", token="", write_id="")
        return Fetched(
            data=data,
            token=headers.get("X-Goog-Generation", ""),
            write_id=headers.get(f"X-Goog-Meta-{_WRITE}", ""),
        )

    async def list(self, prefix: str, *, after: str = "", more: str | None = None) -> Page:
        """List the objects whose keys begin with a prefix and come behind a key, a page at a time."""
        params = {"prefix": prefix, "fields": "items(name,size),nextPageToken"}
        if after:
            params["startOffset"] = after
        if more:
            params["pageToken"] = more
        _, data = await self._call("GET", self._objects(), params=params)
        answer = json.loads(data)
        # The offset belongs to what is listed.
        entries = [(each["name"], int(each["size"])) for each in answer.get("items", []) if each["name"] > after]
        return Page(entries=entries, more=answer.get("nextPageToken") or None)

    async def delete(self, key: str) -> None:
        """Remove an object, if there is one."""
        await self._call("DELETE", self._object(key))

    async def close(self) -> None:
        """Let go of connections."""
        session = self._fs._session
        if session is not None:
            await session.close()

    def _objects(self) -> str:
        return f"{self._fs.base}b/{quote(self._bucket, safe='')}/o"

    def _object(self, key: str) -> str:
        return f"{self._objects()}/{quote(key, safe='')}"

    async def _call(
        self,
        method: str,
        url: str,
        *,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        data: bytes | None = None,
    ) -> tuple[Mapping[str, str], bytes]:
        try:
            session = await self._fs._set_session()
            async with session.request(
                method,
                # Already quoted: a slash in a key must stay one.
                _as_it_is(url),
                params=self._fs._get_params(dict(params or {})),
                headers=self._fs._get_headers(dict(headers or {})),
                data=data,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=2.0),
            ) as answer:
                body = await answer.read()
                if answer.status < 400:
                    return answer.headers, body
            if answer.status == 404 and b"No such object" not in body:
                await self._see_bucket(url)
            raise self._answered(answer.status, body)
        except aiohttp.ClientConnectorError as error:
            raise RequestFailed(Fault.BUSY, f"{type(error).__name__}: {error}") from error
        except google.auth.exceptions.TransportError as error:
            raise RequestFailed(Fault.BUSY, f"no token could be fetched: {error}") from error
        except google.auth.exceptions.GoogleAuthError as error:
            raise StoreError(self._url, f"the credentials were refused: {error}. {_CREDENTIALS}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise RequestFailed(Fault.UNSURE, f"{type(error).__name__}: {error}") from error

    async def _see_bucket(self, url: str) -> None:
        """Find out whether an object is missing, or all of the bucket."""
        if url == self._objects():
            raise StoreError(self._url, f"there is no bucket {self._bucket!r}. Create it, or correct resilience.store")
        await self._call("GET", self._objects(), params={"maxResults": "1"})

    def _answered(self, status: int, body: bytes) -> Exception:
        reason, detail = _described(body)
        told = f"{status} {reason}: {detail}"
        if status == 416:
            return _NothingInRange()
        if status == 401:
            return StoreError(self._url, f"the credentials are missing or have expired ({told}). {_CREDENTIALS}")
        fault = _FAULTS.get(reason) or fault_of_status(status)
        if fault is None:
            return StoreError(self._url, f"answered {told} for bucket {self._bucket!r}. Check resilience.store")
        return RequestFailed(fault, told)


class _NothingInRange(Exception):
    """The object is there and empty (416)."""


def _as_it_is(url: str) -> Any:
    from yarl import URL

    return URL(url, encoded=True)


def _described(body: bytes) -> tuple[str, str]:
    """Reason and message of an error, which may be JSON or text."""
    text = body.decode("utf-8", errors="replace")[:500]
    try:
        error = json.loads(body)["error"]
        reasons = [each.get("reason", "") for each in error.get("errors", [])]
        return (reasons or [""])[0], str(error.get("message", text))
    except (ValueError, KeyError, TypeError, AttributeError):
        return "", text.strip()
