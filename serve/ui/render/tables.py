"""Small HTML tables of whatever the API tells; every text in them is a stranger's and is escaped. Knows no widget."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def rows_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, caption: str) -> str:
    """A table with a header row; the first cell of each row names it. An empty text without rows."""
    drawn = "".join(_row(row) for row in rows)
    if not drawn:
        return ""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in columns)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(caption)}"><table class="plain">'
        f"<caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{drawn}</tbody></table></div>"
    )


def facts_table(facts: Mapping[str, Any]) -> str:
    """Two columns, nested facts as dotted names; what is empty is left out."""
    drawn = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{_cell(value)}</td></tr>'
        for name, value in _flat(facts)
        if value not in (None, "", [], {})
    )
    return f'<table class="plain facts"><tbody>{drawn}</tbody></table>' if drawn else ""


def note_html(message: str) -> str:
    return f'<p class="trouble" role="status">⚠ {html.escape(message)}</p>'


def size_text(size_bytes: float) -> str:
    """In the largest unit that leaves a whole number before the point."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.2f} {unit}"
    return f"{size_bytes:.0f} B"


def _row(cells: Sequence[Any]) -> str:
    first, *rest = cells
    return f'<tr><th scope="row">{_cell(first)}</th>{"".join(f"<td>{_cell(cell)}</td>" for cell in rest)}</tr>'


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return html.escape(", ".join(str(one) for one in value))
    return html.escape(str(value))


def _flat(facts: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            for number, one in enumerate(value, 1):
                yield from _flat(one, f"{before}{name} {number}.")
        else:
            yield f"{before}{name}".replace("_", " "), value
