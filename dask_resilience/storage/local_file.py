"""Files of the local store: written whole or not at all, appended, read, and made durable."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from dask_resilience.storage.object_store import AppendHandle

#: The most buffers that one writev takes (POSIX allows as few as 16, Linux takes 1024).
IOV_MAX = min(1024, os.sysconf("SC_IOV_MAX"))

PRIVATE_FILE = 0o600
PRIVATE_FOLDER = 0o700

#: How much is read and rewritten at once when a file is settled.
_SETTLE_BYTES = 1 << 20


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path, *, below: Path) -> None:
    """Create a folder and its parents durably, as far down as `below`, which exists."""
    if path == below or path.is_dir():
        return
    make_folder(path.parent, below=below)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=PRIVATE_FOLDER)
    # Also after losing a race: what is put into the folder must not be more durable than the folder.
    sync_folder(path.parent)


def write_all(descriptor: int, buffers: Sequence[bytes | memoryview]) -> int:
    """Write every byte in order, whatever the number and size of the buffers.

    A short write is not an error: the next call tells the reason, such as a full disk.

    Returns
    -------
    int
        Number of bytes.
    """
    total = 0
    for first in range(0, len(buffers), IOV_MAX):
        waiting = list(buffers[first : first + IOV_MAX])
        while waiting:
            written = os.writev(descriptor, waiting)
            total += written
            while waiting and written >= (size := _nbytes(waiting[0])):
                written -= size
                del waiting[0]
            if written:
                waiting[0] = memoryview(waiting[0]).cast("B")[written:]
    return total


def _nbytes(buffer: bytes | memoryview) -> int:
    return buffer.nbytes if isinstance(buffer, memoryview) else len(buffer)


def write_temporary(folder: Path, data: bytes) -> tuple[Path, int]:
    """Write and sync a file under a name that nobody looks for; return it with its open descriptor."""
    path = folder / secrets.token_hex(16)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, PRIVATE_FILE)
    try:
        write_all(descriptor, [data])
        os.fsync(descriptor)
    except BaseException:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise
    return path, descriptor


def read_from(path: Path, offset: int, length: int) -> bytes:
    """Read a file from an offset on, the rest of it when the length is negative."""
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        return file.read() if length < 0 else file.read(length) or b""


def settle(path: Path, length: int) -> None:
    """Make the first bytes of a file durable although an earlier fsync of it may have failed.

    After a failed fsync Linux marks the pages clean: they read back well from memory and are not on the disk, and the
    next fsync says nothing (Rebello et al., "Can Applications Recover from fsync Failures?", USENIX ATC 2020). So
    fsync alone proves nothing about bytes that another process wrote. Writing the same bytes over themselves makes
    the pages dirty again, and then fsync tells the truth. A writer that is still alive only appends behind them, and
    anyone else who settles writes the same bytes, so this needs no lock.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        done = 0
        while done < length:
            part = os.pread(descriptor, min(_SETTLE_BYTES, length - done), done)
            if not part:
                raise OSError(f"{path} has {done} bytes, {length} were read from it before")
            done += os.pwrite(descriptor, part, done)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LocalAppendHandle(AppendHandle):
    """A growing file, opened in append mode.

    Parameters
    ----------
    descriptor
        Owned by the handle from now on.
    size_bytes
        What is in the file already.
    """

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self._descriptor = descriptor
        self._size_bytes = size_bytes

    @property
    def size_bytes(self) -> int:
        """Bytes handed to the file so far, the header included."""
        return self._size_bytes

    def write(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Append all bytes, in order."""
        self._size_bytes += write_all(self._descriptor, buffers)

    def sync(self) -> None:
        """Return when everything that was written is durable, and the length of the file with it."""
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Let go of the file without making anything durable. May be called twice."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
