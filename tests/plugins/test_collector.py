"""The collector's pace comes back, in whichever order those who slow it down are done."""

from __future__ import annotations

import gc
from contextlib import ExitStack

import pytest

from dask_resilience.plugins.collector import collecting_rarely


@pytest.fixture(autouse=True)
def usual():
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield (700, 10, 10)
    gc.set_threshold(*before)


def test_collections_are_rare_inside_and_as_before_afterwards(usual):
    with collecting_rarely():
        assert gc.get_threshold()[0] == 100_000
    assert gc.get_threshold() == usual


def test_the_last_to_leave_restores_what_the_first_found(usual):
    first, second = ExitStack(), ExitStack()
    first.enter_context(collecting_rarely())
    second.enter_context(collecting_rarely())
    first.close()
    assert gc.get_threshold()[0] == 100_000
    second.close()
    assert gc.get_threshold() == usual


def test_a_collector_that_is_switched_off_or_slower_stays_so():
    for threshold in (0, 500_000):
        gc.set_threshold(threshold, 10, 10)
        with collecting_rarely():
            assert gc.get_threshold()[0] == threshold
        assert gc.get_threshold()[0] == threshold
