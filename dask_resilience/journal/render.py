"""One line a record, for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, Final

from dask_resilience.journal.records import Record

_SHOWN_ITEMS: Final = 3
_SHOWN_CHARACTERS: Final = 48


def render_record(record: Record) -> str:
    """Render a record as one readable line.

    Keys are shortened in the middle, only the first few of many are shown, and of raw data only the size. A field that
    has its default says nothing and is left out.

    Parameters
    ----------
    record
        Any record of the journal.

    Examples
    --------
    >>> from dask_resilience.journal.records import KeysReleased
    >>> render_record(KeysReleased(client="Client-1", keys=("a", "b", "c", "d", "e")))
    "KeysReleased client='Client-1' keys=['a', 'b', 'c', 2 more]"
    """
    shown = [
        f"{each.name}={_field(str(each.type), getattr(record, each.name))}"
        for each in fields(record)  # type: ignore[arg-type]  # every record is a dataclass
        if not _is_default(each, getattr(record, each.name))
    ]
    return " ".join([type(record).__name__, *shown])


def _is_default(each: Field[Any], value: Any) -> bool:
    default = each.default if each.default_factory is MISSING else each.default_factory()
    return default is not MISSING and bool(value == default)


def _field(annotation: str, value: Any) -> str:
    # By the annotation, not the value: a key may be bytes too.
    if annotation == "tuple[bytes, ...]":
        return f"<{len(value)} buffers, {_size(sum(map(len, value)))}>"
    if annotation.startswith("bytes") and value is not None:
        return f"<{_size(len(value))}>"
    if annotation.startswith("tuple["):
        return f"[{_listed(map(_short, value), len(value))}]"
    if isinstance(value, Mapping):
        pairs = (f"{_short(key)}: {_short(item)}" for key, item in value.items())
        return f"{{{_listed(pairs, len(value))}}}"
    return _short(value)


def _listed(items: Iterable[str], count: int) -> str:
    shown = [item for item, _ in zip(items, range(_SHOWN_ITEMS), strict=False)]
    if count > _SHOWN_ITEMS:
        shown.append(f"{count - _SHOWN_ITEMS} more")
    return ", ".join(shown)


def _short(value: object) -> str:
    text = repr(value)
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    half = _SHOWN_CHARACTERS // 2
    return f"{text[: half - 1]}…{text[-half:]}"


def _size(nbytes: int) -> str:
    size, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{nbytes} B" if unit == "B" else f"{size:.1f} {unit}"
