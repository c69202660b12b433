"""Requests to S3, and to what speaks its protocol, through s3fs.

Creations carry ``If-None-Match: *``, swaps ``If-Match`` with the ETag. s3fs brings credentials, configuration and the
client; its own way of telling errors depends on the server's words, so answers are judged by their HTTP status and
error code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import aiobotocore.httpsession
import aiohttp
import botocore.exceptions
import s3fs

from dask_resilience.errors import StoreError
from dask_resilience.storage.object_backend import Fault, Fetched, Page, RequestFailed, fault_of_status

#: Metadata with this key holds the write id.
_WRITE = "dask-resilience-write"

#: For what a person must act on, by the error code of the answer.
_ADVICE = {
    "NoSuchBucket": "there is no bucket {bucket!r}. Create it, or correct resilience.store",
    "PermanentRedirect": "bucket {bucket!r} is in another region. Name it: client_kwargs: {{region_name: ...}}",
    "AuthorizationHeaderMalformed": "bucket {bucket!r} is in another region. "
    "Name it: client_kwargs: {{region_name: ...}}",
    "IllegalLocationConstraintException": "bucket {bucket!r} is in another region. "
    "Name it: client_kwargs: {{region_name: ...}}",
    "ExpiredToken": "the credentials have expired. Renew them, or use ones that renew themselves (a role)",
    "ExpiredTokenException": "the credentials have expired. Renew them, or use ones that renew themselves (a role)",
    "InvalidAccessKeyId": "the access key is not known there. Correct key and secret",
    "InvalidToken": "the session token is not accepted. Renew the credentials",
    "SignatureDoesNotMatch": "the secret does not fit the access key. Correct key and secret",
    "RequestTimeTooSkewed": "the clock of this host differs from the store's. Synchronise it",
    "NotImplemented": "the store does not know conditional writes, without which two schedulers could both rule. "
    "Use another",
}
_WHERE = " (resilience.storage-options, the environment, or the files that the AWS tools read)"

#: Error codes whose meaning the HTTP status does not tell.
_FAULTS = {
    "QuotaExceeded": Fault.FULL,
    "XMinioStorageFull": Fault.FULL,
    "XMinioAdminBucketQuotaExceeded": Fault.FULL,
    "SlowDown": Fault.BUSY,
    "RequestTimeout": Fault.UNSURE,
    "RequestTimeoutException": Fault.UNSURE,
}

#: The request was never sent.
_UNSENT = (
    botocore.exceptions.EndpointConnectionError,
    botocore.exceptions.ConnectTimeoutError,
    botocore.exceptions.ProxyConnectionError,
    aiohttp.ClientConnectorError,
)


class _SentOnce(aiobotocore.httpsession.AIOHTTPSession):  # type: ignore[misc]
    """Tells when a connection breaks.

    aiohttp would send a PUT a second time by itself where a kept connection breaks before the answer. The answer to
    that, that the condition does not hold, would be taken for the answer to the first.
    """

    async def _get_session(self, proxy_url: str | None) -> aiohttp.ClientSession:
        session: aiohttp.ClientSession = await super()._get_session(proxy_url)
        session._retry_connection = False
        return session


class S3Backend:
    """One bucket.

    Parameters
    ----------
    url
        Of the store, for messages.
    bucket
        Its name.
    options
        Arguments of ``s3fs.S3FileSystem``, such as ``key``, ``secret``, ``endpoint_url`` or ``client_kwargs``.
    """

    def __init__(self, url: str, bucket: str, options: Mapping[str, Any]) -> None:
        self._url = url
        self._bucket = bucket
        config = {
            "connect_timeout": 2.0,
            # Above every deadline of a request; those are kept by the caller.
            "read_timeout": 300.0,
            "max_pool_connections": 32,
            **options.get("config_kwargs", {}),
            "http_session_cls": _SentOnce,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
        }
        ours = {"asynchronous": True, "skip_instance_cache": True, "use_listings_cache": False}
        try:
            self._fs = s3fs.S3FileSystem(**{**options, "config_kwargs": config, **ours})
        except (TypeError, ValueError) as error:
            raise StoreError(url, f"resilience.storage-options are not understood: {error}") from error
        # s3fs tries everything five times by itself.
        self._fs.retries = 1

    async def open(self) -> None:
        """Make the client, which takes a second on a busy machine."""
        try:
            await self._fs.set_session()
        except Exception as error:
            raise self._translated(error) from error

    async def put(self, key: str, data: bytes, *, token: str | None, write_id: str) -> None:
        """Write an object that still is what `token` stands for, or that must not exist (None)."""
        condition = {"IfNoneMatch": "*"} if token is None else {"IfMatch": token}
        await self._call("put_object", Key=key, Body=data, Metadata={_WRITE: write_id}, **condition)

    async def get(self, key: str, *, end: int | None = None) -> Fetched:
        """Read an object, or its bytes before `end`."""
        selection = {} if end is None else {"Range": f"bytes=0-{end - 1}"}
        try:
            answer = await self._call("get_object", Key=key, **selection)
        except _NothingInRange:
            return Fetched(data=b"", token="", write_id="")
        try:
            async with answer["Body"] as body:
                data = await body.read()
        except Exception as error:
            raise self._translated(error) from error
        metadata = {name.lower(): value for name, value in answer.get("Metadata", {}).items()}
        return Fetched(data=data, token=answer["ETag"], write_id=metadata.get(_WRITE, ""))

    async def list(self, prefix: str, *, after: str = "", more: str | None = None) -> Page:
        """List the objects whose keys begin with a prefix and come behind a key, a page at a time."""
        where = {"ContinuationToken": more} if more else {"StartAfter": after} if after else {}
        answer = await self._call("list_objects_v2", Prefix=prefix, **where)
        entries = [(each["Key"], int(each["Size"])) for each in answer.get("Contents", [])]
        return Page(entries=entries, more=answer.get("NextContinuationToken") if answer.get("IsTruncated") else None)

    async def delete(self, key: str) -> None:
        """Remove an object, if there is one."""
        await self._call("delete_object", Key=key)

    async def close(self) -> None:
        """Let go of connections."""
        client = getattr(self._fs, "_s3", None)
        if client is not None:
            await client.close()

    async def _call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = await self._fs._call_s3(operation, Bucket=self._bucket, **arguments)
        except Exception as error:
            raise self._translated(error) from error
        return answer

    def _translated(self, error: Exception) -> Exception:
        """Tell what a failure means. Only asked for its fields, never for its type, where there is an answer."""
        response = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
        if response is not None:
            return self._answered(response)
        detail = f"{type(error).__name__}: {error}"
        if isinstance(error, _UNSENT):
            return RequestFailed(Fault.BUSY, detail)
        if isinstance(error, botocore.exceptions.NoCredentialsError | botocore.exceptions.PartialCredentialsError):
            return StoreError(self._url, f"there are no credentials: {error}. Give some{_WHERE}")
        if isinstance(error, botocore.exceptions.HTTPClientError | aiohttp.ClientError | OSError):
            # Includes what is neither connection nor answer: whatever it was, the request may have been done.
            return RequestFailed(Fault.UNSURE, detail)
        if isinstance(error, botocore.exceptions.BotoCoreError | TypeError | ValueError):
            return StoreError(self._url, f"cannot be used with these resilience.storage-options: {detail}")
        return error

    def _answered(self, response: Mapping[str, Any]) -> Exception:
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        described = response.get("Error", {})
        code, detail = str(described.get("Code", "")), str(described.get("Message", ""))
        told = f"{status} {code}: {detail}"
        if status == 416:
            return _NothingInRange()
        if code in _ADVICE:
            return StoreError(self._url, f"{_ADVICE[code].format(bucket=self._bucket)}{_WHERE}. It answered {told}")
        fault = _FAULTS.get(code) or fault_of_status(status)
        if fault is None:
            return StoreError(self._url, f"answered {told} for bucket {self._bucket!r}. Check resilience.store{_WHERE}")
        return RequestFailed(fault, told)


class _NothingInRange(Exception):
    """The object is there and empty (416)."""
