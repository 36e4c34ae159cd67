"""Load what a run needs before the base's weights: tokenizer, chat template and tokenized data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer

from adapterhub.adapter import Adapter, StoredBase
from adapterhub.bases.capabilities import Support, capability_of
from adapterhub.bases.checks import check_causal, read_config
from adapterhub.compatibility import check_adapter
from adapterhub.errors import BaseNotFound, IncompatibleBase, RecipeError, UsageError
from train.data.chat_template import chat_template_of
from train.data.preferences import read_preferences
from train.data.sources import read_source, rows_of
from train.data.tokenization import prepare
from train.model.lora import lora_of
from train.objectives.base import Objective
from train.objectives.preference import preference_objective
from train.objectives.sft import SftObjective
from train.recipe import Recipe, RowData


@dataclass(frozen=True)
class Inputs:
    """Everything that a run reads before it loads the base's weights."""

    objective: Objective
    tokenizer: Any
    """Tokenizer of the base, with the chat template of the run."""
    stop: tuple[str, ...]
    """Strings that end an answer under that template."""
    support: Support
    """How the base is trained: samples packed into rows, or one a row."""


def load_inputs(recipe: Recipe, base: StoredBase, *, start: Adapter | None) -> Inputs:
    """Load tokenizer and data, without weights, within seconds.

    Raises BaseNotFound, RecipeError, DatasetError, IncompatibleBase.
    """
    support = training_support(base)
    if start is not None:
        check_adapter(start, base)
    chat = chat_template_of(recipe, start)
    tokenizer = load_tokenizer(base)
    if chat.text is not None:
        tokenizer.chat_template = chat.text
    objective = _objective(recipe, tokenizer, chat.stop)
    _check_vocabulary(base, objective)
    _check_lengths(support, objective)
    return Inputs(objective, tokenizer, chat.stop, support)


def training_support(base: StoredBase) -> Support:
    """Return how the base is trained, from its config alone. Raises BaseNotFound, IncompatibleBase."""
    config = read_config(base.path)
    check_causal(config, base.path)
    found = capability_of(config).train
    if found.mode == "refused":
        raise IncompatibleBase(f"{base.ref} cannot be trained: {found.reason}. Expected another base.")
    return found


def _check_lengths(support: Support, objective: Objective) -> None:
    """Check that no sample is longer than the base computes alike in every pass. Raises UsageError."""
    if support.limit is not None and objective.longest > support.limit:
        raise UsageError(
            f"the longest sample has {objective.longest} tokens: beyond {support.limit} the base's rotary positions "
            f"(dynamic NTK) depend on the samples before. Set max_length = {support.limit} or less in [data]."
        )


def _check_vocabulary(base: StoredBase, objective: Objective) -> None:
    """Check that the base has an embedding for every token: training would end in an index out of range.

    Raises IncompatibleBase.
    """
    size = getattr(read_config(base.path).get_text_config(), "vocab_size", None)
    places = range(objective.num_samples)
    highest = max(max(sample.tokens) for place in places for sample in objective.samples_at(place))
    if isinstance(size, int) and highest >= size:
        raise IncompatibleBase(
            f"the tokenizer at {base.path} gives token {highest}: expected ids below {size}, the number of embeddings "
            "of the base. The tokenizer is another model's or has tokens added to it: fetch the base again."
        )


def load_tokenizer(base: StoredBase) -> Any:
    """Load the base's tokenizer. Raises BaseNotFound."""
    try:
        return AutoTokenizer.from_pretrained(base.path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BaseNotFound(
            f"cannot load the tokenizer of {base.path} ({error}): expected a Hugging Face tokenizer. Fetch the base "
            "again."
        ) from error


def _objective(recipe: Recipe, tokenizer: Any, stop: Sequence[str]) -> Objective:
    """Tokenize the recipe's data and return it with its loss. Raises DatasetError."""
    data = recipe.data
    if recipe.preference and isinstance(data, RowData):
        name, rows, _ = rows_of(recipe)
        preferences = read_preferences(
            rows,
            tokenizer,
            name=name,
            method=recipe.preference.method,
            held_out=data.held_out,
            max_length=data.max_length,
            seed=recipe.seed,
            on_fault=data.on_fault,
        )
        return preference_objective(preferences, recipe.preference)
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
    """Return the recipe with the [lora] section of its start adapter. Raises RecipeError for contradictions."""
    if recipe.start and start is None:
        raise RecipeError(
            f"the recipe has start = {recipe.start!r}: expected that adapter as `start`. Resolve it and pass it."
        )
    if start is None:
        return recipe
    lora = lora_of(start, dropout=recipe.lora.dropout)
    if "lora" in recipe.model_fields_set and recipe.lora != lora:
        raise RecipeError(
            f"[lora] has rank {recipe.lora.rank}, alpha {recipe.lora.alpha:g}, targets {recipe.lora.targets}: expected "
            f"those of the start adapter, rank {lora.rank}, alpha {lora.alpha:g}, targets {lora.targets}. Leave [lora] "
            "out."
        )
    changed = recipe.model_copy(update={"lora": lora})
    changed._folder = recipe.folder
    return changed
