"""What deciding code sees of a cluster: frozen views, built by the seam."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dask_resilience.types import Address, Key


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskView:
    """One task as the journal knows it.

    Parameters
    ----------
    dependencies
        Keys that must be in memory before it can run.
    wanted
        Whether a client, variable or other owner holds it.
    computable
        Whether it has a run spec; scattered data has none.
    erred
        Whether its failure was journalled.
    retried_run
        The last run whose failure was answered with a retry; a worker may still hold that failure.
    """

    dependencies: tuple[Key, ...] = ()
    wanted: bool = False
    computable: bool = True
    erred: bool = False
    retried_run: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """What one worker holds when it comes back.

    Parameters
    ----------
    worker
        Its contact address.
    memory
        Results in memory or spilled: key to size in bytes.
    running
        Tasks on its threads: key to run id.
    erred
        Tasks that failed there and whose failure may not have arrived: key to run id.
    failed
        Its last failures, whatever became of them: key to run ids.
    stale
        Keys of which it holds something that belongs to an earlier meaning of the key, to be freed.
    """

    worker: Address
    memory: Mapping[Key, int] = field(default_factory=dict)
    running: Mapping[Key, int] = field(default_factory=dict)
    erred: Mapping[Key, int] = field(default_factory=dict)
    failed: Mapping[Key, tuple[int, ...]] = field(default_factory=dict)
    stale: frozenset[Key] = frozenset()
