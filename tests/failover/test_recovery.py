from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_resilience.failover.invariants import INVARIANTS, Facts, broken
from dask_resilience.failover.recovery import LatePlan, RecoveryPlan, plan_late, plan_recovery
from dask_resilience.types import Key
from dask_resilience.views import Inventory, TaskView

A, B, C = "tcp://a:1", "tcp://b:1", "tcp://c:1"
STATES = ("released", "waiting", "no-worker", "queued", "processing", "memory", "erred", "forgotten")


def plan_of(facts: Facts) -> RecoveryPlan:
    return plan_recovery(facts.tasks, facts.inventories, durable=facts.durable, distrust=facts.distrust)


# --- A reference: each key's fate by the words of the rules, slowly and recursively ---


def fate(facts: Facts, key: Key) -> tuple[object, ...]:
    task = facts.tasks.get(key, TaskView(computable=False))
    if task.erred:
        return ("erred",)
    if key not in facts.distrust:
        if holders := sorted(i.worker for i in facts.inventories if key in i.memory):
            return ("memory", tuple(holders))
        runs = [
            (-i.running[key], i.worker)
            for i in facts.inventories
            if key in i.running
            and all(
                d in i.memory and d not in facts.distrust and not facts.tasks.get(d, TaskView()).erred
                for d in task.dependencies
            )
        ]
        if runs:
            run_id, worker = min(runs)
            return ("running", (worker, -run_id))
        if failures := [(-i.erred[key], i.worker) for i in facts.inventories if key in i.erred]:
            run_id, worker = min(failures)
            return ("report", (worker, -run_id))
        if key in facts.durable:
            return ("load",)
    return ("recompute",) if task.computable else ("lost",)


def reference(facts: Facts) -> dict[Key, tuple[object, ...]]:
    fates: dict[Key, tuple[object, ...]] = {}

    def need(key: Key) -> None:
        if key not in fates:
            fates[key] = fate(facts, key)
            if fates[key][0] in ("running", "recompute"):
                for dependency in facts.tasks[key].dependencies if key in facts.tasks else ():
                    need(dependency)

    for key, task in facts.tasks.items():
        if task.wanted or task.erred:
            need(key)
    return fates


def fates_of(plan: RecoveryPlan) -> dict[Key, tuple[object, ...]]:
    return {
        **dict.fromkeys(plan.adopt_erred, ("erred",)),
        **{key: ("memory", found) for key, found in plan.adopt_memory.items()},
        **{key: ("running", run) for key, run in plan.adopt_running.items()},
        **{key: ("report", run) for key, run in plan.report_erred.items()},
        **dict.fromkeys(plan.load, ("load",)),
        **dict.fromkeys(plan.lost, ("lost",)),
        **dict.fromkeys(plan.recompute, ("recompute",)),
    }


@st.composite
def all_facts(draw: st.DrawFn) -> Facts:
    """Small clusters in which everything that can go wrong does so often."""
    keys: list[Key] = [("k", i) for i in range(draw(st.integers(1, 8)))]
    tasks: dict[Key, TaskView] = {}
    for index, key in enumerate(keys):
        before = keys[:index]
        computable = draw(st.sampled_from((True, True, True, False)))
        tasks[key] = TaskView(
            dependencies=tuple(draw(st.sets(st.sampled_from(before), max_size=3))) if before and computable else (),
            wanted=draw(st.booleans()),
            computable=computable,
            erred=draw(st.sampled_from((False, False, False, True))),
        )
    possible: list[Key] = [*keys, "unknown"]
    inventories = []
    for worker in (A, B, C)[: draw(st.integers(0, 3))]:
        held = draw(st.dictionaries(st.sampled_from(possible), st.sampled_from("mmmrres")))
        run_ids = st.integers(1, 3)
        inventories.append(
            Inventory(
                worker=worker,
                memory={key: 8 for key, how in held.items() if how == "m"},
                running={key: draw(run_ids) for key, how in held.items() if how == "r"},
                erred={key: draw(run_ids) for key, how in held.items() if how == "e"},
                stale=frozenset(key for key, how in held.items() if how == "s"),
            )
        )
    few = st.one_of(st.just(frozenset()), st.frozensets(st.sampled_from(keys), max_size=2))
    order = draw(st.permutations(keys))
    return Facts(
        tasks={key: tasks[key] for key in order},
        inventories=draw(st.permutations(inventories)),
        durable=draw(few),
        distrust=draw(few),
    )


@given(all_facts())
@settings(max_examples=600, deadline=None)
def test_a_plan_keeps_its_invariants_and_agrees_with_the_reference(facts: Facts) -> None:
    plan = plan_of(facts)
    assert broken(facts, plan) == ()
    assert fates_of(plan) == reference(facts)


@given(all_facts())
@settings(max_examples=100, deadline=None)
def test_the_order_in_which_workers_came_does_not_matter(facts: Facts) -> None:
    reversed_facts = Facts(
        tasks=facts.tasks, inventories=facts.inventories[::-1], durable=facts.durable, distrust=facts.distrust
    )
    assert plan_of(facts) == plan_of(reversed_facts)


# --- Each rule by example ---

#: x -> y -> z, z wanted
CHAIN = {"x": TaskView(), "y": TaskView(dependencies=("x",)), "z": TaskView(dependencies=("y",), wanted=True)}


def test_nothing_held_means_everything_again_in_order() -> None:
    assert plan_recovery(CHAIN, []) == RecoveryPlan(recompute=("x", "y", "z"))


def test_what_nobody_needs_is_forgotten() -> None:
    tasks = {**CHAIN, "idle": TaskView()}
    held = Inventory(worker=A, memory={"z": 8, "x": 8}, running={"idle": 1}, erred={"y": 1})
    assert plan_recovery(tasks, [held]) == RecoveryPlan(adopt_memory={"z": (A,)}, forget={A: ("x", "idle", "y")})


def test_all_replicas_are_adopted_in_order_of_address() -> None:
    plan = plan_recovery(CHAIN, [Inventory(worker=B, memory={"z": 8}), Inventory(worker=A, memory={"z": 8})])
    assert plan == RecoveryPlan(adopt_memory={"z": (A, B)})


def test_a_running_task_goes_on_with_its_dependencies() -> None:
    plan = plan_recovery(CHAIN, [Inventory(worker=A, memory={"x": 8, "y": 8}, running={"z": 7})])
    assert plan == RecoveryPlan(adopt_memory={"y": (A,)}, adopt_running={"z": (A, 7)}, forget={A: ("x",)})


def test_of_two_runs_the_newest_lives() -> None:
    first = Inventory(worker=A, memory={"y": 8}, running={"z": 7})
    second = Inventory(worker=B, memory={"y": 8}, running={"z": 9})
    plan = plan_recovery(CHAIN, [first, second])
    assert plan.adopt_running == {"z": (B, 9)}
    assert plan.forget == {A: ("z",)}


def test_of_two_runs_with_one_id_the_smaller_address_lives() -> None:
    held = [Inventory(worker=w, memory={"y": 8}, running={"z": 7}) for w in (B, A)]
    assert plan_recovery(CHAIN, held).adopt_running == {"z": (A, 7)}


def test_a_newer_run_without_its_dependencies_gives_way() -> None:
    """Its dependency is in memory elsewhere: enough to compute it, not enough to have it processing."""
    held = [Inventory(worker=A, memory={"y": 8}, running={"z": 7}), Inventory(worker=B, running={"z": 9})]
    plan = plan_recovery(CHAIN, held)
    assert plan.adopt_running == {"z": (A, 7)}
    assert plan.forget == {B: ("z",)}


def test_a_run_without_its_dependencies_is_cancelled() -> None:
    held = [Inventory(worker=A, memory={"y": 8}), Inventory(worker=B, running={"z": 9})]
    assert plan_recovery(CHAIN, held) == RecoveryPlan(adopt_memory={"y": (A,)}, recompute=("z",), forget={B: ("z",)})


def test_a_result_beats_a_run() -> None:
    held = [Inventory(worker=A, memory={"y": 8}, running={"z": 9}), Inventory(worker=B, memory={"z": 8})]
    plan = plan_recovery(CHAIN, held)
    assert plan == RecoveryPlan(adopt_memory={"z": (B,)}, forget={A: ("y", "z")})


def test_a_run_beats_a_failure() -> None:
    held = [Inventory(worker=A, memory={"y": 8}, running={"z": 7}), Inventory(worker=B, erred={"z": 9})]
    plan = plan_recovery(CHAIN, held)
    assert (plan.adopt_running, plan.report_erred, plan.forget) == ({"z": (A, 7)}, {}, {B: ("z",)})


def test_a_failure_that_only_a_worker_knows_is_reported() -> None:
    held = [Inventory(worker=A, memory={"y": 8}, erred={"z": 7}), Inventory(worker=B, erred={"z": 9})]
    assert plan_recovery(CHAIN, held) == RecoveryPlan(report_erred={"z": (B, 9)}, forget={A: ("y", "z")})


def test_a_failure_that_was_answered_with_a_retry_is_not_reported_again() -> None:
    tasks = {**CHAIN, "z": TaskView(dependencies=("y",), wanted=True, retried_run=7)}
    held = [Inventory(worker=A, memory={"y": 8}, erred={"z": 7})]
    assert plan_recovery(tasks, held) == RecoveryPlan(adopt_memory={"y": (A,)}, recompute=("z",), forget={A: ("z",)})
    newer = [Inventory(worker=A, memory={"y": 8}, erred={"z": 7}), Inventory(worker=B, erred={"z": 8})]
    assert plan_recovery(tasks, newer).report_erred == {"z": (B, 8)}


def test_a_late_worker_brings_only_failures_that_nobody_has_answered() -> None:
    held = Inventory(worker=A, erred={"k": 7})
    for retried, expected in ((6, LatePlan(report_erred={"k": 7})), (7, LatePlan(forget=("k",)))):
        assert plan_late({"k": TaskView(wanted=True, retried_run=retried)}, {"k": "waiting"}, held) == expected


def test_what_belongs_to_an_earlier_meaning_of_a_key_is_freed() -> None:
    held = [Inventory(worker=A, memory={"y": 8}, stale=frozenset({"z"}))]
    assert plan_recovery(CHAIN, held) == RecoveryPlan(adopt_memory={"y": (A,)}, recompute=("z",), forget={A: ("z",)})
    late = plan_late({"z": TaskView(wanted=True)}, {"z": "waiting"}, Inventory(worker=A, stale=frozenset({"z"})))
    assert late == LatePlan(forget=("z",))


def test_a_journalled_failure_stays_whatever_workers_hold() -> None:
    tasks = {**CHAIN, "z": TaskView(dependencies=("y",), wanted=True, erred=True)}
    held = [Inventory(worker=A, memory={"z": 8}), Inventory(worker=B, erred={"z": 7})]
    assert plan_recovery(tasks, held) == RecoveryPlan(adopt_erred=("z",), forget={A: ("z",), B: ("z",)})


def test_the_blame_of_a_failure_stays_though_nobody_wants_it() -> None:
    tasks = {"x": TaskView(erred=True), "y": TaskView(dependencies=("x",), wanted=True, erred=True)}
    assert plan_recovery(tasks, []) == RecoveryPlan(adopt_erred=("x", "y"))


def test_a_run_on_top_of_a_failure_is_cancelled() -> None:
    tasks = {"x": TaskView(erred=True), "y": TaskView(dependencies=("x",), wanted=True)}
    plan = plan_recovery(tasks, [Inventory(worker=A, memory={"x": 8}, running={"y": 7})])
    assert plan == RecoveryPlan(adopt_erred=("x",), recompute=("y",), forget={A: ("x", "y")})


def test_a_durable_result_is_loaded_and_ends_the_lineage() -> None:
    assert plan_recovery(CHAIN, [], durable=["y"]) == RecoveryPlan(load=("y",), recompute=("z",))


def test_what_nothing_can_compute_is_lost_by_name() -> None:
    tasks = {"data": TaskView(computable=False), "y": TaskView(dependencies=("data", "never seen"), wanted=True)}
    assert plan_recovery(tasks, []) == RecoveryPlan(lost=("never seen", "data"), recompute=("y",))


def test_the_distrusted_is_freed_and_run_again() -> None:
    held = Inventory(worker=A, memory={"y": 8, "x": 8}, running={"z": 7})
    plan = plan_recovery(CHAIN, [held], distrust=["y"], durable=["y"])
    assert plan == RecoveryPlan(adopt_memory={"x": (A,)}, recompute=("y", "z"), forget={A: ("y", "z")})


def test_two_inventories_of_one_worker_are_refused() -> None:
    with pytest.raises(ValueError, match=f"two inventories of {A}"):
        plan_recovery(CHAIN, [Inventory(worker=A), Inventory(worker=A)])


def test_a_result_is_not_freed_because_its_run_is_listed_too() -> None:
    plan = plan_recovery(CHAIN, [Inventory(worker=A, memory={"z": 8}, running={"z": 7})])
    assert plan == RecoveryPlan(adopt_memory={"z": (A,)})


def test_a_diamond_is_computed_once_and_in_order() -> None:
    tasks = {
        "d": TaskView(dependencies=("b", "c"), wanted=True),
        "b": TaskView(dependencies=("a",)),
        "c": TaskView(dependencies=("a", "b")),
        "a": TaskView(),
    }
    assert plan_recovery(tasks, []).recompute == ("a", "b", "c", "d")


def test_a_long_chain_needs_no_recursion() -> None:
    length = 100_000
    tasks: dict[Key, TaskView] = {
        ("k", i): TaskView(dependencies=(("k", i - 1),) if i else (), wanted=i == length - 1) for i in range(length)
    }
    assert plan_recovery(tasks, []).recompute == tuple(tasks)


# --- The invariants themselves bite ---


@pytest.mark.parametrize(
    ("facts", "plan", "name"),
    [
        (
            Facts(tasks=CHAIN, inventories=[Inventory(worker=A, running={"x": 1})]),
            RecoveryPlan(adopt_running={"x": (A, 1)}, recompute=("x", "y", "z")),
            "each_key_is_in_one_place",
        ),
        (Facts(tasks=CHAIN), RecoveryPlan(), "every_wanted_key_is_somewhere"),
        (Facts(tasks=CHAIN), RecoveryPlan(recompute=("z",)), "dependencies_are_somewhere"),
        (Facts(tasks=CHAIN), RecoveryPlan(recompute=("y", "x", "z")), "recompute_is_topological"),
        (
            Facts(tasks=CHAIN, inventories=[Inventory(worker=A)]),
            RecoveryPlan(adopt_memory={"z": (A,)}),
            "adopted_is_held",
        ),
        (
            Facts(tasks=CHAIN, inventories=[Inventory(worker=A, running={"z": 1})]),
            RecoveryPlan(adopt_running={"z": (A, 1)}),
            "running_has_its_dependencies",
        ),
        (
            Facts(tasks=CHAIN, inventories=[Inventory(worker=A, memory={"z": 1})]),
            RecoveryPlan(adopt_memory={"z": (A,)}, forget={A: ("z",)}),
            "held_is_adopted_or_forgotten",
        ),
        (
            Facts(tasks=CHAIN, inventories=[Inventory(worker=A, memory={"z": 1})]),
            RecoveryPlan(recompute=("x", "y", "z"), forget={A: ("z",)}),
            "a_result_is_not_computed_again",
        ),
        (
            Facts(tasks=CHAIN, durable=["z"], distrust=["z"]),
            RecoveryPlan(load=("z",)),
            "the_distrusted_is_not_used",
        ),
    ],
    ids=[check.__name__ for check in INVARIANTS],
)
def test_each_invariant_names_its_breach(facts: Facts, plan: RecoveryPlan, name: str) -> None:
    assert name in broken(facts, plan)


# --- A late worker ---


@pytest.mark.parametrize(
    ("state", "wanted", "result", "run", "failure"),
    [
        ("memory", True, "add_replica", "forget", "forget"),
        ("waiting", True, "adopt_memory", "adopt_running", "report_erred"),
        ("queued", True, "adopt_memory", "adopt_running", "report_erred"),
        ("no-worker", True, "adopt_memory", "adopt_running", "report_erred"),
        ("released", True, "adopt_memory", "adopt_running", "report_erred"),
        ("released", False, "forget", "forget", "forget"),
        ("processing", True, "forget", "forget", "forget"),
        ("erred", True, "forget", "forget", "forget"),
        ("forgotten", False, "forget", "forget", "forget"),
        (None, False, "forget", "forget", "forget"),
    ],
)
def test_a_late_worker_yields(state: str | None, wanted: bool, result: str, run: str, failure: str) -> None:
    tasks = {"k": TaskView(wanted=wanted)}
    states = {} if state is None else {"k": state}
    for held, expected in (
        (Inventory(worker=A, memory={"k": 8}), result),
        (Inventory(worker=A, running={"k": 7}), run),
        (Inventory(worker=A, erred={"k": 7}), failure),
    ):
        done = {"k": 7} if expected in ("adopt_running", "report_erred") else ("k",)
        assert plan_late(tasks, states, held) == LatePlan(**{expected: done})


def test_a_late_run_brings_its_dependencies_along() -> None:
    """Released, since the scheduler has z from nowhere yet and wants it not for a waiting task but for a client."""
    held = Inventory(worker=A, memory={"x": 8, "y": 8}, running={"z": 7})
    plan = plan_late(CHAIN, dict.fromkeys(CHAIN, "released"), held)
    assert plan == LatePlan(adopt_memory=("y",), adopt_running={"z": 7}, forget=("x",))


@pytest.mark.parametrize("state", ["processing", "erred", "forgotten"])
def test_a_late_run_whose_dependency_is_freed_is_cancelled(state: str) -> None:
    held = Inventory(worker=A, memory={"y": 8}, running={"z": 7})
    plan = plan_late(CHAIN, {"x": "released", "y": state, "z": "waiting"}, held)
    assert plan == LatePlan(forget=("y", "z"))


def test_a_late_run_whose_dependency_is_elsewhere_is_cancelled() -> None:
    plan = plan_late(CHAIN, {"y": "memory", "z": "waiting"}, Inventory(worker=A, running={"z": 7}))
    assert plan == LatePlan(forget=("z",))


def test_a_late_run_keeps_a_replica_as_its_dependency() -> None:
    held = Inventory(worker=A, memory={"y": 8}, running={"z": 7})
    plan = plan_late(CHAIN, {"y": "memory", "z": "queued"}, held)
    assert plan == LatePlan(add_replica=("y",), adopt_running={"z": 7})


def test_late_results_of_distrusted_keys_are_freed() -> None:
    held = Inventory(worker=A, memory={"y": 8}, running={"z": 7})
    plan = plan_late(CHAIN, {"y": "memory", "z": "waiting"}, held, distrust=["y"])
    assert plan == LatePlan(forget=("y", "z"))


def test_a_key_that_is_listed_twice_counts_once() -> None:
    held = Inventory(worker=A, memory={"k": 8}, running={"k": 7}, erred={"k": 7})
    assert plan_late({"k": TaskView()}, {"k": "waiting"}, held) == LatePlan(adopt_memory=("k",))


def test_a_state_that_dask_does_not_have_is_refused() -> None:
    with pytest.raises(KeyError, match="limbo"):
        plan_late({"k": TaskView()}, {"k": "limbo"}, Inventory(worker=A, memory={"k": 8}))


@given(all_facts(), st.data())
@settings(max_examples=300, deadline=None)
def test_a_late_plan_is_safe(facts: Facts, data: st.DataObject) -> None:
    states = {key: data.draw(st.sampled_from(STATES)) for key in facts.tasks if data.draw(st.booleans())}
    for held in facts.inventories:
        plan = plan_late(facts.tasks, states, held, distrust=facts.distrust)
        kept = [*plan.add_replica, *plan.adopt_memory, *plan.adopt_running, *plan.report_erred]
        everything = {*held.memory, *held.running, *held.erred, *held.stale}
        assert sorted(map(repr, [*kept, *plan.forget])) == sorted(map(repr, everything))
        assert all(states[key] == "memory" for key in plan.add_replica)
        assert not any(states[key] in ("memory", "processing", "erred") for key in kept if key not in plan.add_replica)
        assert not any(key in facts.distrust for key in kept)
        for key in plan.adopt_running:
            dependencies = facts.tasks[key].dependencies
            assert all(d in plan.add_replica or d in plan.adopt_memory for d in dependencies)


def test_a_plan_repeats() -> None:
    """The same facts give the same plan, order included, at a size where sets of strings would show."""
    rng = random.Random(1)
    tasks: dict[Key, TaskView] = {
        f"k-{i}": TaskView(dependencies=tuple({f"k-{rng.randrange(i)}" for _ in range(2)}) if i else (), wanted=i > 900)
        for i in range(1000)
    }
    first, again = plan_recovery(tasks, []), plan_recovery(dict(tasks), [])
    assert first.recompute == again.recompute
