"""The right to rule, kept, published and given back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass

from dask_resilience.errors import Fenced, StoreError
from dask_resilience.failover.lease import LeaseState
from dask_resilience.journal.checked_json import NewerObject, decode_checked, encode_checked
from dask_resilience.journal.records import SealedEnd
from dask_resilience.storage import names
from dask_resilience.storage.lease_driver import LeaseDriver
from dask_resilience.storage.log_map import LogEnd
from dask_resilience.storage.object_store import ConditionalStore, Outcome
from dask_resilience.storage.trouble import store_error

#: Each round is lost only to another leader's publication.
_PUBLISH_ROUNDS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderRecord:
    """Where the ruling scheduler listens.

    Parameters
    ----------
    epoch
        Its epoch.
    address
        Its contact address.
    cluster_id
        Random identity of the cluster.
    """

    epoch: int
    address: str
    cluster_id: str


def leader(store: ConditionalStore) -> LeaderRecord | None:
    """Read who published itself as leader last.

    It may be dead, or fenced without knowing: connect and compare the epoch.

    Parameters
    ----------
    store
        The store of the cluster.

    Returns
    -------
    LeaderRecord or None
        None when nobody ever ruled.

    Raises
    ------
    StoreError
        If the store cannot be read, or a newer release wrote the record.
    """
    stored = store.get(names.LEADER)
    return None if stored is None else _decode(store.url, stored.data)


def newest_epoch(store: ConditionalStore) -> int:
    """Tell the newest epoch that has a manifest; 0 when there is none."""
    epochs = [0]
    for name in store.list(names.MANIFESTS):
        try:
            epochs.append(names.epoch_of_manifest(name))
        except ValueError:
            continue
    return max(epochs)


class Leadership:
    """The right to rule one epoch, as `rule` returns it.

    Any thread may call any method; `valid` and `lost` cost about a microsecond.

    Parameters
    ----------
    store
        The store of the cluster.
    driver
        Holds the lease.
    epoch
        The epoch whose manifest this process created.
    cluster_id
        Random identity of the cluster.
    end
        Where the older log ends.
    address
        Where this scheduler will listen.
    """

    def __init__(
        self, store: ConditionalStore, *, driver: LeaseDriver, epoch: int, cluster_id: str, end: LogEnd, address: str
    ) -> None:
        self._store = store
        self._driver = driver
        self._end = end
        self._address = address
        self._fence = names.manifest(epoch + 1)
        self.epoch = epoch
        self.cluster_id = cluster_id

    @property
    def next_lsn(self) -> int:
        """LSN of the first record of this epoch."""
        return self._end.next_lsn

    @property
    def chain(self) -> int:
        """The chain value before that record."""
        return self._end.chain

    @property
    def sealed(self) -> SealedEnd | None:
        """Where the older log ends, for `EpochStarted`; None when there is none."""
        return self._end.sealed

    @property
    def pause_seconds(self) -> float:
        """How long to wait between two calls of `renew`."""
        return self._driver.pause_seconds()

    @property
    def trouble(self) -> StoreError | None:
        """Why the lease could not be read or written the last time; None when it could."""
        return self._driver.trouble

    def valid(self) -> bool:
        """Tell whether this process may act: its lease has not run out. Never True after `lost`."""
        return self._driver.valid()

    def lost(self) -> bool:
        """Tell whether it is known that another rules. This process must end then."""
        return self._driver.stopped_for is not None

    def fenced(self) -> bool:
        """Look whether a newer epoch exists: one ``stat`` on a local store.

        Raises
        ------
        StoreError
            If the store does not say; that is no permission to ack.
        """
        return self._store.exists(self._fence)

    def why_lost(self) -> Fenced:
        """Tell it as an error."""
        return Fenced(self.epoch, max(self.epoch + 1, self._driver.stopped_for or 0))

    def renew(self) -> None:
        """Renew the lease when it is due, and notice when another rules. Call it every `pause_seconds`.

        Trouble with the store raises nothing here: validity runs out by itself, and `trouble` says why.
        """
        try:
            if not self.lost() and self.fenced():
                self._driver.fence_seen(max(self.epoch + 1, newest_epoch(self._store)))
            self._driver.tick()
        except StoreError:
            # An unreadable lease or fence. What was allowed is not extended.
            return

    def publish(self, address: str) -> None:
        """Tell members where this scheduler listens.

        Parameters
        ----------
        address
            Its contact address.

        Raises
        ------
        Fenced
            If another rules.
        StoreError
            If the store cannot be written.
        """
        record = LeaderRecord(epoch=self.epoch, address=address, cluster_id=self.cluster_id)
        data = encode_checked(asdict(record))
        outcome = Outcome.RETRY
        for _ in range(_PUBLISH_ROUNDS):
            if self.lost() or self.fenced():
                raise self.why_lost()
            stored = self._store.get(names.LEADER)
            if stored is None:
                outcome = self._store.create(names.LEADER, data)
            else:
                # Publications never go backwards: a leader that was fenced after the look above must not hide its
                # successor from the members.
                newer = _decode(self._store.url, stored.data).epoch
                if newer > self.epoch:
                    raise Fenced(self.epoch, newer)
                outcome = self._store.compare_and_swap(names.LEADER, data, stored.token)
            if outcome is Outcome.OK:
                self._address = address
                self._driver.tell(epoch=self.epoch, address=address)
                return
            if outcome in (Outcome.DENIED, Outcome.FULL):
                break
        raise store_error(self._store.url, f"written ({names.LEADER})", outcome)

    def release(self) -> None:
        """Give the lease back at a clean end, so that a successor need not wait. Close the journal before."""
        if self._driver.state in (LeaseState.HOLDING, LeaseState.DOUBTFUL):
            self._driver.release()


class LeaseKeeper:
    """A thread that keeps a leadership and tells when it is lost.

    Parameters
    ----------
    leadership
        What to keep.
    on_lost
        Called once, from the thread, when another rules; then the thread ends.
    """

    def __init__(self, leadership: Leadership, *, on_lost: Callable[[Fenced], None]) -> None:
        self._leadership = leadership
        self._on_lost = on_lost
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease-keeper", daemon=True)

    def start(self) -> None:
        """Begin to renew."""
        self._thread.start()

    def close(self) -> None:
        """End the thread without giving the lease back. May be called from `on_lost`, and twice."""
        self._stop.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._leadership.renew()
            if self._leadership.lost():
                self._on_lost(self._leadership.why_lost())
                return
            self._stop.wait(self._leadership.pause_seconds)


def decode_leader(data: bytes) -> LeaderRecord:
    """Read the object; raises ValueError when it is not what was written."""
    try:
        return LeaderRecord(**decode_checked(data))
    except TypeError as error:
        raise ValueError(f"no leader record: {error!r}") from error


def _decode(url: str, data: bytes) -> LeaderRecord:
    try:
        return decode_leader(data)
    except NewerObject as error:
        raise StoreError(url, f"the object {names.LEADER!r} cannot be read: {error}") from error
    except ValueError as error:
        raise StoreError(url, f"the object {names.LEADER!r} is damaged: {error}. Delete it") from error
