"""Errors travel: what they carry is made again elsewhere, and stays small."""

from __future__ import annotations

import pickle

from dask_resilience.errors import GraphUnreadable


def test_the_error_of_a_large_graph_does_not_carry_all_its_keys():
    keys = [f"increment-{number}" for number in range(50_000)]
    error = GraphUnreadable(keys, "ModuleNotFoundError: No module named 'only_there'")
    # Each key of the graph gets this error: what it carried would be multiplied by their number.
    assert len(pickle.dumps(error)) < 1_000
    again = pickle.loads(pickle.dumps(error))
    assert again.keys == tuple(keys[:3])
    assert "'increment-2', ..." in str(again)
