"""When to send a request again: how long to wait, and when to give up.

Waits follow "full jitter" (Brooker, *Exponential Backoff And Jitter*, AWS Architecture Blog, 2015): a random part of a
bound that doubles, so that clients that failed together do not come back together.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryTerms:
    """How long an operation on a store may take.

    Parameters
    ----------
    first_pause_seconds
        Bound of the wait after the first failure.
    longest_pause_seconds
        Bound of any wait.
    request_seconds
        How long one request may take, besides the time for its bytes. It must be well below the TTL of the lease:
        a renewal whose connection died is sent again only after this time.
    slowest_bytes_per_second
        The slowest transfer that still counts as alive.
    total_seconds
        How long one operation may go on sending. The last request may end one `request_seconds` later.

    Examples
    --------
    >>> terms = RetryTerms()
    >>> terms.deadline_seconds(4_000_000)
    6.0
    >>> terms.pause_seconds(1, jitter=0.5, elapsed_seconds=0.0)
    0.025
    """

    first_pause_seconds: float = 0.05
    longest_pause_seconds: float = 1.0
    request_seconds: float = 2.0
    slowest_bytes_per_second: float = 1e6
    total_seconds: float = 10.0

    def deadline_seconds(self, nbytes: int, *, timeouts: int = 0) -> float:
        """Tell how long a request may take: ``(request + nbytes / slowest) x 2^timeouts``, at most `total_seconds`.

        Parameters
        ----------
        nbytes
            How many bytes it moves.
        timeouts
            How many times it ran into this deadline already; the size of what is read is not always known before.
        """
        wanted = self.request_seconds + nbytes / self.slowest_bytes_per_second
        return max(wanted, min(self.total_seconds, wanted * 2.0 ** min(timeouts, 16)))

    def pause_seconds(self, failures: int, *, jitter: float, elapsed_seconds: float) -> float | None:
        """Tell how long to wait before the next try; None to give up.

        Parameters
        ----------
        failures
            How many tries failed, the last included: from one on.
        jitter
            A random number from 0 to 1.
        elapsed_seconds
            Time since the operation began.
        """
        bound = min(self.longest_pause_seconds, self.first_pause_seconds * 2.0 ** min(failures - 1, 16))
        pause = bound * jitter
        return pause if elapsed_seconds + pause < self.total_seconds else None
