"""HTML for an adapter's alias history and for a diff of two adapters."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from serve.ui.render.tables import rows_table

_LAYERS_SHOWN = 40


def short_digest(digest: str | None) -> str:
    """Return a digest short enough for a table."""
    return (digest or "")[:19]


def history_html(found: dict[str, Any]) -> Markup:
    """Return a table of every move of an adapter's aliases, newest first."""
    rows = [
        (move["at"][:19].replace("T", " "), move["act"], move["revision"], short_digest(move["before"]),
         short_digest(move["after"]), move["by"])
        for move in reversed(found["data"])
    ]  # fmt: skip
    return rows_table(("at (UTC)", "act", "revision", "from", "to", "by"), rows, caption="History")


def adapter_diff_html(found: dict[str, Any]) -> Markup:
    """Return tables of the facts that changed and of the layers that changed, largest change first."""
    facts = [
        (change["fact"], change["before"], change["after"])
        for part in ("config", "provenance", "metrics")
        for change in found[part]
    ]
    changed = [layer for layer in found["layers"] if layer["distance"] != 0]
    changed.sort(key=lambda layer: -(layer["distance"] or float("inf")))
    layers = [
        (layer["module"], layer["norm_before"], layer["norm_after"], layer["distance"])
        for layer in changed[:_LAYERS_SHOWN]
    ]
    count = f"{len(changed)} of {len(found['layers'])} layers differ"
    if len(changed) > _LAYERS_SHOWN:
        count += f"; the {_LAYERS_SHOWN} with the largest change"
    return (
        rows_table(("fact", "before", "after"), facts, caption="Changed facts")
        + rows_table(("layer", "norm before", "norm after", "norm of the difference"), layers, caption=count)
    ) or Markup("<p>{}.</p>").format(count)
