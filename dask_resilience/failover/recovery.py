"""Who keeps what after a takeover: adopt, load, recompute, forget, or name as lost.

Theory of operation
===================
The journal says which tasks exist, which are wanted and which failed. The workers say what they hold. Neither knows
the other's half, so one walk over the graph joins them, from the wanted keys towards their dependencies:

========================================  =====================  ==============================
a needed key that                         is                     and its dependencies are
========================================  =====================  ==============================
failed, says the journal                  left erred             not needed for its sake
is in the memory of a worker              adopted, all replicas  not needed for its sake
is running with its dependencies at hand  adopted, one run       needed; they are in memory
failed, says a worker                     reported               not needed for its sake
has a durable copy                        loaded                 not needed for its sake
has no run spec                           lost                   not needed for its sake
is none of these                          recomputed             needed
========================================  =====================  ==============================

The first line that fits decides. Why this order:

- A journalled failure was told to clients. A future that failed does not succeed later because an older run of its
  task comes back with a result.
- A result beats a run, since it is there. A run beats a reported failure, since it may still succeed.
- Of several runs the one with the highest run id lives, the newest decision of a scheduler; of equal run ids the one
  on the smallest address, so that the same facts give the same plan. The others are cancelled: a task runs once.
- A failure that was answered with a retry is over: its run is not counted again.
- A run is adopted only if every dependency is in memory on its own worker. That holds for each run that a worker
  started, unless the dependency is distrusted or erred; and a scheduler that had a task processing without its
  dependencies in memory would contradict itself.

A distrusted key (a transfer of a P2P shuffle, whose result stands for shards that are gone) is treated as if nobody
held it: neither what workers hold of it nor a durable copy is used.

What is held and not adopted is forgotten: the worker is told to free it. So each worker ends with exactly what the
scheduler believes of it.

A late worker
-------------
A worker that comes when the scheduler serves already meets states instead of a blank. The scheduler has decided, so
the worker yields: it adds a replica where there is a result, gives its result, run or failure where nobody works on
the key, and frees what another worker is working on. The plan must be enacted in the turn of the event loop in which
the states were read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, TypeAlias

from dask_resilience.types import Address, Key
from dask_resilience.views import Inventory, TaskView

#: One run of a task: where, and its run id.
Run: TypeAlias = tuple[Address, int]

#: A dependency that the journal does not know cannot be computed, only found.
_UNKNOWN: Final = TaskView(computable=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPlan:
    """What a new scheduler does with every needed key and with everything that workers hold.

    Each key is in at most one of the first seven. Enact them in the order of the fields.

    Parameters
    ----------
    adopt_erred
        Journalled failures, needed or not: they stay, with their blame, as long as their task is known.
    adopt_memory
        Results that are there, with every worker that holds them, in order of address.
    load
        Keys to load from their durable copy.
    lost
        Keys that nobody holds and nothing can compute. To be named to whoever wants them.
    adopt_running
        Runs that go on: the worker and the run id.
    report_erred
        Failures that only a worker knows of: to be handled as if its message arrived now, retries and dependents
        included.
    recompute
        Keys to compute, dependencies before dependents. One whose dependency is erred, lost or reported as erred is
        listed as well: it shares the fate of that dependency.
    forget
        What each worker has to free. Workers with nothing to free are left out.
    """

    adopt_erred: tuple[Key, ...] = ()
    adopt_memory: Mapping[Key, tuple[Address, ...]] = field(default_factory=dict)
    load: tuple[Key, ...] = ()
    lost: tuple[Key, ...] = ()
    adopt_running: Mapping[Key, Run] = field(default_factory=dict)
    report_erred: Mapping[Key, Run] = field(default_factory=dict)
    recompute: tuple[Key, ...] = ()
    forget: Mapping[Address, tuple[Key, ...]] = field(default_factory=dict)


def plan_recovery(
    tasks: Mapping[Key, TaskView],
    inventories: Sequence[Inventory],
    *,
    durable: Collection[Key] = (),
    distrust: Collection[Key] = (),
) -> RecoveryPlan:
    """Decide, once, what becomes of every needed key and of everything that workers hold.

    Parameters
    ----------
    tasks
        Every task of the journal. Without cycles, or the order of `recompute` means nothing.
    inventories
        One for each worker that came back.
    durable
        Keys with a durable copy.
    distrust
        Keys whose results, runs, failures and durable copies must not be used.

    Returns
    -------
    RecoveryPlan
        The same for the same facts, whatever the order of `inventories`.

    Raises
    ------
    ValueError
        If a worker has two inventories: only the newest is true.

    Examples
    --------
    >>> tasks = {"x": TaskView(), "y": TaskView(dependencies=("x",)), "z": TaskView(dependencies=("y",), wanted=True)}
    >>> plan = plan_recovery(tasks, [Inventory(worker="tcp://a:1", memory={"x": 8, "old": 8})])
    >>> plan.adopt_memory, plan.recompute, plan.forget
    ({'x': ('tcp://a:1',)}, ('y', 'z'), {'tcp://a:1': ('old',)})
    """
    durable, distrust = _indexed(durable), _indexed(distrust)
    by_address = _by_address(inventories)
    memory = _holders(by_address)
    running = _runs({address: inventory.running for address, inventory in by_address.items()})
    failed = _runs({address: inventory.erred for address, inventory in by_address.items()})

    adopt_memory: dict[Key, tuple[Address, ...]] = {}
    adopt_running: dict[Key, Run] = {}
    report_erred: dict[Key, Run] = {}
    load: list[Key] = []
    lost: list[Key] = []
    recompute: list[Key] = []

    # Depth first without recursion. None on the stack closes the innermost open key, all of whose dependencies
    # were decided by then: so `recompute` comes out in topological order.
    stack: list[Key | None] = [key for key, task in tasks.items() if task.wanted]
    stack.reverse()
    opened: list[Key] = []
    decided: set[Key] = set()
    while stack:
        key = stack.pop()
        if key is None:
            recompute.append(opened.pop())
            continue
        if key in decided:
            continue
        decided.add(key)
        task = tasks.get(key, _UNKNOWN)
        if task.erred:
            continue
        trusted = key not in distrust
        if trusted and key in memory:
            adopt_memory[key] = memory[key]
        elif trusted and key in running and (run := _adoptable(task, running[key], by_address, tasks, distrust)):
            adopt_running[key] = run
            stack.extend(task.dependencies)
        elif trusted and key in failed and failed[key][0][1] > task.retried_run:
            report_erred[key] = failed[key][0]
        elif trusted and key in durable:
            load.append(key)
        elif not task.computable:
            lost.append(key)
        else:
            opened.append(key)
            stack.append(None)
            stack.extend(task.dependencies)

    return RecoveryPlan(
        adopt_erred=tuple(key for key, task in tasks.items() if task.erred),
        adopt_memory=adopt_memory,
        load=tuple(load),
        lost=tuple(lost),
        adopt_running=adopt_running,
        report_erred=report_erred,
        recompute=tuple(recompute),
        forget=_forget(by_address, adopt_memory, {**adopt_running, **report_erred}),
    )


def _adoptable(
    task: TaskView,
    runs: Sequence[Run],
    by_address: Mapping[Address, Inventory],
    tasks: Mapping[Key, TaskView],
    distrust: Collection[Key],
) -> Run | None:
    """Find the newest run whose worker holds, ready to be adopted, all that it depends on."""
    if any(key in distrust or tasks.get(key, _UNKNOWN).erred for key in task.dependencies):
        return None
    for run in runs:
        memory = by_address[run[0]].memory
        if all(key in memory for key in task.dependencies):
            return run
    return None


def _indexed(keys: Collection[Key]) -> Collection[Key]:
    """Something that answers `in` without a scan."""
    return keys if isinstance(keys, (set, frozenset, Mapping)) else frozenset(keys)


def _by_address(inventories: Sequence[Inventory]) -> dict[Address, Inventory]:
    found: dict[Address, Inventory] = {}
    for inventory in sorted(inventories, key=lambda inventory: inventory.worker):
        if inventory.worker in found:
            raise ValueError(f"two inventories of {inventory.worker}: pass only the newest")
        found[inventory.worker] = inventory
    return found


def _holders(by_address: Mapping[Address, Inventory]) -> dict[Key, tuple[Address, ...]]:
    """Key to the workers that have its result."""
    found: dict[Key, tuple[Address, ...]] = {}
    for address, inventory in by_address.items():
        alone = (address,)
        for key in inventory.memory:
            found[key] = found[key] + alone if key in found else alone
    return found


def _runs(held: Mapping[Address, Mapping[Key, int]]) -> dict[Key, list[Run]]:
    """Key to its runs, the newest first; a stable sort keeps equal ones in order of address."""
    found: dict[Key, list[Run]] = {}
    for address, run_ids in held.items():
        for key, run_id in run_ids.items():
            found.setdefault(key, []).append((address, run_id))
    for runs in found.values():
        runs.sort(key=lambda run: -run[1])
    return found


def _forget(
    by_address: Mapping[Address, Inventory],
    adopt_memory: Mapping[Key, tuple[Address, ...]],
    adopted_runs: Mapping[Key, Run],
) -> dict[Address, tuple[Key, ...]]:
    """Everything held that was not adopted, each key once a worker."""
    forget: dict[Address, tuple[Key, ...]] = {}
    for address, inventory in by_address.items():
        # Every replica of an adopted result is adopted: no need to look at its addresses.
        unused: dict[Key, None] = dict.fromkeys(key for key in inventory.memory if key not in adopt_memory)
        unused.update(dict.fromkeys(sorted(inventory.stale, key=str)))
        for held in (inventory.running, inventory.erred):
            for key, run_id in held.items():
                adopted_here = adopted_runs.get(key) == (address, run_id) or (
                    key in adopt_memory and key in inventory.memory
                )
                if not adopted_here:
                    unused[key] = None
        if unused:
            forget[address] = tuple(unused)
    return forget


class _Late(Enum):
    """What a scheduler that serves does with something that a late worker holds."""

    REPLICA = "a result is there: one more replica"
    ADOPT = "nobody works on it: take it"
    IF_WANTED = "nobody works on it: take it if somebody wants it"
    YIELD = "decided without this worker: free it here"


#: Scheduler state of a key to what happens with what a late worker holds of it.
_LATE_TABLE: Final[Mapping[str, _Late]] = {
    "memory": _Late.REPLICA,
    "waiting": _Late.ADOPT,
    "queued": _Late.ADOPT,
    "no-worker": _Late.ADOPT,
    "released": _Late.IF_WANTED,
    # Somewhere else, since a worker that just came has been given nothing. Two runs, one of them believed, is safe;
    # a result taken from here while the other run goes on would be one more race for nothing.
    "processing": _Late.YIELD,
    # The failure was told.
    "erred": _Late.YIELD,
    "forgotten": _Late.YIELD,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LatePlan:
    """What a scheduler that serves does with one late worker. Enact in the order of the fields.

    Parameters
    ----------
    add_replica
        Results that others hold too.
    adopt_memory
        Results that nobody else has: the key goes to memory.
    adopt_running
        Runs that go on here: key to run id.
    report_erred
        Failures to be handled as if the worker's message arrived now: key to run id.
    forget
        What the worker has to free.
    """

    add_replica: tuple[Key, ...] = ()
    adopt_memory: tuple[Key, ...] = ()
    adopt_running: Mapping[Key, int] = field(default_factory=dict)
    report_erred: Mapping[Key, int] = field(default_factory=dict)
    forget: tuple[Key, ...] = ()


def plan_late(
    tasks: Mapping[Key, TaskView],
    states: Mapping[Key, str],
    inventory: Inventory,
    *,
    distrust: Collection[Key] = (),
) -> LatePlan:
    """Decide what a scheduler that serves does with what one late worker holds.

    Parameters
    ----------
    tasks
        At least the keys of `inventory` and the dependencies of its running tasks. `wanted` means here: by an owner
        or by a task that waits for it.
    states
        Name of the scheduler's state of each key that it knows. A key without one is unknown.
    inventory
        What the worker holds.
    distrust
        Keys whose results, runs and failures must not be used.

    Raises
    ------
    KeyError
        If a state has a name that the table does not list.

    Examples
    --------
    >>> late = Inventory(worker="tcp://a:1", memory={"x": 8, "y": 8}, running={"z": 7})
    >>> plan_late({"x": TaskView(), "y": TaskView()}, {"x": "memory", "y": "waiting"}, late)
    LatePlan(add_replica=('x',), adopt_memory=('y',), adopt_running={}, report_erred={}, forget=('z',))
    """
    distrust = _indexed(distrust)

    def fate(key: Key) -> _Late:
        return _LATE_TABLE[states[key]] if key in states and key not in distrust else _Late.YIELD

    def takes(key: Key) -> bool:
        verdict = fate(key)
        return verdict is _Late.ADOPT or (verdict is _Late.IF_WANTED and tasks.get(key, _UNKNOWN).wanted)

    running: dict[Key, int] = {}
    needed: set[Key] = set()
    for key, run_id in inventory.running.items():
        if key in inventory.memory:
            continue
        dependencies = tasks.get(key, _UNKNOWN).dependencies
        # A dependency that is processing elsewhere is about to be freed here, so its dependent cannot go on here.
        if takes(key) and all(d in inventory.memory and fate(d) is not _Late.YIELD for d in dependencies):
            running[key] = run_id
            needed.update(dependencies)

    replicas = [key for key in inventory.memory if fate(key) is _Late.REPLICA]
    results = [key for key in inventory.memory if takes(key) or (key in needed and fate(key) is not _Late.REPLICA)]
    kept = {*replicas, *results, *running}
    erred = {
        key: run_id
        for key, run_id in inventory.erred.items()
        if takes(key) and key not in kept and run_id > tasks.get(key, _UNKNOWN).retried_run
    }
    kept.update(erred)
    held = dict.fromkeys((*inventory.memory, *inventory.running, *inventory.erred, *sorted(inventory.stale, key=str)))
    return LatePlan(
        add_replica=tuple(replicas),
        adopt_memory=tuple(results),
        adopt_running=running,
        report_erred=erred,
        forget=tuple(key for key in held if key not in kept),
    )
