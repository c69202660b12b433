"""Checks over everything that a store holds of a cluster's journal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from uuid import UUID

from dask_resilience.journal.verify import Finding, Report, verify_store
from dask_resilience.storage import names
from dask_resilience.storage.cluster_object import read_cluster
from dask_resilience.storage.object_store import ConditionalStore
from dask_resilience.storage.snapshots import check_snapshots


def verify_journal(store: ConditionalStore) -> Report:
    """Check the snapshots of a store and its log behind the oldest one that is sound.

    Parameters
    ----------
    store
        Where the journal is. Nothing is changed.

    Returns
    -------
    Report
        A snapshot that is not sound counts as damage, although a recovery takes the one before it.

    Raises
    ------
    JournalTooNew
        If a newer release wrote a snapshot.
    StoreError
        If the store cannot be read, or its cluster object is damaged.
    """
    owner = read_cluster(store)
    cluster = None if owner is None else UUID(owner.cluster_id).bytes
    sound, problems = check_snapshots(store, cluster=cluster)
    report = verify_store(_segments(store), cluster=cluster, base=sound[0].taken if sound else None)
    damaged = (Finding(level="damage", name=e.segment, offset=e.offset, problem=e.problem) for e in problems)
    return replace(report, findings=(*report.findings, *damaged), snapshots=len(sound))


def _segments(store: ConditionalStore) -> Iterator[tuple[str, bytes]]:
    for name in store.list(names.LOG):
        stored = store.get(name)
        if stored is not None:
            yield name, stored.data
