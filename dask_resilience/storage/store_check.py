"""Checks over everything that a store holds: its small objects, its snapshots, and the log by `verify_store`."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from dask_resilience.errors import JournalCorrupt
from dask_resilience.failover.lease_record import LeaseRecord
from dask_resilience.journal.checked_json import decode_checked, is_checked
from dask_resilience.journal.verify import Finding, Level, Report, verify_store
from dask_resilience.storage import names
from dask_resilience.storage.cluster_object import decode_cluster
from dask_resilience.storage.leadership import decode_leader
from dask_resilience.storage.object_store import ConditionalStore
from dask_resilience.storage.snapshots import Snapshot, check_snapshots


def check_store(store: ConditionalStore) -> Report:
    """Check every byte of a store. Nothing is written, and its scheduler may be running.

    Parameters
    ----------
    store
        Any store.

    Returns
    -------
    Report
        What is wrong with its objects, in the order of their names. The log is checked from the oldest snapshot on
        that is sound. One that is not is damage, although a recovery takes the one before it.

    Raises
    ------
    StoreError
        If the store cannot be read.
    JournalTooNew
        If a newer release wrote a snapshot.

    Examples
    --------
    >>> import tempfile
    >>> from dask_resilience.storage.local_store import LocalStore
    >>> check_store(LocalStore(tempfile.mkdtemp())).findings
    ()
    """
    check = _Check(store)
    cluster = check.cluster()
    check.small(names.LEASE, lambda data: LeaseRecord.decode(data).cluster)
    check.small(names.LEADER, lambda data: decode_leader(data).cluster_id)
    for name in store.list(names.MANIFESTS):
        check.manifest(name)
    sound = check.snapshots(cluster)
    report = verify_store(check.segments(), cluster=cluster, base=sound[0].taken if sound else None)
    if report.segments and not store.exists(names.CLUSTER):
        check.tell("damage", names.CLUSTER, "missing: nothing says whose journal this is")
    findings = [*check.findings, *map(check.with_cause, report.findings)]
    findings.sort(key=lambda finding: (finding.name, finding.offset))
    return replace(report, findings=tuple(findings), snapshots=len(sound))


@dataclass(slots=True)
class _Check:
    store: ConditionalStore
    findings: list[Finding] = field(default_factory=list)
    #: Identity of the cluster, once it is known.
    owner: str | None = None
    #: Why segments could not be read, by name.
    unreadable: dict[str, str] = field(default_factory=dict)

    def tell(self, level: Level, name: str, problem: str) -> None:
        self.findings.append(Finding(level=level, name=name, offset=0, problem=problem))

    def cluster(self) -> bytes | None:
        self.owner = self.small(names.CLUSTER, lambda data: decode_cluster(data).cluster_id)
        return None if self.owner is None else uuid.UUID(self.owner).bytes

    def manifest(self, name: str) -> None:
        """Nobody reads what a manifest says; that it is there counts. It is told all the same: something rots."""

        def owner(data: bytes) -> str:
            fields = decode_checked(data)
            if name != names.manifest(fields.get("epoch", -1)):
                raise ValueError("its name is that of another epoch")
            return str(fields.get("cluster"))

        self.small(name, owner)

    def small(self, name: str, owner_of: Callable[[bytes], str]) -> str | None:
        """Check an object, if it is there; return the cluster that it names."""
        try:
            stored = self.store.get(name)
            if stored is None:
                return None
            owner = owner_of(stored.data)
        except (JournalCorrupt, ValueError) as error:
            problem = error.problem if isinstance(error, JournalCorrupt) else str(error)
            self.tell("damage", name, f"it is not what was written: {problem}")
            return None
        if self.owner not in (None, owner):
            self.tell("damage", name, f"it belongs to another cluster, {owner}, not {self.owner}")
        elif not is_checked(stored.data):
            self.tell("note", name, "an older release wrote it without a checksum, so not every change would show")
        return owner

    def snapshots(self, cluster: bytes | None) -> list[Snapshot]:
        sound, problems = check_snapshots(self.store, cluster=cluster)
        for error in problems:
            self.findings.append(
                Finding(level="damage", name=error.segment, offset=error.offset, problem=error.problem)
            )
        return sound

    def segments(self) -> Iterator[tuple[str, bytes]]:
        for name in self.store.list(names.LOG):
            try:
                stored = self.store.get(name)
            except JournalCorrupt as error:
                # Told by `verify_store`, which knows whether it counts.
                self.unreadable[name] = error.problem
                yield name, b""
            else:
                if stored is not None:
                    yield name, stored.data

    def with_cause(self, finding: Finding) -> Finding:
        if finding.level == "damage" and finding.name in self.unreadable:
            return replace(finding, problem=self.unreadable[finding.name])
        return finding
