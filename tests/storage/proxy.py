"""A proxy between a store and its server that does to requests what networks and busy servers do.

`Proxy.faults` is a queue. A request takes the first fault if it is meant for its method; others go through.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections import deque
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

#: For each fault: how often, of endless ones.
ALWAYS = 10**6

_HOP = {"connection", "keep-alive", "transfer-encoding", "host", "content-length"}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to one request.

    `forward` is whether, and when, the server gets it; `answer` is what the client gets: nothing, the server's answer
    (None), or a status with a body.
    """

    method: str = "PUT"
    forward: bool = True
    forward_after_seconds: float = 0.0
    reply: bool = True
    hang_seconds: float = 0.0
    status: int | None = None
    body: bytes = b""
    #: Called when the server has answered and before the client hears of it.
    then: object = None
    drop_headers: tuple[str, ...] = ()


def lost_reply(**kwargs):
    return Fault(reply=False, **kwargs)


def lost_request(**kwargs):
    return Fault(forward=False, reply=False, **kwargs)


def hang(seconds, **kwargs):
    return Fault(forward=False, reply=False, hang_seconds=seconds, **kwargs)


def late(seconds, **kwargs):
    """The connection breaks, and the request reaches the server some time afterwards."""
    return Fault(reply=False, forward_after_seconds=seconds, **kwargs)


def refused(status, code, message="no", **kwargs):
    """An answer as S3 gives it."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    return Fault(forward=False, status=status, body=body, **kwargs)


class Proxy:
    """Listens on a port of this host for as long as the context lasts."""

    def __init__(self, url):
        self.target = urlsplit(url).netloc
        self.faults = deque()
        self.seen = []
        self.drop_headers = ()
        self.lock = threading.Lock()
        self.late = []
        proxy = self

        class Handler(_Handler):
            def __init__(self, *args):
                self.proxy = proxy
                super().__init__(*args)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
        self.wait_for_late()

    def wait_for_late(self):
        """Until what was to come late is there."""
        while self.late:
            self.late.pop().join()

    def add(self, fault, times=1):
        with self.lock:
            self.faults.extend([fault] * min(times, 1000))

    def next_fault(self, method):
        with self.lock:
            self.seen.append(method)
            if self.faults and self.faults[0].method == method:
                return self.faults.popleft()
            return Fault(method=method)

    def send(self, method, path, headers, body):
        connection = http.client.HTTPConnection(self.target, timeout=30)
        try:
            connection.request(method, path, body=body, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_any(self):
        proxy = self.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = proxy.next_fault(self.command)
        dropped = {name.lower() for name in (*fault.drop_headers, *proxy.drop_headers)} | _HOP | {"expect"}
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        request = (self.command, self.path, headers, body)
        answer = None
        if fault.forward_after_seconds:
            thread = threading.Thread(target=lambda: (time.sleep(fault.forward_after_seconds), proxy.send(*request)))
            thread.start()
            proxy.late.append(thread)
        elif fault.forward:
            answer = proxy.send(*request)
        if fault.then is not None:
            fault.then()
        time.sleep(fault.hang_seconds)
        if not fault.reply:
            self.close_connection = True
            return
        if fault.status is not None:
            answer = (fault.status, [], fault.body)
        status, got, data = answer
        self.send_response_only(status)
        for name, value in got:
            if name.lower() not in _HOP:
                self.send_header(name, value)
        if self.command == "HEAD" or status in (204, 304):
            data = b""
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815 - the base class looks for these names

    def handle_expect_100(self):
        self.send_response_only(100)
        self.end_headers()
        return True

    def log_message(self, *args):
        pass
