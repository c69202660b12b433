"""Named places where a test kills or stops this process.

Crash safety is claimed between any two steps, so the steps carry names and a test dies at each. Off by default, a
failpoint costs one lookup in an empty dictionary.

``DASK_RESILIENCE_FAILPOINTS="journal.after-sync=kill@3;takeover.after-fence=stop"`` kills this process by SIGKILL the
third time it comes past the first name, and stops it by SIGSTOP the first time it comes past the second. ``name=kill``
is short for ``name=kill@1``, and ``name=stop:2`` is another way to write ``name=stop@2``.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Mapping

#: The environment variable, read once at import.
VARIABLE = "DASK_RESILIENCE_FAILPOINTS"

#: Every name that the code passes; anything else in the variable is a mistake of the test.
NAMES = frozenset(
    {
        "journal.after-open",
        "journal.before-write",
        "journal.after-write",
        "journal.after-sync",
        "journal.after-fence-check",
        "journal.after-ack",
        "journal.after-footer",
        "snapshot.before-data",
        "snapshot.after-data",
        "snapshot.after-check",
        "snapshot.after-marker",
        "retention.before-segment",
        "retention.after-marker",
        "takeover.after-cluster",
        "takeover.after-lease",
        "takeover.after-fence",
        "takeover.after-log-read",
        "takeover.after-epoch-started",
        "graph.before-record",
        "graph.after-record",
        "graph.after-apply",
        "recovery.after-replay",
        "recovery.after-gather",
        "recovery.after-clients",
        "recovery.after-plan",
        "recovery.before-serving",
        "client.before-registration",
    }
)

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def parse(text: str) -> dict[str, tuple[int, int]]:
    """Read the variable.

    Parameters
    ----------
    text
        Its value.

    Returns
    -------
    dict
        Name to signal number and which pass it strikes at, counted from one.

    Raises
    ------
    ValueError
        For an unknown name or action.

    Examples
    --------
    >>> parse("journal.after-sync=stop@3")["journal.after-sync"][1]
    3
    """
    armed: dict[str, tuple[int, int]] = {}
    for item in filter(None, (part.strip() for part in text.split(";"))):
        match = re.fullmatch(r"(?P<name>[\w.-]+)=(?P<action>kill|stop)(?:[@:](?P<nth>[1-9]\d*))?", item)
        if match is None or match["name"] not in NAMES:
            raise ValueError(f"{VARIABLE}: {item!r} is not name=kill@n or name=stop@n with a name of {sorted(NAMES)}")
        armed[match["name"]] = (_SIGNALS[match["action"]], int(match["nth"] or 1))
    return armed


def arm(points: Mapping[str, tuple[int, int]]) -> None:
    """Replace what is armed in this process by what `parse` returned."""
    _armed.clear()
    _armed.update(points)


def failpoint(name: str) -> None:
    """Die or stop here if this name is armed and its turn has come.

    Parameters
    ----------
    name
        One of `NAMES`.
    """
    if _armed and name in _armed:
        number, remaining = _armed.pop(name)
        if remaining > 1:
            _armed[name] = (number, remaining - 1)
        else:
            os.kill(os.getpid(), number)


_armed: dict[str, tuple[int, int]] = parse(os.environ.get(VARIABLE, ""))
