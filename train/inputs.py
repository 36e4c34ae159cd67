"""What a recipe stands on: data as tokens, the tokenizer, the adapter it goes on from. Loads no weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer

from adapterhub.adapter import Adapter, StoredBase
from adapterhub.errors import BaseNotFound, IncompatibleBase, RecipeError
from adapterhub.package.layout import check_base
from train.data.chat_template import chat_template_of
from train.data.preferences import read_comparisons
from train.data.sources import read_source, rows_of
from train.data.tokenization import prepare
from train.model.lora import lora_of
from train.objectives.base import Objective
from train.objectives.preference import preference_objective
from train.objectives.sft import SftObjective
from train.recipe import Recipe, RowData


@dataclass(frozen=True)
class Inputs:
    """All that a run reads before it loads the base."""

    objective: Objective
    tokenizer: Any
    """with the chat template of the run"""
    stop: tuple[str, ...]
    """strings that end an answer under that template"""


def load_inputs(recipe: Recipe, base: StoredBase, *, start: Adapter | None) -> Inputs:
    """Tokenizer and data; seconds, no weights. Raises BaseNotFound, RecipeError, DatasetError, IncompatibleBase."""
    if start is not None and base.ref.fingerprint is not None:  # an outline has none
        check_base(start, base)
    chat = chat_template_of(recipe, start)
    tokenizer = load_tokenizer(base)
    if chat.text is not None:
        tokenizer.chat_template = chat.text
    objective = _objective(recipe, tokenizer, chat.stop)
    _check_vocabulary(base, objective)
    return Inputs(objective, tokenizer, chat.stop)


def _check_vocabulary(base: StoredBase, objective: Objective) -> None:
    """Raises IncompatibleBase for tokens the base has no embedding for: training would end in an index out of range."""
    try:
        size = json.loads((base.path / "config.json").read_bytes()).get("vocab_size")
    except (OSError, ValueError) as error:
        raise BaseNotFound(f"{base.path} has no config.json that can be read: {error}") from error
    places = range(objective.num_samples)
    highest = max(max(sample.tokens) for place in places for sample in objective.samples_at(place))
    if isinstance(size, int) and highest >= size:
        raise IncompatibleBase(
            f"the tokenizer at {base.path} gives token {highest}, the base has embeddings for {size}: its tokenizer "
            "is another model's, or has tokens added that the base was never given; fetch the base again."
        )


def load_tokenizer(base: StoredBase) -> Any:
    """Raises BaseNotFound."""
    try:
        return AutoTokenizer.from_pretrained(base.path)
    except (OSError, ValueError) as error:
        raise BaseNotFound(f"{base.path} has no tokenizer that can be loaded: {error}") from error


def _objective(recipe: Recipe, tokenizer: Any, stop: Sequence[str]) -> Objective:
    """The recipe's data as tokens, and what to do with it. Raises DatasetError."""
    data = recipe.data
    if recipe.preference and isinstance(data, RowData):
        name, rows, _ = rows_of(recipe)
        comparisons = read_comparisons(
            rows,
            tokenizer,
            name=name,
            method=recipe.preference.method,
            held_out=data.held_out,
            max_length=data.max_length,
            seed=recipe.seed,
            on_fault=data.on_fault,
        )
        return preference_objective(comparisons, recipe.preference)
    prepared = prepare(
        read_source(recipe),
        tokenizer,
        held_out=data.held_out,
        max_length=data.max_length,
        loss_on=recipe.train.loss_on,
        seed=recipe.seed,
        stop=stop,
    )
    return SftObjective(prepared)


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
