"""A full disk during a snapshot."""
import asyncio, errno, os
import pytest
from journals import graph
from dask_resilience.errors import StoreError
from dask_resilience.plugins.snapshot_process import take_snapshot
from dask_resilience.storage.local_file import LocalAppendHandle
from tests.plugins.test_hostile import write


def test_a_full_disk_gets_its_room_back(store, monkeypatch):
    local, lsn = write(store, *[graph("C", n + 1, {f"k{n}-{i}": [] for i in range(1000)}) for n in range(3)])
    stock, count = LocalAppendHandle.write, [0]

    def full(self, buffers):
        count[0] += 1
        if count[0] > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        stock(self, buffers)

    monkeypatch.setattr(LocalAppendHandle, "write", full)
    with pytest.raises(StoreError):
        asyncio.run(take_snapshot(local, lsn=lsn, epoch=1))
    assert local.list("snapshot-data/") == []
