"""Seeded traffic: what a client does while schedulers die, and what must come of it.

Every operation leaves an `Expectation`: a result or an exception, and how often its tasks may run. Tasks say that they
ran by one appended line, so the oracle needs nothing from the cluster that it judges.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import distributed


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What must come of one operation.

    Parameters
    ----------
    operation
        Its name, with a number.
    future
        What to ask for the result; None where the client keeps nothing.
    result
        The right result, or the exception's text.
    fails
        Whether the result is an exception.
    excused
        Whether the death of a worker excuses its loss, as it does for scattered data.
    runs
        Tag of each task to the least and the most runs without the death of a worker.
    """

    operation: str
    future: distributed.Future[Any] | None
    result: Any
    runs: dict[str, tuple[int, int]]
    fails: bool = False
    excused: bool = False


class Traffic:
    """Submits seeded operations and remembers what to expect.

    Parameters
    ----------
    client
        A client of the cluster under test.
    run_log
        File that tasks append to.
    seed
        The same seed makes the same operations.
    """

    def __init__(self, client: distributed.Client, run_log: Path, *, seed: int) -> None:
        self.client = client
        self.run_log = run_log
        self.expectations: list[Expectation] = []
        self._random = random.Random(seed)
        self._count = 0
        self._operations: list[Callable[[str], Expectation]] = [
            self._map,
            self._map,
            self._chain,
            self._tree,
            self._error,
            self._retries,
            self._forget,
            self._release,
            self._nested,
            self._scatter,
        ]

    def step(self) -> Expectation:
        """Submit one operation."""
        self._count += 1
        operation = self._random.choice(self._operations)
        expectation = operation(f"{operation.__name__.strip('_')}-{self._count}")
        self.expectations.append(expectation)
        return expectation

    def runs(self) -> Counter[str]:
        """How often each tag ran."""
        return Counter(self.run_log.read_text().split()) if self.run_log.exists() else Counter()

    def _seconds(self) -> float:
        return self._random.choice([0.0, 0.01, 0.05, 0.2])

    def _submit(self, tag: str, value: Any, *args: Any, **kwargs: Any) -> distributed.Future[Any]:
        return self.client.submit(logged(self.run_log, tag, self._seconds()), value, *args, key=tag, **kwargs)

    def _map(self, name: str) -> Expectation:
        tags = [f"{name}:{i}" for i in range(self._random.randint(3, 12))]
        futures = [self._submit(tag, i) for i, tag in enumerate(tags)]
        total = self.client.submit(sum, futures, key=name)
        return Expectation(operation=name, future=total, result=sum(range(len(tags))), runs=dict.fromkeys(tags, (1, 1)))

    def _chain(self, name: str) -> Expectation:
        tags = [f"{name}:{i}" for i in range(self._random.randint(2, 6))]
        future: Any = 1
        for tag in tags:
            future = self._submit(tag, future)
        return Expectation(operation=name, future=future, result=1, runs=dict.fromkeys(tags, (1, 1)))

    def _tree(self, name: str) -> Expectation:
        leaves = [f"{name}:{i}" for i in range(8)]
        level = [self._submit(tag, i) for i, tag in enumerate(leaves)]
        depth = 0
        while len(level) > 1:
            depth += 1
            level = [
                self.client.submit(lambda a, b: a + b, level[i], level[i + 1], key=f"{name}:{depth}:{i}")
                for i in range(0, len(level), 2)
            ]
        return Expectation(operation=name, future=level[0], result=28, runs=dict.fromkeys(leaves, (1, 1)))

    def _error(self, name: str) -> Expectation:
        future = self.client.submit(failing(self.run_log, name, times=-1), key=name)
        return Expectation(operation=name, future=future, result=name, runs={name: (1, 1)}, fails=True)

    def _retries(self, name: str) -> Expectation:
        failures = self._random.randint(1, 3)
        future = self.client.submit(failing(self.run_log, name, times=failures), key=name, retries=3)
        return Expectation(operation=name, future=future, result=name, runs={name: (failures + 1, failures + 1)})

    def _forget(self, name: str) -> Expectation:
        distributed.fire_and_forget(self._submit(name, 0))
        return Expectation(operation=name, future=None, result=None, runs={name: (1, 1)})

    def _release(self, name: str) -> Expectation:
        self._submit(name, 0).release()
        return Expectation(operation=name, future=None, result=None, runs={name: (0, 1)})

    def _nested(self, name: str) -> Expectation:
        inner = [f"{name}:{i}" for i in range(3)]
        future = self.client.submit(nested(self.run_log, name, inner), key=name)
        return Expectation(operation=name, future=future, result=3, runs=dict.fromkeys([name, *inner], (1, 1)))

    def _scatter(self, name: str) -> Expectation:
        value = list(range(self._random.randint(1, 50)))
        data = self.client.scatter([value], hash=False)[0]
        future = self.client.submit(logged(self.run_log, name, self._seconds(), apply=sum), data, key=name)
        return Expectation(operation=name, future=future, result=sum(value), runs={name: (1, 1)}, excused=True)


def logged(run_log: Path, tag: str, seconds: float, apply: Callable[[Any], Any] | None = None) -> Callable[..., Any]:
    """A task that notes its run, takes its time, and returns `apply(value)`, or the value itself."""
    path = str(run_log)

    def run(value: Any) -> Any:
        import time

        note(path, tag)
        time.sleep(seconds)
        return value if apply is None else apply(value)

    return run


def failing(run_log: Path, tag: str, *, times: int) -> Callable[[], str]:
    """A task that fails on its first `times` runs (-1: on all), counted in the run log."""
    path = str(run_log)

    def run() -> str:
        note(path, tag)
        ran = Path(path).read_text().split().count(tag)
        if times < 0 or ran <= times:
            raise ValueError(tag)
        return tag

    return run


def nested(run_log: Path, tag: str, inner: list[str]) -> Callable[[], int]:
    """A task that submits tasks and waits for them."""
    path = str(run_log)

    def run() -> int:
        note(path, tag)
        with distributed.worker_client() as client:
            futures = [client.submit(logged(Path(path), name, 0.05), 1, key=name) for name in inner]
            return sum(client.gather(futures))

    return run


def note(path: str, tag: str) -> None:
    """Append one line in one write: it survives this process from then on."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, f"{tag}\n".encode())
    finally:
        os.close(handle)
