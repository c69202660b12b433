"""What a client hands over when it comes back, and in which order."""

from __future__ import annotations

import threading
from collections import defaultdict

from dask_resilience._distributed.client_link import ResilientClient
from dask_resilience._distributed.client_outbox import Outbox


def graph(*keys):
    return {"op": "update-graph", "keys": set(keys)}


def client_with(*sent, refcount):
    """A client without a loop: only what the picture is made of."""
    client = ResilientClient.__new__(ResilientClient)
    client.id = "c"
    client.sent = []
    client._refcount_lock = threading.RLock()
    client._outbox = Outbox()
    numbered = [client._outbox.add(msg, origin="c") for msg in sent]
    client.refcount = defaultdict(int, refcount)
    client._send_to_scheduler_safe = client.sent.append
    return client, numbered


def test_graphs_go_before_the_releases_of_what_they_depend_on():
    client, [_, later] = client_with(graph("handed"), graph("sum"), refcount={"sum": 1, "handed": 1})
    client._send_what_came_meanwhile(["leaf"], handed=1)
    assert client.sent == [later, {"op": "client-releases-keys", "keys": ["leaf"], "client": "c"}]


def test_a_key_that_came_and_went_during_the_join_is_released():
    client, [_, later] = client_with(graph("handed"), graph("brief"), refcount={})
    client._send_what_came_meanwhile([], handed=1)
    assert client.sent == [later, {"op": "client-releases-keys", "keys": ["brief"], "client": "c"}]


def test_an_ack_empties_the_outbox_up_to_its_number():
    client, numbered = client_with(graph("a"), graph("b"), graph("c"), refcount={})
    client._handle_ack(2)
    assert client._outbox.unacked() == numbered[2:]


def test_a_key_that_was_let_go_is_named_once_by_the_graph_that_uses_it_again():
    outbox = Outbox()
    assert "again" not in outbox.add(graph("x"), origin="c")
    outbox.let_go(["x"])
    outbox.add({"op": "cancel-keys", "keys": ["y"]}, origin="c")
    assert sorted(outbox.add(graph("x", "y", "z"), origin="c")["again"]) == ["x", "y"]
    assert "again" not in outbox.add(graph("x", "y"), origin="c")


def test_only_so_many_keys_are_remembered():
    outbox = Outbox()
    outbox.let_go(["first", *range(10_000)])
    assert outbox.add(graph("first", 0), origin="c")["again"] == [0]
