"""The remote stores: the conformance of all stores, over memory and over servers that speak the clouds' protocols."""

from __future__ import annotations

import uuid

import pytest

from dask_resilience.storage import open_store
from tests.storage.conformance import StoreConformance
from tests.storage.servers import new_place


class OnAServer(StoreConformance):
    """A place of its own for each test."""

    @pytest.fixture
    def server(self):
        raise NotImplementedError

    @pytest.fixture
    def address(self, server):
        return new_place(server)

    @pytest.fixture
    def storage_options(self, server):
        return server.options()

    @pytest.fixture
    def conditional_store(self, address, storage_options):
        opened = open_store(address, storage_options=storage_options)
        yield opened
        opened.close()
        opened.close()


class TestMemory(StoreConformance):
    @pytest.fixture
    def conditional_store(self):
        opened = open_store(f"memory://{uuid.uuid4()}/prefix")
        yield opened
        opened.close()
        opened.close()


class TestMoto(OnAServer):
    @pytest.fixture
    def server(self, moto):
        return moto


class TestSeaweedFS(OnAServer):
    @pytest.fixture
    def server(self, seaweedfs):
        return seaweedfs


class TestFakeGcs(OnAServer):
    @pytest.fixture
    def server(self, fake_gcs):
        return fake_gcs
