"""Objects that grow by parts: holes, listings that lag, large writes, and backends that forget or answer strangely."""

from __future__ import annotations

import asyncio
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import pytest
from support import until

from dask_resilience.errors import JournalCorrupt, StoreError
from dask_resilience.storage import grown_object, names
from dask_resilience.storage.grown_object import GROWN
from dask_resilience.storage.memory_backend import MemoryBackend
from dask_resilience.storage.object_backend import Fault, Page, RequestFailed
from dask_resilience.storage.object_store import Outcome
from dask_resilience.storage.remote_store import RemoteStore
from dask_resilience.storage.retrying import RetryTerms

TERMS = RetryTerms(first_pause_seconds=0.001, longest_pause_seconds=0.002, total_seconds=0.2)


class Backend(MemoryBackend):
    """Counts requests, and does what a test sets."""

    def __init__(self, name):
        super().__init__(name)
        self.hidden_from_lists = lambda key: False
        self.forgets_write_ids = False
        self.before_put = lambda: None
        self.after_put = lambda: None
        self.requests = []

    async def put(self, key, data, *, token, write_id):
        self.requests.append(("put", key))
        self.before_put()
        await super().put(key, data, token=token, write_id="" if self.forgets_write_ids else write_id)
        self.after_put()

    async def get(self, key, *, end=None):
        self.requests.append(("get", key))
        return await super().get(key, end=end)

    async def list(self, prefix, *, after="", more=None):
        self.requests.append(("list", prefix))
        page = await super().list(prefix, after=after, more=more)
        return Page(entries=[entry for entry in page.entries if not self.hidden_from_lists(entry[0])], more=page.more)


@pytest.fixture
def backend():
    return Backend(str(uuid.uuid4()))


@pytest.fixture
def made(backend):
    opened = RemoteStore("memory://test", backend, prefix="p/", terms=TERMS)
    yield opened
    opened.close()


def grow(store, name="log/a", parts=5):
    handle = store.open_append(name, b"head")
    for number in range(1, parts + 1):
        handle.write([b"<%d>" % number])
        handle.sync()
    return handle


def part_key(handle, number):
    return f"p/{names.part(handle._name, handle._head.identity, number)}"


def objects(backend):
    return backend._shelf.objects


WHOLE = b"head<1><2><3><4><5>"


class TestParts:
    def test_where_they_are(self, made, backend):
        handle = grow(made, parts=2)
        identity = handle._head.identity
        assert sorted(objects(backend)) == [
            f"p/.parts/log/a/.{identity}/000001",
            f"p/.parts/log/a/.{identity}/000002",
            "p/log/a",
        ]

    @pytest.mark.parametrize("fresh", [True, False])
    @pytest.mark.parametrize("number", [1, 3, 4])
    def test_one_that_is_missing_before_another_is_a_loss(self, made, backend, number, fresh):
        handle = grow(made)
        if not fresh:
            assert made.get("log/a").data == WHOLE
        del objects(backend)[part_key(handle, number)]
        for read in (lambda: made.get("log/a"), lambda: made.read_from("log/a", 0)):
            with pytest.raises(JournalCorrupt, match=f"part {number} is missing") as caught:
                read()
            assert caught.value.segment == "log/a"
            assert caught.value.offset == len(WHOLE[: WHOLE.index(b"<%d>" % number)])
        if fresh:
            with pytest.raises(JournalCorrupt, match="is missing"):
                made.settle("log/a", len(WHOLE))

    def test_what_is_not_needed_is_not_read(self, made, backend):
        handle = grow(made)
        assert made.read_from("log/a", 0) == WHOLE
        backend.requests.clear()
        assert made.read_from("log/a", 4 + 3, length=3) == b"<2>"
        assert backend.requests == [("get", "p/log/a"), ("get", part_key(handle, 2))]
        backend.requests.clear()
        assert made.read_from("log/a", 0, length=4) == b"head"
        assert backend.requests == [("get", "p/log/a")]

    @pytest.mark.parametrize("hidden", [(5,), (4, 5), (3,), (1, 2, 3, 4, 5), (1, 3, 5)])
    def test_a_listing_that_lags_hides_nothing(self, made, backend, hidden):
        handle = grow(made)
        keys = {part_key(handle, number) for number in hidden}
        backend.hidden_from_lists = keys.__contains__
        assert made.read_from("log/a", 0) == WHOLE
        made.settle("log/a", len(WHOLE))

    def test_foreign_names_among_them_are_left_alone(self, made, backend):
        handle = grow(made)
        objects(backend)[part_key(handle, 1)[:-6] + "readme"] = objects(backend)["p/log/a"]
        objects(backend)[part_key(handle, 1) + "0"] = objects(backend)["p/log/a"]
        assert made.get("log/a").data == WHOLE

    def test_one_that_changed_its_size_is_damage(self, made, backend):
        handle = grow(made)
        made.get("log/a")
        objects(backend)[part_key(handle, 2)] = objects(backend)["p/log/a"]
        with pytest.raises(JournalCorrupt, match=r"part 2 has .* bytes, and 3 were listed"):
            made.read_from("log/a", 0)

    def test_deleting_leaves_the_parts_of_other_names(self, made, backend):
        grow(made, "a")
        grow(made, "a/b")
        made.delete("a")
        assert made.get("a/b").data == WHOLE
        made.delete("a/b")
        assert objects(backend) == {}

    def test_parts_whose_object_is_gone_do_not_belong_to_the_next(self, made, backend):
        grow(made)
        # As a deletion that was interrupted leaves it.
        del objects(backend)["p/log/a"]
        assert made.get("log/a") is None
        assert made.read_from("log/a", 0) is None
        grow(made, parts=1)
        assert made.get("log/a").data == b"head<1>"

    def test_a_large_write_becomes_several(self, made, backend, monkeypatch):
        monkeypatch.setattr(grown_object, "PART_BYTES", 10)
        handle = made.open_append("a", b"")
        handle.write([b"x" * 7, memoryview(b"y" * 7), b"z" * 11])
        handle.sync()
        assert [len(objects(backend)[part_key(handle, number)].data) for number in (1, 2, 3)] == [10, 10, 5]
        assert made.get("a").data == b"x" * 7 + b"y" * 7 + b"z" * 11

    def test_what_a_writer_changes_after_writing_does_not_count(self, made):
        handle = made.open_append("a", b"")
        buffer = bytearray(b"abc")
        handle.write([memoryview(buffer)])
        buffer[:] = b"xyz"
        handle.sync()
        assert made.get("a").data == b"abc"

    def test_what_was_not_synced_is_let_go(self, made, backend):
        handle = made.open_append("a", b"head")
        handle.write([b"lost"])
        handle.close()
        with pytest.raises(OSError, match="closed"):
            handle.sync()
        assert made.get("a").data == b"head"

    def test_nothing_is_sent_for_nothing(self, made, backend):
        handle = grow(made)
        backend.requests.clear()
        handle.sync()
        handle.write([b"", memoryview(b"")])
        handle.sync()
        assert backend.requests == []

    def test_numbers_end(self, made):
        handle = made.open_append("a", b"head")
        handle._number = 999_999
        handle.write([b"x"])
        with pytest.raises(OSError, match="has 999999 parts already"):
            handle.sync()

    def test_a_listing_of_names_does_not_walk_through_the_parts(self, made, backend):
        grow(made, parts=400)
        made.create("z", b"")
        backend.requests.clear()
        assert made.list("") == ["log/a", "z"]
        assert len(backend.requests) == 2

    def test_a_long_read_does_not_hold_up_a_renewal(self, made, backend, monkeypatch):
        handle = grow(made, parts=200)
        beyond = part_key(handle, 201)
        real, under_way, most, gate = backend.get, set(), [0], threading.Event()

        async def slow(key, *, end=None):
            if ".parts" in key and key != beyond:
                under_way.add(key)
                most[0] = max(most[0], len(under_way))
                await asyncio.to_thread(gate.wait, 30)
                under_way.discard(key)
            return await real(key, end=end)

        monkeypatch.setattr(backend, "get", slow)
        made._requests._terms = RetryTerms(request_seconds=30.0)
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(made.get, "log/a")
            try:
                until(lambda: under_way)
                assert made.create("lease", b"") is Outcome.OK
                assert not reading.done()
            finally:
                gate.set()
            assert reading.result().data == b"head" + b"".join(b"<%d>" % number for number in range(1, 201))
        assert 1 < most[0] <= 24

    def test_a_form_of_a_newer_release_is_told(self, made, backend):
        grow(made)
        found = objects(backend)["p/log/a"]
        line = GROWN + b"2 whatever"
        data = b"%b %08x\nheader" % (line, google_crc32c.value(line))
        objects(backend)["p/log/a"] = type(found)(data=data, token=found.token, write_id="")
        with pytest.raises(StoreError, match="Install a newer dask-resilience"):
            made.get("log/a")

    def test_bytes_that_look_like_it_are_refused(self, made):
        with pytest.raises(ValueError, match="would be taken for"):
            made.create("a", GROWN + b"x")
        made.create("a", b"")
        with pytest.raises(ValueError, match="would be taken for"):
            made.compare_and_swap("a", GROWN, made.get("a").token)


class TestWriteIds:
    """A store that does not keep them is judged by the bytes, after a lost reply only."""

    def lose_reply(self, backend):
        def lose():
            backend.after_put = lambda: None
            raise RequestFailed(Fault.UNSURE, "lost")

        backend.after_put = lose

    @pytest.mark.parametrize("forgets", [True, False])
    def test_ours_after_a_lost_reply(self, made, backend, forgets):
        backend.forgets_write_ids = forgets
        self.lose_reply(backend)
        assert made.create("a", b"mine") is Outcome.OK
        token = made.get("a").token
        self.lose_reply(backend)
        assert made.compare_and_swap("a", b"more", token) is Outcome.OK
        assert len([request for request in backend.requests if request[0] == "put"]) == 4

    @pytest.mark.parametrize("forgets", [True, False])
    def test_the_same_bytes_without_a_lost_reply_are_not_ours(self, made, backend, forgets):
        backend.forgets_write_ids = forgets
        made.create("a", b"same")
        assert made.create("a", b"same") is Outcome.EXISTS
        assert made.compare_and_swap("a", b"same", "0") is Outcome.CONFLICT

    def test_a_library_that_sends_again_without_telling_is_seen_through(self, made, backend):
        def sent_before():
            backend.after_put = lambda: None
            # What the caller hears is the answer to the second.
            raise RequestFailed(Fault.REFUSED, "412")

        backend.after_put = sent_before
        assert made.create("a", b"mine") is Outcome.OK

    def test_a_name_that_was_taken_and_is_free_again(self, made, backend):
        def taken():
            raise RequestFailed(Fault.REFUSED, "412")

        backend.before_put = taken
        assert made.create("a", b"mine") is Outcome.RETRY

    def test_a_refusal_that_cannot_be_looked_into_is_ambiguous(self, made, backend, monkeypatch):
        made.create("a", b"theirs")

        async def away(*args, **kwargs):
            raise RequestFailed(Fault.BUSY, "away")

        monkeypatch.setattr(backend, "get", away)
        assert made.create("a", b"mine") is Outcome.AMBIGUOUS


class TestThread:
    def test_a_closed_store_says_so(self, backend):
        store = RemoteStore("memory://test", backend)
        store.close()
        store.close()
        with pytest.raises(StoreError, match="was closed"):
            store.get("a")

    def test_the_thread_ends_with_the_store(self, backend):
        store = RemoteStore("memory://ends", backend)
        assert "store-memory://ends" in {thread.name for thread in threading.enumerate()}
        store.close()
        assert "store-memory://ends" not in {thread.name for thread in threading.enumerate()}

    def test_requests_run_on_the_thread_of_the_store(self, made, backend):
        seen = []
        backend.before_put = lambda: seen.append(threading.current_thread().name)
        made.create("a", b"")
        assert seen == ["store-memory://test"]

    def test_it_cannot_wait_for_itself(self, made):
        async def inside():
            return made.exists("a")

        with pytest.raises(StoreError, match="waits for itself"):
            made._run(inside())

    def test_a_backend_that_cannot_be_opened_leaves_no_thread(self, backend, monkeypatch):
        async def fails():
            raise StoreError("memory://x", "no")

        monkeypatch.setattr(backend, "open", fails)
        with pytest.raises(StoreError):
            RemoteStore("memory://leaves", backend)
        assert "store-memory://leaves" not in {thread.name for thread in threading.enumerate()}
