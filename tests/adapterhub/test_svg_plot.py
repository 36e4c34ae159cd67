"""Plots as SVG: well-formed, escaped, and with a text alternative."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from adapterhub.svg_plot import Curve, Interval, bar_plot, interval_plot, line_plot


def elements(svg: str, tag: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg).iter(tag))  # our own text


def texts(svg: str) -> list[str]:
    return [str(one.text) for one in elements(svg, "text")]


def test_a_curve_has_a_point_for_each_finite_value() -> None:
    svg = line_plot([Curve([(1, 3.0), (2, math.nan), (3, math.inf), (4, 2.0)], "trained")], label="Loss")
    (line,) = elements(svg, "polyline")
    assert len(line.attrib["points"].split()) == 2
    assert line.attrib["class"] == "trained"
    assert ElementTree.fromstring(svg).attrib["aria-label"] == "Loss"  # our own text


def test_curves_share_their_axes_and_stay_inside_the_plot() -> None:
    svg = line_plot([Curve([(0, 5.0), (10, 1.0)], "a", "first"), Curve([(5, 9.0)], "b", "second")], label="two")
    points = [point.split(",") for line in elements(svg, "polyline") for point in line.attrib["points"].split()]
    assert all(0 <= float(x) <= 760 and 0 <= float(y) <= 260 for x, y in points)
    assert {"first", "second", "step 0", "5", "10"} <= set(texts(svg))


def test_ticks_are_round_numbers_around_the_values() -> None:
    shown = texts(line_plot([Curve([(1, 2.9), (2, 1.1)], "a")], label="x"))
    assert shown[:6] == ["1", "1.5", "2", "2.5", "3", "step 1"]
    assert texts(line_plot([Curve([(1, 2.9), (2, 1.1)], "a")], label="x", from_zero=True))[0] == "0"


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-12, 1e300])
def test_a_constant_curve_is_drawn(value: float) -> None:
    assert elements(line_plot([Curve([(1, value), (2, value)], "a")], label="x"), "polyline")


def test_a_single_step_is_drawn() -> None:
    assert texts(line_plot([Curve([(7, 1.0)], "a")], label="x"))[-1] == "step 7"


@pytest.mark.parametrize(
    "svg",
    [
        line_plot([], label="x"),
        line_plot([Curve([(1, math.nan)], "a")], label="x"),
        interval_plot([], label="x"),
        bar_plot([], label="x"),
    ],
)
def test_nothing_is_drawn_of_nothing(svg: str) -> None:
    assert svg == ""


def test_intervals_are_drawn_in_their_order() -> None:
    svg = interval_plot([Interval("captain", 1100, 990, 1210), Interval("trivia", 1000, 900, 1100)], label="Ratings")
    assert [text for text in texts(svg) if text in ("captain", "trivia")] == ["captain", "trivia"]
    dots = [float(dot.attrib["cx"]) for dot in elements(svg, "circle")]
    whiskers = [line.attrib for line in elements(svg, "line") if line.attrib["class"] == "interval"]
    assert dots[0] > dots[1]
    for dot, whisker in zip(dots, whiskers, strict=True):
        assert float(whisker["x1"]) < dot < float(whisker["x2"])


def test_bars_are_as_long_as_their_counts() -> None:
    svg = bar_plot([("to 64 tokens", 10), ("to 128 tokens", 5), ("to 256 tokens", 0)], label="Samples by length")
    assert [float(bar.attrib["width"]) for bar in elements(svg, "rect")] == [500, 250, 0]


def test_names_are_escaped_and_cut() -> None:
    hostile = '<script>"&'
    for svg in (
        line_plot([Curve([(1, 1.0)], hostile, hostile)], label=hostile),
        interval_plot([Interval(hostile, 1, 0, 2)], label=hostile),
        bar_plot([(hostile, 1)], label=hostile),
    ):
        assert "<script" not in svg
        assert hostile in texts(svg)
        assert ElementTree.fromstring(svg).attrib["aria-label"] == hostile  # our own text
    assert "a" * 21 + "…" in texts(interval_plot([Interval("a" * 40, 1, 0, 2)], label="x"))
