"""Free ports and small HTTP requests on the loopback interface.

Ports are taken from below the kernel's ephemeral range: a member that keeps calling a dead scheduler's port on
loopback would otherwise, sooner or later, be given that very port as its own end and connect to itself, and the
replacement could not bind it.
"""

from __future__ import annotations

import http.client
import random
import socket

from dask_resilience.chaos.owned_process import MemberError

HOST = "127.0.0.1"
_LOWEST_PORT, _EPHEMERAL_PORT = 12_000, 32_768


def free_port() -> int:
    """Return a loopback port that nobody listens on and that the kernel does not hand out by itself."""
    for _ in range(1000):
        port = random.randrange(_LOWEST_PORT, _EPHEMERAL_PORT)
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise MemberError("ports", f"none between {_LOWEST_PORT} and {_EPHEMERAL_PORT} is free")


def http_get(port: int, path: str, *, timeout_seconds: float = 1.0) -> tuple[int, bytes] | None:
    """Fetch a page from loopback: status and body, or None when nobody answers."""
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout_seconds)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
