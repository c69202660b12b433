"""What the demo shows while it runs: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from types import TracebackType

#: Plain lines: one whenever so much more of the work is done.
_PLAIN_STEP = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """How far a run is.

    Parameters
    ----------
    done, total
        Tasks.
    workers
        Living worker processes.
    scheduler
        State of the scheduler, in a word.
    """

    done: int
    total: int
    workers: int
    scheduler: str


class Board(Protocol):
    """Where a run shows itself."""

    def update(self, snapshot: Snapshot) -> None:
        """Show how far the run is."""

    def say(self, message: str) -> None:
        """Report something that happens, such as a kill."""

    def __enter__(self) -> Self:
        """Begin."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the terminal as it was."""


class LiveBoard:
    """A progress bar below the messages.

    Parameters
    ----------
    title
        What runs.
    console
        A terminal.
    """

    def __init__(self, title: str, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn("{task.completed:.0f}/{task.total:.0f} tasks"),
            TextColumn("workers {task.fields[workers]}"),
            TextColumn("scheduler {task.fields[scheduler]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._bar = self._progress.add_task(title, total=1, workers=0, scheduler="starting")
        self._started_at = time.monotonic()

    def update(self, snapshot: Snapshot) -> None:
        """Show how far the run is."""
        colour = {"running": "green", "dead": "red"}.get(snapshot.scheduler, "yellow")
        self._progress.update(
            self._bar,
            completed=snapshot.done,
            total=snapshot.total,
            workers=snapshot.workers,
            scheduler=f"[{colour}]{snapshot.scheduler}[/]",
        )

    def say(self, message: str) -> None:
        """Report something that happens, above the bar."""
        self._progress.console.print(f"[dim]{time.monotonic() - self._started_at:6.2f} s[/]  {message}")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class PlainBoard:
    """One line for each message and for each tenth of the work.

    Parameters
    ----------
    title
        What runs.
    console
        Where the lines go.
    """

    def __init__(self, title: str, console: Console) -> None:
        self._title = title
        self._console = console
        self._started_at = time.monotonic()
        self._shown = -1

    def update(self, snapshot: Snapshot) -> None:
        """Write a line if another tenth is done."""
        step = int(snapshot.done / snapshot.total / _PLAIN_STEP)
        if step > self._shown:
            self._shown = step
            self.say(
                f"{snapshot.done}/{snapshot.total} tasks, {snapshot.workers} workers, scheduler {snapshot.scheduler}"
            )

    def say(self, message: str) -> None:
        """Write one line."""
        elapsed_seconds = time.monotonic() - self._started_at
        self._console.print(
            f"{elapsed_seconds:6.2f} s  {self._title}: {message}", soft_wrap=True, highlight=False, markup=False
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def make_board(title: str, console: Console) -> Board:
    """Return a live bar for a terminal and plain lines for anything else."""
    return LiveBoard(title, console) if console.is_terminal else PlainBoard(title, console)
