"""A plot of ratings and their intervals, as a PNG file."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from adapterhub.feedback.ratings import Ratings
from adapterhub.files import write_atomic

_WIDTH, _ROW_HEIGHT, _TOP, _LEFT, _RIGHT = 960, 44, 60, 260, 120
_TEXT_COLOR, _GRID_COLOR, _MARK_COLOR = "#1f2430", "#d5d9e2", "#3557c8"


def plot_ratings(ratings: Ratings, path: Path) -> None:
    """Write a PNG file with a dot and a 95 % interval for each model, best first."""
    rows = ratings.ratings
    low, high = min(one.low for one in rows), max(one.high for one in rows)
    margin = 0.05 * (high - low) or 1.0
    low, high = low - margin, high + margin
    image = Image.new("RGB", (_WIDTH, _TOP + _ROW_HEIGHT * len(rows) + 50), "white")
    draw = ImageDraw.Draw(image)
    text, small = ImageFont.load_default(18), ImageFont.load_default(14)

    def x(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    title = {"bt": "Bradley-Terry", "elo": "Elo"}[ratings.method]
    draw.text((20, 18), f"{title} ratings, 95 % intervals", fill=_TEXT_COLOR, font=text)
    bottom = _TOP + _ROW_HEIGHT * len(rows)
    for tick in range(5):
        value = low + (high - low) * tick / 4
        draw.line([(x(value), _TOP - 6), (x(value), bottom)], fill=_GRID_COLOR)
        draw.text((x(value), bottom + 8), f"{value:.0f}", fill=_TEXT_COLOR, font=small, anchor="ma")
    for number, one in enumerate(rows):
        y = _TOP + _ROW_HEIGHT * number + _ROW_HEIGHT / 2
        draw.text((_LEFT - 16, y), one.model[-28:], fill=_TEXT_COLOR, font=text, anchor="rm")
        draw.line([(x(one.low), y), (x(one.high), y)], fill=_MARK_COLOR, width=3)
        for end in (one.low, one.high):
            draw.line([(x(end), y - 7), (x(end), y + 7)], fill=_MARK_COLOR, width=3)
        draw.ellipse([x(one.rating) - 7, y - 7, x(one.rating) + 7, y + 7], fill=_MARK_COLOR)
        draw.text((_WIDTH - _RIGHT + 20, y), f"{one.rating:.0f}", fill=_TEXT_COLOR, font=text, anchor="lm")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())
