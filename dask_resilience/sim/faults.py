"""What goes wrong in a run, and when: drawn from the seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from dask_resilience.failpoints import NAMES
from dask_resilience.sim.loop import Process
from dask_resilience.sim.store import STORE_HOST
from dask_resilience.sim.strand import Strand, die_if_killed

if TYPE_CHECKING:
    from dask_resilience.sim.cluster import Cluster

#: What can hit a cluster whose members stay well, and what else can.
GENTLE: Final = ("kill leader", "crash host", "failpoint", "failpoint", "kill standby")
ROUGH: Final = (
    *GENTLE,
    "stop leader",
    "cut leader from store",
    "cut leader from member",
    "kill worker",
    "cut worker",
    "kill client",
    "stop worker",
)


class Faults:
    """Draws faults and lets them happen.

    Parameters
    ----------
    cluster
        Where.
    count
        How many.
    """

    def __init__(self, cluster: Cluster, *, count: int) -> None:
        self._cluster = cluster
        self._loop = cluster.loop
        #: Name of a failpoint to how many times it is still passed before it strikes, and what it does then.
        self._armed: dict[str, tuple[int, str]] = {}
        kinds = GENTLE if cluster.terms.gentle else ROUGH
        for _ in range(count):
            self._loop.later(
                self._loop.between(0.5, cluster.terms.busy_seconds), self._strike, self._loop.rng.choice(kinds)
            )

    def disarm(self) -> None:
        """Let no failpoint strike any more."""
        self._armed.clear()

    def passed(self, name: str) -> None:
        """Take the place of `failpoint` in the code under simulation."""
        strand = Strand.current()
        if strand is None or name not in self._armed:
            return
        remaining, what = self._armed.pop(name)
        if remaining:
            self._armed[name] = (remaining - 1, what)
            return
        self._cluster.history.reached[f"{what} at {name}"] += 1
        self._loop.note(what, "at", name)
        if what == "stop":
            strand.process.stop(self._stop_seconds())
            strand.block(0.0)
        else:
            self._cluster.end(strand.process, crash=what == "crash")
            die_if_killed()

    def _strike(self, kind: str) -> None:
        self._loop.note("fault:", kind)
        self._cluster.history.reached[kind] += 1
        deeds: dict[str, Callable[[], None]] = {
            "kill leader": lambda: self._end(self._cluster.leader_process(), crash=False),
            "crash host": lambda: self._end(self._cluster.leader_process(), crash=True),
            "kill standby": lambda: self._end(self._cluster.standby_process(), crash=False),
            "failpoint": self._arm,
            "stop leader": lambda: self._stop(self._cluster.leader_process()),
            "cut leader from store": lambda: self._cut_leader(STORE_HOST),
            "cut leader from member": lambda: self._cut_leader(self._loop.rng.choice(self._cluster.member_hosts())),
            "kill worker": lambda: self._end(self._cluster.some_worker(), crash=False),
            "stop worker": lambda: self._stop(self._cluster.some_worker()),
            "cut worker": self._cut_worker,
            "kill client": lambda: self._end(self._cluster.some_client(), crash=False),
        }
        deeds[kind]()

    def _end(self, process: Process | None, *, crash: bool) -> None:
        if process is not None:
            self._cluster.end(process, crash=crash)

    def _stop(self, process: Process | None) -> None:
        if process is not None:
            process.stop(self._stop_seconds())

    def _stop_seconds(self) -> float:
        return self._loop.between(0.1, 3 * self._cluster.terms.ttl_seconds)

    def _arm(self) -> None:
        what = self._loop.rng.choice(("kill", "crash") if self._cluster.terms.gentle else ("kill", "crash", "stop"))
        self._armed[self._loop.rng.choice(sorted(NAMES))] = (self._loop.rng.randrange(4), what)

    def _cut_leader(self, other: str) -> None:
        leader = self._cluster.leader_process()
        if leader is not None:
            self._cut(leader.host, other)

    def _cut_worker(self) -> None:
        worker = self._cluster.some_worker()
        if worker is not None:
            for host in self._cluster.scheduler_hosts():
                self._cut(worker.host, host)

    def _cut(self, one: str, other: str) -> None:
        self._loop.note("cut", one, other)
        self._cluster.network.cut(one, other)
        self._loop.later(self._loop.between(0.5, 15.0), self._cluster.network.join, one, other)
