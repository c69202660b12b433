"""Failures of tasks on a scheduler that schedules nothing: set and cleared without transitions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from distributed.protocol import Serialized, serialize


def clear_error(ts: Any) -> None:
    """A failed task is to run again."""
    ts.exception = ts.exception_blame = ts.traceback = ts.erred_on = None
    ts.state = "released"


def set_error(
    ts: Any,
    blame: Any,
    exception: Any,
    traceback: Any,
    exception_text: str,
    traceback_text: str,
    erred_on: Iterable[str],
) -> None:
    """A task failed; `blame` is the one whose function raised."""
    ts.exception = exception
    ts.traceback = traceback
    ts.exception_text = exception_text
    ts.traceback_text = traceback_text
    ts.erred_on = set(erred_on)
    ts.exception_blame = blame
    ts.state = "erred"


def packed(problem: Exception) -> Serialized:
    """An error as tasks hold it."""
    return Serialized(*serialize(problem))


def fail_with_dependents(ts: Any, exception: Serialized, text: str) -> None:
    """A task cannot run, and nothing that depends on it can."""
    set_error(ts, ts, exception, None, text, "", ())
    reached, stack = {ts}, [ts]
    while stack:
        for dts in stack.pop().dependents - reached:
            reached.add(dts)
            stack.append(dts)
            if dts.state != "erred":
                set_error(dts, ts, None, None, text, "", ())
