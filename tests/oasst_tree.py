"""A tree of messages as OpenAssistant publishes them."""

from __future__ import annotations

from typing import Any


def message(name: str, parent: str | None, rank: int | None = None, **changed: Any) -> dict[str, Any]:
    """A row with the columns of OpenAssistant/oasst1; `a...` are the assistant's, the others the prompter's."""
    role = "assistant" if name.startswith("a") else "prompter"
    row = {"message_id": name, "parent_id": parent, "message_tree_id": "p", "role": role, "text": f"text {name}"}
    return row | {"rank": rank, "lang": "en", "deleted": False, "review_result": True, "synthetic": False} | changed


TREE = [
    message("p", None),
    message("a1", "p", 1),
    message("a0", "p", 0),
    message("a2", "p", 2),
    message("q1", "a0", 1),
    message("q0", "a0", 0),
    message("better of the worse", "a1", 0),
    message("a4", "q0", 1),
    message("a3", "q0", 0),
    message("q9", "a3"),
]
