"""Ratings with their intervals as a PNG."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from adapterhub.feedback.ratings import Ratings
from adapterhub.files import write_atomic

_WIDTH, _ROW, _TOP, _LEFT, _RIGHT = 960, 44, 60, 260, 120
_INK, _PALE, _DOT = "#1f2430", "#d5d9e2", "#3557c8"


def plot_ratings(ratings: Ratings, path: Path) -> None:
    """A dot and a whisker (95 %) for each, best first."""
    rows = ratings.ratings
    low, high = min(one.low for one in rows), max(one.high for one in rows)
    margin = 0.05 * (high - low) or 1.0
    low, high = low - margin, high + margin
    image = Image.new("RGB", (_WIDTH, _TOP + _ROW * len(rows) + 50), "white")
    draw = ImageDraw.Draw(image)
    text, small = ImageFont.load_default(18), ImageFont.load_default(14)

    def x(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    title = {"bt": "Bradley-Terry", "elo": "Elo"}[ratings.method]
    draw.text((20, 18), f"{title} ratings, 95 % intervals", fill=_INK, font=text)
    bottom = _TOP + _ROW * len(rows)
    for part in range(5):
        value = low + (high - low) * part / 4
        draw.line([(x(value), _TOP - 6), (x(value), bottom)], fill=_PALE)
        draw.text((x(value), bottom + 8), f"{value:.0f}", fill=_INK, font=small, anchor="ma")
    for number, one in enumerate(rows):
        y = _TOP + _ROW * number + _ROW / 2
        draw.text((_LEFT - 16, y), one.model[-28:], fill=_INK, font=text, anchor="rm")
        draw.line([(x(one.low), y), (x(one.high), y)], fill=_DOT, width=3)
        for end in (one.low, one.high):
            draw.line([(x(end), y - 7), (x(end), y + 7)], fill=_DOT, width=3)
        draw.ellipse([x(one.rating) - 7, y - 7, x(one.rating) + 7, y + 7], fill=_DOT)
        draw.text((_WIDTH - _RIGHT + 20, y), f"{one.rating:.0f}", fill=_INK, font=text, anchor="lm")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())
