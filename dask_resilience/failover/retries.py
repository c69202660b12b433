"""How many retries were used up that nobody has written down.

A failure that is answered with a retry uses one up, and the journal is told. A scheduler that dies before that is
durable leaves a journal which allows too many. Workers remember their failures by run id, and each counts once:

- not when it is known to be counted, or older than the task: `counted`, the last such run;
- not when it is the last word on its task. A failure of a task that neither runs nor is done anywhere is about to be
  reported, and counts then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dask_resilience.types import Key
from dask_resilience.views import Inventory


def answered_failures(inventories: Sequence[Inventory], *, counted: Mapping[Key, int]) -> dict[Key, tuple[int, ...]]:
    """Find failures that were answered with a retry, although the journal does not say so.

    Parameters
    ----------
    inventories
        One for each worker that came back.
    counted
        The keys that have retries left, with the last run that does not count any more; -1 for none.

    Returns
    -------
    dict
        Key to the runs whose failures use up a retry each, in order. Keys without any are left out.

    Examples
    --------
    >>> held = [Inventory(worker="tcp://a:1", failed={"x": (3, 5, 8)}, erred={"x": 8})]
    >>> answered_failures(held, counted={"x": 3})
    {'x': (5,)}
    """
    failed: dict[Key, set[int]] = {}
    last_words: dict[Key, int] = {}
    goes_on: set[Key] = set()
    for inventory in inventories:
        goes_on.update(counted.keys() & inventory.running.keys(), counted.keys() & inventory.memory.keys())
        for key, runs in inventory.failed.items():
            failed.setdefault(key, set()).update(runs)
        for key, run_id in inventory.erred.items():
            last_words[key] = max(run_id, last_words.get(key, -1))
    found: dict[Key, tuple[int, ...]] = {}
    for key, floor in counted.items():
        open_run = None if key in goes_on else last_words.get(key)
        runs = tuple(
            run_id
            for run_id in sorted(failed.get(key, ()))
            if run_id > floor and (open_run is None or run_id < open_run)
        )
        if runs:
            found[key] = runs
    return found
