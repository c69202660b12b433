"""Five questions to the flights, each written once for pandas and for Dask frames.

In pandas they give the expected results. In Dask two of them shuffle peer to peer: `delays_by_weather` joins two
large frames, `rotations` regroups all flights by aircraft. Delays and distances are whole numbers far below
2**53, so their sums are exact in any order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Callable

    from dask_resilience.chaos.flights import Frame, Tables

_DELAYS = ["dep_delay", "arr_delay"]
_SUMMARY = ["count", "sum", "max"]


def delays_by_carrier(tables: Tables) -> Frame:
    """How late does each airline leave and arrive?"""
    return tables.flights.groupby("carrier")[_DELAYS].agg(_SUMMARY)


def delays_by_destination(tables: Tables) -> Frame:
    """How late is one at each airport?"""
    names = tables.airports[["faa", "name"]]
    flights = tables.flights.merge(names, left_on="dest", right_on="faa", how="inner")
    return flights.groupby("name")[_DELAYS].agg(_SUMMARY)


def delays_by_weather(tables: Tables) -> Frame:
    """How much do rain and fog cost at each hour of the day?"""
    broadcast = {"broadcast": False} if tables.shuffled else {}
    weather = tables.weather[["origin", "time_hour", "precip", "visib"]]
    flights = tables.flights.merge(weather, on=["origin", "time_hour"], how="inner", **tables.shuffled, **broadcast)
    flights = flights.assign(rain=flights["precip"] > 0, fog=flights["visib"] < 3)
    return flights.groupby(["hour", "rain", "fog"])[_DELAYS].agg(_SUMMARY)


def distance_by_manufacturer(tables: Tables) -> Frame:
    """How far, and with how many seats, fly the planes of each manufacturer?"""
    planes = tables.planes[["tailnum", "manufacturer", "seats"]]
    flights = tables.flights.merge(planes, on="tailnum", how="inner")
    return flights.groupby("manufacturer")[["seats", "distance"]].agg(_SUMMARY)


def rotations(tables: Tables) -> Frame:
    """How often does each aircraft change its New York airport between two departures?"""
    flights = tables.flights[["tailnum", "origin", "time_hour", "flight", "distance"]]
    flights = flights.dropna(subset=["tailnum"])
    if not tables.shuffled:
        return _rotations_of(flights)
    meta = _rotations_of(flights._meta)  # noqa: SLF001 - Dask's documented way to an empty frame
    return flights.shuffle("tailnum", **tables.shuffled).map_partitions(_rotations_of, meta=meta)


def _rotations_of(flights: Frame) -> Frame:
    ordered = flights.sort_values(["tailnum", "time_hour", "flight"])
    previous = ordered.groupby("tailnum")["origin"].shift()
    ordered = ordered.assign(changes=(previous.notna() & (previous != ordered["origin"])).astype("int64"))
    return ordered.groupby("tailnum").agg({"changes": "sum", "distance": "sum", "flight": "count"})


QUERIES: dict[str, Callable[[Tables], Frame]] = {
    query.__name__: query
    for query in (delays_by_carrier, delays_by_destination, delays_by_weather, distance_by_manufacturer, rotations)
}


def frame_difference(found: Frame, expected: Frame) -> str | None:
    """Say how a result differs from the expected one, whatever the order of its rows; None when equal."""
    try:
        pd.testing.assert_frame_equal(
            found.sort_index(), expected.sort_index(), check_exact=True, check_index_type=False, check_column_type=False
        )
    except AssertionError as difference:
        return " ".join(str(difference).split())
    return None
