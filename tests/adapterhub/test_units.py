"""Sizes and durations as a person reads them."""

from __future__ import annotations

import pytest

from adapterhub.units import format_bytes, format_duration


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1_000, "1 kB"),
        (999_499, "999 kB"),
        (999_600, "1.0 MB"),
        (53_000_000, "53.0 MB"),
        (999_600_000, "1.00 GB"),
        (1_318_000_000, "1.32 GB"),
        (1 << 30, "1.07 GB"),
        (9e12, "9000.00 GB"),
        (-2e9, "-2.00 GB"),
    ],
)
def test_sizes_are_decimal(size_bytes: float, text: str) -> None:
    assert format_bytes(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.0421, "42 ms"),
        (0.9999, "1.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (119.4, "119 s"),
        (120, "2 min"),
        (7100, "118 min"),
        (7200, "2.0 h"),
        (90_000, "25.0 h"),
    ],
)
def test_durations_keep_two_or_three_digits(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
