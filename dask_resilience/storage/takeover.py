"""The way to rule: win the lease, raise the fence, find where the older log ends."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable

from dask_resilience.clock import Clock, SystemClock
from dask_resilience.errors import ResilienceError, StoreError
from dask_resilience.failover.lease import LeaseMachine, LeaseState
from dask_resilience.failover.lease_record import HolderIdentity
from dask_resilience.failover.lease_terms import LeaseTerms
from dask_resilience.failpoints import failpoint
from dask_resilience.journal.checked_json import encode_checked
from dask_resilience.storage import names
from dask_resilience.storage.cluster_object import claim_cluster
from dask_resilience.storage.identity import this_process
from dask_resilience.storage.leadership import LeaderRecord, Leadership, leader, newest_epoch
from dask_resilience.storage.lease_driver import LeaseDriver
from dask_resilience.storage.log_map import LogEnd, find_end
from dask_resilience.storage.object_store import ConditionalStore, Outcome
from dask_resilience.storage.trouble import store_error

__all__ = ["LeaderRecord", "Leadership", "TakeoverStopped", "leader", "rule"]


class TakeoverStopped(ResilienceError):
    """The process was asked to end before it ruled. Nothing is to be done."""


def rule(
    store: ConditionalStore,
    *,
    address: str,
    ttl_seconds: float,
    cluster: str | None = None,
    holder: HolderIdentity | None = None,
    clock: Clock | None = None,
    stop: threading.Event | None = None,
    on_wait: Callable[[str], None] | None = None,
) -> Leadership:
    """Wait for the lease, fence every older epoch and find the end of its log.

    Blocking: run it in a thread. When it returns, start a `LeaseKeeper` at once, replay the log by
    `JournalReader.read_to(leadership.sealed)`, and append `EpochStarted` with that end as the first record.

    Parameters
    ----------
    store
        Where the cluster keeps its journal.
    address
        Where this scheduler will listen; for people, until `Leadership.publish`.
    ttl_seconds
        How long this process may act on one renewal of the lease.
    cluster
        The configured name of the cluster; None takes the store's.
    holder
        This process, by default.
    clock
        The system's, by default.
    stop
        Set it to give up.
    on_wait
        Called with a line for the log when what is waited for changes.

    Returns
    -------
    Leadership
        The right to rule.

    Raises
    ------
    TakeoverStopped
        If `stop` was set.
    WrongCluster
        If the store belongs to another cluster.
    StoreError
        If the store cannot be read, or holds what this release does not know. Trouble while waiting is waited out.
    JournalCorrupt, JournalTooNew
        If the end of the older log cannot be told.
    """
    clock = clock or SystemClock()
    holder = holder or this_process()
    stop = stop or threading.Event()
    tell = _once(on_wait)
    cluster_id = claim_cluster(store, name=cluster).cluster_id
    failpoint("takeover.after-cluster")
    while True:
        machine = LeaseMachine(
            cluster=cluster_id, holder=holder, address=address, terms=LeaseTerms(ttl_seconds=ttl_seconds)
        )
        driver = LeaseDriver(store, machine=machine, clock=clock)
        driver.tell(epoch=newest_epoch(store) + 1, address=address)
        _win(driver, stop, tell)
        failpoint("takeover.after-lease")
        epoch = _raise_fence(store, driver, cluster_id, stop, tell)
        if epoch is None:
            tell("the lease was lost before the fence was raised; waiting again")
            continue
        failpoint("takeover.after-fence")
        end = _seal(store, epoch)
        failpoint("takeover.after-log-read")
        driver.tell(epoch=epoch, address=address)
        return Leadership(store, driver=driver, epoch=epoch, cluster_id=cluster_id, end=end, address=address)


def _win(driver: LeaseDriver, stop: threading.Event, tell: Callable[[str], None]) -> None:
    while True:
        if stop.is_set():
            raise TakeoverStopped("asked to end while waiting for the lease")
        driver.tick()
        if driver.trouble is not None:
            tell(f"waiting for the store: {driver.trouble}")
        if driver.state is LeaseState.HOLDING:
            return
        if driver.seen is not None and driver.seen.holder is not None and driver.state is LeaseState.OBSERVING:
            seen, by = driver.seen, driver.seen.holder
            tell(f"waiting for epoch {seen.epoch}, held by process {by.pid} on {by.host} for {seen.address}")
        stop.wait(driver.pause_seconds())


def _raise_fence(
    store: ConditionalStore, driver: LeaseDriver, cluster_id: str, stop: threading.Event, tell: Callable[[str], None]
) -> int | None:
    """Create the next manifest; None when the lease was lost before that."""
    while driver.valid():
        try:
            epoch = newest_epoch(store) + 1
            outcome = _create_manifest(store, epoch, cluster_id)
            if outcome is Outcome.OK:
                # Whoever was stopped in between comes here with a lease that ran out, and perhaps an older epoch.
                return epoch if driver.valid() and newest_epoch(store) == epoch else None
            trouble = store_error(store.url, f"written ({names.manifest(epoch)})", outcome)
        except StoreError as error:
            trouble, outcome = error, Outcome.RETRY
        if outcome is not Outcome.EXISTS:
            # A disk that is full now need not be so in a moment, and the place in the queue is kept meanwhile.
            tell(f"waiting to rule: {trouble}")
            if stop.wait(driver.pause_seconds()):
                raise TakeoverStopped("asked to end while raising the fence")
        driver.tick()
    return None


def _create_manifest(store: ConditionalStore, epoch: int, cluster_id: str) -> Outcome:
    # The nonce tells our manifest from another's when the reply to the creation is lost.
    data = encode_checked({"epoch": epoch, "cluster": cluster_id, "nonce": secrets.token_hex(16)})
    name = names.manifest(epoch)
    outcome = store.create(name, data)
    if outcome in (Outcome.AMBIGUOUS, Outcome.EXISTS):
        stored = store.get(name)
        if stored is not None and stored.data == data:
            store.settle(name, len(data))
            return Outcome.OK
    return outcome


def _seal(store: ConditionalStore, epoch: int) -> LogEnd:
    end = find_end(store, before=epoch)
    if end.sealed is not None:
        # What is sealed must not vanish: the older writer may have died before its sync.
        store.settle(names.segment(end.sealed[0], end.sealed[1]), end.sealed[2])
    return end


def _once(on_wait: Callable[[str], None] | None) -> Callable[[str], None]:
    last = ""

    def tell(line: str) -> None:
        nonlocal last
        if on_wait is not None and line != last:
            last = line
            on_wait(line)

    return tell
