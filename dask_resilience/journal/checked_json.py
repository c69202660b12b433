"""The JSON of the store's small objects, with a checksum of its own; see ``docs/reference/journal-format.md``.

Version 2 ends in the checksum of all before it, in a form that is compared byte for byte. So a flipped bit is found
wherever it is: one before the checksum does not fit it, and one in it leaves no checksum or a wrong one. Version 1 had
none, and no single flip makes a 1 of the 2 that says that there must be one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

import google_crc32c

#: The version that is written, and the newest that is read.
VERSION: Final = 2

_END: Final = re.compile(rb', "crc32c": "([0-9a-f]{8})"\}\Z')


class NewerObject(ValueError):
    """A newer release wrote the object."""


def encode_checked(fields: Mapping[str, Any]) -> bytes:
    """Write fields as a JSON object of the present version.

    Parameters
    ----------
    fields
        One or more, of what JSON knows; none is called ``version`` or ``crc32c``.

    Examples
    --------
    >>> encode_checked({"epoch": 7})
    b'{"version": 2, "epoch": 7, "crc32c": "fbbb3d86"}'
    """
    written = json.dumps({"version": VERSION, **fields}).encode().removesuffix(b"}")
    return b'%b, "crc32c": "%08x"}' % (written, google_crc32c.value(written))


def decode_checked(data: bytes) -> dict[str, Any]:
    """Read the fields back, of this and every older version, without the version and the checksum.

    Raises
    ------
    NewerObject
        A newer release wrote them.
    ValueError
        The bytes are not what was written.
    """
    end = _END.search(data)
    if end is not None and int(end[1], 16) != google_crc32c.value(data[: end.start()]):
        raise ValueError("its checksum does not fit")
    fields = json.loads(data)
    if not isinstance(fields, dict):
        raise ValueError("it is no JSON object")  # noqa: TRY004 - the argument has the right type
    version = fields.pop("version", None)
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"version {version!r} was never written")
    if version > VERSION:
        raise NewerObject(f"it has format {version}, this release knows up to {VERSION}; install a newer release")
    if version == VERSION and end is None:
        raise ValueError("its checksum is missing")
    if end is not None:
        del fields["crc32c"]
    return fields


def is_checked(data: bytes) -> bool:
    """Tell whether an object ends in a checksum, right or wrong."""
    return _END.search(data) is not None
