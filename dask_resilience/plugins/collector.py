"""Python's garbage collector while a state is rebuilt.

All that a replay creates stays, some forty objects a task, and the collector looks at it again and again as it grows:
more than a third of the CPU time of a recovery of 100,000 tasks. Collecting at every 100,000 instead of every 700
objects brings that to about a tenth. It is not switched off, since a long journal also leaves garbage: tasks that were
forgotten later.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_OBJECTS = 100_000

_lock = threading.Lock()
_usual: list[tuple[int, int, int]] = []


@contextmanager
def collecting_rarely() -> Iterator[None]:
    """Collect young garbage every 100,000 objects. May be nested, and entered by several threads."""
    with _lock:
        _usual.append(gc.get_threshold())
        gc.set_threshold(max(_OBJECTS, _usual[0][0]) if _usual[0][0] else 0, *_usual[0][1:])
    try:
        yield
    finally:
        with _lock:
            # Whoever leaves last restores what the first one found, in whichever order they leave.
            if len(_usual) == 1:
                gc.set_threshold(*_usual[0])
            _usual.pop()
