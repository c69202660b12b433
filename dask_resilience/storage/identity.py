"""Who this process is, and whether another of this host still runs."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from dask_resilience.failover.lease_record import HolderIdentity, HostFacts

_PROC = Path("/proc")

#: States in /proc/{pid}/stat of a process that runs no more and was not reaped.
_ENDED = frozenset("ZXx")


def this_process() -> HolderIdentity:
    """Identify the calling process.

    Returns
    -------
    HolderIdentity
        On a system without /proc, one that no other process can prove dead.
    """
    return HolderIdentity(
        host=socket.gethostname(),
        boot_id=_boot_id(),
        pid_namespace=_pid_namespace(),
        pid=os.getpid(),
        started_ticks=started_ticks(os.getpid()) or 0,
    )


def look_up(pid: int) -> HostFacts:
    """Gather what this host knows about a pid, for `provably_dead`."""
    return HostFacts(
        host=socket.gethostname(),
        boot_id=_boot_id(),
        pid_namespace=_pid_namespace(),
        pid=pid,
        started_ticks=started_ticks(pid),
    )


def started_ticks(pid: int) -> int | None:
    """Tell when a living process started, in ticks since boot; None when it runs no more."""
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name of the program stands in parentheses and may hold anything, parentheses too.
    fields = text[text.rindex(")") + 2 :].split()
    state, threads, started = fields[0], int(fields[17]), int(fields[19])
    # The first thread of a process can have ended while others still write.
    return None if state in _ENDED and threads <= 1 else started


def _boot_id() -> str:
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return str((_PROC / "self/ns/pid").readlink())
    except OSError:
        return ""
