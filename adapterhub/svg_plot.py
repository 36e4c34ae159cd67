"""Plots as SVG text: curves over steps, values with their intervals, bars. Colors come from the page's style sheet.

Each plot is one `<svg class="plot">` with a text alternative. Names and labels are escaped. Classes to style: `grid`,
`interval`, `bar`, and the class of each curve.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT, _BOTTOM = 760, 260, 34
_LEFT, _RIGHT = 56, 16
"""Margins of a line plot, for the labels of its axes."""
_NAMES_LEFT, _VALUES_RIGHT = 170, 70
"""Margins of an interval plot, for names and values."""
_ROW, _BAR_ROW = 34, 18
_MAX_NAME = 22
"""Characters of a name that fit beside its interval."""


@dataclass(frozen=True)
class Curve:
    """Values over steps, in the order of the steps."""

    points: Sequence[tuple[int, float]]
    css_class: str
    name: str = ""
    """Name in the legend; empty: not in the legend."""


@dataclass(frozen=True)
class Interval:
    """A value, and the bounds of its interval."""

    name: str
    value: float
    low: float
    high: float


def line_plot(curves: Sequence[Curve], *, label: str, from_zero: bool = False) -> str:
    """Return the curves over steps; an empty text when no curve has a finite value. Non-finite values are left out."""
    drawn = [(one, [(step, value) for step, value in one.points if math.isfinite(value)]) for one in curves]
    points = [point for _, finite in drawn for point in finite]
    if not points:
        return ""
    values = [value for _, value in points] + ([0.0] if from_zero else [])
    ticks = _ticks(min(values), max(values))
    low, high = ticks[0], ticks[-1]
    first, last = min(step for step, _ in points), max(step for step, _ in points)

    def x(step: float) -> float:
        return _LEFT + (step - first) / (last - first or 1) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return 14 + (high - value) / (high - low or 1) * (_HEIGHT - 14 - _BOTTOM)

    lines = [
        _polyline(one.css_class, [(x(step), y(value)) for step, value in finite]) for one, finite in drawn if finite
    ]
    named = [one for one, finite in drawn if finite and one.name]
    grid = [_value_tick(tick, y(tick)) for tick in ticks]
    return _svg([*grid, *lines, *_step_ticks(first, last, x), *_legend(named)], height=_HEIGHT, label=label)


def interval_plot(intervals: Sequence[Interval], *, label: str) -> str:
    """Return a dot and a whisker for each interval, in the order given; an empty text for none."""
    if not intervals:
        return ""
    low, high = min(one.low for one in intervals), max(one.high for one in intervals)
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def x(value: float) -> float:
        return _NAMES_LEFT + (value - low) / (high - low or 1) * (_WIDTH - _NAMES_LEFT - _VALUES_RIGHT)

    bottom = _ROW * len(intervals) + 12
    axis = [
        f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="8" y2="{bottom}"/>'
        f'<text x="{x(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>'
        for tick in ticks
    ]
    rows = [_whisker(one, _ROW * index + 24, x) for index, one in enumerate(intervals)]
    return _svg([*axis, *rows], height=bottom + 26, label=label)


def bar_plot(bars: Sequence[tuple[str, int]], *, label: str) -> str:
    """Return a horizontal bar for each (name, count); an empty text for none."""
    if not bars:
        return ""
    most = max(count for _, count in bars) or 1
    rows = [
        f'<text x="110" y="{_BAR_ROW * at + 14}" text-anchor="end">{html.escape(name)}</text>'
        f'<rect class="bar" x="118" y="{_BAR_ROW * at + 3}" height="13" width="{500 * count / most:.1f}"/>'
        f'<text x="{124 + 500 * count / most:.1f}" y="{_BAR_ROW * at + 14}">{count}</text>'
        for at, (name, count) in enumerate(bars)
    ]
    return _svg(rows, height=_BAR_ROW * len(bars) + 6, label=label)


def _whisker(one: Interval, y: float, x: Callable[[float], float]) -> str:
    name = one.name if len(one.name) <= _MAX_NAME else one.name[: _MAX_NAME - 1] + "…"
    return (
        f'<text x="{_NAMES_LEFT - 14}" y="{y + 4}" text-anchor="end">{html.escape(name)}</text>'
        f'<line class="interval" x1="{x(one.low):.1f}" x2="{x(one.high):.1f}" y1="{y}" y2="{y}"/>'
        f'<circle cx="{x(one.value):.1f}" cy="{y}" r="5"/>'
        f'<text x="{_WIDTH - _VALUES_RIGHT + 14}" y="{y + 4}">{one.value:.0f}</text>'
    )


def _legend(curves: Sequence[Curve]) -> list[str]:
    """Return what the lines are, above their right end, where a falling loss leaves room."""
    return [
        _polyline(one.css_class, [(_WIDTH - 130, 22 + 22 * at), (_WIDTH - 98, 22 + 22 * at)])
        + f'<text x="{_WIDTH - 90}" y="{26 + 22 * at}">{html.escape(one.name)}</text>'
        for at, one in enumerate(curves)
    ]


def _polyline(css_class: str, places: Sequence[tuple[float, float]]) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline class="{html.escape(css_class)}" points="{points}"/>'


def _value_tick(tick: float, y: float) -> str:
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{_LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
    )


def _step_ticks(first: int, last: int, x: Callable[[float], float]) -> list[str]:
    """Return at most five step numbers below the plot, the first with the axis' name."""
    steps = sorted({first + (last - first) * part // 4 for part in range(5)})
    anchors = {last: "end", first: "start"}
    return [
        f'<text x="{x(step):.1f}" y="{_HEIGHT - 8}" text-anchor="{anchors.get(step, "middle")}">'
        f"{'step ' if step == first else ''}{step}</text>"
        for step in steps
    ]


def _ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers around the range."""
    span = high - low or abs(low) or 1.0
    unit = 10.0 ** math.floor(math.log10(span / 4))
    unit *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (unit * factor) <= 6)
    return [at * unit for at in range(math.floor(low / unit), math.ceil(high / unit) + 1)]


def _svg(parts: Sequence[str], *, height: float, label: str) -> str:
    alternative = html.escape(label)
    return (
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{alternative}">'
        f"{''.join(parts)}</svg>"
    )
