"""Writing the journal: records queue up, one thread makes them durable and says so in order.

The group commit
----------------
`JournalWriter.append` encodes and queues. The I/O thread takes all that is queued, writes, syncs, looks for the fence,
and acks: the fence was absent after the sync, so whoever raises it later reads these records. While one commit is
under way the next gathers; a commit starts at most once in an interval, and at once after a pause.

Failures
--------
After a failed write or sync nothing is known about what of it is in the file, and a later sync that succeeds proves
nothing (see `local_file.settle`). So the segment is abandoned as it is: not truncated, for it holds acked records, and
not appended to. The next segment goes on from the last *acked* record and holds again all that was not acked, byte for
byte, since a frame depends on its LSN and on the frames before it and not on its segment. What stands in the
abandoned segment from there on does not count, which the reader sees by the first LSN of the next segment's header.
Nothing is acked meanwhile, what is pending stays in memory, and it goes on by itself when the store does.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from dask_resilience.errors import StoreError
from dask_resilience.failpoints import failpoint
from dask_resilience.journal.codec import encode_frame
from dask_resilience.journal.records import Record
from dask_resilience.journal.segment import HEADER_BYTES, SegmentHeader, encode_footer, encode_header
from dask_resilience.storage import names
from dask_resilience.storage.leadership import Leadership
from dask_resilience.storage.object_store import AppendHandle, ConditionalStore, Outcome
from dask_resilience.storage.trouble import store_error

#: LSN, chain value behind it, size in bytes, buffers.
_Pending: TypeAlias = tuple[int, int, int, list[bytes]]

#: Wait after the n-th failure in a row: 0.05 x 2^n seconds, at most one.
_BACK_OFF_SECONDS = 0.05
_BACK_OFF_LIMIT_SECONDS = 1.0

#: How often a writer whose lease ran out asks whether it was renewed.
_DOUBT_SECONDS = 0.02


class JournalWriter:
    """Appends records of one epoch.

    Parameters
    ----------
    store
        Where the journal is.
    leadership
        The right to write this epoch.
    commit_interval_seconds
        Least time between the starts of two commits, unless somebody hurries.
    segment_bytes
        A segment that has this size is sealed and the next begun.
    on_durable
        Called from the I/O thread with the LSN up to which all is durable and acked, in order.
    on_failure
        Called from the I/O thread once when writing begins to fail (`StoreError`: it goes on trying), and once when
        it ends for good (`Fenced`, or the error of a defect).
    on_recovered
        Called from the I/O thread when writing goes on after a failure.

    Attributes
    ----------
    durable_lsn : int
        LSN of the last acked record.
    """

    def __init__(
        self,
        store: ConditionalStore,
        leadership: Leadership,
        *,
        commit_interval_seconds: float,
        segment_bytes: int,
        on_durable: Callable[[int], None],
        on_failure: Callable[[Exception], None],
        on_recovered: Callable[[], None] | None = None,
    ) -> None:
        self._store = store
        self._leadership = leadership
        self._interval_seconds = commit_interval_seconds
        self._segment_bytes = segment_bytes
        self._on_durable = on_durable
        self._on_failure = on_failure
        self._on_recovered = on_recovered
        # Of the appending thread.
        self._next_lsn = leadership.next_lsn
        self._chain = leadership.chain
        self._appended_bytes = 0
        # Shared: a deque, and single values that one side sets and the other reads.
        self._queue: deque[_Pending] = deque()
        self._idle = False
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._closing = threading.Event()
        self._close_by = float("inf")
        self._ended_by: Exception | None = None
        self._durable_bytes = 0
        self.durable_lsn = leadership.next_lsn - 1
        # Of the I/O thread.
        self._durable_chain = leadership.chain
        self._unacked: list[_Pending] = []
        self._segment: AppendHandle | None = None
        self._segment_frames = 0
        self._seq = 0
        self._unsure_of = ""
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="journal-writer", daemon=True)
        self._thread.start()

    @property
    def pending_bytes(self) -> int:
        """Bytes that are queued or written and not acked. Callers hold back when it grows: nothing else bounds it."""
        return self._appended_bytes - self._durable_bytes

    @property
    def durable_bytes(self) -> int:
        """Bytes of records that are durable and acked, headers not counted."""
        return self._durable_bytes

    def append(self, record: Record) -> int:
        """Queue a record, from one thread only. Never blocks.

        Parameters
        ----------
        record
            What to write. The first of an epoch is `EpochStarted`.

        Returns
        -------
        int
            Its LSN, which `on_durable` reaches.

        Raises
        ------
        RecordRefused
            If it cannot be written. Nothing was queued.
        Fenced
            If another scheduler rules.
        """
        if self._ended_by is not None:
            raise self._ended_by
        lsn = self._next_lsn
        buffers, chain = encode_frame(record, lsn=lsn, chain=self._chain)
        size = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
        self._queue.append((lsn, chain, size, buffers))
        self._next_lsn, self._chain = lsn + 1, chain
        self._appended_bytes += size
        if self._idle:
            # Cleared before set, so that a thread that goes idle again in between is woken for nothing, never left.
            self._idle = False
            self._wake.set()
        return lsn

    def hurry(self) -> None:
        """Somebody waits for what was appended: commit it without gathering more."""
        self._hurry.set()

    def close(self, *, timeout_seconds: float = 10.0) -> bool:
        """Write what is queued, seal the segment and end the thread.

        Parameters
        ----------
        timeout_seconds
            When to give up on a store that fails.

        Returns
        -------
        bool
            Whether everything that was appended is durable and acked.
        """
        self._close_by = time.monotonic() + timeout_seconds
        self._closing.set()
        self._hurry.set()
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_seconds + _BACK_OFF_LIMIT_SECONDS)
        return self.durable_lsn == self._next_lsn - 1

    def _run(self) -> None:
        try:
            while self._await_work():
                started = time.monotonic()
                self._commit()
                self._roll_when_full()
                # While this lasts the next commit gathers.
                self._hurry.wait(max(0.0, started + self._interval_seconds - time.monotonic()))
                self._hurry.clear()
            self._seal()
        except Exception as error:  # noqa: BLE001 - whatever ends this thread must be told, or acks stop in silence
            self._ended_by = error
            self._on_failure(error)
        finally:
            if self._segment is not None:
                self._segment.close()

    def _await_work(self) -> bool:
        """Wait for records; False when the writer was closed and nothing is left."""
        while not self._queue and not self._unacked:
            if self._closing.is_set():
                return False
            self._wake.clear()
            self._idle = True
            # Looked at after the flag is up: an append that came before saw it down and did not wake anyone.
            if not self._queue and not self._closing.is_set():
                self._wake.wait()
            self._idle = False
        return True

    def _take(self) -> None:
        while self._queue:
            self._unacked.append(self._queue.popleft())

    def _commit(self) -> None:
        """Make all that is queued durable, however long the store fails."""
        while True:
            self._take()
            try:
                self._write()
                self._permit()
            except (OSError, StoreError) as error:
                self._abandon()
                self._report(error)
                self._back_off()
            else:
                self._ack()
                return

    def _write(self) -> None:
        failpoint("journal.before-write")
        if self._segment is None:
            self._segment, self._segment_frames = self._open(), 0
            failpoint("journal.after-open")
        self._segment.write([buffer for pending in self._unacked for buffer in pending[3]])
        failpoint("journal.after-write")
        self._segment.sync()
        failpoint("journal.after-sync")

    def _open(self) -> AppendHandle:
        epoch = self._leadership.epoch
        if self._unsure_of:
            # Where it is there it must stay before another follows it: a hole in the numbers would look like a loss.
            # Where a remote store lost the request the number is free, and a creation that comes late is refused.
            if self._store.exists(self._unsure_of):
                self._store.settle(self._unsure_of, HEADER_BYTES)
                self._seq += 1
            self._unsure_of = ""
        name = names.segment(epoch, self._seq)
        header = SegmentHeader(
            cluster=uuid.UUID(self._leadership.cluster_id).bytes,
            epoch=epoch,
            seq=self._seq,
            nonce=secrets.token_bytes(16),
            first_lsn=self.durable_lsn + 1,
            chain=self._durable_chain,
        )
        opened = self._store.open_append(name, encode_header(header))
        if isinstance(opened, Outcome):
            if opened in (Outcome.AMBIGUOUS, Outcome.EXISTS):
                # Left empty; the next one goes on from the same record.
                self._unsure_of = name
            raise store_error(self._store.url, f"written ({name})", opened)
        self._seq += 1
        return opened

    def _permit(self) -> None:
        """Return when acking is allowed: the fence is absent after the sync, and the lease has not run out."""
        while True:
            if self._leadership.lost() or self._leadership.fenced():
                raise self._leadership.why_lost()
            # After the look at the fence: a shared file system may show an old state, for less than the lease lasts.
            if self._leadership.valid():
                break
            self._leadership.renew()
            if not self._leadership.valid() and not self._leadership.lost():
                self._pause(_DOUBT_SECONDS)
        failpoint("journal.after-fence-check")

    def _ack(self) -> None:
        lsn, chain, _, _ = self._unacked[-1]
        first = self.durable_lsn < self._leadership.next_lsn
        self._segment_frames += len(self._unacked)
        self._durable_bytes += sum(pending[2] for pending in self._unacked)
        self._durable_chain, self.durable_lsn = chain, lsn
        self._unacked.clear()
        if self._failures:
            self._failures = 0
            if self._on_recovered is not None:
                self._on_recovered()
        self._on_durable(lsn)
        failpoint("journal.after-ack")
        if first:
            failpoint("takeover.after-epoch-started")

    def _abandon(self) -> None:
        segment, self._segment = self._segment, None
        if segment is not None:
            # Closing may report the same failure once more.
            with contextlib.suppress(OSError):
                segment.close()

    def _report(self, error: OSError | StoreError) -> None:
        self._failures += 1
        if self._failures == 1:
            told = error if isinstance(error, StoreError) else store_error(self._store.url, "written (log)", error)
            self._on_failure(told)

    def _back_off(self) -> None:
        self._pause(min(_BACK_OFF_LIMIT_SECONDS, _BACK_OFF_SECONDS * 2 ** min(self._failures, 10)))

    def _pause(self, seconds: float) -> None:
        """Wait, shorter when closing; give up when closing took too long."""
        if not self._closing.wait(seconds):
            return
        if time.monotonic() > self._close_by:
            problem = f"closed while {len(self._unacked)} records could not be made durable; none of them was acked"
            raise StoreError(self._store.url, problem)
        time.sleep(min(seconds, _DOUBT_SECONDS))

    def _roll_when_full(self) -> None:
        if self._segment is not None and self._segment.size_bytes >= self._segment_bytes:
            self._seal()

    def _seal(self) -> None:
        """End the segment by its footer. Failing at it is no failure: all records are durable without it."""
        segment, self._segment = self._segment, None
        if segment is None:
            return
        try:
            footer = encode_footer(
                frames=self._segment_frames,
                nbytes=segment.size_bytes,
                lsn=self.durable_lsn + 1,
                chain=self._durable_chain,
            )
            segment.write([footer])
            segment.sync()
            failpoint("journal.after-footer")
            segment.close()
        except OSError:
            self._segment = segment
            self._abandon()
