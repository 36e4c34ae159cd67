"""Runs of every adapter method, and what they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from engine_runs import PROMPTS
from training import make_recipe

from adapterhub.adapter import StoredBase
from adapterhub.base_model import LoadedBase, load_base
from train.recipe import Recipe

CPU = torch.device("cpu")


def recipe_of(folder: Path, *, method: str = "lora", **sections: dict[str, Any]) -> Recipe:
    """make_recipe's, and with another method what that leaves out."""
    train = LIVELY | sections.pop("train", {})
    recipe = make_recipe(folder, train=train, **sections)
    if method == "lora":
        return recipe
    raw = recipe.model_dump(exclude={"lora"}) | {"method": method, "virtual_tokens": 4}
    if method == "full":
        raw["quantization"] |= {"kind": "none"}
    changed = Recipe.model_validate(raw)
    changed._folder = folder
    return changed


def logits(model: Any) -> torch.Tensor:
    """[prompts, vocabulary] of the first tokens answered."""
    with torch.no_grad():
        return torch.stack([model(input_ids=torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS])


def plain(base: StoredBase, purpose: Any = "train") -> LoadedBase:
    return load_base(base, purpose=purpose, dtype="float32")


def layers_of(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


LIVELY = {"learning_rate": 0.02, "max_grad_norm": 1.0}
