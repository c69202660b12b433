"""What comes of a write whose request or reply is lost, late, refused or put off, with a real server behind a proxy."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from dask_resilience.errors import StoreError
from dask_resilience.storage import open_store
from dask_resilience.storage.gcs_backend import GcsBackend
from dask_resilience.storage.object_store import Outcome
from dask_resilience.storage.remote_store import RemoteStore
from dask_resilience.storage.retrying import RetryTerms
from dask_resilience.storage.s3_backend import S3Backend
from tests.storage import proxy as faults
from tests.storage.proxy import Fault, Proxy, hang, late, lost_reply, lost_request
from tests.storage.servers import free_ports, new_place

TERMS = RetryTerms(first_pause_seconds=0.01, longest_pause_seconds=0.1, request_seconds=0.5, total_seconds=1.5)

#: More than any operation here sends.
EVERY_TIME = 500


class Behind:
    """A store behind a proxy, another that goes straight to the same server, and the words of its protocol."""

    def __init__(self, kind, server, proxy):
        self.kind, self.server, self.proxy = kind, server, proxy
        self.url = new_place(server)
        self.writes = {"s3": "PUT", "gcs": "POST"}[kind]
        self.store = self.made(proxy.url)
        self.other = self.made(server.url)

    def made(self, endpoint):
        backend = {"s3": S3Backend, "gcs": GcsBackend}[self.kind](
            self.url, self.server.bucket, self.server.options(endpoint)
        )
        return RemoteStore(self.url, backend, prefix=f"{self.url.rpartition('/')[2]}/", terms=TERMS)

    def add(self, make, *args, times=1, method=None, **kwargs):
        self.proxy.add(make(*args, method=method or self.writes, **kwargs), times)

    def refuse(self, status, code, times=1, method=None):
        if self.kind == "s3":
            fault = faults.refused(status, code, method=method or self.writes)
        else:
            body = f'{{"error": {{"message": "no", "errors": [{{"reason": "{code}"}}]}}}}'.encode()
            fault = Fault(method=method or self.writes, forward=False, status=status, body=body)
        self.proxy.add(fault, times)

    def requests(self):
        return self.proxy.seen.count(self.writes)


@pytest.fixture(params=["s3", "gcs"])
def behind(request):
    server = request.getfixturevalue({"s3": "moto", "gcs": "fake_gcs"}[request.param])
    with Proxy(server.url) as proxy:
        made = Behind(request.param, server, proxy)
        yield made
        made.store.close()
        made.other.close()


def lose_reply(behind):
    behind.add(lost_reply)


def lose_replies(behind):
    behind.add(lost_reply, times=3)


def lose_request(behind):
    behind.add(lost_request)


def hang_once(behind):
    behind.add(hang, 0.8)


def come_late(behind):
    behind.add(late, 0.4)


def be_busy(behind):
    behind.refuse(503, "SlowDown", times=4)


def break_inside(behind):
    behind.refuse(500, "InternalError", times=2)


def conflict(behind):
    behind.refuse(409, "ConditionalRequestConflict", times=2)


def limit(behind):
    behind.refuse(429, "rateLimitExceeded", times=2)


PASSING = [
    lose_reply,
    lose_replies,
    lose_request,
    hang_once,
    come_late,
    be_busy,
    break_inside,
    conflict,
    limit,
]


@pytest.mark.parametrize("trouble", PASSING)
class TestTroubleThatPasses:
    def test_a_creation_is_done_once(self, behind, trouble):
        trouble(behind)
        assert behind.store.create("a", b"mine") is Outcome.OK
        behind.proxy.wait_for_late()
        assert not behind.proxy.faults
        assert behind.requests() > 1
        assert behind.other.get("a").data == b"mine"
        assert behind.other.create("a", b"mine") is Outcome.EXISTS

    def test_a_creation_of_what_is_there_is_told(self, behind, trouble):
        behind.other.create("a", b"theirs")
        trouble(behind)
        assert behind.store.create("a", b"mine") is Outcome.EXISTS
        behind.proxy.wait_for_late()
        assert behind.other.get("a").data == b"theirs"

    def test_the_same_bytes_of_another_are_not_ours(self, behind, trouble):
        behind.other.create("a", b"same")
        trouble(behind)
        assert behind.store.create("a", b"same") is Outcome.EXISTS

    def test_a_swap_is_done_once(self, behind, trouble):
        behind.other.create("a", b"one")
        token = behind.other.get("a").token
        trouble(behind)
        assert behind.store.compare_and_swap("a", b"two", token) is Outcome.OK
        behind.proxy.wait_for_late()
        assert behind.other.get("a").data == b"two"
        assert behind.other.compare_and_swap("a", b"three", token) is Outcome.CONFLICT

    def test_a_sync_writes_each_byte_once(self, behind, trouble):
        handle = behind.store.open_append("log/a", b"head")
        handle.write([b"one"])
        trouble(behind)
        handle.sync()
        handle.write([b"two"])
        handle.sync()
        behind.proxy.wait_for_late()
        assert behind.other.get("log/a").data == b"headonetwo"


class TestTroubleThatLasts:
    def test_busy_for_ever(self, behind):
        behind.refuse(503, "SlowDown", times=EVERY_TIME)
        assert behind.store.create("a", b"mine") is Outcome.RETRY
        assert behind.requests() < 200
        assert behind.other.get("a") is None

    def test_busy_for_ever_fails_a_sync_for_good(self, behind):
        handle = behind.store.open_append("a", b"head")
        handle.write([b"one"])
        behind.refuse(503, "SlowDown", times=EVERY_TIME)
        with pytest.raises(OSError, match="part 1 of a: retry"):
            handle.sync()
        behind.proxy.faults.clear()
        with pytest.raises(OSError, match="given up"):
            handle.sync()
        with pytest.raises(OSError, match="given up"):
            handle.write([b"two"])
        handle.close()
        assert behind.other.get("a").data == b"head"

    @pytest.mark.parametrize("operation", ["create", "swap"])
    def test_all_replies_lost_is_ours_when_it_can_be_read(self, behind, operation):
        behind.other.create("a", b"one")
        token = behind.other.get("a").token
        behind.add(lost_reply, times=EVERY_TIME)
        if operation == "create":
            assert behind.store.create("b", b"two") is Outcome.OK
        else:
            assert behind.store.compare_and_swap("a", b"two", token) is Outcome.OK

    @pytest.mark.parametrize("operation", ["create", "swap"])
    def test_all_requests_lost_is_ambiguous(self, behind, operation):
        """They may still be under way."""
        behind.other.create("a", b"one")
        token = behind.other.get("a").token
        behind.add(lost_request, times=EVERY_TIME)
        if operation == "create":
            assert behind.store.create("b", b"two") is Outcome.AMBIGUOUS
        else:
            assert behind.store.compare_and_swap("a", b"two", token) is Outcome.AMBIGUOUS

    def test_a_reply_that_is_lost_and_a_store_that_then_denies_all_is_ambiguous(self, behind):
        behind.add(lost_reply)
        behind.refuse(403, "AccessDenied", times=EVERY_TIME)
        assert behind.store.create("a", b"mine") is Outcome.AMBIGUOUS

    def test_a_swap_that_was_swapped_away_behind_a_lost_reply_is_ambiguous(self, behind):
        behind.other.create("a", b"one")
        token = behind.other.get("a").token

        def swap_away():
            assert behind.other.compare_and_swap("a", b"three", behind.other.get("a").token) is Outcome.OK

        behind.add(lost_reply, then=swap_away)
        assert behind.store.compare_and_swap("a", b"two", token) is Outcome.AMBIGUOUS
        assert behind.other.get("a").data == b"three"

    def test_a_part_of_another_fails_a_sync(self, behind):
        handle = behind.store.open_append("a", b"head")
        key = handle._head.identity
        # Not by any writer of ours, which has its own identity.
        other = behind.other
        outcome = other._run(other._requests.put(other._key(f".parts/a/.{key}/000001"), b"foreign", token=None))
        assert outcome is Outcome.OK
        handle.write([b"one"])
        with pytest.raises(OSError, match="part 1 of a: exists"):
            handle.sync()

    def test_no_permission(self, behind):
        behind.refuse(403, "AccessDenied", times=2)
        assert behind.store.create("a", b"mine") is Outcome.DENIED
        behind.other.create("b", b"one")
        assert behind.store.compare_and_swap("b", b"two", behind.other.get("b").token) is Outcome.DENIED
        assert behind.requests() == 2
        handle = behind.store.open_append("c", b"")
        handle.write([b"x"])
        behind.refuse(403, "AccessDenied")
        with pytest.raises(PermissionError):
            handle.sync()

    def test_no_permission_to_read_is_told(self, behind):
        for operation in (behind.store.get, behind.store.exists, behind.store.list):
            behind.refuse(403, "AccessDenied", method="GET")
            with pytest.raises(StoreError, match=r"permission denied.*Give these credentials the right"):
                operation("a")

    def test_no_space(self, behind):
        behind.refuse(507, "InsufficientStorage")
        assert behind.store.create("a", b"mine") is Outcome.FULL
        behind.refuse(403, {"s3": "QuotaExceeded", "gcs": "quotaExceeded"}[behind.kind])
        assert behind.store.create("a", b"mine") is Outcome.FULL

    @pytest.mark.parametrize("make", [lost_reply, lost_request])
    def test_reading_never_answers_out_of_ignorance(self, behind, make):
        behind.store._requests._terms = replace(TERMS, total_seconds=0.3)
        for call in (
            lambda: behind.store.get("a"),
            lambda: behind.store.exists("a"),
            lambda: behind.store.list("a"),
            lambda: behind.store.read_from("a", 0),
            lambda: behind.store.settle("a", 1),
        ):
            behind.add(make, times=EVERY_TIME, method="GET")
            with pytest.raises(StoreError, match=r"no good answer for .* Check the network"):
                call()
            behind.proxy.faults.clear()

    def test_reading_goes_on_after_trouble(self, behind):
        behind.other.create("a", b"one")
        behind.add(lost_reply, method="GET")
        behind.refuse(503, "SlowDown", method="GET", times=2)
        assert behind.store.get("a").data == b"one"
        behind.add(lost_reply, method="DELETE")
        behind.store.delete("a")
        assert behind.other.get("a") is None


class TestWords:
    """A person must act, and is told what is wrong, where, and what to do."""

    def opened(self, url, options):
        with pytest.raises(StoreError) as caught:
            open_store(url, storage_options=options)
        return str(caught.value)

    def test_no_bucket(self, behind):
        url = f"{behind.server.scheme}://missing-bucket/a"
        said = self.opened(url, behind.server.options())
        assert said.startswith(f"{url}: there is no bucket 'missing-bucket'. Create it, or correct resilience.store")
        with pytest.raises(StoreError, match="there is no bucket"):
            open_store(url, existing=True, storage_options=behind.server.options()).exists("manifest/1")

    @pytest.mark.parametrize(
        ("status", "code", "says"),
        [
            (400, "ExpiredToken", "have expired. Renew them"),
            (403, "InvalidAccessKeyId", "access key is not known"),
            (403, "SignatureDoesNotMatch", "secret does not fit"),
            (403, "RequestTimeTooSkewed", "clock of this host"),
            (400, "AuthorizationHeaderMalformed", "is in another region. Name it: client_kwargs: {region_name"),
            (501, "NotImplemented", "does not know conditional writes"),
            (418, "Teapot", "answered 418 Teapot"),
        ],
    )
    def test_s3_errors(self, moto, status, code, says):
        with Proxy(moto.url) as proxy:
            proxy.add(faults.refused(status, code, method="PUT"), 3)
            proxy.add(faults.refused(status, code, method="GET"), EVERY_TIME)
            store = Behind("s3", moto, proxy).store
            for write in (lambda: store.create("a", b""), lambda: store.open_append("a", b"")):
                with pytest.raises(StoreError, match=says):
                    write()

    def test_no_credentials(self, moto, monkeypatch, tmp_path):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        said = self.opened("s3://bucket/a", {"endpoint_url": moto.url})
        assert "there are no credentials" in said
        assert "resilience.storage-options, the environment" in said

    def test_gcs_says_that_credentials_are_needed(self, fake_gcs):
        with Proxy(fake_gcs.url) as proxy:
            store = Behind("gcs", fake_gcs, proxy).store
            proxy.add(Fault(method="POST", forward=False, status=401, body=b"{}"))
            with pytest.raises(StoreError, match=r"missing or have expired.*GOOGLE_APPLICATION_CREDENTIALS"):
                store.create("a", b"")

    def test_gcs_with_a_key_file_that_is_none(self, tmp_path):
        (tmp_path / "key.json").write_text("{}")
        assert "credentials" in self.opened("gs://bucket/a", {"token": str(tmp_path / "missing.json")})

    @pytest.mark.parametrize("scheme", ["s3", "gs"])
    def test_nobody_listens(self, scheme, moto, fake_gcs, monkeypatch):
        monkeypatch.setattr(sys.modules["dask_resilience.storage.open_store"], "RetryTerms", lambda **_: TERMS)
        server = {"s3": moto, "gs": fake_gcs}[scheme]
        (port,) = free_ports(1)
        url = f"{scheme}://bucket/a"
        said = self.opened(url, server.options(f"http://127.0.0.1:{port}"))
        assert said.startswith(f"{url}: cannot be read (a/cluster): no good answer for")

    def test_a_write_that_reaches_nobody_was_surely_not_done(self, behind):
        (port,) = free_ports(1)
        store = behind.made(f"http://127.0.0.1:{port}")
        assert store.create("a", b"") is Outcome.RETRY
        store.close()

    def test_options_that_are_none(self, behind):
        said = self.opened(
            behind.url,
            {**behind.server.options(), "client_kwargs": {"reigon_name": 1}, "consistency": 7, "access": "some"},
        )
        assert "storage-options" in said


class TestPretenders:
    """A store that ignores conditions is refused at the start."""

    @pytest.mark.parametrize(
        ("ignored", "says"), [("If-None-Match", "'ok' to a second create"), ("If-Match", "'ok' to a stale swap")]
    )
    def test_s3(self, moto, ignored, says):
        url = new_place(moto)
        with Proxy(moto.url) as proxy:
            proxy.drop_headers = (ignored,)
            with pytest.raises(StoreError, match=says):
                open_store(url, storage_options=moto.options(proxy.url))
        store = open_store(url, storage_options=moto.options())
        assert store.list("") == []
        store.close()


def test_gcs_notices_that_fewer_bytes_were_stored(fake_gcs):
    with Proxy(fake_gcs.url) as proxy:
        store = Behind("gcs", fake_gcs, proxy).store
        proxy.add(Fault(method="POST", status=200, body=b'{"size": "3"}'))
        with pytest.raises(StoreError, match="stored 3 of the 4 bytes"):
            store.create("a", b"four")
        store.close()
