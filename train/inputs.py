"""What a recipe stands on: data as tokens, the tokenizer, the adapter it goes on from. Loads no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from adapterhub.adapter import Adapter
from adapterhub.base_store import StoredBase
from adapterhub.errors import BaseNotFound, RecipeError
from adapterhub.package import TEMPLATE_NAME, check_base
from train.comparisons import read_comparisons
from train.data import prepare, read_source
from train.lora import lora_of
from train.objective import Answers, Objective
from train.preference_objective import preference_objective
from train.recipe import FileData, Recipe


def load_objective(recipe: Recipe, tokenizer: Any) -> Objective:
    """The recipe's data as tokens, and what to do with it; seconds, no weights. Raises DatasetError."""
    if recipe.preference and isinstance(recipe.data, FileData):
        comparisons = read_comparisons(
            recipe.folder / Path(recipe.data.path).expanduser(),
            tokenizer,
            method=recipe.preference.method,
            held_out=recipe.data.held_out,
            max_length=recipe.data.max_length,
            seed=recipe.seed,
        )
        return preference_objective(comparisons, recipe.preference)
    data = prepare(
        read_source(recipe),
        tokenizer,
        held_out=recipe.data.held_out,
        max_length=recipe.data.max_length,
        loss_on=recipe.train.loss_on,
        seed=recipe.seed,
    )
    return Answers(data)


def load_tokenizer(base: StoredBase, *, start: Adapter | None) -> Any:
    """The base's tokenizer, with the chat template of the adapter to go on from. Raises BaseNotFound."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.path)
    except (OSError, ValueError) as error:
        raise BaseNotFound(f"{base.path} has no tokenizer that can be loaded: {error}") from error
    if start is not None:
        check_base(start, base)
        tokenizer.chat_template = (start.path / TEMPLATE_NAME).read_text(encoding="utf-8")
    return tokenizer


def with_lora_of(recipe: Recipe, start: Adapter | None) -> Recipe:
    """The recipe with [lora] as the adapter it goes on from has it. Raises RecipeError for contradictions."""
    if recipe.start and start is None:
        raise RecipeError(f"the recipe goes on from {recipe.start}, which was not given: resolve it and pass it on.")
    if start is None:
        return recipe
    theirs = lora_of(start, dropout=recipe.lora.dropout)
    if "lora" in recipe.model_fields_set and recipe.lora != theirs:
        raise RecipeError(
            f"[lora] says rank {recipe.lora.rank}, alpha {recipe.lora.alpha:g}, targets {recipe.lora.targets}; the "
            f"adapter to go on from has rank {theirs.rank}, alpha {theirs.alpha:g}, targets {theirs.targets}: leave "
            "[lora] out."
        )
    changed = recipe.model_copy(update={"lora": theirs})
    changed._folder = recipe.folder
    return changed
