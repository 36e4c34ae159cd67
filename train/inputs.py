"""Load what a run needs before the base's weights: tokenizer, chat template and tokenized data."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapterhub.adapter import Adapter, StoredBase
from adapterhub.bases.capabilities import Support, capability_of
from adapterhub.bases.checks import check_causal, read_config
from adapterhub.bases.loading import load_tokenizer
from adapterhub.chat_template import chat_date, reads_clock
from adapterhub.compatibility import check_adapter
from adapterhub.errors import IncompatibleBase, RecipeError, UsageError
from train.data.chat_template import chat_template_of, template_notes
from train.data.formats import OnFault
from train.data.preferences import read_preferences
from train.data.sources import read_source, rows_of
from train.data.tokenization import prepare
from train.distributed.world import current_world
from train.model.lora import lora_of
from train.objectives.base import Objective
from train.objectives.preference import preference_objective
from train.objectives.sft import SftObjective
from train.recipe import MixData, Recipe, RowSource


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
    date: datetime.date | None = None
    """Date that the template rendered; None: it does not read the clock."""
    template_notes: tuple[str, ...] = ()

    @property
    def notes(self) -> list[str]:
        """What was left out of the data, and what is special about the chat template."""
        return [*self.objective.notes, *self.template_notes]


def load_inputs(
    recipe: Recipe, base: StoredBase, *, start: Adapter | None, date: datetime.date | None = None
) -> Inputs:
    """Load tokenizer and data, without weights, within seconds.

    `date` is that of a stopped run; by default the recipe's, or today, as the first of several processes has it. Chat
    templates that read the clock render it.

    Raises BaseNotFound, RecipeError, DatasetError, IncompatibleBase.
    """
    support = training_support(base)
    if start is not None:
        check_adapter(start, base)
    chat = chat_template_of(recipe, start)
    tokenizer = load_tokenizer(base)
    if chat.text is not None:
        tokenizer.chat_template = chat.text
    date = date or recipe.data.date or datetime.date.today()
    date = datetime.date.fromordinal(int(current_world().from_first([date.toordinal()])[0]))
    with chat_date(date):
        objective = _objective(recipe, tokenizer, chat.stop)
        notes = template_notes(tokenizer)
    _check_vocabulary(base, objective)
    _check_lengths(support, objective)
    is_dated = bool(tokenizer.chat_template) and reads_clock(tokenizer.get_chat_template())
    if is_dated and recipe.data.date is None:
        notes.append(
            f"the chat template reads the clock: this run renders {date}, which its record keeps. Set date = {date} in "
            "[data] to repeat the run on another day"
        )
    return Inputs(objective, tokenizer, chat.stop, support, date if is_dated else None, tuple(notes))


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


def _objective(recipe: Recipe, tokenizer: Any, stop: Sequence[str]) -> Objective:
    """Tokenize the recipe's data and return it with its loss. Raises DatasetError."""
    data = recipe.data
    if recipe.preference and isinstance(data, RowSource):
        name, rows, _ = rows_of(data, recipe.folder)
        preferences = read_preferences(
            rows,
            tokenizer,
            name=name,
            method=recipe.preference.method,
            held_out=data.held_out,
            max_length=data.max_length,
            seed=recipe.seed,
            on_fault=data.on_fault,
            duplicates=data.duplicates,
        )
        return preference_objective(preferences, recipe.preference, max_length=data.max_length)
    prepared = prepare(
        read_source(recipe),
        tokenizer,
        held_out=data.held_out,
        max_length=data.max_length,
        loss_on=recipe.train.loss_on,
        seed=recipe.seed,
        stop=stop,
        duplicates=data.duplicates,
        on_fault=_on_fault(data),
    )
    return SftObjective(prepared)


def _on_fault(data: object) -> OnFault:
    """Return what to do about rows that the chat template refuses; a mix skips them when all its sources do."""
    entries = data.sources if isinstance(data, MixData) else (data,)
    return "skip" if all(isinstance(entry, RowSource) and entry.on_fault == "skip" for entry in entries) else "stop"


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
    if faults := list(changed.method_conflicts()):
        raise RecipeError(f"the recipe does not go with its start adapter: {'; '.join(faults)}.")
    changed._folder = recipe.folder
    return changed
