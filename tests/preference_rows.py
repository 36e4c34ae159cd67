"""Rows of preference data, and a recipe that trains on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training import make_recipe

from train.recipe import Recipe


def says(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def pair(number: int, *, chosen: str = "Aye, {n}.", rejected: str = "It is {n}.") -> dict[str, Any]:
    replies = {"chosen": chosen.format(n=number), "rejected": rejected.format(n=number)}
    return {"prompt": says("user", f"What is {number}?")} | {k: says("assistant", v) for k, v in replies.items()}


def label(number: int, is_good: bool) -> dict[str, Any]:
    reply = says("assistant", f"{'Aye' if is_good else 'No'}, {number}.")
    return {"prompt": says("user", f"What is {number}?"), "completion": reply, "label": is_good}


TRAIN = {"steps": 12, "batch_size": 4, "learning_rate": 5e-3, "max_grad_norm": 1.0}


def preference_recipe(folder: Path, method: str, lines: list[Any] | None = None, **sections: Any) -> Recipe:
    """A recipe on lines of our own, or twelve pairs that prefer one opening word."""
    lines = lines or [pair(n) for n in range(12)]
    (folder / "votes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = {"path": "votes.jsonl", "held_out": 4}
    return make_recipe(folder, **({"data": data, "train": TRAIN, "preference": {"method": method}} | sections))
