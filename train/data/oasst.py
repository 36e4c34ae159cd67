"""Select one conversation from each OpenAssistant message tree: the top-ranked reply at every level.

Guanaco's data were selected this way (arXiv 2305.14314, appendix B.1); OASST1 is arXiv 2304.07327.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from train.data.conversation import Message, check_keys, messages_of
from train.data.readers import Row

_ROLES = {"prompter": "user", "assistant": "assistant"}
KEYS = (
    "message_id", "parent_id", "user_id", "message_tree_id", "tree_state", "created_date", "text", "role", "lang",
    "rank", "review_count", "review_result", "deleted", "synthetic", "model_name", "detoxify", "emojis", "labels",
    "replies", "prompt", "events", "safe_labels", "safety",
)  # fmt: skip
"""Keys of messages and trees as OpenAssistant published them. Only text, role, rank and state are used."""


def trees_of(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Build trees from flat messages by `message_id` and `parent_id`; return (trees, faults).

    Rows that are trees already (`{"prompt": {..., "replies": [...]}}`) do not change.
    """
    flat = [row for row in rows if "prompt" not in row.value]
    trees = [row for row in rows if "prompt" in row.value]
    faults: list[str] = []
    nodes: dict[str, dict[str, Any]] = {}
    named: list[tuple[Row, str]] = []
    for row in flat:
        name = row.value.get("message_id")
        if not isinstance(name, str):
            faults.append(f"{row.where}: message_id {name!r} is not a string")
        elif name in nodes:
            faults.append(f"{row.where}: duplicate message_id {name!r}")
        else:
            nodes[name] = row.value | {"replies": []}
            named.append((row, name))
    for row, name in named:
        parent = row.value.get("parent_id")
        if isinstance(parent, str) and parent in nodes:
            nodes[parent]["replies"].append(nodes[name])
        elif parent:
            faults.append(f"{row.where}: parent {parent} is not in the data")
    reached: set[str] = set()
    for row, name in named:
        if not row.value.get("parent_id"):
            root = nodes[name]
            reached |= _names_below(root)
            trees.append(Row(row.where, {"prompt": root, "tree_state": row.value.get("tree_state")}))
    if not faults:
        faults += [f"{row.where}: no prompt above it" for row, name in named if name not in reached]
    return trees, faults


def _names_below(root: dict[str, Any]) -> set[str]:
    found, open_ = set(), [root]
    while open_:
        node = open_.pop()
        found.add(node["message_id"])
        open_ += node["replies"]
    return found


def top_ranked(tree: dict[str, Any]) -> tuple[Message, ...]:
    """Return the path of top-ranked replies from the prompt to the last assistant's; empty without an answer.

    Skips deleted and rejected messages, and trees that are not ready. Of replies without a rank, takes the first.
    Raises ValueError for a row that is not a tree.
    """
    node = tree.get("prompt")
    if tree.get("tree_state") not in (None, "ready_for_export"):
        return ()
    path: list[dict[str, Any]] = []
    while node is not None:
        if not isinstance(node, dict):
            raise ValueError("a reply is not an object")
        check_keys(node, KEYS, what="a message has the")
        role = node.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise ValueError(f"role {role!r} is neither prompter nor assistant")
        path.append({"role": _ROLES[role], "content": node.get("text")})
        node = _best(node.get("replies") or [])
    while path and path[-1]["role"] == "user":
        path.pop()
    return messages_of(path) if path else ()


def _best(replies: Any) -> Any:
    if not isinstance(replies, list):
        raise ValueError("'replies' is not a list")
    valid = [
        reply
        for reply in replies
        if not isinstance(reply, dict) or not (reply.get("deleted") or reply.get("review_result") is False)
    ]
    return min(valid, key=_rank, default=None)


def _rank(reply: Any) -> float:
    """Return the rank, 0 the best; a reply without one sorts after all others, in the order of the data."""
    rank = reply.get("rank") if isinstance(reply, dict) else None
    try:
        return float("inf") if rank is None else float(rank)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"rank {rank!r} is not a number") from error
