"""Bars with whiskers as SVG, without a plotting library: what the report shows beside its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

#: Median, least, greatest.
Bar = tuple[float, float, float]

_WIDTH, _HEIGHT = 720, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 20, 60, 40
#: Told apart by those who see few colours: Okabe and Ito, "Color Universal Design", 2008.
_COLOURS = ("#999999", "#0072b2", "#e69f00")
_TICKS = 5


def bars(title: str, unit: str, series: Mapping[str, Sequence[Bar]], groups: Sequence[str]) -> str:
    """Draw one group of bars for each name of `groups`, one bar in it for each series; whiskers span all samples."""
    top = _round_up(max(bar[2] for many in series.values() for bar in many))
    inner_width, inner_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def y(value: float) -> float:
        return _TOP + inner_height * (1 - max(0.0, value) / top)

    parts = [_text(_LEFT, 20, f"{title} ({unit})", weight="bold")]
    for tick in range(_TICKS + 1):
        value = top * tick / _TICKS
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ccc"/>'
        )
        parts.append(_text(_LEFT - 6, y(value) + 4, f"{value:g}", anchor="end"))
    slot = inner_width / len(groups)
    width = slot * 0.7 / len(series)
    for number, (name, many) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        legend = _LEFT + number * 180
        parts.append(f'<rect x="{legend}" y="32" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(legend + 18, 43, name))
        for group, (median, low, high) in enumerate(many):
            left = _LEFT + slot * (group + 0.15) + width * number
            middle = left + width / 2
            size = f'width="{width * 0.9:.1f}" height="{y(0) - y(median):.1f}"'
            parts.append(f'<rect x="{left:.1f}" y="{y(median):.1f}" {size} fill="{colour}"/>')
            ends = f'x1="{middle:.1f}" x2="{middle:.1f}" y1="{y(high):.1f}" y2="{y(low):.1f}"'
            parts.append(f'<line {ends} stroke="#333"/>')
    for group, name in enumerate(groups):
        parts.append(_text(_LEFT + slot * (group + 0.5), _HEIGHT - _BOTTOM + 20, name, anchor="middle"))
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">'
    ground = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, ground, *parts, "</svg>", ""])


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}"'
    return f"<text {where}>{escape(text)}</text>"


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5, 10 times a power of ten."""
    power = 1.0
    while power * 10 <= value:
        power *= 10
    while power > value:
        power /= 10
    return next(power * step for step in (1, 2, 2.5, 5, 10) if power * step >= value)
