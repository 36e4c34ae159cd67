"""HTML tables and notes of values from the API: every value comes from another machine and is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from serve.ui.render.templates import render


def rows_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, caption: str) -> Markup:
    """Return a table with a header row, or empty Markup without rows. The first cell of a row is its heading."""
    cells = [[_text(cell) for cell in row] for row in rows]
    return render("rows_table", columns=columns, rows=cells, caption=caption) if cells else Markup()


def scrollable(drawn: Markup, *, label: str) -> Markup:
    """Return the HTML in a region that scrolls sideways, also with the keyboard; empty Markup stays empty."""
    if not drawn:
        return drawn
    opening = Markup('<div class="scroll" tabindex="0" role="region" aria-label="{}">').format(label)
    return opening + drawn + Markup("</div>")


def facts_table(facts: Mapping[str, Any]) -> Markup:
    """Return a table of two columns: nested facts under dotted names, without empty values."""
    rows = [(name, _text(value)) for name, value in _flat(facts) if value not in (None, "", [], {})]
    return render("facts_table", facts=rows) if rows else Markup()


def bullet_list(items: Iterable[str]) -> Markup:
    """Return a bullet list, or empty Markup without items."""
    drawn = Markup().join(Markup("<li>{}</li>").format(item) for item in items)
    return Markup("<ul>{}</ul>").format(drawn) if drawn else Markup()


def note_html(message: str) -> Markup:
    """Return a warning."""
    return Markup('<p class="trouble" role="status">⚠ {}</p>').format(message)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(str(one) for one in value)
    return str(value)


def _flat(facts: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            for number, one in enumerate(value, 1):
                yield from _flat(one, f"{before}{name} {number}.")
        else:
            yield f"{before}{name}".replace("_", " "), value
