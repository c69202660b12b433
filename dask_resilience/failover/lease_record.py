"""What the store holds under ``lease``: the record, the process it names, and when that process is provably dead."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from dask_resilience.journal.checked_json import decode_checked, encode_checked


@dataclass(frozen=True, slots=True, kw_only=True)
class HolderIdentity:
    """One process, told apart from every other that ever had its pid.

    Parameters
    ----------
    host
        Name of the machine or container.
    boot_id
        Random identity of this boot of the kernel.
    pid_namespace
        Namespace in which ``pid`` has its meaning.
    pid
        Process id.
    started_ticks
        Start time of the process in clock ticks since boot.
    """

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    started_ticks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What a process found out about its own host and one pid on it.

    Parameters
    ----------
    host, boot_id, pid_namespace
        As in `HolderIdentity`, of the process that looks.
    pid
        The pid that was looked up.
    started_ticks
        Start time of the living process with that pid; None when there is none (a process that has exited and was
        not reaped counts as none).
    """

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    started_ticks: int | None


def provably_dead(holder: HolderIdentity, this_host: HostFacts) -> bool:
    """Tell whether a holder can be shown to run no more.

    Only the same boot of the same kernel in the same pid namespace can show it. Another boot id under the same name
    is no proof: names of containers and cloned machines repeat.

    Parameters
    ----------
    holder
        The process that the lease names.
    this_host
        Facts about its pid, gathered on this host.

    Returns
    -------
    bool
        True only when no living process can be the holder.

    Examples
    --------
    >>> holder = HolderIdentity(host="a", boot_id="b", pid_namespace="pid:[1]", pid=7, started_ticks=100)
    >>> facts = HostFacts(host="a", boot_id="b", pid_namespace="pid:[1]", pid=7, started_ticks=None)
    >>> provably_dead(holder, facts)
    True
    """
    same_place = (holder.host, holder.boot_id, holder.pid_namespace) == (
        this_host.host,
        this_host.boot_id,
        this_host.pid_namespace,
    )
    # An empty identity (a platform without /proc) compares equal to another empty one and proves nothing.
    if not same_place or not holder.boot_id or not holder.pid_namespace or holder.pid != this_host.pid:
        return False
    return this_host.started_ticks is None or this_host.started_ticks != holder.started_ticks


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRecord:
    """What the store holds under ``lease``.

    Parameters
    ----------
    cluster
        Identity of the cluster.
    epoch
        Epoch that the holder rules or is about to create; for people and error messages, the manifests decide.
    generation
        Grows by one with each write, so that an unchanged record means a silent holder.
    holder
        The process that holds it; None after a release.
    address
        Where the holder listens, or will.
    ttl_seconds
        How long the holder may act after it sent this record.
    """

    cluster: str
    epoch: int
    generation: int
    holder: HolderIdentity | None
    address: str
    ttl_seconds: float

    def encode(self) -> bytes:
        """Write the record as JSON."""
        return encode_checked(asdict(self))

    @classmethod
    def decode(cls, data: bytes) -> LeaseRecord:
        """Read a record back.

        Raises
        ------
        ValueError
            If the bytes are no lease record, or a newer release wrote them.
        """
        try:
            fields = decode_checked(data)
            holder = fields.pop("holder")
            record = cls(holder=None if holder is None else HolderIdentity(**holder), **fields)
            if not record.ttl_seconds > 0:
                raise ValueError(f"a lease of {record.ttl_seconds} seconds")
        except (TypeError, KeyError) as error:
            raise ValueError(f"no lease record: {error!r}") from error
        return record
