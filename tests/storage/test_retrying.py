"""Waits and deadlines of requests: pure arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_resilience.storage.object_backend import Fault, fault_of_status
from dask_resilience.storage.retrying import RetryTerms

TERMS = RetryTerms(
    first_pause_seconds=0.1,
    longest_pause_seconds=1.0,
    request_seconds=2.0,
    slowest_bytes_per_second=1000.0,
    total_seconds=10.0,
)


@pytest.mark.parametrize(("failures", "bound"), [(1, 0.1), (2, 0.2), (3, 0.4), (4, 0.8), (5, 1.0), (10**9, 1.0)])
def test_the_bound_doubles_up_to_a_limit(failures, bound):
    assert TERMS.pause_seconds(failures, jitter=1.0, elapsed_seconds=0.0) == pytest.approx(bound)
    assert TERMS.pause_seconds(failures, jitter=0.25, elapsed_seconds=0.0) == pytest.approx(bound / 4)
    assert TERMS.pause_seconds(failures, jitter=0.0, elapsed_seconds=0.0) == 0.0


def test_nothing_is_sent_behind_the_end():
    assert TERMS.pause_seconds(1, jitter=1.0, elapsed_seconds=9.89) is not None
    assert TERMS.pause_seconds(1, jitter=1.0, elapsed_seconds=9.91) is None
    assert TERMS.pause_seconds(1, jitter=0.0, elapsed_seconds=10.0) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=200))
def test_the_waits_together_stay_below_the_total(jitters):
    elapsed = 0.0
    for failures, jitter in enumerate(jitters, 1):
        pause = TERMS.pause_seconds(failures, jitter=jitter, elapsed_seconds=elapsed)
        if pause is None:
            break
        assert 0.0 <= pause <= TERMS.longest_pause_seconds
        elapsed += pause
    assert elapsed < TERMS.total_seconds


def test_a_deadline_allows_for_the_bytes_and_grows_with_timeouts():
    assert TERMS.deadline_seconds(0) == 2.0
    assert TERMS.deadline_seconds(3000) == 5.0
    assert TERMS.deadline_seconds(0, timeouts=1) == 4.0
    # No longer than all together, except for bytes that need longer.
    assert TERMS.deadline_seconds(0, timeouts=10**9) == 10.0
    assert TERMS.deadline_seconds(30_000, timeouts=3) == 32.0


@pytest.mark.parametrize(
    ("statuses", "fault"),
    [
        ([401, 403], Fault.DENIED),
        ([404], Fault.ABSENT),
        ([412], Fault.REFUSED),
        ([408, 409, 429, 503], Fault.BUSY),
        ([500, 502, 504, 599], Fault.UNSURE),
        ([507], Fault.FULL),
        ([200, 301, 400, 405, 418], None),
    ],
)
def test_what_a_status_means(statuses, fault):
    assert [fault_of_status(status) for status in statuses] == [fault] * len(statuses)
