"""What every store must do. A store's tests inherit `StoreConformance` and give it a `conditional_store`.

Stores that other processes can open also give an `address` for `open_store`, and get the races between processes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from dask_resilience.errors import StoreError
from dask_resilience.storage import names
from dask_resilience.storage.object_store import Outcome
from dask_resilience.storage.open_store import probe

RACERS = 20

#: Waits for the gate, then tries once and tells what came of it.
_RACER = """
import json, sys
from dask_resilience.storage import open_store
store = open_store(sys.argv[1], existing=True, storage_options=json.loads(sys.argv[4]))
store.exists("raced")  # what is set up at the first request is no part of the race
print("ready", flush=True)
sys.stdin.readline()
if sys.argv[2] == "create":
    print(store.create("raced", sys.argv[3].encode()).value, flush=True)
else:
    won = 0
    while won < 5:
        stored = store.get("counter")
        grown = str(int(stored.data) + 1).encode()
        won += store.compare_and_swap("counter", grown, stored.token).value == "ok"
    print(won, flush=True)
"""


def race(address: str, what: str, racers: int, storage_options: dict[str, object]) -> list[str]:
    """Start processes, let them go at once, and return what each said."""
    options = json.dumps(storage_options)
    commands = ([sys.executable, "-c", _RACER, address, what, str(number), options] for number in range(racers))
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for command in commands
    ]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.communicate(timeout=60)[0].strip() for process in running]


class StoreConformance:
    """Inherit it, and define the fixtures `conditional_store` and, for races between processes, `address`."""

    @pytest.fixture
    def address(self):
        pytest.skip("this store cannot be opened by other processes")

    @pytest.fixture
    def storage_options(self):
        return {}

    def test_it_is_empty(self, conditional_store):
        assert conditional_store.list("") == []
        assert conditional_store.get("a") is None
        assert not conditional_store.exists("a")
        assert conditional_store.read_from("a/b", 0) is None

    def test_create_makes_once(self, conditional_store):
        assert conditional_store.create("folder/a", b"one") is Outcome.OK
        assert conditional_store.create("folder/a", b"two") is Outcome.EXISTS
        assert conditional_store.get("folder/a").data == b"one"
        assert conditional_store.exists("folder/a")

    @pytest.mark.parametrize(
        "data",
        [b"", b"\0" * 100_000, bytes(range(256)) * 5000, b"a\n--==0==--b\r\n--==0==--\r\nc"],
        ids=["none", "zeros", "megabyte", "boundary"],
    )
    def test_any_bytes_come_back(self, conditional_store, data):
        conditional_store.create("a", data)
        assert conditional_store.get("a").data == data

    def test_swap_replaces_what_was_read(self, conditional_store):
        conditional_store.create("a", b"one")
        first = conditional_store.get("a")
        assert conditional_store.compare_and_swap("a", b"two", first.token) is Outcome.OK
        assert conditional_store.get("a").data == b"two"
        assert conditional_store.compare_and_swap("a", b"three", first.token) is Outcome.CONFLICT
        assert conditional_store.get("a").data == b"two"

    def test_swap_of_nothing_is_a_conflict(self, conditional_store):
        assert conditional_store.compare_and_swap("a", b"two", "token") is Outcome.CONFLICT
        assert conditional_store.get("a") is None

    def test_delete_is_final_and_may_be_repeated(self, conditional_store):
        conditional_store.create("a/b", b"one")
        token = conditional_store.get("a/b").token
        conditional_store.delete("a/b")
        conditional_store.delete("a/b")
        conditional_store.delete("a/c/d")
        assert conditional_store.get("a/b") is None
        assert conditional_store.compare_and_swap("a/b", b"two", token) is Outcome.CONFLICT

    def test_list_tells_names_in_order(self, conditional_store):
        wanted = [names.segment(2, 10), names.segment(2, 9), names.segment(10, 0), names.manifest(1), "lease"]
        for name in wanted:
            conditional_store.create(name, b"")
        assert conditional_store.list("") == sorted(wanted)
        assert conditional_store.list(names.LOG) == [names.segment(2, 9), names.segment(2, 10), names.segment(10, 0)]
        assert conditional_store.list(names.segments(2)) == [names.segment(2, 9), names.segment(2, 10)]
        assert conditional_store.list("le") == ["lease"]
        assert conditional_store.list("none/") == []

    @pytest.mark.parametrize("name", ["", "/a", "a//b", "a/", "../a", "a/../b", ".lock", "a/.b", ".parts/a"])
    def test_names_that_lead_elsewhere_are_refused(self, conditional_store, name):
        with pytest.raises(ValueError, match="no name of an object"):
            conditional_store.create(name, b"")

    def test_an_appended_object_is_there_with_its_header(self, conditional_store):
        handle = conditional_store.open_append("log/a", b"header")
        assert conditional_store.get("log/a").data == b"header"
        assert handle.size_bytes == 6
        handle.write([b"one", memoryview(b"two")])
        handle.sync()
        handle.write([])
        assert conditional_store.read_from("log/a", 6) == b"onetwo"
        assert conditional_store.read_from("log/a", 3, length=4) == b"dero"
        assert conditional_store.read_from("log/a", 100) == b""
        assert handle.size_bytes == 12
        handle.close()
        handle.close()
        assert conditional_store.open_append("log/a", b"other") is Outcome.EXISTS

    def test_many_buffers_are_written_in_order(self, conditional_store):
        handle = conditional_store.open_append("a", b"")
        buffers = [b"%d," % number for number in range(5000)]
        handle.write(buffers)
        handle.sync()
        handle.close()
        assert conditional_store.get("a").data == b"".join(buffers)

    def test_what_grew_is_read_in_any_cut_and_listed_once(self, conditional_store):
        handle = conditional_store.open_append("log/a", b"head")
        whole = b"head"
        for number in range(150):
            handle.write([b"<%d>" % number])
            handle.sync()
            handle.sync()
            whole += b"<%d>" % number
        for start, length in [(0, -1), (3, 5), (4, -1), (len(whole) - 3, -1), (100, 200), (len(whole), -1), (0, 0)]:
            wanted = whole[start:] if length < 0 else whole[start : start + length]
            assert conditional_store.read_from("log/a", start, length=length) == wanted
        assert conditional_store.list("") == conditional_store.list("log/") == ["log/a"]
        conditional_store.settle("log/a", len(whole))
        with pytest.raises(StoreError, match=f"has {len(whole)} bytes, {len(whole) + 1} were read"):
            conditional_store.settle("log/a", len(whole) + 1)

    def test_a_reader_follows_what_grows(self, conditional_store):
        handle = conditional_store.open_append("log/a", b"head")
        whole = b"head"
        for number in range(5):
            assert conditional_store.read_from("log/a", len(whole)) == b""
            handle.write([bytes([number])] * 3)
            handle.sync()
            assert conditional_store.read_from("log/a", len(whole)) == bytes([number]) * 3
            whole += bytes([number]) * 3
        assert conditional_store.get("log/a").data == whole

    def test_what_grew_and_was_deleted_leaves_nothing_to_the_next(self, conditional_store):
        for header in (b"first", b"next"):
            handle = conditional_store.open_append("a", header)
            assert conditional_store.get("a").data == header
            handle.write([b"grown"])
            handle.sync()
            assert conditional_store.get("a").data == header + b"grown"
            conditional_store.delete("a")
            assert conditional_store.get("a") is None
            assert conditional_store.list("") == []

    def test_settling_changes_nothing(self, conditional_store):
        data = bytes(range(256)) * 10_000
        conditional_store.create("a", data)
        conditional_store.settle("a", len(data) - 7)
        assert conditional_store.get("a").data == data

    def test_the_probe_accepts_it_and_leaves_nothing(self, conditional_store):
        probe(conditional_store)
        assert conditional_store.list("") == []

    def test_threads_race_for_a_name(self, conditional_store):
        with ThreadPoolExecutor(RACERS) as pool:
            for number in range(10):
                outcomes = list(
                    pool.map(lambda data, n=number: conditional_store.create(f"a{n}", data), [b"x"] * RACERS)
                )
                assert sorted(outcomes, key=str) == [Outcome.EXISTS] * (RACERS - 1) + [Outcome.OK]

    def test_threads_race_to_swap(self, conditional_store):
        conditional_store.create("a", b"start")
        token = conditional_store.get("a").token
        with ThreadPoolExecutor(8) as pool:
            data = [b"%d" % number for number in range(8)]
            outcomes = list(pool.map(lambda each: conditional_store.compare_and_swap("a", each, token), data))
        assert outcomes.count(Outcome.OK) == 1
        assert conditional_store.get("a").data == data[outcomes.index(Outcome.OK)]

    def test_processes_race_for_a_name(self, conditional_store, address, storage_options):
        said = race(address, "create", RACERS, storage_options)
        assert sorted(said) == ["exists"] * (RACERS - 1) + ["ok"]
        assert conditional_store.get("raced").data == str(said.index("ok")).encode()

    def test_processes_race_to_swap_and_no_swap_is_lost(self, conditional_store, address, storage_options):
        conditional_store.create("counter", b"0")
        assert race(address, "swap", 6, storage_options) == ["5"] * 6
        assert conditional_store.get("counter").data == b"30"
