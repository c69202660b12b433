"""The drop-in client, and `install` for clusters that already run."""

from __future__ import annotations

from dask_resilience._distributed.pinned import check_supported

# Before the seam is imported, which would fail by the first missing name and not name the others.
check_supported()

from dask_resilience._distributed.client_link import ResilientClient  # noqa: E402

__all__ = ["Client"]


class Client(ResilientClient):
    """`distributed.Client`, whose futures outlive the scheduler.

    On a scheduler that keeps a journal (``dask scheduler --preload dask_resilience.preload``), futures, ``gather``,
    ``as_completed``, ``wait`` and callbacks go on when the scheduler is replaced, at the same address or at the
    one in the store's leader record; submissions made meanwhile go through afterwards, once. On a plain scheduler it
    behaves as `distributed.Client`.

    Parameters
    ----------
    address : str, Cluster, optional
        As for `distributed.Client`.
    **kwargs
        As for `distributed.Client`. How long to wait for a new scheduler is ``resilience.client.patience``.

    Raises
    ------
    ConfigError
        If a key under ``resilience`` is unknown or malformed.
    StoreError
        If the URL of ``resilience.store`` is not supported.

    Examples
    --------
    >>> from dask_resilience import Client
    >>> client = Client("tcp://127.0.0.1:8786")  # doctest: +SKIP
    >>> client.submit(sum, [1, 2]).result()  # doctest: +SKIP
    3
    """
