"""No thread of a test writes on in the next one."""

from __future__ import annotations

import uuid

import pytest

from dask_resilience.storage import journal_writer
from dask_resilience.storage.memory_backend import MemoryBackend
from dask_resilience.storage.s3_backend import S3Backend
from tests.storage.acting import FaultyRemoteStore, FaultyStore, Ruler
from tests.storage.servers import fake_gcs, moto, new_place, seaweedfs

__all__ = ["fake_gcs", "moto", "seaweedfs"]


@pytest.fixture(autouse=True)
def no_writer_left_behind():
    yield
    while Ruler.made:
        Ruler.made.pop().writer.close(timeout_seconds=0)


@pytest.fixture(params=["local", "memory", "moto"])
def store_kind(request):
    return request.param


@pytest.fixture
def faulty(store_kind, request, monkeypatch):
    """A store of each kind that fails on demand."""
    monkeypatch.setattr(journal_writer, "_BACK_OFF_SECONDS", 0.001)
    if store_kind == "local":
        opened = FaultyStore(request.getfixturevalue("store"))
    elif store_kind == "memory":
        opened = FaultyRemoteStore("memory://test", MemoryBackend(str(uuid.uuid4())))
    else:
        server = request.getfixturevalue("moto")
        url = new_place(server)
        backend = S3Backend(url, server.bucket, server.options())
        opened = FaultyRemoteStore(url, backend, prefix=f"{url.rpartition('/')[2]}/")
    yield opened
    while Ruler.made:
        Ruler.made.pop().writer.close(timeout_seconds=0)
    opened.close()
