"""Moving bytes: the store, the journal's writer and reader, and the way to rule."""

from dask_resilience.storage.open_store import open_store

__all__ = ["open_store"]
