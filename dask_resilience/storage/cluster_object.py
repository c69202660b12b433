"""Whose store this is: one object, written once."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass

from dask_resilience.errors import StoreError, WrongCluster
from dask_resilience.storage import names
from dask_resilience.storage.object_store import ConditionalStore, Outcome
from dask_resilience.storage.trouble import store_error

CLUSTER_VERSION = 1

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


def _encode(cluster: Cluster) -> bytes:
    return json.dumps({"version": CLUSTER_VERSION, "id": cluster.cluster_id, "name": cluster.name}).encode()


def _decode(url: str, data: bytes) -> Cluster:
    try:
        fields = json.loads(data)
        version, identity, name = fields["version"], str(uuid.UUID(fields["id"])), fields["name"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"the object {names.CLUSTER!r} is damaged ({error!r}). Restore it from a copy, or use another store"
        raise StoreError(url, problem) from error
    if version > CLUSTER_VERSION:
        raise StoreError(url, f"the store has format {version}, this release knows {CLUSTER_VERSION}. Use a newer one")
    return Cluster(cluster_id=identity, name=name)
