"""URLs of stores: which are accepted, what they mean, and what is told of those that are not."""

from __future__ import annotations

import sys
import uuid

import pytest

from dask_resilience.errors import StoreError
from dask_resilience.storage import open_store
from dask_resilience.storage.open_store import check_url


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket",
        "s3://bucket/",
        "s3a://bucket/a/b",
        "gs://bucket/a/",
        "gcs://my.bucket/a%20b",
        "memory://name",
        "/a/b",
        "file:///a",
        None,
    ],
)
def test_urls_that_are_accepted(url):
    check_url(url)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://", "write s3://bucket/prefix"),
        ("s3:///a", "write s3://bucket/prefix"),
        ("gs://bucket/a//b", "write gs://bucket/prefix"),
        ("gs://bucket//a", "write gs://bucket/prefix"),
        ("memory://", "write memory://bucket/prefix"),
        ("s3://bucket/../a", "without empty, '.' or '..' parts"),
        ("s3://bucket/a#b", "write s3://bucket/prefix"),
        ("s3://bucket/a?versionId=3", "no credentials and no query"),
        ("az://container/a", "'az' is not supported"),
        ("s3://[bucket", "is no URL"),
    ],
)
def test_urls_that_are_refused(url, says):
    with pytest.raises(StoreError, match=says):
        check_url(url)
    with pytest.raises(StoreError, match=says):
        open_store(url)


def test_a_secret_in_a_url_is_not_repeated():
    with pytest.raises(StoreError, match=r"Use resilience\.storage-options") as caught:
        check_url("s3://key:hush@bucket/a")
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("form", ["memory://{}/a/b", "memory://{}/a/b/"])
def test_stores_of_one_bucket_are_apart(form):
    name = uuid.uuid4()
    outer, inner = open_store(f"memory://{name}/a"), open_store(form.format(name))
    inner.create("x", b"inner")
    assert outer.get("x") is None
    assert outer.list("") == ["b/x"]
    assert open_store(f"memory://{name}/a/b").get("x").data == b"inner"
    assert inner.url == f"memory://{name}/a/b"


def test_the_memory_of_another_process_is_not_taken_for_an_empty_store():
    with pytest.raises(StoreError, match="no such memory store in this process"):
        open_store(f"memory://{uuid.uuid4()}", existing=True)


@pytest.mark.parametrize(
    ("url", "library", "extra"), [("s3://bucket/a", "s3fs", "s3"), ("gcs://bucket/a", "gcsfs", "gcs")]
)
def test_a_library_that_is_missing_is_named_with_its_extra(url, library, extra, monkeypatch):
    for name in ("s3_backend", "gcs_backend"):
        monkeypatch.delitem(sys.modules, f"dask_resilience.storage.{name}", raising=False)
    for name in ("s3fs", "gcsfs", "gcsfs.core"):
        monkeypatch.setitem(sys.modules, name, None)
    check_url(url)
    with pytest.raises(StoreError, match=rf"{library} is needed .* pip install 'dask-resilience\[{extra}\]'"):
        open_store(url)


def test_opening_an_existing_store_sends_nothing(moto):
    store = open_store("s3://missing-bucket/a", existing=True, storage_options=moto.options())
    with pytest.raises(StoreError, match="there is no bucket"):
        store.exists("cluster")
    store.close()
