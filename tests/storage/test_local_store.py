"""The local store: the conformance of all stores, privacy, and what the operating system may answer."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess

import pytest

from dask_resilience.errors import StoreError
from dask_resilience.storage import local_file, local_store, open_store
from dask_resilience.storage.local_store import LocalStore
from dask_resilience.storage.object_store import Outcome
from dask_resilience.storage.open_store import probe
from tests.storage.conformance import StoreConformance

ROOT = os.geteuid() == 0


@pytest.fixture
def conditional_store(store):
    opened = LocalStore(store)
    yield opened
    opened.close()
    opened.close()


class TestConformance(StoreConformance):
    @pytest.fixture
    def address(self, store):
        return str(store)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


class TestPrivacy:
    def test_what_it_makes_is_for_its_owner(self, tmp_path):
        old = os.umask(0)
        try:
            made = LocalStore(tmp_path / "a" / "b")
            made.create("log/x", b"")
        finally:
            os.umask(old)
        assert mode(tmp_path / "a" / "b") == 0o700
        assert mode(tmp_path / "a" / "b" / "log") == 0o700
        assert mode(tmp_path / "a" / "b" / "log" / "x") == 0o600
        assert mode(tmp_path / "a" / "b" / ".temporary") == 0o700

    @pytest.mark.parametrize("open_to", [0o720, 0o702, 0o777])
    def test_a_folder_that_others_may_write_is_refused(self, store, open_to):
        store.chmod(open_to)
        with pytest.raises(StoreError, match="chmod 700"):
            LocalStore(store)
        assert list(store.iterdir()) == []

    def test_a_folder_that_others_may_only_read_is_accepted(self, store):
        store.chmod(0o755)
        LocalStore(store)

    @pytest.mark.skipif(not ROOT, reason="only root can give a folder away")
    def test_another_users_folder_is_refused(self, store):
        os.chown(store, 12345, 12345)
        with pytest.raises(StoreError, match="belongs to user 12345"):
            LocalStore(store)
        assert list(store.iterdir()) == []

    def test_a_lock_that_leads_elsewhere_is_not_followed(self, store, tmp_path, conditional_store):
        (store / ".lock").symlink_to(tmp_path / "elsewhere")
        conditional_store.create("a", b"")
        with pytest.raises(StoreError):
            conditional_store.compare_and_swap("a", b"", conditional_store.get("a").token)
        assert not (tmp_path / "elsewhere").exists()


class TestOpening:
    @pytest.mark.parametrize("form", ["{}", "file://{}", "local://{}", "file://localhost{}"])
    def test_urls(self, store, form):
        assert open_store(form.format(store)).url == store.as_uri()

    def test_quoted_urls(self, tmp_path):
        assert open_store((tmp_path / "with space").as_uri()).url.endswith("with%20space")
        assert (tmp_path / "with space").is_dir()

    @pytest.mark.parametrize("url", ["http://x/y", "az://container", "S4://bucket/a"])
    def test_other_schemes_are_refused(self, url):
        with pytest.raises(StoreError, match="is not supported"):
            open_store(url)

    @pytest.mark.parametrize("url", ["file://host/a", "file:///a?b=c", "local:///a#b"])
    def test_other_hosts_and_queries_are_refused(self, url):
        with pytest.raises(StoreError, match="three slashes"):
            open_store(url)

    def test_no_url_is_refused(self):
        with pytest.raises(StoreError, match="is empty"):
            open_store("")

    def test_existing_makes_and_writes_nothing(self, store, tmp_path):
        open_store(str(store), existing=True)
        assert list(store.iterdir()) == []
        with pytest.raises(StoreError, match="no such directory"):
            open_store(str(tmp_path / "missing"), existing=True)
        assert not (tmp_path / "missing").exists()

    def test_a_file_in_its_place_is_told(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(StoreError, match="Check that the file system"):
            open_store(str(tmp_path / "file"))

    def test_leftovers_of_dead_processes_go(self, store, conditional_store):
        conditional_store.create("a", b"")
        old, new = store / ".temporary" / "old", store / ".temporary" / "new"
        old.write_text("")
        new.write_text("")
        os.utime(old, (0, 0))
        probe(conditional_store)
        assert not old.exists()
        assert new.exists()


class TestProbe:
    """A store that only pretends is refused, whichever promise it breaks."""

    @pytest.mark.parametrize(
        ("breaks", "answer", "says"),
        [
            ("create", [Outcome.OK, Outcome.OK], "answered 'ok' to a second create"),
            ("create", [Outcome.FULL], "Free some space"),
            ("create", [Outcome.DENIED], "Give this user permission"),
            ("compare_and_swap", [Outcome.OK, Outcome.OK], "answered 'ok' to a stale swap"),
            ("compare_and_swap", [Outcome.RETRY], "Another process holds the lock"),
            ("get", [None], "does not return what was written"),
        ],
    )
    def test_a_broken_promise(self, conditional_store, monkeypatch, breaks, answer, says):
        answers = iter(answer)
        real = getattr(LocalStore, breaks)

        def lies(self, *args):
            real(self, *args)
            return next(answers)

        monkeypatch.setattr(LocalStore, breaks, lies)
        with pytest.raises(StoreError, match=says):
            probe(conditional_store)


class TestTrouble:
    def failing(self, monkeypatch, where, name, number):
        def fails(*args, **kwargs):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(where, name, fails)

    @pytest.mark.parametrize(
        ("number", "outcome"),
        [
            (errno.EACCES, Outcome.DENIED),
            (errno.EROFS, Outcome.DENIED),
            (errno.ENOSPC, Outcome.FULL),
            (errno.EDQUOT, Outcome.FULL),
        ],
    )
    def test_what_a_caller_can_decide_on_is_an_outcome(self, conditional_store, monkeypatch, number, outcome):
        conditional_store.create("a", b"")
        token = conditional_store.get("a").token
        self.failing(monkeypatch, os, "fsync", number)
        assert conditional_store.create("b", b"") is outcome
        assert conditional_store.compare_and_swap("a", b"x", token) is outcome
        assert not conditional_store.exists("b")

    def test_the_rest_is_an_error_with_advice(self, conditional_store, monkeypatch):
        conditional_store.create("a", b"")
        token = conditional_store.get("a").token
        self.failing(monkeypatch, os, "fsync", errno.EIO)
        with pytest.raises(StoreError, match="Check that the file system is mounted"):
            conditional_store.create("b", b"")
        with pytest.raises(StoreError, match="Check that the file system is mounted"):
            conditional_store.compare_and_swap("a", b"x", token)
        assert conditional_store.get("a").data == b""

    def test_a_name_that_may_not_last_is_ambiguous(self, conditional_store, monkeypatch):
        conditional_store.create("a", b"")
        token = conditional_store.get("a").token
        self.failing(monkeypatch, local_file, "sync_folder", errno.EIO)
        assert conditional_store.create("b", b"") is Outcome.AMBIGUOUS
        assert conditional_store.compare_and_swap("a", b"x", token) is Outcome.AMBIGUOUS

    def test_nothing_is_left_of_a_failed_write(self, store, conditional_store, monkeypatch):
        self.failing(monkeypatch, os, "fsync", errno.ENOSPC)
        conditional_store.create("b", b"")
        assert list((store / ".temporary").iterdir()) == []

    @pytest.mark.parametrize("operation", ["get", "exists", "read_from", "list", "settle", "delete"])
    def test_reading_never_answers_out_of_ignorance(self, store, conditional_store, operation):
        (store / "a").symlink_to("a")  # ELOOP, for root too
        call = getattr(conditional_store, operation)
        arguments = {"read_from": ("a", 0), "settle": ("a", 1)}.get(operation, ("a/b",))
        with pytest.raises(StoreError):
            call(*arguments)

    def test_a_folder_that_went_away_is_no_absent_object(self, store, conditional_store):
        store.rename(store.with_name("away"))
        with pytest.raises(StoreError, match="the folder is gone"):
            conditional_store.exists("a")
        store.mkdir()
        with pytest.raises(StoreError, match="the folder is gone"):
            conditional_store.exists("a")

    def test_a_lock_that_is_held_on_is_no_swap(self, store, conditional_store, monkeypatch):
        monkeypatch.setattr(local_store, "_LOCK_SECONDS", 0.05)
        conditional_store.create("a", b"")
        token = conditional_store.get("a").token
        with (store / ".lock").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            assert conditional_store.compare_and_swap("a", b"x", token) is Outcome.RETRY
            with pytest.raises(StoreError, match="try again"):
                conditional_store.delete("a")
        assert conditional_store.compare_and_swap("a", b"x", token) is Outcome.OK

    def test_settling_more_than_there_is_fails(self, conditional_store):
        conditional_store.create("a", b"one")
        with pytest.raises(StoreError, match="has 3 bytes, 4 were read"):
            conditional_store.settle("a", 4)


@pytest.mark.parametrize("at_most", [1, 2, 3, 7])
def test_short_writes_are_gone_on_with(conditional_store, monkeypatch, at_most):
    real = os.writev

    def short(descriptor, buffers):
        return real(descriptor, [b"".join(buffers)[:at_most]])

    handle = conditional_store.open_append("a", b"")
    monkeypatch.setattr(os, "writev", short)
    handle.write([b"", b"one", memoryview(b"four"), b"", b"x"])
    assert conditional_store.get("a").data == b"onefourx"
    assert handle.size_bytes == 8
    handle.close()


@pytest.fixture
def mounted(tmp_path):
    """A file system of 64 KiB, writable or not by remounting."""
    path = tmp_path / "small"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "none", path], check=False, capture_output=True
    )
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


class TestRealFileSystems:
    def test_a_full_one_is_told_and_usable_again(self, mounted):
        made = open_store(str(mounted))
        assert made.create("a", bytes(1 << 20)) is Outcome.FULL
        filler = made.open_append("filler", b"")
        with pytest.raises(OSError, match="No space left"):
            filler.write([bytes(1 << 20)])
        filler.close()
        with pytest.raises(StoreError, match="Free some space"):
            open_store(str(mounted))
        made.delete("filler")
        open_store(str(mounted))

    def test_a_read_only_one_is_told_but_can_be_read(self, mounted):
        open_store(str(mounted)).create("a", b"x")
        subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
        with pytest.raises(StoreError, match="Give this user permission"):
            open_store(str(mounted))
        with pytest.raises(StoreError, match="Give this user permission"):
            open_store(str(mounted / "below"))
        assert open_store(str(mounted), existing=True).get("a").data == b"x"

    @pytest.mark.skipif(ROOT, reason="root may write everywhere")
    def test_a_folder_without_permission_is_told(self, store):
        store.chmod(0o500)
        with pytest.raises(StoreError, match="Give this user permission"):
            open_store(str(store))
