"""Sizes and durations as a person reads them: the only place that chooses units and digits.

Sizes are decimal, as disks and the Hub count: 1 GB is 10^9 bytes, 1 MB 10^6, 1 kB 10^3. Options and settings whose
names end in `_mb` keep their own definition.
"""

from __future__ import annotations


def format_bytes(size_bytes: float) -> str:
    """Return a size in GB with two digits after the point, MB with one, or kB and bytes with none."""
    if abs(size_bytes) >= 0.9995e9:
        return f"{size_bytes / 1e9:.2f} GB"
    if abs(size_bytes) >= 0.9995e6:
        return f"{size_bytes / 1e6:.1f} MB"
    return f"{size_bytes / 1e3:.0f} kB" if abs(size_bytes) >= 1e3 else f"{size_bytes:.0f} bytes"


def format_duration(seconds: float) -> str:
    """Return a duration: milliseconds up to 1 s, seconds up to 2 min, minutes up to 2 h, then hours."""
    if 0 < seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 119.5:
        return f"{seconds:.1f} s" if 0 < seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7170 else f"{seconds / 3600:.1f} h"
