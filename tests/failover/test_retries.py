"""Failures that were answered count once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dask_resilience.failover.retries import answered_failures
from dask_resilience.views import Inventory

A, B = "tcp://a:1", "tcp://b:1"


def test_each_run_counts_once_wherever_it_is_remembered():
    held = [Inventory(worker=A, failed={"x": (1, 3)}), Inventory(worker=B, failed={"x": (3, 2)})]
    assert answered_failures(held, counted={"x": -1}) == {"x": (1, 2, 3)}


def test_what_is_known_to_be_counted_or_older_than_the_task_does_not_count():
    held = [Inventory(worker=A, failed={"x": (1, 2, 3), "y": (1,)})]
    assert answered_failures(held, counted={"x": 2, "y": 1}) == {"x": (3,)}


def test_the_last_word_on_a_task_that_goes_on_nowhere_is_left_to_its_report():
    ended = Inventory(worker=A, failed={"x": (1, 2)}, erred={"x": 2})
    assert answered_failures([ended], counted={"x": -1}) == {"x": (1,)}
    for goes_on in (Inventory(worker=B, running={"x": 3}), Inventory(worker=B, memory={"x": 8})):
        assert answered_failures([ended, goes_on], counted={"x": -1}) == {"x": (1, 2)}


def test_keys_that_were_not_asked_for_are_left_out():
    assert answered_failures([Inventory(worker=A, failed={"x": (1,)})], counted={}) == {}


runs = st.lists(st.integers(0, 9), max_size=5, unique=True).map(tuple)


@given(
    failed=st.tuples(runs, runs),
    erred=st.none() | st.integers(0, 9),
    floor=st.integers(-1, 9),
    goes_on=st.booleans(),
)
def test_nothing_counts_twice_and_nothing_that_is_reported_counts(failed, erred, floor, goes_on):
    first, second = failed
    held = [
        Inventory(worker=A, failed={"x": first}, erred={} if erred is None else {"x": erred}),
        Inventory(worker=B, failed={"x": second}, running={"x": 10} if goes_on else {}),
    ]
    found = answered_failures(held, counted={"x": floor}).get("x", ())
    assert list(found) == sorted(set(found))
    expected = {run for run in {*first, *second} if run > floor and (goes_on or erred is None or run < erred)}
    assert set(found) == expected
