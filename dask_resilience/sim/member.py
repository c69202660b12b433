"""What workers and clients have in common: they look for the leader, join, and leave a silent link."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Final

from dask_resilience.errors import StoreError
from dask_resilience.sim.loop import Process
from dask_resilience.sim.network import Link, Message
from dask_resilience.storage.leadership import leader

if TYPE_CHECKING:
    from dask_resilience.sim.cluster import Cluster

#: A member that heard nothing for so long looks for another leader.
SILENCE_SECONDS: Final = 3.0
SEARCH_SECONDS: Final = 0.4


class Member(ABC):
    """Base of workers and clients.

    Parameters
    ----------
    cluster
        Where it belongs.
    process
        Where it runs.
    """

    def __init__(self, cluster: Cluster, process: Process) -> None:
        self.cluster = cluster
        self.process = process
        self.epoch = 0
        self.link: Link | None = None
        self._heard_seconds = 0.0
        #: Whether the leader answered on the present link.
        self._welcome = False
        self._view = cluster.view(process)
        cluster.network.listen(self)
        process.later(0.0, self._search)
        process.later(SILENCE_SECONDS, self._watch)

    def accept(self, link: Link) -> bool:  # noqa: ARG002 -- none is welcome
        """Members call; nobody calls them."""
        return False

    def receive(self, link: Link, message: Message) -> None:
        """Take a message of the leader."""
        if link is not self.link:
            return
        self._heard_seconds = self.process.loop.now_seconds
        if message["op"] == "welcome":
            if message["epoch"] < self.epoch:
                link.close()  # a leader that was replaced and does not know it
                return
            self.epoch = message["epoch"]
            self._welcome = True
        elif message["op"] != "beat":
            getattr(self, f"_on_{message['op']}")(message)

    def link_broken(self, link: Link) -> None:
        """Look for the leader again."""
        if link is self.link:
            self.link = None
            self.left_alone()
            if self._welcome:
                self.process.later(0.0, self._search)
            else:
                self._search_later()

    def tell(self, op: str, *, repeatable: bool = False, **fields: Any) -> None:
        """Send to the leader. Without a link nothing is sent: what matters is said when joining."""
        if self.link is not None and self.link.usable_by(self):
            self.link.send(self, {"op": op, **fields}, repeatable=repeatable)

    @abstractmethod
    def joining(self) -> dict[str, Any]:
        """Say what this member holds; the first message on a link."""

    def left_alone(self) -> None:  # noqa: B027 -- not every member has something
        """Give back what only a leader can go on with."""

    def _search(self) -> None:
        if self.link is not None:
            return
        try:
            found = leader(self._view)
        except StoreError:
            found = None
        if found is not None and found.epoch >= self.epoch:
            self._heard_seconds, self._welcome = self.process.loop.now_seconds, False
            self.link = self.cluster.network.connect(self, found.address)
        if self.link is None:
            self._search_later()
        else:
            self.link.send(self, self.joining())

    def _search_later(self) -> None:
        self.process.later(SEARCH_SECONDS * self.process.loop.between(0.5, 1.5), self._search)

    def _watch(self) -> None:
        if self.link is not None and self.process.loop.now_seconds - self._heard_seconds > SILENCE_SECONDS:
            self.process.loop.note(self.process, "hears nothing")
            link = self.link
            link.close()
            self.link_broken(link)
        self.process.later(SILENCE_SECONDS / 3, self._watch)
