"""A Dask cluster that goes on when its scheduler dies.

The public names are imported when they are first used: the scheduler's preload and ``dask --help`` import this
package and want none of the client.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dask_resilience.client import Client
    from dask_resilience.plugins.install import install

__version__ = "0.1.0"

__all__ = ["Client", "__version__", "install"]

_HOMES = {"Client": "dask_resilience.client", "install": "dask_resilience.plugins.install"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
