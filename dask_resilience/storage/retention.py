"""What is removed when snapshots stand for it, and in which order.

The log is removed from its oldest segment on, up to where the older of the snapshots that are kept goes on: whatever is
there at any moment is the end of the log and a snapshot below it. Nothing here can break the fence. Manifests are never
removed, and a scheduler that was deposed in the middle removes only what snapshots stand for that were there, and
counted, when it still ruled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from dask_resilience.failpoints import failpoint
from dask_resilience.storage import names
from dask_resilience.storage.object_store import ConditionalStore
from dask_resilience.storage.snapshots import list_snapshots, read_marker

#: So many snapshots are kept: the newest, and one to go back to should it be damaged.
KEPT: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """What `retain` removed.

    Parameters
    ----------
    segments, snapshots
        How many of each.
    """

    segments: int
    snapshots: int


def retain(store: ConditionalStore) -> Removed:
    """Remove what the snapshots of a store stand for.

    Call it as the scheduler that rules, and while no snapshot is being written.

    Parameters
    ----------
    store
        Where the journal is.

    Raises
    ------
    StoreError
        If something could not be removed. Calling it again goes on from there.
    JournalCorrupt
        If the marker of a snapshot that is to be kept is damaged. Nothing was removed.
    """
    markers = list_snapshots(store)
    if len(markers) < KEPT:
        return Removed(segments=0, snapshots=0)
    kept, old = markers[-KEPT:], markers[:-KEPT]
    oldest = read_marker(store, kept[0])
    segments = covered(store.list(names.LOG), epoch=oldest.epoch, seq=oldest.seq)
    for name in segments:
        failpoint("retention.before-segment")
        store.delete(name)
    for marker in old:
        store.delete(marker)
        failpoint("retention.after-marker")
        store.delete(names.data_of_snapshot(marker))
    for data in store.list(names.SNAPSHOT_DATA):
        # What was begun and never marked. Behind the newest there may be those of a newer reign.
        if names.marker_of_data(data) < kept[-1] and names.marker_of_data(data) not in kept:
            store.delete(data)
    return Removed(segments=len(segments), snapshots=len(old))


def covered(segments: Sequence[str], *, epoch: int, seq: int) -> list[str]:
    """Tell which segments lie before one, oldest first. Other names are left alone.

    Parameters
    ----------
    segments
        Names of objects.
    epoch, seq
        The first segment that is needed.

    Examples
    --------
    >>> covered([names.segment(1, 0), names.segment(1, 1), names.segment(2, 0)], epoch=1, seq=1)
    ['log/0000000001/00000000000000000000']
    """
    found = []
    for name in segments:
        try:
            place = names.epoch_and_seq_of_segment(name)
        except ValueError:
            continue
        if place < (epoch, seq):
            found.append((place, name))
    return [name for _, name in sorted(found)]
