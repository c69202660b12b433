"""From a record to its payload and back: a MessagePack map of the fields by name.

Unknown fields are ignored and fields with defaults may be absent, so a field can be added without a new format
version. The same check of field types runs before a write and after a read: a record that could be written but not
read again would make the whole journal unreadable.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from operator import attrgetter
from types import NoneType
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]  # it ships no types

from dask_resilience.journal.records import REGISTRY, Record

#: From here on, raw data goes to the store as it came; below, a copy is cheaper than one more buffer.
_COPIED_BYTES: Final = 4096

_KEY: Final = (str, bytes, int, float, tuple)
_RAW: Final = (bytes, bytearray, memoryview)

#: What a field may hold, by its annotation. A new annotation must be added here, or importing this module fails.
_FIELD_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "str": (str,),
    "int": (int,),
    "bool": (bool,),
    "bytes": _RAW,
    "bytes | None": (*_RAW, NoneType),
    "Key": _KEY,
    "Address": (str,),
    "Address | None": (str, NoneType),
    "PluginKind": (str,),
    "SealedEnd | None": (tuple, NoneType),
    "tuple[Key, ...]": (tuple,),
    "tuple[bytes, ...]": (tuple,),
    "Mapping[str, str]": (dict,),
    "Mapping[Key, int]": (dict,),
    "Mapping[Key, tuple[Address, ...]]": (dict,),
}
_RAW_ANNOTATIONS: Final = frozenset({"bytes", "bytes | None", "tuple[bytes, ...]"})


class _Shape:
    """What is known about a record class before any record is seen."""

    __slots__ = ("names", "raw_indices", "raw_names", "required", "types", "types_by_name", "values")

    def __init__(self, cls: type[Record]) -> None:
        declared = fields(cls)  # type: ignore[arg-type]  # every class of the registry is a dataclass
        annotations = [str(field.type) for field in declared]
        self.names = tuple(field.name for field in declared)
        self.types = tuple(_FIELD_TYPES[annotation] for annotation in annotations)
        self.types_by_name = dict(zip(self.names, self.types, strict=True))
        self.raw_names = frozenset(field.name for field in declared if field.type in _RAW_ANNOTATIONS)
        self.raw_indices = tuple(index for index, name in enumerate(self.names) if name in self.raw_names)
        self.required = frozenset(
            field.name for field in declared if field.default is MISSING and field.default_factory is MISSING
        )
        self.values: Callable[[Record], tuple[Any, ...]] = _getter(self.names)


def _getter(names: Sequence[str]) -> Callable[[Record], tuple[Any, ...]]:
    get = attrgetter(*names)
    # attrgetter of one name gives the bare value, of several a tuple.
    return get if len(names) > 1 else lambda record: (get(record),)


_SHAPES: Final = {cls: _Shape(cls) for cls in REGISTRY.values()}


def to_payload(record: Record) -> list[bytes]:
    r"""Encode the fields of a record.

    Parameters
    ----------
    record
        An instance of a class in `REGISTRY`.

    Returns
    -------
    list of bytes
        The payload in pieces. Large raw data is among them as it came, not copied.

    Raises
    ------
    TypeError, ValueError, OverflowError
        A field has the wrong type or holds what the format cannot express.

    Examples
    --------
    >>> from dask_resilience.journal.records import ClientLeft
    >>> to_payload(ClientLeft(client="c"))
    [b'\x81\xa6client\xa1c']
    """
    shape = _SHAPES[type(record)]
    values = shape.values(record)
    for value, types in zip(values, shape.types):  # noqa: B905  # strict costs time; equal by construction
        if not isinstance(value, types):
            raise TypeError(_complaint(shape, values))
    if shape.raw_names and not _is_small(shape, values):
        return _packed_in_pieces(shape, values)
    return [msgpack.packb(dict(zip(shape.names, values)))]  # noqa: B905


def from_payload(number: int, payload: bytes) -> Record:
    """Decode a record.

    Parameters
    ----------
    number
        Type number of the record.
    payload
        The whole payload.

    Raises
    ------
    KeyError
        The number is not in `REGISTRY`.
    ValueError
        The payload is not what this type of record looks like.
    """
    cls = REGISTRY[number]
    shape = _SHAPES[cls]
    named = {name: value for name, value in unpack_map(payload).items() if name in shape.types_by_name}
    missing = shape.required - named.keys()
    if missing:
        raise ValueError(f"{cls.__name__} lacks {', '.join(sorted(missing))}")
    for name, value in named.items():
        if not isinstance(value, shape.types_by_name[name]):
            raise ValueError(f"{cls.__name__}.{name} is of type {type(value).__name__}")  # noqa: TRY004  # of data
    return cls(**named)


def unpack_map(payload: bytes) -> dict[Any, Any]:
    """Decode one MessagePack map, or raise ValueError."""
    try:
        # Given all bytes at once, unpackb takes their count as its limit for each str, bin, array and map.
        named = msgpack.unpackb(payload, use_list=False, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ValueError(f"the payload is not MessagePack: {error or type(error).__name__}") from error
    if not isinstance(named, dict):
        raise ValueError(f"the payload is not a map but of type {type(named).__name__}")  # noqa: TRY004  # of data
    return named


def _is_small(shape: _Shape, values: Sequence[Any]) -> bool:
    """Whether a copy of all raw data is cheaper than to handle it apart: most graphs, submitted one by one."""
    left = _COPIED_BYTES
    for index in shape.raw_indices:
        value = values[index]
        for raw in value if type(value) is tuple else (value,):
            # A memoryview has a length in items, and may have gaps.
            if type(raw) is bytes:
                left -= len(raw)
            elif raw is not None:
                return False
    return left > 0


def _packed_in_pieces(shape: _Shape, values: Sequence[Any]) -> list[bytes]:
    pieces: list[bytes] = []
    small = bytearray([0x80 | len(values)])

    def add_raw(raw: bytes) -> None:
        # The checksum takes nothing but bytes; bytes() of bytes is no copy.
        raw = bytes(raw)
        small.extend(_bin_header(len(raw)))
        if len(raw) < _COPIED_BYTES:
            small.extend(raw)
        else:
            pieces.extend((bytes(small), raw))
            small.clear()

    for name, value in zip(shape.names, values, strict=True):
        if name not in shape.raw_names or value is None:
            # A map of one without its header byte: so nesting has the limit that holds when the whole map is read.
            small += msgpack.packb({name: value})[1:]
            continue
        small += msgpack.packb(name)
        if isinstance(value, tuple):
            small += _array_header(len(value))
            for raw in value:
                add_raw(raw)
        else:
            add_raw(value)
    if small:
        pieces.append(bytes(small))
    return pieces


def _bin_header(length: int) -> bytes:
    if length < 1 << 8:
        return struct.pack(">BB", 0xC4, length)
    if length < 1 << 16:
        return struct.pack(">BH", 0xC5, length)
    return struct.pack(">BI", 0xC6, length)


def _array_header(length: int) -> bytes:
    if length < 1 << 4:
        return bytes([0x90 | length])
    if length < 1 << 16:
        return struct.pack(">BH", 0xDC, length)
    return struct.pack(">BI", 0xDD, length)


def _complaint(shape: _Shape, values: Sequence[Any]) -> str:
    return ", ".join(
        f"{name} is {type(value).__name__}, not {' or '.join(each.__name__ for each in types)}"
        for name, value, types in zip(shape.names, values, shape.types, strict=True)
        if not isinstance(value, types)
    )
