"""What the preload does on a worker and on its nanny."""

from __future__ import annotations

import logging

from distributed import Nanny, Worker

from dask_resilience._distributed.nanny_link import NannyLink
from dask_resilience._distributed.pinned import check_supported
from dask_resilience._distributed.worker_link import WorkerLink
from dask_resilience.settings import Settings
from dask_resilience.storage.open_store import check_url

logger = logging.getLogger("distributed.resilience")


def setup_worker(worker: Worker) -> WorkerLink:
    """Let `worker` outlive its scheduler.

    Parameters
    ----------
    worker
        A live worker, registered or not.

    Raises
    ------
    UnsupportedDask, ConfigError, StoreError
        If this Dask, the configuration or the store's URL is not understood.
    """
    settings = _checked_settings()
    link = WorkerLink(
        worker,
        store_url=settings.store,
        storage_options=settings.storage_options,
        patience_seconds=settings.worker.patience_seconds,
        poll_seconds=settings.leader_poll_seconds,
    )
    link.attach()
    return link


def setup_nanny(nanny: Nanny) -> NannyLink:
    """Let `nanny` start its worker although the scheduler dies meanwhile.

    Parameters
    ----------
    nanny
        A nanny that has not yet introduced itself to a scheduler.

    Raises
    ------
    UnsupportedDask, ConfigError, StoreError
        If this Dask, the configuration or the store's URL is not understood.
    """
    settings = _checked_settings()
    link = NannyLink(
        nanny,
        store_url=settings.store,
        storage_options=settings.storage_options,
        patience_seconds=settings.worker.patience_seconds,
    )
    link.attach()
    return link


def _checked_settings() -> Settings:
    check_supported()
    settings = Settings.load()
    check_url(settings.store)
    return settings
