"""What became of a name, and what differs between two adapters, as the page shows them. Knows no widget."""

from __future__ import annotations

import html
from typing import Any

from serve.ui.render.tables import rows_table

_LAYERS_SHOWN = 40


def short_digest(digest: str | None) -> str:
    return (digest or "")[:19]


def history_html(found: dict[str, Any]) -> str:
    """Every move, newest first."""
    rows = [
        (move["at"][:19].replace("T", " "), move["act"], move["revision"], short_digest(move["before"]),
         short_digest(move["after"]), move["by"])
        for move in reversed(found["data"])
    ]  # fmt: skip
    return rows_table(("at (UTC)", "act", "revision", "from", "to", "by"), rows, caption="History")


def difference_html(found: dict[str, Any]) -> str:
    """Facts that changed, then the layers whose update did, the farthest first."""
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
    told = f"{len(changed)} of {len(found['layers'])} layers differ"
    if len(changed) > _LAYERS_SHOWN:
        told += f"; the {_LAYERS_SHOWN} farthest apart"
    return (
        rows_table(("fact", "before", "after"), facts, caption="What is not the same")
        + rows_table(("layer", "norm before", "norm after", "norm of the difference"), layers, caption=told)
        or f"<p>{html.escape(told)}.</p>"
    )
