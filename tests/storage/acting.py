"""What the tests of the journal share: a scheduler that only rules and writes, and a store that fails on demand."""

from __future__ import annotations

import os
import uuid
from collections import deque
from dataclasses import replace
from typing import ClassVar

from support import until

from dask_resilience.journal.records import ClientLeft, EpochStarted, SnapshotBegun
from dask_resilience.storage import names
from dask_resilience.storage.cluster_object import read_cluster
from dask_resilience.storage.identity import this_process
from dask_resilience.storage.journal_reader import JournalReader
from dask_resilience.storage.journal_writer import JournalWriter
from dask_resilience.storage.local_store import LocalStore
from dask_resilience.storage.object_store import AppendHandle
from dask_resilience.storage.remote_store import RemoteStore
from dask_resilience.storage.snapshots import open_journal, write_snapshot
from dask_resilience.storage.store_check import check_store
from dask_resilience.storage.takeover import rule
from dask_resilience.storage.trouble import store_error


class FakeClock:
    """Stands still until it is told to go on."""

    def __init__(self):
        self.seconds = 1000.0

    def boot_seconds(self):
        return self.seconds

    def wall_seconds(self):
        return self.seconds


class FaultyHandle(AppendHandle):
    """Loses what was not synced when a sync fails, as a file system may."""

    def __init__(self, store, name, handle):
        self.store, self.name, self.handle = store, name, handle
        self.synced_bytes = handle.size_bytes

    @property
    def size_bytes(self):
        return self.handle.size_bytes

    def write(self, buffers):
        fault = self.store.next_fault("write")
        if fault is not None:
            whole = b"".join(buffers)
            self.handle.write([whole[: len(whole) // 2]])
            raise OSError(fault, os.strerror(fault))
        self.handle.write(buffers)

    def sync(self):
        fault = self.store.next_fault("sync")
        if fault is not None:
            self.lose()
            raise OSError(fault, os.strerror(fault))
        self.handle.sync()
        self.synced_bytes = self.size_bytes

    def lose(self):
        path = self.store._path(self.name)
        lost = path.stat().st_size - self.synced_bytes
        with path.open("r+b") as file:
            file.seek(self.synced_bytes)
            match self.store.loses:
                case "nothing":
                    pass
                case "all":
                    file.truncate()
                case "zeros":
                    file.write(bytes(lost))
                case "start":
                    # Pages go to the disk in any order: the end may be there and the start not.
                    file.write(bytes(lost // 2))
                case "noise":
                    file.write(os.urandom(lost))

    def close(self):
        self.handle.close()


class FaultyRemoteHandle(FaultyHandle):
    """What was not synced is all there, in whole parts, or none of it is."""

    def lose(self):
        if self.store.loses == "nothing":
            self.handle.sync()


class Faulty:
    """Fails where `faults` says: a queue for each operation, of error numbers, outcomes, or None for success."""

    handle_type = FaultyHandle

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.faults = {"write": deque(), "sync": deque(), "open": deque(), "exists": deque(), "swap": deque()}
        self.loses = "nothing"

    def next_fault(self, operation):
        queue = self.faults[operation]
        return queue.popleft() if queue else None

    def open_append(self, name, header):
        fault = self.next_fault("open") if name.startswith(names.LOG) else None
        if callable(fault):
            return fault(self, name, header)
        if fault is not None:
            return fault
        handle = super().open_append(name, header)
        grows = isinstance(handle, AppendHandle) and name.startswith(names.LOG)
        return self.handle_type(self, name, handle) if grows else handle

    def exists(self, name):
        fault = self.next_fault("exists")
        if fault is not None:
            raise store_error(self.url, "read", OSError(fault, os.strerror(fault)))
        return super().exists(name)

    def compare_and_swap(self, name, data, token):
        fault = self.next_fault("swap")
        return fault(self, name, data, token) if fault is not None else super().compare_and_swap(name, data, token)


class FaultyStore(Faulty, LocalStore):
    real = LocalStore


class FaultyRemoteStore(Faulty, RemoteStore):
    handle_type = FaultyRemoteHandle
    real = RemoteStore


class Ruler:
    """Rules a store and journals what it is told."""

    #: All that the running test made; its writers are closed when it ends.
    made: ClassVar[list[Ruler]] = []

    def __init__(
        self, store, *, ttl_seconds=30.0, segment_bytes=1 << 20, interval_seconds=0.0, holder=None, clock=None
    ):
        self.store = store
        self.leadership = rule(store, address="tcp://a:1", ttl_seconds=ttl_seconds, holder=holder, clock=clock)
        self.acked: list[int] = []
        self.failures: list[Exception] = []
        self.recoveries = 0
        self.writer = JournalWriter(
            store,
            self.leadership,
            commit_interval_seconds=interval_seconds,
            segment_bytes=segment_bytes,
            on_durable=self.acked.append,
            on_failure=self.failures.append,
            on_recovered=self.recovered,
        )
        self.start = EpochStarted(
            epoch=self.leadership.epoch, cluster="c", holder="me", versions={}, sealed=self.leadership.sealed
        )
        self.made.append(self)
        self.records = {self.writer.append(self.start): self.start}

    def recovered(self):
        self.recoveries += 1

    def append(self, count=1, size=10):
        for _ in range(count):
            record = ClientLeft(client=f"{self.writer._next_lsn}-{'x' * size}")
            self.records[self.writer.append(record)] = record
        return self

    def settled(self):
        """Wait until all is acked."""
        last = max(self.records)
        until(lambda: self.writer.durable_lsn == last, what=f"{self.writer.durable_lsn} of {last} acked")
        return self

    def release(self):
        assert self.writer.close()
        self.leadership.release()
        return self


def another():
    """Identity of a process that is not this one and cannot be shown to be dead."""
    return replace(this_process(), host="elsewhere")


def dead():
    """Identity of a process of this host that has ended: its pid belongs to this one, started at another time."""
    return replace(this_process(), started_ticks=1)


def read(store):
    return list(JournalReader(store).read())


def verify(store):
    return check_store(store)


def segments(store):
    return [names.epoch_and_seq_of_segment(name) for name in store.list(names.LOG)]


def snapshot_at(store, lsn, *, epoch=9):
    """A snapshot of the log behind a record, as one that replays it would take it, and without a state."""
    _, reader = open_journal(store)
    for logged in reader.read():
        if logged.lsn == lsn:
            break
    _, chain, of_epoch, seq = reader.place
    place = SnapshotBegun(lsn=lsn, chain=chain, epoch=of_epoch, seq=seq, rest=b"")
    cluster = uuid.UUID(read_cluster(store).cluster_id).bytes
    return write_snapshot(store, cluster=cluster, epoch=epoch, begun=place, state=[])
