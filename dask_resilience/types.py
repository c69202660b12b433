"""Names for the plain values that every layer passes around."""

from __future__ import annotations

from typing import TypeAlias

#: A Dask key: what `dask.typing.Key` allows, without importing Dask.
Key: TypeAlias = str | bytes | int | float | tuple["Key", ...]

#: A worker's contact address, such as ``tcp://10.0.0.5:38211``.
Address: TypeAlias = str
