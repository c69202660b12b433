"""A process group that this process started, and that this process alone may signal.

Each group has one thread. It starts the process, waits for its exit, kills what is left of the group and only then
reaps the leader: until that moment the kernel cannot give the number to anyone else, so a signal to the group
can never reach a stranger. The same thread is the parent in the eyes of ``PR_SET_PDEATHSIG``, which fires when
the *thread* that forked ends; as it lives as long as the child, only the death of this whole process fires it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

import psutil

from dask_resilience.errors import ResilienceError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

#: What runs before ``python -m dask`` in each child: die with the parent; when parked, import everything and wait.
_LAUNCHER = """
import ctypes, importlib, os, runpy, signal, sys
parent, parked_imports = int(sys.argv.pop(1)), sys.argv.pop(1)
try:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
except (AttributeError, OSError):
    pass
if os.getppid() != parent:
    sys.exit("the parent is gone")
if parked_imports:
    for module in parked_imports.split(","):
        importlib.import_module(module)
    print("parked", flush=True)
    if not sys.stdin.readline():
        sys.exit(0)
runpy.run_module("dask", run_name="__main__", alter_sys=True)
"""

_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
_START_PATIENCE_SECONDS = 30.0
_EXIT_PATIENCE_SECONDS = 10.0
_POLL_SECONDS = 0.02


class MemberError(ResilienceError):
    """A process did not do what was awaited.

    Parameters
    ----------
    name
        The process.
    problem
        What was awaited and what happened instead.
    log_tail
        The last lines of its log.
    """

    def __init__(self, name: str, problem: str, log_tail: str = "") -> None:
        super().__init__(f"{name}: {problem}" + (f"\n{log_tail}" if log_tail else ""))
        self.name = name
        self.problem = problem
        self.log_tail = log_tail


def wait_until(condition: Callable[[], bool], *, timeout_seconds: float, poll_seconds: float = _POLL_SECONDS) -> bool:
    """Poll a condition; return whether it became true in time."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(poll_seconds)
    return True


class OwnedProcess:
    """``python -m dask ...`` in a process group of its own, with a log file.

    Parameters
    ----------
    arguments
        What follows ``python -m dask``.
    name
        How errors call it.
    log
        File that receives its stdout and stderr.
    environment
        Variables on top of this process' own.
    parked_imports
        Modules to import first; then the process waits for `go`. Empty: it runs at once.

    Attributes
    ----------
    on_exit
        Set before `start`: called once from the watching thread, after the process has exited and was reaped.

    Examples
    --------
    >>> import tempfile
    >>> with OwnedProcess(["--version"], name="version", log=Path(tempfile.mkdtemp()) / "log") as process:
    ...     process.wait()
    0
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        name: str,
        log: Path,
        environment: Mapping[str, str] | None = None,
        parked_imports: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.log = log
        self.on_exit: Callable[[OwnedProcess], None] | None = None
        self._arguments = list(arguments)
        self._environment = dict(environment or {})
        self._parked_imports = tuple(parked_imports)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: OSError | None = None
        self._spawned = threading.Event()
        self._reaped = threading.Event()
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------ life

    def start(self) -> Self:
        """Start the process, once."""
        if self._thread is not None:
            raise MemberError(self.name, "was started before; make a new one")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._live, name=f"watch-{self.name}", daemon=True)
        self._thread.start()
        if not self._spawned.wait(_START_PATIENCE_SECONDS):
            raise MemberError(self.name, f"could not be forked in {_START_PATIENCE_SECONDS} seconds")
        if self._process is None:
            raise MemberError(self.name, f"could not be started: {self._failure}") from self._failure
        return self

    def _live(self) -> None:
        try:
            process = self._spawn()
        except OSError as failure:
            self._failure = failure
            self._reaped.set()
            return
        finally:
            self._spawned.set()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # exited, but its number is still taken
        with self._lock:
            self._signal_group(signal.SIGKILL)
            process.wait()
            self._reaped.set()
        if process.stdin is not None:
            process.stdin.close()
        if self.on_exit is not None:
            self.on_exit(self)

    def _spawn(self) -> subprocess.Popen[bytes]:
        search = os.pathsep.join(filter(None, [_PACKAGE_ROOT, os.environ.get("PYTHONPATH", "")]))
        environment = {**os.environ, "PYTHONPATH": search, "PYTHONUNBUFFERED": "1", **self._environment}
        launcher = [sys.executable, "-c", _LAUNCHER, str(os.getpid()), ",".join(self._parked_imports)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                launcher + self._arguments,
                stdin=subprocess.PIPE if self._parked_imports else subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        return self._process

    def wait_parked(self, *, timeout_seconds: float = _START_PATIENCE_SECONDS) -> None:
        """Wait until everything is imported and only `go` is awaited."""
        self.await_condition(
            lambda: b"parked" in self.log.read_bytes()[:65536], "to be parked", timeout_seconds=timeout_seconds
        )

    def go(self) -> None:
        """Let a parked process run."""
        if self._process is None or self._process.stdin is None:
            raise MemberError(self.name, "is not parked")
        self._process.stdin.write(b"go\n")
        self._process.stdin.flush()

    # --------------------------------------------------------------- queries

    @property
    def pid(self) -> int:
        """Process id of the leader, which is also the id of the group."""
        if self._process is None:
            raise MemberError(self.name, "was not started")
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it was started and has not exited."""
        return self._process is not None and not self._reaped.is_set()

    @property
    def exit_code(self) -> int | None:
        """Exit code, negative for a signal; None while alive."""
        return self._process.returncode if self._process is not None and self._reaped.is_set() else None

    def pids(self) -> tuple[int, ...]:
        """Return the leader's and its descendants' process ids; empty when dead."""
        with self._lock:
            if not self.alive:
                return ()
            try:
                return (self.pid, *(child.pid for child in psutil.Process(self.pid).children(recursive=True)))
            except psutil.NoSuchProcess:
                return ()

    def log_tail(self, lines: int = 15) -> str:
        """Return the last lines of the log."""
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def await_condition(self, condition: Callable[[], bool], what: str, *, timeout_seconds: float) -> None:
        """Wait for a condition of a living process.

        Raises
        ------
        MemberError
            When the process exits first, or the time is over.
        """
        wait_until(lambda: condition() or not self.alive, timeout_seconds=timeout_seconds)
        if condition():
            return
        story = f"was not seen {what} in {timeout_seconds} seconds" if self.alive else f"exited with {self.exit_code}"
        raise MemberError(self.name, story, self.log_tail())

    # --------------------------------------------------------------- signals

    def _signal_group(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):  # macOS says EPERM for a group of zombies
            os.killpg(self.pid, number)

    def send(self, number: int) -> bool:
        """Send a signal to the whole group; return False when it is dead already."""
        with self._lock:
            if not self.alive:
                return False
            self._signal_group(number)
            return True

    def kill(self, number: int = signal.SIGKILL) -> float:
        """Signal the group; after SIGKILL also wait until it is gone.

        Returns
        -------
        float
            The moment of the signal, in seconds of ``time.monotonic``.
        """
        moment = time.monotonic()
        if self.send(number) and number == signal.SIGKILL:
            self.wait()
        return moment

    def pause(self) -> None:
        """Stop the group with SIGSTOP."""
        self.send(signal.SIGSTOP)

    def cont(self) -> None:
        """Let a stopped group go on with SIGCONT."""
        self.send(signal.SIGCONT)

    def wait(self, *, timeout_seconds: float = _EXIT_PATIENCE_SECONDS) -> int:
        """Wait for the exit and return the exit code (negative for a signal)."""
        if self._process is None:
            raise MemberError(self.name, "was not started")
        if not self._reaped.wait(timeout_seconds):
            raise MemberError(self.name, f"did not exit in {timeout_seconds} seconds", self.log_tail())
        return int(self._process.returncode)

    def close(self) -> None:
        """Kill the group if it lives."""
        if self.alive:
            self.kill()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
