"""Spans, and the order of plugins, are after a failover what they were."""

from __future__ import annotations

from distributed import SchedulerPlugin, WorkerPlugin, span, wait
from support import all_durable, fail_over


def spans_of(client):
    """Of each span that a client named: its id to its name, its parent, its groups of tasks, and their states."""

    def described(dask_scheduler):
        spans = dask_scheduler.extensions["spans"]
        return {
            id_: (
                each.name,
                each.parent and each.parent.id,
                sorted(group.name for group in each.groups),
                [dict(snippet) for snippet in each.metadata.get("collections", ())] if each.metadata else None,
            )
            for id_, each in spans.spans.items()
            if each.name[0] != "default"
        }

    return client.run_on_scheduler(described)


def annotations_of(client):
    return client.run_on_scheduler(
        lambda dask_scheduler: {key: ts.annotations for key, ts in dask_scheduler.tasks.items()}
    )


def test_spans_are_as_they_were(cluster, client):
    import dask.array

    with span("outer") as outer, span("inner") as inner:
        deep = client.submit(lambda: 1, key="deep")
        x = client.persist(dask.array.ones(4, chunks=2) + 1)
    with span("outer"):
        other = client.submit(lambda: 2, key="other")
    wait([deep, x, other])
    before, annotations = spans_of(client), annotations_of(client)
    assert before[inner][:2] == (("outer", "inner"), outer)
    assert len(before) == 3
    for _ in range(2):
        fail_over(cluster, client)
        assert spans_of(client) == before
        assert annotations_of(client) == annotations
    # And what comes later under a span that is still open belongs to it.
    assert client.submit(lambda: 3, key="later").result(timeout=10) == 3


def test_plugins_come_back_in_their_order(cluster, client):
    class OnScheduler(SchedulerPlugin):
        def __init__(self, name):
            self.name = name

    class OnWorker(WorkerPlugin):
        def __init__(self, name):
            self.name = name

    for name in ("b", "a", "c"):
        client.register_plugin(OnScheduler(name))
        client.register_plugin(OnWorker(name))
    client.unregister_scheduler_plugin("a")
    client.unregister_worker_plugin("b")
    client.register_plugin(OnScheduler("a"))
    all_durable(client)

    def order(dask_scheduler):
        return (
            [name for name in dask_scheduler.plugins if name in "abc"],
            [name for name in dask_scheduler.worker_plugins if name in "abc"],
        )

    assert client.run_on_scheduler(order) == (["b", "c", "a"], ["a", "c"])
    for _ in range(2):
        fail_over(cluster, client)
        assert client.run_on_scheduler(order) == (["b", "c", "a"], ["a", "c"])
