"""What a replay refuses."""

from __future__ import annotations

import asyncio

import pytest

from dask_resilience._distributed.scheduler_replay import Replay
from dask_resilience.errors import ChangeTooNew
from dask_resilience.journal import records


@pytest.mark.parametrize(
    ("record", "about"),
    [
        (records.SharedChanged(kind="barrier", name="n", value=b""), "SharedChanged record about 'barrier'"),
        (records.SharedChanged(kind="barrier", name="n", value=None), "SharedChanged record about 'barrier'"),
        (records.QueueChanged(name="q", change="sorted"), "QueueChanged record about 'sorted'"),
    ],
)
def test_what_a_newer_release_shares_is_refused_and_not_skipped(seat, record, about):
    async def main():
        async with seat() as here:
            with pytest.raises(ChangeTooNew, match=f"{about}.*Install a newer dask-resilience"):
                Replay(here.scheduler).apply(record)

    asyncio.run(main())


def test_a_clean_end_leaves_nothing_shared(seat):
    async def main():
        async with seat() as here:
            replay = Replay(here.scheduler)
            replay.apply(records.QueueChanged(name="q", change="users", count=1, client="c", number=1, settled=1))
            replay.apply(records.QueueChanged(name="q", change="put", items=(b"",), keys=("k",)))
            replay.apply(records.EventLogged(topics=("t",), event=b""))
            replay.apply(records.CallAnswered(client="d", number=1, settled=1, items=(b"",)))
            assert [call.client for call, _ in replay.calls] == ["c", "d"]
            replay.apply(records.ClientLeft(client="d"))
            assert [call.client for call, _ in replay.calls] == ["c"]
            replay.apply(records.ClusterClosed(reason=""))
            assert not list(replay.calls)
            assert not replay.queues.queues
            assert not replay.queues.held
            assert not replay.topics.events

    asyncio.run(main())
