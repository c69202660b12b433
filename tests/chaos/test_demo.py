"""The demo is the promise in one run, so it runs here too."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.chaos


@pytest.mark.timeout(280)
def test_the_demo_ends_with_the_right_result_and_nothing_run_twice():
    done = subprocess.run(
        [sys.executable, "-m", "dask_resilience.chaos.demo", "--no-stock"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["result_equal"] is True
    assert (told["scheduler_kills"], told["worker_kills"]) == (2, 1)
    assert told["tasks_run_twice_because_of_the_scheduler"] == 0
    assert len(told["failover_seconds"]) == 2
