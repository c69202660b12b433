"""The one place that builds and reads the names of objects.

::

    cluster                            who owns the store
    lease                              who may try to rule
    leader                             where the ruling scheduler listens
    manifest/{epoch:020d}              the fence of every older epoch; never deleted, see the design record
    log/{epoch:010d}/{seq:020d}        one segment of the journal

Numbers have a fixed width, so that the order of names is the order of numbers.
"""

from __future__ import annotations

CLUSTER = "cluster"
LEASE = "lease"
LEADER = "leader"
MANIFESTS = "manifest/"
LOG = "log/"

#: Names under which a store probes itself.
PROBE = "probe"


def manifest(epoch: int) -> str:
    """Name of the manifest that opens an epoch.

    Examples
    --------
    >>> manifest(7)
    'manifest/00000000000000000007'
    """
    return f"{MANIFESTS}{epoch:020d}"


def segments(epoch: int) -> str:
    """Prefix of the segments of one epoch.

    Examples
    --------
    >>> segments(7)
    'log/0000000007/'
    """
    return f"{LOG}{epoch:010d}/"


def segment(epoch: int, seq: int) -> str:
    """Name of a segment.

    Examples
    --------
    >>> segment(7, 1)
    'log/0000000007/00000000000000000001'
    """
    return f"{segments(epoch)}{seq:020d}"


def epoch_of_manifest(name: str) -> int:
    """Read an epoch back; raises ValueError for any other name."""
    epoch = int(name.removeprefix(MANIFESTS))
    if manifest(epoch) != name:
        raise ValueError(f"{name!r} is no manifest")
    return epoch


def epoch_and_seq_of_segment(name: str) -> tuple[int, int]:
    """Read epoch and sequence number back; raises ValueError for any other name."""
    epoch, _, seq = name.removeprefix(LOG).partition("/")
    numbers = int(epoch), int(seq)
    if segment(*numbers) != name:
        raise ValueError(f"{name!r} is no segment")
    return numbers
