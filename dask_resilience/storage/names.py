"""The one place that builds and reads the names of objects.

::

    cluster                            who owns the store
    lease                              who may try to rule
    leader                             where the ruling scheduler listens
    manifest/{epoch:020d}              the fence of every older epoch; never deleted, see the design record
    log/{epoch:010d}/{seq:020d}        one segment of the journal
    snapshot/{lsn:020d}.{epoch:010d}   a snapshot that counts: what was read back of it
    snapshot-data/...                  the same name: the snapshot itself
    .parts/{name}/.{id}/{number:06d}   what was appended to a name, on stores whose objects do not grow

Numbers have a fixed width, so that the order of names is the order of numbers.
"""

from __future__ import annotations

CLUSTER = "cluster"
LEASE = "lease"
LEADER = "leader"
MANIFESTS = "manifest/"
LOG = "log/"
SNAPSHOTS = "snapshot/"
SNAPSHOT_DATA = "snapshot-data/"

#: Below it is what belongs to objects and is none itself: names of objects never begin with a dot.
PARTS = ".parts/"

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


def snapshot(lsn: int, epoch: int) -> str:
    """Name of the marker of a snapshot of the state behind a record, taken in an epoch.

    Examples
    --------
    >>> snapshot(812, 7)
    'snapshot/00000000000000000812.0000000007'
    """
    return f"{SNAPSHOTS}{lsn:020d}.{epoch:010d}"


def data_of_snapshot(marker: str) -> str:
    """Name of the snapshot that a marker is of.

    Examples
    --------
    >>> data_of_snapshot(snapshot(812, 7))
    'snapshot-data/00000000000000000812.0000000007'
    """
    return SNAPSHOT_DATA + marker.removeprefix(SNAPSHOTS)


def marker_of_data(data: str) -> str:
    """Name of the marker of a snapshot."""
    return SNAPSHOTS + data.removeprefix(SNAPSHOT_DATA)


def lsn_and_epoch_of_snapshot(name: str) -> tuple[int, int]:
    """Read LSN and epoch back; raises ValueError for any other name."""
    lsn, _, epoch = name.removeprefix(SNAPSHOTS).partition(".")
    numbers = int(lsn), int(epoch)
    if snapshot(*numbers) != name:
        raise ValueError(f"{name!r} is no snapshot")
    return numbers


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


def check(name: str) -> str:
    """Return a name of an object; raises ValueError where it could lead elsewhere.

    Examples
    --------
    >>> check("log/a")
    'log/a'
    """
    if any(not part or part.startswith(".") for part in name.split("/")):
        raise ValueError(f"{name!r} is no name of an object")
    return name


def all_parts(name: str) -> str:
    """Prefix of the parts of everything that was ever created under a name.

    Examples
    --------
    >>> all_parts("log/a")
    '.parts/log/a/.'
    """
    return f"{PARTS}{name}/."


def parts(name: str, identity: str) -> str:
    """Prefix of the parts of one object.

    Examples
    --------
    >>> parts("log/a", "7f")
    '.parts/log/a/.7f/'
    """
    return f"{all_parts(name)}{identity}/"


def part(name: str, identity: str, number: int) -> str:
    """Name of a part; the head of the object is number 0 and has the object's own name.

    Examples
    --------
    >>> part("log/a", "7f", 1)
    '.parts/log/a/.7f/000001'
    """
    return f"{parts(name, identity)}{number:06d}"


def number_of_part(name: str) -> int:
    """Read the number of a part back; raises ValueError for any other name."""
    number = name.rpartition("/")[2]
    if not number.isdecimal() or f"{int(number):06d}" != number:
        raise ValueError(f"{name!r} is no part")
    return int(number)
