"""A store in a folder of a local or shared POSIX file system.

How each promise is kept:

create
    The data goes to a temporary file and is synced; ``link`` gives it its name. ``link`` fails when the name exists,
    on NFS too, so of many callers one wins, and a name never stands for a part of an object.
compare_and_swap
    New data is written and synced first. Then, under ``flock``, the present bytes are compared and the new file is
    renamed over them. The lock is held for a read and a rename only: a process that is stopped just there delays
    the others until it is continued or killed, and they are told `Outcome.RETRY` meanwhile.
durability
    Every answer of `Outcome.OK` comes after a sync of the file and of the folder that names it.
privacy
    The journal holds pickles, and whoever can write it can run code in the scheduler. The folder and all in it are
    for its owner alone, and a folder that others could have written is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dask_resilience.errors import StoreError
from dask_resilience.storage import local_file, names
from dask_resilience.storage.object_store import AppendHandle, ConditionalStore, Outcome, Stored
from dask_resilience.storage.trouble import outcome_of, store_error

#: Not objects; the names of objects never begin with a dot.
_TEMPORARY = ".temporary"
_LOCK = ".lock"

#: How long a swap waits for others before it says RETRY, and how often it tries.
_LOCK_SECONDS = 1.0
_LOCK_POLL_SECONDS = 0.002

#: A temporary file older than this belongs to a process that died; the oldest write takes far less.
_LEFTOVER_SECONDS = 3600.0


class LocalStore(ConditionalStore):
    """Objects as files below one folder, which is created when it is missing.

    Parameters
    ----------
    path
        The folder.
    create
        Whether to create a missing folder; else it must exist, and nothing is written by opening it.

    Raises
    ------
    StoreError
        If the folder cannot be used: not reachable, not writable, full, or open to others.

    Examples
    --------
    >>> import tempfile
    >>> store = LocalStore(tempfile.mkdtemp())
    >>> store.create("lease", b"mine"), store.create("lease", b"yours")
    (<Outcome.OK: 'ok'>, <Outcome.EXISTS: 'exists'>)
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool = True) -> None:
        self._root = Path(path).absolute()
        with self._translated("opened"):
            if create:
                self._create_root()
            elif not self._root.is_dir():
                raise StoreError(self.url, "there is no such directory on this machine. Check resilience.store")
            # Kept open to tell this folder from another that takes its place.
            self._folder = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._refuse_open_folder()

    def _create_root(self) -> None:
        missing = [folder for folder in (self._root, *self._root.parents) if not folder.exists()]
        self._root.mkdir(mode=local_file.PRIVATE_FOLDER, parents=True, exist_ok=True)
        for folder in missing:
            local_file.sync_folder(folder.parent)

    def _refuse_open_folder(self) -> None:
        status = os.fstat(self._folder)
        if status.st_uid != os.geteuid():
            raise StoreError(
                self.url,
                f"the folder belongs to user {status.st_uid}, and whoever can write a journal can run code in the "
                f"scheduler. Use a folder that user {os.geteuid()} owns, or run as its owner",
            )
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise StoreError(
                self.url,
                "other users may write to the folder, and whoever can write a journal can run code in the scheduler. "
                f"Check that nothing foreign is in it, then run: chmod 700 {self._root}",
            )

    @property
    def url(self) -> str:
        """Where it is, for people."""
        return self._root.as_uri()

    def create(self, name: str, data: bytes) -> Outcome:
        """Write an object that must not exist: of any number of callers exactly one gets `Outcome.OK`."""
        handle = self.open_append(name, data)
        if isinstance(handle, Outcome):
            return handle
        handle.close()
        return Outcome.OK

    def open_append(self, name: str, header: bytes) -> AppendHandle | Outcome:
        """Create an object that grows; it never exists without its header. An `Outcome` says why there is none."""
        path = self._path(name)
        linked = False
        with self._translated(f"written ({name})"):
            try:
                if path.exists():
                    return Outcome.EXISTS
                local_file.make_folder(path.parent, below=self._root)
                temporary, descriptor = local_file.write_temporary(self._temporary_folder(), header)
                try:
                    os.link(temporary, path)
                    linked = True
                    local_file.sync_folder(path.parent)
                except BaseException:
                    os.close(descriptor)
                    raise
                finally:
                    temporary.unlink(missing_ok=True)
                return local_file.LocalAppendHandle(descriptor, len(header))
            except FileExistsError:
                return Outcome.EXISTS
            except OSError as error:
                # With the link done, the name is there and may not survive a crash of the machine.
                outcome = Outcome.AMBIGUOUS if linked else outcome_of(error)
                if outcome is None:
                    raise
                return outcome

    def get(self, name: str) -> Stored | None:
        """Read an object; None when there is none. Never a part of one."""
        data = self.read_from(name, 0)
        return None if data is None else Stored(data=data, token=_token(data))

    def read_from(self, name: str, offset: int, *, length: int = -1) -> bytes | None:
        """Read an object, growing ones included, from a byte offset on; None when there is none."""
        with self._translated(f"read ({name})"):
            try:
                return local_file.read_from(self._path(name), offset, length)
            except (FileNotFoundError, NotADirectoryError):
                return None

    def compare_and_swap(self, name: str, data: bytes, token: str) -> Outcome:
        """Replace an object that still is what `token` stands for."""
        path = self._path(name)
        renamed = False
        with self._translated(f"written ({name})"):
            try:
                temporary, descriptor = local_file.write_temporary(self._temporary_folder(), data)
                os.close(descriptor)
                try:
                    with self._locked() as locked:
                        if not locked:
                            return Outcome.RETRY
                        present = self.get(name)
                        if present is None or present.token != token:
                            return Outcome.CONFLICT
                        temporary.rename(path)
                        renamed = True
                finally:
                    if not renamed:
                        temporary.unlink(missing_ok=True)
                # Outside of the lock, to hold it shortly. Whoever builds on the new bytes syncs this folder too,
                # before it gets its own answer.
                local_file.sync_folder(path.parent)
                return Outcome.OK
            except OSError as error:
                outcome = Outcome.AMBIGUOUS if renamed else outcome_of(error)
                if outcome is None:
                    raise
                return outcome

    def list(self, prefix: str) -> list[str]:
        """Names that begin with the prefix, sorted."""
        folder = self._path(prefix + "x").parent
        with self._translated(f"listed ({prefix})"):
            found = (
                (Path(parent) / file).relative_to(self._root).as_posix()
                for parent, folders, files in _walk(folder)
                for file in files
            )
            return sorted(name for name in found if name.startswith(prefix) and not name.startswith("."))

    def delete(self, name: str) -> None:
        """Remove an object; nothing happens when there is none."""
        path = self._path(name)
        with self._translated(f"deleted ({name})"), self._locked() as locked:
            if not locked:
                raise StoreError(self.url, f"{name} cannot be deleted while another process holds the lock; try again")
            try:
                path.unlink()
            except (FileNotFoundError, NotADirectoryError):
                return
            local_file.sync_folder(path.parent)

    def exists(self, name: str) -> bool:
        """Tell whether there is an object, by one stat. Never answers False out of ignorance."""
        with self._translated(f"read ({name})"):
            try:
                self._path(name).stat()
            except (FileNotFoundError, NotADirectoryError):
                # A folder that vanished (an unmounted share) looks like an absent object and is not one.
                if not self._root_is_there():
                    raise StoreError(self.url, "the folder is gone; mount or restore it") from None
                return False
            return True

    def settle(self, name: str, length: int) -> None:
        """Make the first `length` bytes of a growing object durable, whoever wrote them and whatever failed then."""
        with self._translated(f"made durable ({name})"):
            local_file.settle(self._path(name), length)
            local_file.sync_folder(self._path(name).parent)

    def remove_leftovers(self, newer: str) -> None:
        """Remove temporary files of processes that died, judged by the age difference to an object just written.

        Both times come from the clock of the file system, so the clock of this machine does not matter.
        """
        with self._translated("cleaned"):
            now = self._path(newer).stat().st_mtime
            for leftover in self._temporary_folder().iterdir():
                # Its owner may remove it at the same time.
                with contextlib.suppress(FileNotFoundError):
                    if now - leftover.lstat().st_mtime > _LEFTOVER_SECONDS:
                        leftover.unlink()

    def close(self) -> None:
        """Let go of the folder; the store must not be used any more."""
        descriptor, self._folder = self._folder, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _temporary_folder(self) -> Path:
        folder = self._root / _TEMPORARY
        folder.mkdir(mode=local_file.PRIVATE_FOLDER, exist_ok=True)
        return folder

    def _path(self, name: str) -> Path:
        return self._root / names.check(name)

    def _root_is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._folder), self._root.stat())
        except OSError:
            return False

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        # A descriptor of its own for each call: threads that share one would share the lock.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self._root / _LOCK, flags, local_file.PRIVATE_FILE)
        try:
            yield _lock(descriptor)
        finally:
            os.close(descriptor)

    @contextmanager
    def _translated(self, attempt: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise store_error(self.url, attempt, error) from error


def _lock(descriptor: int) -> bool:
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOCK_POLL_SECONDS)


def _token(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    def missing_is_empty(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for parent, folders, files in os.walk(folder, onerror=missing_is_empty):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield parent, folders, files
