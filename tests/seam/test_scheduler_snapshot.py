"""A snapshot and what came after it give the same state as the whole journal."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st
from journals import described, journals, replayed

from dask_resilience._distributed.scheduler_snapshot import scheduler_rest, state_records
from dask_resilience.journal import records
from dask_resilience.journal.codec import decode_frame, encode_frame


def snapshot_of(replay):
    """Its records, through their frames."""
    begun = records.SnapshotBegun(lsn=1, chain=0, epoch=1, seq=0, rest=scheduler_rest(replay.scheduler))
    for record in [begun, *state_records(replay)]:
        buffers, _ = encode_frame(record, lsn=1, chain=0)
        yield decode_frame(b"".join(buffers), 0, lsn=1, chain=0, name="snapshot").record


@given(journal=journals(), cut=st.integers(0, 14))
def test_a_snapshot_and_the_rest_are_the_whole(journal, cut):
    async def main():
        whole = replayed(journal)
        from_snapshot = replayed(journal[cut:], snapshot=list(snapshot_of(replayed(journal[:cut]))))
        assert described(from_snapshot) == described(whole)

    asyncio.run(main())
