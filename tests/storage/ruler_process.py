"""A process that rules a store, journals numbered records, and says what it did. Started by `test_processes`.

Usage: ruler_process.py STORE TTL_SECONDS SEGMENT_BYTES RECORDS. It appends RECORDS records, then one for each line of
its input; RECORDS below zero appends without end. It ends with code 3 when another rules.
"""

from __future__ import annotations

import json
import os
import sys
import threading

from dask_resilience.errors import Fenced
from dask_resilience.journal.records import ClientLeft, EpochStarted
from dask_resilience.storage import open_store
from dask_resilience.storage.journal_writer import JournalWriter
from dask_resilience.storage.leadership import LeaseKeeper
from dask_resilience.storage.takeover import rule


def say(line):
    os.write(1, f"{line}\n".encode())


_ENDING = threading.Lock()


def fenced(error):
    # Keeper and writer may find out at the same time; whoever comes second waits for the end by the first.
    _ENDING.acquire()
    say(f"fenced {error.epoch} {error.newer}")
    os._exit(3)


def main():
    url, ttl_seconds, segment_bytes, count = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    store = open_store(url, storage_options=json.loads(os.environ.get("RULER_STORAGE_OPTIONS", "{}")))
    say("opened")
    leadership = rule(store, address="tcp://a:1", ttl_seconds=ttl_seconds, on_wait=say)
    say(f"rules {leadership.epoch} {leadership.next_lsn}")

    def failed(error):
        if isinstance(error, Fenced):
            fenced(error)
        say(f"failed {error}")

    keeper = LeaseKeeper(leadership, on_lost=failed)
    keeper.start()
    acks = threading.Semaphore(0)

    def durable(lsn):
        say(f"acked {lsn}")
        acks.release()

    writer = JournalWriter(
        store,
        leadership,
        commit_interval_seconds=0.001,
        segment_bytes=segment_bytes,
        on_durable=durable,
        on_failure=failed,
    )
    writer.append(EpochStarted(epoch=leadership.epoch, cluster="c", holder="", versions={}, sealed=leadership.sealed))
    leadership.publish("tcp://a:2")
    while count:
        # A commit each, so that many points are passed.
        acks.acquire()
        writer.append(ClientLeft(client=f"{leadership.epoch}-{'x' * 20}"))
        count -= 1
    for _ in sys.stdin:
        writer.append(ClientLeft(client=f"{leadership.epoch}-{'x' * 20}"))
    writer.close()
    keeper.close()
    leadership.release()
    say("released")


if __name__ == "__main__":
    try:
        main()
    except Fenced as error:
        fenced(error)
