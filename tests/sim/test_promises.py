"""The promises hold over many seeds, and a seed repeats its run."""

from __future__ import annotations

from collections import Counter

import pytest

from dask_resilience.journal.records import KeysWanted
from dask_resilience.sim import check
from dask_resilience.sim.__main__ import main
from dask_resilience.sim.check import broken_promises
from dask_resilience.sim.cluster import Cluster
from dask_resilience.sim.history import Ack, History, Recovery

SEEDS_A_TEST = 25


@pytest.mark.parametrize("first", range(0, 200, SEEDS_A_TEST))
def test_promises_hold(first):
    reached: Counter[str] = Counter()
    for seed in range(first, first + SEEDS_A_TEST):
        outcome = Cluster(seed).run()
        assert not outcome.broken, (seed, outcome.broken, outcome.trace[-50:])
        reached += outcome.reached
    # A simulation in which nothing happens keeps every promise.
    assert reached["epochs"] > SEEDS_A_TEST
    assert reached["acks"] > 10 * SEEDS_A_TEST
    assert reached["plan.adopt_memory"]
    assert reached["plan.adopt_running"]
    assert reached["plan.recompute"]
    assert reached["late worker"]
    assert reached["repeated message"]
    assert reached["snapshot"]
    assert reached["segment removed"]


@pytest.mark.parametrize("seed", [4, 5, 7])
def test_a_seed_repeats_its_run(seed):
    first, again = Cluster(seed).run(), Cluster(seed).run()
    assert first.digest == again.digest
    assert first.events == again.events
    assert first.digest != Cluster(seed + 10).run().digest


def test_the_command_line_tells_what_was_reached(capsys):
    assert main(["--seeds", "2", "--first", "4"]) == 0
    printed = capsys.readouterr().out
    assert "epochs" in printed
    assert printed.endswith("2 seeds, 0 broke a promise\n")


def test_the_command_line_tells_a_broken_promise(capsys, monkeypatch):
    def broken(history):
        yield "as planned"

    monkeypatch.setattr(check, "PROMISES", (broken,))
    assert main(["--seeds", "1", "--trace"]) == 1
    assert "seed 0:\n  broken: as planned\n" in capsys.readouterr().out


def told(history):
    return [line.split(":")[0] for line in broken_promises(history)]


def test_nothing_breaks_no_promise():
    assert told(History(gentle=True)) == []


def test_a_lost_ack_is_told():
    lost = Ack(epoch=1, client="c", seq=1, lsn=5)
    history = History(gentle=True, acks=[lost], recoveries=[Recovery(epoch=2, sealed=(1, 0, 100, 4), records=())])
    assert told(history) == ["acked_is_recovered", "one_epoch_acks"]


def wanted(*seqs):
    return tuple((lsn, KeysWanted(client="c", seq=seq, keys=("x",))) for lsn, seq in enumerate(seqs, start=1))


def recovered(*logs):
    found = [Recovery(epoch=epoch, sealed=None, records=records) for epoch, records in enumerate(logs, start=1)]
    return told(History(gentle=True, recoveries=found))


def test_a_log_that_grows_is_well():
    assert recovered((), wanted(1), wanted(1, 2, 3)) == []


def test_a_log_that_shrinks_or_changes_is_told():
    assert recovered(wanted(1, 2), wanted(1)) == ["recovered_is_a_prefix"]
    assert recovered(wanted(1, 2)[1:]) == ["recovered_is_a_prefix", "each_message_is_applied_once"]


@pytest.mark.parametrize("seqs", [(1, 1), (1, 3), (2,)])
def test_a_message_applied_twice_or_left_out_is_told(seqs):
    assert recovered(wanted(*seqs)) == ["each_message_is_applied_once"]


def test_a_task_that_ran_twice_is_told_where_members_stayed_well():
    assert told(History(gentle=True, runs=Counter(x=2))) == ["a_task_runs_once"]
    assert told(History(gentle=False, runs=Counter(x=2))) == []


@pytest.mark.parametrize(
    ("ending", "breaks"),
    [
        (("c", "x", "finished", True), False),
        (("c", "x", "finished", False), True),
        (("c", "x", "pending", True), True),
        (("c", "x", "erred", False), False),
        (("c", "x", "lost", False), False),
    ],
)
def test_a_want_without_an_answer_is_told(ending, breaks):
    assert told(History(gentle=True, endings=[ending])) == ["every_want_is_answered"] * breaks


def test_a_message_that_waits_for_its_ack_is_told():
    assert told(History(gentle=True, unacked=[("c", [3]), ("d", [])])) == ["everything_is_acked"]
