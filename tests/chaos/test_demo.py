"""The demo is the promise in one run, so it runs here too, with its journal in each kind of store."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from dask_resilience.storage import open_store
from tests.storage.servers import fake_gcs, new_place, seaweedfs

__all__ = ["fake_gcs", "seaweedfs"]

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(280)]


def run(*arguments, **environment):
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def demo(*arguments, **environment):
    """Run the demo, check what it tells, and return all that it showed."""
    done = run("dask_resilience.chaos.demo", "--no-stock", *arguments, **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["result_equal"] is True
    assert (told["scheduler_kills"], told["worker_kills"]) == (2, 1)
    assert told["tasks_run_twice_because_of_the_scheduler"] == 0
    assert len(told["failover_seconds"]) == 2
    return done.stdout


def test_the_demo_ends_with_the_right_result_and_nothing_run_twice():
    demo()


def test_the_demo_on_s3_leaves_a_sound_journal(seaweedfs, tmp_path):
    place = new_place(seaweedfs)
    # As a user who has configured fsspec, and nothing of ours but the URL.
    reach = {"FSSPEC_S3": json.dumps(seaweedfs.options()), "TMPDIR": str(tmp_path)}
    shown = demo("--store", place, "--keep-logs", **reach)
    (store,) = (line.removeprefix("the journal is in ") for line in shown.splitlines() if place in line)
    done = run("dask", "resilience", "verify", store, "-o", "json", **reach)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert (told["sound"], told["epochs"]) == (True, 3)
    done = run("dask", "resilience", "inspect", store, "--type", "EpochStarted", **reach)
    assert done.returncode == 0, done.stderr
    assert [line.split()[2] for line in done.stdout.splitlines()] == ["1", "2", "3"]


@pytest.mark.long
def test_the_demo_on_google_cloud_storage_removes_its_journal(fake_gcs, tmp_path):
    place, options = new_place(fake_gcs), fake_gcs.options()
    shown = demo("--store", place, DASK_RESILIENCE__STORAGE_OPTIONS=json.dumps(options), TMPDIR=str(tmp_path))
    assert f"the journal is in {place}/demo-" in shown
    bucket = open_store(place, existing=True, storage_options=options)
    assert bucket.list("") == []
    bucket.close()


def test_a_store_that_is_not_there_is_told():
    done = run("dask_resilience.chaos.demo", "--store", "ftp://host/a")
    assert done.returncode == 2
    assert "'ftp' is not supported" in done.stderr
    assert "Traceback" not in done.stderr
