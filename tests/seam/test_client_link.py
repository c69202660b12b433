"""What a client hands over when it comes back, and in which order."""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict

from dask_resilience._distributed.client_link import ResilientClient


def client_with(*, outbox, refcount):
    """A client without a loop: only what the picture is made of."""
    client = ResilientClient.__new__(ResilientClient)
    client.id = "c"
    client.sent = []
    client._refcount_lock = threading.RLock()
    client._outbox = OrderedDict(outbox)
    client.refcount = defaultdict(int, refcount)
    client._send_to_scheduler_safe = client.sent.append
    return client


def test_graphs_go_before_the_releases_of_what_they_depend_on():
    graph = {"op": "update-graph", "keys": {"sum"}, "seq": 8}
    client = client_with(outbox={8: graph}, refcount={"sum": 1})
    client._send_what_came_meanwhile(["leaf"], handed=7)
    assert client.sent == [graph, {"op": "client-releases-keys", "keys": ["leaf"], "client": "c"}]


def test_a_key_that_came_and_went_during_the_join_is_released():
    graph = {"op": "update-graph", "keys": {"brief"}, "seq": 8}
    client = client_with(outbox={7: {"op": "update-graph", "keys": {"handed"}, "seq": 7}, 8: graph}, refcount={})
    client._send_what_came_meanwhile([], handed=7)
    assert client.sent == [graph, {"op": "client-releases-keys", "keys": ["brief"], "client": "c"}]


def test_an_ack_empties_the_outbox_up_to_its_number():
    client = client_with(outbox={1: {}, 2: {}, 3: {}}, refcount={})
    client._handle_ack(2)
    assert list(client._outbox) == [3]
