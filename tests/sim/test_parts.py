"""The parts of the simulator do what they stand for."""

from __future__ import annotations

import pytest

from dask_resilience.errors import StoreError
from dask_resilience.sim.loop import Loop, Process
from dask_resilience.sim.network import Network, NetworkTerms
from dask_resilience.sim.store import Disk, StoreTerms, StoreView
from dask_resilience.sim.strand import Strand, StrandKilled, pause
from dask_resilience.sim.virtual import VirtualEvent, VirtualRLock, VirtualThreading, VirtualTime
from dask_resilience.storage.object_store import Outcome


@pytest.fixture
def loop():
    return Loop(0)


@pytest.fixture
def process(loop):
    return Process(loop, name="p", host="h")


def view(process, *, trouble=0.0, reaches=lambda process, host: True):
    disk = Disk(process.loop)
    return disk, StoreView(disk, process=process, terms=StoreTerms(trouble=trouble), reaches=reaches)


def test_events_of_one_moment_keep_their_order(loop):
    seen = []
    for number in range(5):
        loop.later(1.0, seen.append, number)
    loop.run(until_seconds=1.0)
    assert seen == [0, 1, 2, 3, 4]


def test_a_dead_process_does_nothing(loop, process):
    process.later(1.0, pytest.fail, "it is dead")
    process.kill()
    loop.run(until_seconds=2.0)


def test_a_stopped_process_goes_on_in_order(loop, process):
    seen = []
    process.stop(5.0)
    for number in range(3):
        process.later(1.0, seen.append, number)
    loop.run(until_seconds=4.0)
    assert seen == []
    loop.run(until_seconds=5.0)
    assert seen == [0, 1, 2]


def test_a_run_that_does_not_end_is_told(loop, monkeypatch):
    monkeypatch.setattr("dask_resilience.sim.loop.EVENT_LIMIT", 100)
    loop.note("here")

    def again():
        loop.later(0.0, again)

    again()
    with pytest.raises(RuntimeError, match="more than 100 events"):
        loop.run(until_seconds=1.0)


def test_strands_take_turns_in_virtual_time(loop, process):
    seen = []

    def count(name, seconds):
        for _ in range(3):
            pause(seconds)
            seen.append((name, loop.now_seconds))

    Strand(process, lambda: count("slow", 2.0)).start()
    Strand(process, lambda: count("fast", 0.9)).start()
    loop.run(until_seconds=10.0)
    assert [name for name, _ in seen] == ["fast", "fast", "slow", "fast", "slow", "slow"]
    assert seen[-1] == ("slow", 6.0)


def test_a_kill_unwinds_a_strand_where_it_waits(loop, process):
    seen = []

    def work():
        try:
            pause(5.0)
        except Exception:  # noqa: BLE001 -- as broad as the code under simulation has them
            pytest.fail("no handler survives a kill")
        finally:
            seen.append("unwound")
            with pytest.raises(StrandKilled):
                pause(1.0)

    strand = Strand(process, work)
    strand.start()
    loop.later(1.0, process.kill)
    loop.run(until_seconds=10.0)
    assert seen == ["unwound"]
    assert strand.done


def test_what_a_strand_raises_reaches_the_loop(loop, process):
    def work():
        pause(1.0)
        raise KeyError("x")

    Strand(process, work).start()
    with pytest.raises(KeyError):
        loop.run(until_seconds=2.0)


def test_an_event_wakes_its_waiters_before_their_time_out(loop, process):
    event, seen = VirtualEvent(), []

    def work(timeout):
        seen.append((event.wait(timeout), loop.now_seconds))

    for timeout in (1.0, 5.0, None):
        Strand(process, lambda timeout=timeout: work(timeout)).start()
    loop.later(2.0, event.set)
    loop.run(until_seconds=9.0)
    assert seen == [(False, 1.0), (True, 2.0), (True, 2.0)]


def test_a_lock_is_held_by_one_strand_and_taken_again_by_the_same(loop, process):
    lock, seen = VirtualRLock(), []

    def work(name):
        with lock, lock:
            seen.append(name)
            pause(1.0)
            seen.append(name)

    for name in "ab":
        Strand(process, lambda name=name: work(name)).start()
    loop.run(until_seconds=9.0)
    assert seen == ["a", "a", "b", "b"]


def test_a_thread_can_be_joined(loop, process):
    threading, seen = VirtualThreading(lambda: process), []
    sleeper = threading.Thread(target=lambda: VirtualTime.sleep(3.0))

    def work():
        sleeper.start()
        assert sleeper.is_alive()
        assert threading.current_thread() is not sleeper
        sleeper.join(10.0)
        seen.append((sleeper.is_alive(), VirtualTime(loop).monotonic()))

    Strand(process, work).start()
    loop.run(until_seconds=9.0)
    assert seen == [(False, 3.0)]


def test_a_crash_tears_only_what_was_not_synced(loop, process):
    disk, store = view(process)
    segment = store.open_append("log/1", b"header")
    segment.write([b"synced"])
    segment.sync()
    segment.write([b"not synced"])
    disk.crash("another host")
    assert store.read_from("log/1", 0) == b"headersyncednot synced"
    disk.crash("h")
    left = store.read_from("log/1", 0)
    assert left.startswith(b"headersynced")
    assert len(left) < len(b"headersyncednot synced") or left.endswith(b"\0")


def test_what_is_settled_survives_a_crash(loop, process):
    disk, store = view(process)
    store.open_append("log/1", b"header").write([b"not synced"])
    store.settle("log/1", 16)
    disk.crash("h")
    assert store.read_from("log/1", 0) == b"headernot synced"
    with pytest.raises(StoreError, match="shorter"):
        store.settle("log/1", 17)
    with pytest.raises(StoreError, match="missing"):
        store.settle("log/2", 1)


def test_conditions_hold(process):
    _, store = view(process)
    assert store.create("a", b"1") is Outcome.OK
    assert store.create("a", b"2") is Outcome.EXISTS
    token = store.get("a").token
    assert store.compare_and_swap("a", b"3", token) is Outcome.OK
    assert store.compare_and_swap("a", b"4", token) is Outcome.CONFLICT
    assert store.compare_and_swap("b", b"4", token) is Outcome.CONFLICT
    assert store.list("") == ["a"]
    store.delete("a")
    assert store.get("a") is None
    assert not store.exists("a")


def test_trouble_comes_in_all_its_kinds(process):
    _, store = view(process, trouble=1.0)
    outcomes = {store.create(f"a{number}", b"") for number in range(50)}
    assert outcomes == {Outcome.AMBIGUOUS, Outcome.RETRY}
    with pytest.raises(StoreError):
        store.get("a")


def test_a_store_out_of_reach_takes_its_time_to_say_so(loop, process):
    _, store = view(process, reaches=lambda process, host: False)
    seen = []

    def work():
        with pytest.raises(StoreError, match="cannot be reached"):
            store.get("a")
        seen.append(loop.now_seconds)

    Strand(process, work).start()
    loop.run(until_seconds=9.0)
    assert 1.0 <= seen[0] < 1.1


class Peer:
    def __init__(self, loop, name):
        self.process = Process(loop, name=name, host=name)
        self.seen = []

    def accept(self, link):
        self.seen.append("link")
        return True

    def receive(self, link, message):
        self.seen.append(message["n"])

    def link_broken(self, link):
        self.seen.append("broken")


def peers(loop, **terms):
    network = Network(loop, NetworkTerms(**terms))
    one, other = Peer(loop, "one"), Peer(loop, "other")
    network.listen(one)
    network.listen(other)
    return network, one, other


def test_messages_keep_their_order_though_some_are_repeated(loop):
    network, one, other = peers(loop, repetition=0.5)
    link = network.connect(one, "other")
    for number in range(20):
        link.send(one, {"n": number}, repeatable=True)
    loop.run(until_seconds=1.0)
    assert other.seen[0] == "link"
    assert other.seen[1:] == sorted(other.seen[1:])
    assert len(other.seen) > 21
    assert link.peer(one) is other


def test_a_lost_message_ends_its_link_for_both(loop):
    network, one, other = peers(loop)
    link = network.connect(one, "other")
    loop.run(until_seconds=1.0)
    network.terms = NetworkTerms(loss=1.0)
    link.send(one, {"n": 1})
    link.send(one, {"n": 2})
    loop.run(until_seconds=2.0)
    assert one.seen == ["broken"]
    assert other.seen == ["link", "broken"]
    assert not link.usable_by(one)


def test_a_dead_process_refuses_and_a_separated_one_is_silent(loop):
    network, one, other = peers(loop)
    other.process.kill()
    assert network.refuses(one.process, "other")
    network.connect(one, "other")
    loop.run(until_seconds=0.1)
    assert one.seen == ["broken"]
    network.cut("one", "other")
    assert not network.refuses(one.process, "other")
    network.connect(one, "other")
    loop.run(until_seconds=2.9)
    assert one.seen == ["broken"]
    loop.run(until_seconds=4.0)
    assert one.seen == ["broken", "broken"]
    network.join("one", "other")
    assert network.reaches(one.process, other.process)
    assert network.connect(one, "nobody") is None
