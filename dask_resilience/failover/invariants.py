"""What must hold for every recovery plan, as plain predicates.

Each looks at the facts and at the plan, never at how the plan was made.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from dask_resilience.failover.recovery import RecoveryPlan
from dask_resilience.types import Address, Key
from dask_resilience.views import Inventory, TaskView


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a plan was made from: the arguments of `plan_recovery`.

    Parameters
    ----------
    tasks, inventories, durable, distrust
        As there.
    """

    tasks: Mapping[Key, TaskView]
    inventories: Sequence[Inventory] = ()
    durable: Collection[Key] = ()
    distrust: Collection[Key] = ()


Invariant: TypeAlias = Callable[[Facts, RecoveryPlan], bool]


def _placed(plan: RecoveryPlan) -> list[Key]:
    return [
        *plan.adopt_erred,
        *plan.adopt_memory,
        *plan.load,
        *plan.lost,
        *plan.adopt_running,
        *plan.report_erred,
        *plan.recompute,
    ]


def _adopted(plan: RecoveryPlan) -> set[tuple[Address, Key]]:
    results = {(address, key) for key, addresses in plan.adopt_memory.items() for address in addresses}
    runs = {(address, key) for found in (plan.adopt_running, plan.report_erred) for key, (address, _) in found.items()}
    return results | runs


def each_key_is_in_one_place(facts: Facts, plan: RecoveryPlan) -> bool:  # noqa: ARG001 -- all have one signature
    """No key has two fates: above all, none is adopted as running and recomputed."""
    placed = _placed(plan)
    return len(placed) == len(set(placed))


def every_wanted_key_is_somewhere(facts: Facts, plan: RecoveryPlan) -> bool:
    """In memory, running, erred, to be loaded, lost by name, or to be recomputed."""
    placed = set(_placed(plan))
    return all(key in placed for key, task in facts.tasks.items() if task.wanted)


def dependencies_are_somewhere(facts: Facts, plan: RecoveryPlan) -> bool:
    """What a recomputed key depends on has a place as well."""
    placed = set(_placed(plan))
    return all(dependency in placed for key in plan.recompute for dependency in facts.tasks[key].dependencies)


def recompute_is_topological(facts: Facts, plan: RecoveryPlan) -> bool:
    """Dependencies stand before dependents."""
    position = {key: index for index, key in enumerate(plan.recompute)}
    return all(
        position[dependency] < position[key]
        for key in plan.recompute
        for dependency in facts.tasks[key].dependencies
        if dependency in position
    )


def adopted_is_held(facts: Facts, plan: RecoveryPlan) -> bool:
    """A worker is believed to have what it said it has, with the run id that it said."""
    workers = {inventory.worker: inventory for inventory in facts.inventories}
    return (
        all(key in workers[address].memory for key, found in plan.adopt_memory.items() for address in found)
        and all(workers[address].running.get(key) == run for key, (address, run) in plan.adopt_running.items())
        and all(workers[address].erred.get(key) == run for key, (address, run) in plan.report_erred.items())
        and all(key in facts.durable for key in plan.load)
    )


def running_has_its_dependencies(facts: Facts, plan: RecoveryPlan) -> bool:
    """Each dependency of an adopted run is adopted in memory on the run's own worker."""
    return all(
        address in plan.adopt_memory.get(dependency, ())
        for key, (address, _) in plan.adopt_running.items()
        for dependency in facts.tasks[key].dependencies
    )


def held_is_adopted_or_forgotten(facts: Facts, plan: RecoveryPlan) -> bool:
    """Exactly one of both, worker by worker: nothing leaks and nothing adopted is freed."""
    held = {
        (inventory.worker, key)
        for inventory in facts.inventories
        for key in (*inventory.memory, *inventory.running, *inventory.erred, *inventory.stale)
    }
    adopted = _adopted(plan)
    forgotten = {(address, key) for address, keys in plan.forget.items() for key in keys}
    return held == adopted | forgotten and adopted.isdisjoint(forgotten)


def a_result_is_not_computed_again(facts: Facts, plan: RecoveryPlan) -> bool:
    """What a worker has in memory, or a durable copy holds, is not recomputed."""
    there = {*facts.durable, *(key for inventory in facts.inventories for key in inventory.memory)}
    return (there - set(facts.distrust)).isdisjoint(plan.recompute)


def the_distrusted_is_not_used(facts: Facts, plan: RecoveryPlan) -> bool:
    """Nothing that a worker or a store holds of a distrusted key counts."""
    used = {*plan.adopt_memory, *plan.adopt_running, *plan.report_erred, *plan.load}
    return used.isdisjoint(facts.distrust)


#: Every invariant of a plan.
INVARIANTS: Final[tuple[Invariant, ...]] = (
    each_key_is_in_one_place,
    every_wanted_key_is_somewhere,
    dependencies_are_somewhere,
    recompute_is_topological,
    adopted_is_held,
    running_has_its_dependencies,
    held_is_adopted_or_forgotten,
    a_result_is_not_computed_again,
    the_distrusted_is_not_used,
)


def broken(facts: Facts, plan: RecoveryPlan) -> tuple[str, ...]:
    """Name the invariants that a plan breaks.

    Examples
    --------
    >>> broken(Facts(tasks={"x": TaskView(wanted=True)}), RecoveryPlan())
    ('every_wanted_key_is_somewhere',)
    """
    return tuple(check.__name__ for check in INVARIANTS if not check(facts, plan))
