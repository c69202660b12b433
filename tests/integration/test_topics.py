"""What was logged under a topic is there after a failover, and subscribers hear each event once."""

from __future__ import annotations

import threading

from distributed import get_worker
from support import all_durable, fail_over, until

from dask_resilience import Client


def logged(client, topic):
    return [msg for _, msg in client.get_events(topic)]


def subscribers(client, topic):
    return client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler._broker._topics[topic].subscribers))


def test_events_of_clients_and_tasks(make_cluster):
    cluster = make_cluster(n_workers=1, environment={"DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH": "5"})
    with Client(cluster.address) as client:
        for number in range(7):
            client.log_event(["many", "both"], number)
        client.submit(lambda: get_worker().log_event("of a task", {"said": 1})).result()
        until(lambda: logged(client, "of a task"))
        all_durable(client)
        before = {topic: client.get_events(topic) for topic in ("many", "both", "of a task")}
        for _ in range(2):
            fail_over(cluster, client)
            assert {topic: client.get_events(topic) for topic in before} == before
        assert logged(client, "many") == [2, 3, 4, 5, 6]
        client.log_event("many", 7)
        assert logged(client, "many") == [3, 4, 5, 6, 7]
        counted = client.run_on_scheduler(lambda dask_scheduler: dask_scheduler._broker._topics["many"].count)
        assert counted == 8


def test_subscribers_hear_each_event_once(cluster, client):
    heard, unwanted, answered = [], [], []
    client.subscribe_topic("t", lambda event: heard.append(event[1]))
    client.subscribe_topic("unwanted", lambda event: unwanted.append(event[1]))
    # A subscription has no answer, and a call may overtake it.
    until(lambda: subscribers(client, "t") == subscribers(client, "unwanted") == 1)
    client.log_event("unwanted", 1)
    until(lambda: unwanted == [1])
    client.unsubscribe_topic("unwanted")
    until(lambda: subscribers(client, "unwanted") == 0)
    with Client(cluster.address, set_as_default=False) as other:
        ended = threading.Event()

        def log():
            number = 0
            while not ended.is_set():
                other.log_event("t", number)
                answered.append(number)
                number += 1

        logging = threading.Thread(target=log)
        logging.start()
        for _ in range(2):
            seen = len(answered)
            until(lambda seen=seen: len(answered) > seen + 20)
            fail_over(cluster, client)
        ended.set()
        logging.join(timeout=30)
        client.log_event("unwanted", 2)
        until(lambda: len(heard) >= len(answered))
    assert heard == answered
    assert unwanted == [1]
