"""What a worker holds, taken from its state machine in one turn of the event loop, and carried over the wire."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dask.utils import typename
from distributed.protocol import Serialized, serialize
from distributed.protocol.pickle import dumps, loads
from distributed.worker import Worker
from distributed.worker_state_machine import FreeKeysEvent

from dask_resilience.types import Key
from dask_resilience.views import Inventory

#: Where the inventory rides in a worker's registration.
FIELD = "resilience"

_RUNNING = frozenset({"executing", "long-running"})
_GIVEN_BACK = frozenset({"ready", "constrained", "waiting", "fetch", "flight", "missing"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """An inventory as it travels: the view that decisions need, and what only the enacting needs.

    Parameters
    ----------
    memory
        Key to (size in bytes, type name, run id; -1 for what was fetched or scattered).
    running
        Key to run id.
    long_running
        Those of `running` that have left the thread pool.
    erred
        Key to (run id, exception, traceback, exception text, traceback text).
    actors
        Those of `memory` that are actors.
    scattered
        Keys that lately came as data, not as results.
    finished
        The last tasks that this worker completed: key to run id.
    failed
        The last failures on this worker: key to run ids.
    shuffle_run
        The highest run id of a P2P shuffle that this worker has seen.
    cluster, epoch
        The scheduler that this worker served before; an empty name if none.
    """

    memory: Mapping[Key, tuple[int, str, int]] = field(default_factory=dict)
    running: Mapping[Key, int] = field(default_factory=dict)
    long_running: frozenset[Key] = frozenset()
    erred: Mapping[Key, tuple[int, Any, Any, str, str]] = field(default_factory=dict)
    actors: frozenset[Key] = frozenset()
    scattered: frozenset[Key] = frozenset()
    finished: Mapping[Key, int] = field(default_factory=dict)
    failed: Mapping[Key, tuple[int, ...]] = field(default_factory=dict)
    shuffle_run: int = 0
    cluster: str = ""
    epoch: int = 0

    def view(self, worker: str, first_runs: Mapping[Key, int]) -> Inventory:
        """The part that the recovery plan looks at.

        Parameters
        ----------
        worker
            Address of the worker.
        first_runs
            The first run that counts of each key that had another meaning before.
        """
        memory = {key: nbytes for key, (nbytes, _, _) in self.memory.items()}
        running = dict(self.running)
        erred = {key: error[0] for key, error in self.erred.items()}
        stale = set()
        for key, first in first_runs.items():
            if key in memory and self.memory[key][2] < first:
                stale.add(key)
                del memory[key]
            for runs in (running, erred):
                if runs.get(key, first) < first:
                    stale.add(key)
                    del runs[key]
        return Inventory(
            worker=worker, memory=memory, running=running, erred=erred, failed=self.failed, stale=frozenset(stale)
        )

    def pack(self) -> bytes:
        return dumps({name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def unpack(cls, packed: bytes) -> Holdings:
        known = set(cls.__slots__)
        return cls(**{name: value for name, value in loads(packed).items() if name in known})


def take(
    worker: Worker,
    *,
    finished: Mapping[Key, int],
    failed: Mapping[Key, tuple[int, ...]],
    scattered: Iterable[Key],
    shuffle_run: int,
    cluster: str,
    epoch: int,
) -> Holdings:
    """Give back what has not started, and list the rest.

    Synchronous on purpose: no message of the worker may fall between the inventory and the new send buffer.
    """
    state = worker.state
    back = [key for key, ts in state.tasks.items() if ts.state in _GIVEN_BACK]
    if back:
        worker.handle_stimulus(FreeKeysEvent(keys=back, stimulus_id="resilience-give-back"))

    memory: dict[Key, tuple[int, str, int]] = {}
    running: dict[Key, int] = {}
    long_running: set[Key] = set()
    erred: dict[Key, tuple[int, Any, Any, str, str]] = {}
    for key, ts in state.tasks.items():
        if ts.state == "memory":
            memory[key] = (ts.get_nbytes(), typename(ts.type) if ts.type is not None else "", ts.run_id)
        elif ts.state in _RUNNING:
            running[key] = ts.run_id
            if ts.state == "long-running":
                long_running.add(key)
        elif ts.state == "error":
            erred[key] = (ts.run_id, _frozen(ts.exception), _frozen(ts.traceback), ts.exception_text, ts.traceback_text)
    return Holdings(
        memory=memory,
        running=running,
        long_running=frozenset(long_running),
        erred=erred,
        actors=frozenset(state.actors) & memory.keys(),
        scattered=frozenset(scattered) & memory.keys(),
        finished=dict(finished),
        failed=dict(failed),
        shuffle_run=shuffle_run,
        cluster=cluster,
        epoch=epoch,
    )


def _frozen(value: Any) -> Serialized | None:
    """The form in which a scheduler that does not deserialize would have received `value`."""
    if value is None or isinstance(value, Serialized):
        return value
    header, frames = serialize(getattr(value, "data", value))
    return Serialized(header, [bytes(frame) for frame in frames])
