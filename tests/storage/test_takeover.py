"""The way to rule, step by step, with a store that fails and a clock that stands still."""

from __future__ import annotations

import errno
import json
import os
import threading

import pytest
from support import until

from dask_resilience.errors import Fenced, StoreError, WrongCluster
from dask_resilience.failover.lease import LeaseState
from dask_resilience.failover.lease_record import LeaseRecord
from dask_resilience.storage import local_file, names, takeover
from dask_resilience.storage.cluster_object import claim_cluster, read_cluster
from dask_resilience.storage.identity import look_up, started_ticks, this_process
from dask_resilience.storage.leadership import LeaderRecord
from dask_resilience.storage.object_store import Outcome
from dask_resilience.storage.takeover import TakeoverStopped, leader, rule
from tests.storage.acting import FakeClock, Ruler, another, dead, read

#: Changes files, or looks at them.
on_files = pytest.mark.parametrize("store_kind", ["local"])


def ruling(store, **kwargs):
    return rule(store, address="tcp://a:1", ttl_seconds=kwargs.pop("ttl_seconds", 30.0), **kwargs)


def lease_of(store):
    return LeaseRecord.decode(store.get(names.LEASE).data)


class TestCluster:
    def test_it_is_made_once_and_named_when_somebody_names_it(self, faulty):
        assert read_cluster(faulty) is None
        made = claim_cluster(faulty, name=None)
        assert claim_cluster(faulty, name=None) == made == read_cluster(faulty)
        named = claim_cluster(faulty, name="prod")
        assert (named.cluster_id, named.name) == (made.cluster_id, "prod")
        assert claim_cluster(faulty, name=None) == claim_cluster(faulty, name="prod") == named

    def test_another_name_is_refused(self, faulty):
        claim_cluster(faulty, name="prod")
        with pytest.raises(WrongCluster, match=r"belongs to cluster 'prod', but resilience\.cluster is 'test'"):
            ruling(faulty, cluster="test")
        assert faulty.get(names.LEASE) is None

    @pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"version": 1, "id": "x", "name": null}', b"\xff"])
    def test_damage_is_told(self, faulty, data):
        faulty.create(names.CLUSTER, data)
        with pytest.raises(StoreError, match="'cluster' is damaged"):
            ruling(faulty)

    def test_a_newer_format_is_told(self, faulty):
        fields = {"version": 3, "id": this_process().boot_id, "name": None}
        faulty.create(names.CLUSTER, json.dumps(fields).encode())
        with pytest.raises(StoreError, match="format 3"):
            read_cluster(faulty)

    def test_a_store_that_is_full_is_told(self, faulty, monkeypatch):
        monkeypatch.setattr(faulty, "create", lambda name, data: Outcome.FULL)
        with pytest.raises(StoreError, match=r"Free some space|Raise the quota"):
            claim_cluster(faulty, name=None)

    def test_it_gives_up_on_a_store_that_is_never_ready(self, faulty, monkeypatch):
        monkeypatch.setattr(faulty, "create", lambda name, data: Outcome.RETRY)
        with pytest.raises(StoreError, match=r"holds the lock|was busy"):
            claim_cluster(faulty, name=None)

    def test_threads_that_race_agree(self, faulty):
        found = []
        racing = [threading.Thread(target=lambda: found.append(claim_cluster(faulty, name="c"))) for _ in range(8)]
        for thread in racing:
            thread.start()
        for thread in racing:
            thread.join()
        assert len(set(found)) == 1
        assert len(found) == 8


class TestRule:
    def test_the_first_reign(self, faulty):
        won = ruling(faulty, cluster="c")
        assert (won.epoch, won.next_lsn, won.chain, won.sealed) == (1, 1, 0, None)
        assert won.cluster_id == read_cluster(faulty).cluster_id
        assert won.valid()
        assert not won.lost()
        assert not won.fenced()
        assert won.trouble is None
        record = lease_of(faulty)
        assert (record.epoch, record.address, record.holder) == (1, "tcp://a:1", this_process())

    def test_the_next_goes_on_from_the_sealed_end(self, faulty):
        first = Ruler(faulty).append(4).settled().release()
        second = ruling(faulty)
        assert (second.epoch, second.next_lsn, second.chain) == (2, 6, first.writer._durable_chain)
        assert first.leadership.fenced()

    @on_files
    def test_what_was_sealed_is_made_durable_again(self, faulty, monkeypatch):
        Ruler(faulty).append(4).settled().release()
        settled = []
        monkeypatch.setattr(local_file, "settle", lambda path, length: settled.append((path.name, length)))
        won = ruling(faulty)
        assert settled == [(f"{0:020d}", won.sealed[2])]

    def test_it_waits_and_tells_once(self, faulty):
        ruling(faulty, holder=another())
        told, stop = [], threading.Event()
        failed = []

        def stand_by():
            try:
                ruling(faulty, stop=stop, on_wait=told.append)
            except TakeoverStopped as error:
                failed.append(error)

        thread = threading.Thread(target=stand_by)
        thread.start()
        until(lambda: told)
        assert told[0].startswith(f"waiting for epoch 1, held by process {os.getpid()} on elsewhere for tcp://a:1")
        stop.set()
        thread.join()
        assert failed
        assert len(told) == 1

    def test_it_waits_by_its_own_clock(self, faulty):
        ruling(faulty, holder=another(), clock=FakeClock())
        clock, won, told = FakeClock(), [], []
        thread = threading.Thread(
            target=lambda: won.append(ruling(faulty, clock=clock, ttl_seconds=0.5, on_wait=told.append))
        )
        thread.start()
        until(lambda: told)
        # TTL x (1 + drift) + margin is 31.6 seconds.
        clock.seconds += 31.5
        thread.join(0.2)
        assert won == []
        clock.seconds += 0.2
        thread.join()
        assert won[0].epoch == 2

    def test_a_store_that_fails_while_it_waits_is_waited_out(self, faulty, monkeypatch):
        real, told, count = faulty.real.get, [], iter(range(100))

        def fails(self, name):
            if name == names.LEASE and next(count) < 2:
                raise StoreError(self.url, "is away")
            return real(self, name)

        monkeypatch.setattr(faulty.real, "get", fails)
        assert ruling(faulty, ttl_seconds=0.5, on_wait=told.append).epoch == 1
        assert told == [f"waiting for the store: {faulty.url}: is away"]

    def test_an_unreadable_lease_is_told(self, faulty):
        faulty.create(names.LEASE, b"{}")
        with pytest.raises(StoreError, match="End all schedulers of the cluster and delete it"):
            ruling(faulty)

    def test_a_lease_that_cannot_be_written_is_waited_out(self, faulty):
        ruling(faulty).release()
        faulty.faults["swap"].extend([lambda *_: Outcome.FULL, lambda *_: Outcome.RETRY])
        told = []
        assert ruling(faulty, ttl_seconds=0.5, on_wait=told.append).epoch == 2
        assert "(full)" in told[0]

    def test_a_lease_whose_reply_was_lost_is_ours(self, faulty):
        def done_but_not_told(store, *args):
            assert store.real.compare_and_swap(store, *args) is Outcome.OK
            return Outcome.AMBIGUOUS

        ruling(faulty).release()
        faulty.faults["swap"].append(done_but_not_told)
        won = ruling(faulty, ttl_seconds=0.5)
        assert won.epoch == 2
        # The write that names it, and the one that it recognised.
        assert lease_of(faulty).generation == 3

    def test_a_race_for_the_lease_that_is_lost(self, faulty):
        def beaten(store, name, data, token):
            record = LeaseRecord.decode(store.get(name).data)
            theirs = LeaseRecord(
                cluster=record.cluster, epoch=9, generation=9, holder=dead(), address="", ttl_seconds=30.0
            )
            store.real.compare_and_swap(store, name, theirs.encode(), token)
            return store.real.compare_and_swap(store, name, data, token)

        ruling(faulty).release()
        faulty.faults["swap"].append(beaten)
        assert ruling(faulty).epoch == 2

    def test_rivals_without_end_are_met_tick_by_tick(self, faulty):
        ruling(faulty).release()
        faulty.faults["swap"].extend([lambda *_: Outcome.CONFLICT] * 20)
        assert ruling(faulty, ttl_seconds=0.5).epoch == 2


class TestFence:
    def creating(self, faulty, monkeypatch, *answers):
        """Answer creations of manifests by these, then truly."""
        real, queue = faulty.real.create, list(answers)

        def create(store, name, data):
            if name.startswith(names.MANIFESTS) and queue:
                return queue.pop(0)(lambda: real(store, name, data))
            return real(store, name, data)

        monkeypatch.setattr(faulty.real, "create", create)

    @on_files
    def test_a_reply_that_was_lost_is_recognised_and_made_to_stay(self, faulty, monkeypatch):
        settled = []
        monkeypatch.setattr(local_file, "settle", lambda path, length: settled.append(path.name))
        self.creating(faulty, monkeypatch, lambda real: real() and Outcome.AMBIGUOUS)
        assert ruling(faulty).epoch == 1
        assert settled == [f"{1:020d}"]

    def test_an_own_creation_that_says_exists_is_recognised(self, faulty, monkeypatch):
        self.creating(faulty, monkeypatch, lambda real: real() and Outcome.EXISTS)
        assert ruling(faulty).epoch == 1

    def test_anothers_manifest_is_stepped_over(self, faulty, monkeypatch):
        def beaten(real):
            faulty.real.open_append(faulty, names.manifest(1), b"another")
            return real()

        self.creating(faulty, monkeypatch, beaten)
        assert ruling(faulty).epoch == 2

    def test_a_full_disk_is_waited_out_while_the_lease_lasts(self, faulty, monkeypatch):
        def away(real):
            raise StoreError(faulty.url, "is away")

        self.creating(faulty, monkeypatch, lambda real: Outcome.FULL, away)
        told = []
        assert ruling(faulty, ttl_seconds=0.5, on_wait=told.append).epoch == 1
        assert [line.startswith("waiting to rule") for line in told] == [True, True]
        assert "Free some space" in told[0] or "Raise the quota" in told[0]

    def test_it_can_be_stopped_there(self, faulty, monkeypatch):
        stop = threading.Event()
        self.creating(faulty, monkeypatch, lambda real: stop.set() or Outcome.FULL)
        with pytest.raises(TakeoverStopped, match="raising the fence"):
            ruling(faulty, stop=stop)

    def test_a_lease_that_ran_out_meanwhile_is_won_again(self, faulty, monkeypatch):
        clock, told = FakeClock(), []

        def slow(real):
            clock.seconds += 3600
            return real()

        self.creating(faulty, monkeypatch, slow)
        won = ruling(faulty, clock=clock, holder=dead(), on_wait=told.append)
        assert told[0] == "the lease was lost before the fence was raised; waiting again"
        assert won.epoch == 2
        assert won.valid()

    def test_a_newer_manifest_right_behind_ours_is_noticed(self, faulty, monkeypatch):
        def overtaken(real):
            done = real()
            faulty.real.open_append(faulty, names.manifest(2), b"another")
            return done

        self.creating(faulty, monkeypatch, overtaken)
        assert ruling(faulty, holder=dead()).epoch == 3


class TestLeadership:
    def test_it_is_published_and_read(self, faulty):
        assert leader(faulty) is None
        won = ruling(faulty)
        won.publish("tcp://a:2")
        expected = LeaderRecord(epoch=1, address="tcp://a:2", cluster_id=won.cluster_id)
        assert leader(faulty) == expected
        assert lease_of(faulty).address == "tcp://a:2"
        won.publish("tcp://a:3")
        assert leader(faulty).address == "tcp://a:3"

    def test_a_fenced_one_publishes_nothing(self, faulty):
        old = ruling(faulty, holder=dead())
        ruling(faulty).publish("tcp://b:1")
        with pytest.raises(Fenced):
            old.publish("tcp://a:1")
        assert leader(faulty).epoch == 2

    def test_also_when_it_was_fenced_in_between(self, faulty, monkeypatch):
        old = ruling(faulty, holder=dead())
        ruling(faulty).publish("tcp://b:1")
        monkeypatch.setattr(old, "fenced", lambda: False)
        with pytest.raises(Fenced) as caught:
            old.publish("tcp://a:1")
        assert caught.value.newer == 2

    def test_a_race_of_publications_is_run_again(self, faulty):
        won = ruling(faulty)
        won.publish("tcp://a:1")
        faulty.faults["swap"].append(lambda *_: Outcome.CONFLICT)
        won.publish("tcp://a:2")
        assert leader(faulty).address == "tcp://a:2"

    @pytest.mark.parametrize(
        ("outcome", "says"), [(Outcome.FULL, "Free some|quota of"), (Outcome.RETRY, "holds the lock|was busy")]
    )
    def test_one_that_cannot_be_written_is_told(self, faulty, outcome, says):
        won = ruling(faulty)
        won.publish("tcp://a:1")
        faulty.faults["swap"].extend([lambda *_: outcome] * 100)
        with pytest.raises(StoreError, match=says):
            won.publish("tcp://a:2")

    @pytest.mark.parametrize(
        ("data", "says"), [(b"{}", "damaged"), (b"[1]", "damaged"), (b'{"version": 3}', "format 3")]
    )
    def test_an_unreadable_record_is_told(self, faulty, data, says):
        faulty.create(names.LEADER, data)
        with pytest.raises(StoreError, match=says):
            leader(faulty)

    def test_it_renews_at_a_third_of_the_ttl(self, faulty):
        clock = FakeClock()
        won = ruling(faulty, clock=clock)
        generation = lease_of(faulty).generation
        won.renew()
        assert lease_of(faulty).generation == generation
        for _ in range(10):
            clock.seconds += 11
            won.renew()
            assert won.valid()
        assert lease_of(faulty).generation == generation + 10

    def test_it_is_invalid_before_the_standby_may_start(self, faulty):
        clock = FakeClock()
        won = ruling(faulty, clock=clock)
        clock.seconds += 28.9
        assert won.valid()
        clock.seconds += 0.2
        assert not won.valid()
        won.renew()
        assert won.valid()

    def test_it_notices_the_fence(self, faulty):
        old = ruling(faulty, holder=dead())
        ruling(faulty)
        assert old.valid()
        old.renew()
        assert old.lost()
        assert not old.valid()
        assert (old.why_lost().epoch, old.why_lost().newer) == (1, 2)
        old.renew()
        old.release()
        assert lease_of(faulty).holder == this_process()

    def test_it_notices_the_lease_of_another(self, faulty):
        clock = FakeClock()
        old = ruling(faulty, holder=dead(), clock=clock)
        ruling(faulty)
        faulty.delete(names.manifest(2))
        clock.seconds += 3600
        assert not old.valid()
        old.renew()
        assert old.lost()
        assert old.why_lost().newer == 2

    def test_trouble_extends_nothing_and_ends_nothing(self, faulty):
        clock = FakeClock()
        won = ruling(faulty, clock=clock)
        faulty.faults["exists"].append(errno.EIO)
        clock.seconds += 15
        won.renew()
        faulty.faults["swap"].append(lambda *_: Outcome.AMBIGUOUS)
        won.renew()
        assert won.trouble is not None
        assert won.valid()
        clock.seconds += 5
        won.renew()
        assert won.trouble is None
        assert won._driver.state is LeaseState.HOLDING
        clock.seconds += 28
        assert won.valid()

    def test_a_store_that_fails_right_after_a_write(self, faulty, monkeypatch):
        clock = FakeClock()
        won = ruling(faulty, clock=clock)
        real, broken = faulty.real.get, [True]

        def fails(self, name):
            if broken:
                raise StoreError(self.url, "is away")
            return real(self, name)

        clock.seconds += 15
        monkeypatch.setattr(faulty.real, "get", fails)
        monkeypatch.setattr(faulty.real, "compare_and_swap", lambda *_: Outcome.OK)
        won.renew()
        assert won.valid()
        monkeypatch.undo()
        broken.clear()
        clock.seconds += 15
        won.renew()
        assert won.valid()
        assert not won.lost()

    def test_a_swap_that_raises_is_uncertain(self, faulty):
        def away(store, *args):
            raise StoreError(store.url, "is away")

        clock = FakeClock()
        won = ruling(faulty, clock=clock)
        faulty.faults["swap"].append(away)
        clock.seconds += 15
        won.renew()
        assert "is away" in str(won.trouble)
        won.renew()
        assert won.trouble is None

    def test_a_release_frees_it_at_once(self, faulty):
        won = ruling(faulty)
        won.release()
        won.release()
        assert not won.valid()
        assert not won.lost()
        assert lease_of(faulty).holder is None
        assert ruling(faulty, holder=another()).epoch == 2


class TestIdentity:
    def test_this_process_lives(self):
        me = this_process()
        assert look_up(me.pid).started_ticks == me.started_ticks > 0
        assert me.boot_id
        assert me.pid_namespace.startswith("pid:[")

    def test_a_process_that_never_was_has_no_start(self):
        assert started_ticks(2**22 + 1) is None

    def test_a_zombie_runs_no_more(self):
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        until(lambda: started_ticks(pid) is None)
        os.waitpid(pid, 0)

    @pytest.mark.parametrize(
        ("state", "threads", "lives"), [("S", 1, True), ("Z", 1, False), ("X", 0, False), ("Z", 3, True)]
    )
    def test_names_of_programs_may_hold_anything(self, tmp_path, monkeypatch, state, threads, lives):
        (tmp_path / "7").mkdir()
        fields = [state, *["0"] * 16, str(threads), "0", "4711", "0"]
        (tmp_path / "7" / "stat").write_text(f"7 (evil) Z 1 ) {' '.join(fields)}\n")
        monkeypatch.setattr("dask_resilience.storage.identity._PROC", tmp_path)
        assert started_ticks(7) == (4711 if lives else None)

    def test_without_proc_nothing_is_provable(self, tmp_path, monkeypatch):
        monkeypatch.setattr("dask_resilience.storage.identity._PROC", tmp_path)
        me = this_process()
        assert (me.boot_id, me.pid_namespace, me.started_ticks) == ("", "", 0)


def test_a_reader_of_the_old_epoch_is_not_needed_to_rule(faulty):
    Ruler(faulty).append(3).settled().release()
    won = ruling(faulty)
    assert len(read(faulty)) == 4
    assert won.sealed[3] == 4
    assert takeover.Leadership is type(won)
