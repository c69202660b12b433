"""What every test has: a kind, a store, and the duty to leave no process behind."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import hypothesis
import psutil
import pytest

KINDS = ("unit", "integration", "chaos")

#: Inherited by all that a test starts, also by what is orphaned when its parent is killed.
_RUN = "RESILIENCE_TEST_RUN"
os.environ[_RUN] = uuid.uuid4().hex

#: What is older is not looked at: reading the environment of every process of a machine takes long.
_SINCE = psutil.Process().create_time()

#: multiprocessing keeps one of each for as long as the interpreter lives.
_LASTING = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")

# A slow machine is no failure of a property.
hypothesis.settings.register_profile("any-machine", deadline=None)
hypothesis.settings.load_profile("any-machine")


def pytest_collection_modifyitems(items):
    """Give each test without a kind the kind of its folder."""
    top = Path(__file__).parent
    for item in items:
        if not any(item.get_closest_marker(kind) for kind in KINDS):
            folder = item.path.relative_to(top).parts[0]
            item.add_marker(folder if folder in KINDS else "unit")


def _started_here() -> set[psutil.Process]:
    found = set()
    for process in psutil.process_iter():
        try:
            if (
                process.pid != os.getpid()
                and process.create_time() >= _SINCE
                and process.environ().get(_RUN) == os.environ[_RUN]
                and process.status() != psutil.STATUS_ZOMBIE
                and not any(name in argument for name in _LASTING for argument in process.cmdline())
            ):
                found.add(process)
        except psutil.Error:  # gone, or not ours to look at
            continue
    return found


@pytest.fixture(autouse=True)
def no_process_left_behind():
    """Fail the test whose processes outlive it, and end them, so that the next one is not disturbed."""
    before = _started_here()
    yield
    left = _started_here() - before
    _, left = psutil.wait_procs(left, timeout=5)
    # What is left may have ended its own children meanwhile.
    left = [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    described = [f"{process.pid}: {_command(process)}" for process in left]
    for process in left:
        process.kill()
    assert not described, "processes outlive this test:\n" + "\n".join(described)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:200]
    except psutil.Error:
        return "gone"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """An empty directory for a store."""
    path = tmp_path / "store"
    path.mkdir(mode=0o700)
    return path
