"""Settings: the one place that reads ``dask.config``, and refuses what it does not understand.

Defaults stand in ``resilience.yaml``, their meaning in ``resilience-schema.yaml``, and their types and bounds here,
each beside its field. A misspelt key is an error, because a setting that is silently ignored is found out during
the failure that it was meant for.
"""

from __future__ import annotations

import difflib
import math
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeVar, get_type_hints

import dask.config
import yaml
from dask.utils import format_bytes, format_time, parse_bytes, parse_timedelta

from dask_resilience.errors import ConfigError, StoreError

_Value = TypeVar("_Value")
_DAY: Final = 86_400.0
_MIB: Final = 2**20

#: Settings whose value is a mapping of names that are not ours.
_FREE: Final = frozenset({"storage-options"})

#: Schemes of stores that are behind a network.
_DISTANT: Final = frozenset({"s3", "s3a", "gs", "gcs"})

with Path(__file__).with_name("resilience.yaml").open(encoding="utf-8") as _file:
    _DEFAULTS: Final = yaml.safe_load(_file)
dask.config.update_defaults(_DEFAULTS)


def _setting(
    key: str, parse: Callable[[Any], _Value], *, secret: bool = False, unset: tuple[_Value, _Value] | None = None
) -> Any:
    """A field; `unset` is what null means on a store of this host, and on one behind a network."""
    return field(metadata={"key": key, "parse": parse, "unset": unset}, repr=not secret)


def _text_or_none(raw: Any) -> str | None:
    if raw is None or (isinstance(raw, str) and raw.strip()):
        return raw
    raise ValueError(f"expected text or null, not {raw!r}; put quotes around it")


def _mapping_or_none(raw: Any) -> Mapping[str, Any]:
    if raw is None:
        return {}
    if isinstance(raw, Mapping) and all(isinstance(name, str) for name in raw):
        return dict(raw)
    # Not shown: it may hold a secret.
    raise ValueError(f"expected a mapping of names to values or null, not {type(raw).__name__}")


def _one_of(*choices: str) -> Callable[[Any], str]:
    def parse(raw: Any) -> str:
        if raw not in choices:
            raise ValueError(f"{raw!r} is not one of {', '.join(choices)}")
        return str(raw)

    return parse


def _duration(low_seconds: float, high_seconds: float) -> Callable[[Any], float]:
    def parse(raw: Any) -> float:
        seconds = _quantity(raw, parse_timedelta, "a duration such as '3s' or '500ms'")
        if not low_seconds <= seconds <= high_seconds:
            bounds = f"from {format_time(low_seconds)} to {format_time(high_seconds)}"
            raise ValueError(f"{raw!r} is out of bounds: {bounds}")
        return float(seconds)

    return parse


def _size(low_bytes: int, high_bytes: int) -> Callable[[Any], int]:
    def parse(raw: Any) -> int:
        size = _quantity(raw, parse_bytes, "a size such as '64 MiB'")
        if not low_bytes <= size <= high_bytes:
            raise ValueError(f"{raw!r} is out of bounds: from {format_bytes(low_bytes)} to {format_bytes(high_bytes)}")
        return int(size)

    return parse


def _or_none(parse: Callable[[Any], _Value]) -> Callable[[Any], _Value | None]:
    return lambda raw: None if raw is None else parse(raw)


def _quantity(raw: Any, parse: Callable[[Any], Any], expected: str) -> float:
    if isinstance(raw, bool) or not isinstance(raw, str | int | float) or raw == "":
        raise ValueError(f"expected {expected}, not {raw!r}")
    try:
        value = float(parse(raw))
    except (ValueError, KeyError, IndexError, OverflowError):
        raise ValueError(f"expected {expected}, not {raw!r}") from None
    if not math.isfinite(value):
        raise ValueError(f"expected {expected}, not {raw!r}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalSettings:
    """How the journal is written.

    Parameters
    ----------
    commit_interval_seconds
        How long a record may wait for others, so that one sync commits them together. Unset, 20 ms; 100 ms in an
        object store, where each commit is an object and costs some 10 to 50 ms whatever its size.
    segment_size_bytes
        A segment that has grown to this size is sealed.
    pending_limit_bytes
        How much may wait for the disk before the journal counts as failed.
    on_failure
        What a journal that cannot be written stops.
    """

    commit_interval_seconds: float = _setting("journal.commit-interval", _duration(0.0, 1.0), unset=(0.02, 0.1))
    segment_size_bytes: int = _setting("journal.segment-size", _size(65_536, 1024 * _MIB))
    pending_limit_bytes: int = _setting("journal.pending-limit", _size(_MIB, 65_536 * _MIB))
    on_failure: Literal["stop-acks", "stop-scheduler"] = _setting(
        "journal.on-failure", _one_of("stop-acks", "stop-scheduler")
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotSettings:
    """When the state is written anew, so that the journal behind it can go.

    Parameters
    ----------
    after_bytes
        So much must the journal grow, and as much as the last snapshot is large; None: there are no snapshots.
    """

    after_bytes: int | None = _setting("snapshot.after", _or_none(_size(65_536, 1024 * 1024 * _MIB)))


@dataclass(frozen=True, slots=True, kw_only=True)
class FailoverSettings:
    """How schedulers follow one another.

    Parameters
    ----------
    lease_ttl_seconds
        How long a lease holds without renewal. Unset, 3 s; 10 s in an object store: a renewal is sent every third of
        it, a request that gets no answer is given up and sent again after 2 s, and 10 s / 3 leaves room for both.
    grace_seconds
        How long a new scheduler waits for workers that may be alive.
    client_grace_seconds
        How long a client that vanished keeps its keys.
    link_grace_seconds
        How long a worker whose link broke may take to come back before its tasks run elsewhere.
    """

    lease_ttl_seconds: float = _setting("failover.lease-ttl", _duration(0.5, 600.0), unset=(3.0, 10.0))
    grace_seconds: float = _setting("failover.grace", _duration(0.1, 3600.0))
    client_grace_seconds: float = _setting("failover.client-grace", _duration(0.1, _DAY))
    link_grace_seconds: float = _setting("failover.link-grace", _duration(0.0, 3600.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """How a worker bears the absence of a scheduler.

    Parameters
    ----------
    patience_seconds
        How long it keeps its results and looks for a scheduler before it closes.
    """

    patience_seconds: float = _setting("worker.patience", _duration(1.0, 7 * _DAY))


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings:
    """How a client bears the absence of a scheduler.

    Parameters
    ----------
    patience_seconds
        How long it looks for a scheduler before its futures raise ``SchedulerGone``.
    """

    patience_seconds: float = _setting("client.patience", _duration(1.0, 7 * _DAY))


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything under ``resilience`` in Dask's configuration, checked.

    Parameters
    ----------
    store
        Directory or URL of journal and lease; None for `default_store`.
    storage_options
        What the library behind a remote store is given; empty for nothing. Not shown, since it may hold secrets.
    cluster
        The name that the store must carry; None for any.
    leader_poll_seconds
        How often a member without a scheduler looks for the leader.
    journal, snapshot, failover, worker, client
        The settings of each part.

    Examples
    --------
    >>> import dask
    >>> with dask.config.set({"resilience.failover.lease-ttl": "5s"}):
    ...     Settings.load().failover.lease_ttl_seconds
    5.0
    """

    store: str | None = _setting("store", _text_or_none)
    storage_options: Mapping[str, Any] = _setting("storage-options", _mapping_or_none, secret=True)
    cluster: str | None = _setting("cluster", _text_or_none)
    leader_poll_seconds: float = _setting("leader-poll", _duration(0.01, 60.0))
    journal: JournalSettings
    snapshot: SnapshotSettings
    failover: FailoverSettings
    worker: WorkerSettings
    client: ClientSettings

    @classmethod
    def load(cls) -> Self:
        """Read ``dask.config``.

        Returns
        -------
        Settings
            Valid in themselves and with each other.

        Raises
        ------
        ConfigError
            A key is unknown, a value is of the wrong type or out of bounds, or two contradict each other.
        """
        tree = dask.config.get("resilience", {})
        if not isinstance(tree, Mapping):
            raise ConfigError("resilience", f"expected a mapping of settings, not {tree!r}")
        _refuse_unknown(tree)
        settings = _read(cls, distant=_is_distant(dask.config.get("resilience.store", None)))
        _check_relations(settings)
        return settings


def keys(part: type = Settings) -> Iterator[str]:
    """Every known key, without the leading ``resilience.``.

    Parameters
    ----------
    part
        The settings class to list, all by default.

    Yields
    ------
    str
        Such as ``failover.lease-ttl``.
    """
    hints = get_type_hints(part)
    for item in fields(part):
        if "key" in item.metadata:
            yield item.metadata["key"]
        else:
            yield from keys(hints[item.name])


def _is_distant(store: Any) -> bool:
    return isinstance(store, str) and store.partition("://")[0].lower() in _DISTANT


def _read(part: type[_Value], *, distant: bool) -> _Value:
    hints = get_type_hints(part)
    values: dict[str, Any] = {}
    for item in fields(part):  # type: ignore[arg-type]
        if "key" not in item.metadata:
            values[item.name] = _read(hints[item.name], distant=distant)
            continue
        # By the full dotted key: a name from the environment stands in the tree with underscores.
        key = f"resilience.{item.metadata['key']}"
        try:
            # The defaults are gone where this module was first imported inside a `dask.config.set` that has ended.
            raw = dask.config.get(key, dask.config.get(key, config=_DEFAULTS))
            unset = item.metadata["unset"]
            values[item.name] = item.metadata["parse"](raw) if raw is not None or unset is None else unset[distant]
        except ValueError as error:
            raise ConfigError(key, str(error)) from None
    return part(**values)


def _refuse_unknown(tree: Mapping[Any, Any]) -> None:
    known = set(keys())
    sections = {key.rpartition(".")[0] for key in known} - {""}
    for key, value in _flatten(tree):
        if key in sections and not isinstance(value, Mapping):
            raise ConfigError(f"resilience.{key}", f"expected a mapping of settings, not {value!r}")
        if key not in known | sections:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"resilience.{key}", f"there is no such setting; did you mean resilience.{close}?")


def _flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = prefix + str(name).replace("_", "-")
        if isinstance(value, Mapping) and value and key not in _FREE:
            yield from _flatten(value, f"{key}.")
        else:
            yield key, value


def _check_relations(settings: Settings) -> None:
    failover, journal = settings.failover, settings.journal
    # (smaller key, its value, larger key, its value): equal is allowed nowhere, because each pair races.
    pairs = (
        # A standby that looks less often than leases end finds a takeover late.
        ("leader-poll", settings.leader_poll_seconds, "failover.lease-ttl", failover.lease_ttl_seconds),
        # The fence is looked for at each commit; a commit must fit into the lease.
        ("journal.commit-interval", journal.commit_interval_seconds, "failover.lease-ttl", failover.lease_ttl_seconds),
        # Members find the new scheduler by polling; who waits less gives up on all of them.
        ("leader-poll", settings.leader_poll_seconds, "failover.grace", failover.grace_seconds),
        ("leader-poll", settings.leader_poll_seconds, "failover.client-grace", failover.client_grace_seconds),
        # A standby waits a whole TTL before it may rule; members must outlast that.
        ("failover.lease-ttl", failover.lease_ttl_seconds, "worker.patience", settings.worker.patience_seconds),
        ("failover.lease-ttl", failover.lease_ttl_seconds, "client.patience", settings.client.patience_seconds),
    )
    for small, low, large, high in pairs:
        if low >= high:
            raise ConfigError(
                f"resilience.{small}",
                f"{format_time(low)} must be shorter than resilience.{large}, {format_time(high)}",
            )
    if journal.segment_size_bytes > journal.pending_limit_bytes:
        raise ConfigError(
            "resilience.journal.pending-limit",
            f"{format_bytes(journal.pending_limit_bytes)} must hold a whole segment: raise it to "
            f"resilience.journal.segment-size, {format_bytes(journal.segment_size_bytes)}, or more",
        )


def default_store(port: int) -> str:
    """Create the private directory that is the store where ``resilience.store`` is unset.

    Parameters
    ----------
    port
        The scheduler's port. A scheduler that is started again on the same port finds the same store; 0, which means
        any free port, gives a fresh store each time.

    Returns
    -------
    str
        An absolute path below Dask's ``temporary-directory`` or the system's.

    Raises
    ------
    StoreError
        The directory cannot be created, or others can write into it: a store holds pickles, and whoever can write
        to it runs code in the scheduler.
    """
    top = Path(dask.config.get("temporary-directory", None) or tempfile.gettempdir()).absolute()
    base = top / f"dask-resilience-{os.getuid()}"
    _make_private(base)
    if port == 0:
        return tempfile.mkdtemp(prefix="scheduler-", dir=base)
    store = base / f"scheduler-{port}"
    _make_private(store)
    return str(store)


def _make_private(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        # lstat: in a directory that all may write to, somebody else's link may be waiting under our name.
        found = path.lstat()
    except OSError as error:
        raise StoreError(
            str(path), f"cannot be created ({error.strerror}); set resilience.store or Dask's temporary-directory"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise StoreError(
            str(path),
            "is not a directory that only this user can enter; remove it, chmod it to 700, or set resilience.store",
        )
