"""Plots as SVG in the page's own colours: ratings with their intervals, a loss as it falls. Knows no widget."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence

from adapterhub.feedback.ratings import Rating

_ROW = 34
_LEFT, _RIGHT, _WIDTH, _HEIGHT = 170, 70, 760, 260


def interval_plot(ratings: Sequence[Rating]) -> str:
    """A dot and a whisker for each rating, best first; an empty text for none."""
    if not ratings:
        return ""
    low, high = min(one.low for one in ratings), max(one.high for one in ratings)
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def x(value: float) -> float:
        return _LEFT + (value - low) / (high - low or 1) * (_WIDTH - _LEFT - _RIGHT)

    bottom = _ROW * len(ratings) + 12
    rows = [_whisker(one, _ROW * index + 24, x) for index, one in enumerate(ratings)]
    axis = [_tick(x(tick), bottom, f"{tick:g}") for tick in ticks]
    said = "; ".join(f"{one.model} {one.rating:.0f}, from {one.low:.0f} to {one.high:.0f}" for one in ratings)
    return _svg("".join(axis + rows), height=bottom + 26, said=f"Ratings with 95 % intervals: {said}")


def _whisker(one: Rating, y: float, x: Callable[[float], float]) -> str:
    name = one.model if len(one.model) <= 22 else one.model[:21] + "…"
    return (
        f'<text x="{_LEFT - 14}" y="{y + 4}" text-anchor="end">{html.escape(name)}</text>'
        f'<line class="interval" x1="{x(one.low):.1f}" x2="{x(one.high):.1f}" y1="{y}" y2="{y}"/>'
        f'<circle cx="{x(one.rating):.1f}" cy="{y}" r="5"/>'
        f'<text x="{_WIDTH - _RIGHT + 14}" y="{y + 4}">{one.rating:.0f}</text>'
    )


def loss_plot(steps: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]] = ()) -> str:
    """Loss (nats a token) over optimizer steps, and dashed on held-out questions; an empty text before two steps."""
    points = [(step, loss) for step, loss in steps if math.isfinite(loss)]
    measured = [(step, loss) for step, loss in held_out if math.isfinite(loss)]
    if len(points) < 2:
        return ""
    losses = [loss for _, loss in (*points, *measured)]
    ticks = _ticks(min(0.0, *losses), max(losses))
    low, high, left, right = ticks[0], ticks[-1], 56, 16
    first, last = points[0][0], points[-1][0]

    def at(step: float, loss: float) -> str:
        x = left + (step - first) / (last - first or 1) * (_WIDTH - left - right)
        return f"{x:.1f},{14 + (high - loss) / (high - low or 1) * (_HEIGHT - 48):.1f}"

    def line(drawn: Sequence[tuple[int, float]], kind: str) -> str:
        return f'<polyline class="{kind}" points="{" ".join(at(*point) for point in drawn)}"/>' if drawn else ""

    grid = "".join(_grid_line(tick, float(at(first, tick).partition(",")[2]), left, right) for tick in ticks)
    ends = (
        f'<text x="{left}" y="{_HEIGHT - 8}">step {first}</text>'
        f'<text x="{_WIDTH - right}" y="{_HEIGHT - 8}" text-anchor="end">step {last}</text>'
    )
    said = f"Loss from {points[0][1]:.3f} at step {first} to {points[-1][1]:.3f} at step {last}"
    drawn = grid + line(points, "trained") + line(measured, "held-out") + ends + _legend(has_held_out=bool(measured))
    return _svg(drawn, height=_HEIGHT, said=said)


def _legend(*, has_held_out: bool) -> str:
    """What the lines are, above their right end, where a falling loss leaves room."""
    kinds = [("trained", "trained on")] + ([("held-out", "held out")] if has_held_out else [])
    return "".join(
        f'<polyline class="{kind}" points="{_WIDTH - 130},{22 + 22 * at} {_WIDTH - 98},{22 + 22 * at}"/>'
        f'<text x="{_WIDTH - 90}" y="{26 + 22 * at}">{label}</text>'
        for at, (kind, label) in enumerate(kinds)
    )


def _grid_line(tick: float, y: float, left: float, right: float) -> str:
    return (
        f'<line class="grid" x1="{left}" x2="{_WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{left - 10}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers around the range."""
    span = high - low or 1.0
    unit = 10.0 ** math.floor(math.log10(span / 4))
    unit *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (unit * factor) <= 6)
    return [at * unit for at in range(math.floor(low / unit), math.ceil(high / unit) + 1)]


def _tick(x: float, bottom: float, label: str) -> str:
    return (
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="8" y2="{bottom}"/>'
        f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{label}</text>'
    )


def _svg(inside: str, *, height: float, said: str) -> str:
    label = html.escape(said)
    drawn = f'<svg class="plot" viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{label}">{inside}</svg>'
    return f'<div class="scroll" tabindex="0" role="region" aria-label="Plot">{drawn}</div>'
