"""Kills at random moments under load, with an oracle over results, futures, run counts and Dask's own check."""

from __future__ import annotations

import pytest

from dask_resilience.chaos.soak import soak

pytestmark = pytest.mark.chaos


@pytest.mark.timeout(400)
def test_twenty_kills_of_the_scheduler(tmp_path):
    report = soak(kills=20, seed=20, directory=tmp_path)
    assert report.violations == []
    assert report.kills == 20


@pytest.mark.timeout(200)
def test_scheduler_and_worker_die_together(tmp_path):
    report = soak(kills=4, seed=5, worker_kills=2, n_workers=3, directory=tmp_path)
    assert report.violations == []
    assert report.worker_kills == 2
