"""Whose store this is: one object, written once."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from dask_resilience.errors import StoreError, WrongCluster
from dask_resilience.journal.checked_json import NewerObject, decode_checked, encode_checked
from dask_resilience.storage import names
from dask_resilience.storage.object_store import ConditionalStore, Outcome
from dask_resilience.storage.trouble import store_error

#: Each round is lost only to another scheduler's success, and there are two things to win.
_ROUNDS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The owner of a store.

    Parameters
    ----------
    cluster_id
        Random, made at the first use.
    name
        What the user calls it; None as long as nobody gave it a name.
    """

    cluster_id: str
    name: str | None


def read_cluster(store: ConditionalStore) -> Cluster | None:
    """Read whose store it is; None when it was never used."""
    stored = store.get(names.CLUSTER)
    return None if stored is None else _decode(store.url, stored.data)


def claim_cluster(store: ConditionalStore, *, name: str | None) -> Cluster:
    """Read whose store it is, and make it ours at the first use.

    Parameters
    ----------
    store
        The store.
    name
        The configured name; None accepts any. A store without a name takes this one.

    Raises
    ------
    WrongCluster
        If the store has another name.
    StoreError
        If it cannot be read or written.
    """
    for _ in range(_ROUNDS):
        stored = store.get(names.CLUSTER)
        if stored is None:
            outcome = store.create(names.CLUSTER, _encode(Cluster(cluster_id=str(uuid.uuid4()), name=name)))
        else:
            found = _decode(store.url, stored.data)
            if name is None or found.name == name:
                return found
            if found.name is not None:
                raise WrongCluster(store.url, name, found.name)
            named = _encode(Cluster(cluster_id=found.cluster_id, name=name))
            outcome = store.compare_and_swap(names.CLUSTER, named, stored.token)
        if outcome in (Outcome.DENIED, Outcome.FULL):
            break
    raise store_error(store.url, f"written ({names.CLUSTER})", outcome)


def decode_cluster(data: bytes) -> Cluster:
    """Read the object; raises ValueError when it is not what was written."""
    fields = decode_checked(data)
    try:
        return Cluster(cluster_id=str(uuid.UUID(fields["id"])), name=fields["name"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no cluster: {error!r}") from error


def _encode(cluster: Cluster) -> bytes:
    return encode_checked({"id": cluster.cluster_id, "name": cluster.name})


def _decode(url: str, data: bytes) -> Cluster:
    try:
        return decode_cluster(data)
    except NewerObject as error:
        raise StoreError(url, f"the object {names.CLUSTER!r} cannot be read: {error}") from error
    except ValueError as error:
        problem = f"the object {names.CLUSTER!r} is damaged: {error}. Restore it from a copy, or use another store"
        raise StoreError(url, problem) from error
