"""Run sequences one at a time by the model's own forward pass and cache, as `generate` of transformers does.

For bases that keep more than attention's keys and values, or whose attention is not ours: their caches cannot be cut
into blocks, so nothing is shared between sequences, and a prompt is computed whole.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from adapterhub.bases.loading import LoadedBase
from serve.local_engine.guided_decoding import GuidedDecoder
from serve.local_engine.lora_layers import AdapterBank
from serve.local_engine.sampling import Sampler, SamplingRow, rows_of
from serve.local_engine.scheduler import Batch, ScheduledChunk, Sequence


@dataclass
class _State:
    """What the model keeps of one sequence."""

    num_tokens: int
    arguments: dict[str, Any]
    """Arguments of the model's next forward pass, its cache among them."""


@dataclass(frozen=True)
class CacheSize:
    """Size of the cache of one sequence, in bytes."""

    per_sequence: int
    """Of its states, whatever its length."""
    per_token: int


class SingleRunner:
    """Runs each sequence in a forward pass of its own; its state is a cache of transformers for each."""

    mode: Literal["batched", "single"] = "single"

    def __init__(self, base: LoadedBase, adapters: AdapterBank) -> None:
        self._model = base.model
        self._states: WeakKeyDictionary[Sequence, _State] = WeakKeyDictionary()
        self.adapters = adapters
        self.guided_decoder = GuidedDecoder(base.tokenizer)
        self.sampler = Sampler(base.model.device)

    @torch.inference_mode()
    def run(self, batch: Batch) -> dict[str, SamplingRow]:
        """Compute every chunk. Return the logits of each request whose chunk reaches the end of its sequence.

        A chunk that does not continue what was computed of its sequence is computed from the sequence's beginning.
        """
        for ended in [sequence for sequence in self._states if not sequence.blocks]:
            del self._states[ended]
        rows = {chunk.sequence.request.id: self._logits(chunk) for chunk in batch.chunks}
        samples = {chunk.sequence.request.id for chunk in batch.chunks if chunk.samples}
        return {name: row for name, row in rows.items() if name in samples}

    def _logits(self, chunk: ScheduledChunk) -> SamplingRow:
        sequence, end = chunk.sequence, chunk.start + chunk.num_tokens
        # Taken out: a forward pass that fails half way leaves a cache that is of no use.
        state = self._states.pop(sequence, None)
        is_next = state is not None and state.num_tokens == chunk.start == end - 1
        self.adapters.begin_one(sequence.request.adapters)
        logits, arguments = forward(self._model, sequence.tokens[:end], state.arguments if is_next and state else None)
        self._states[sequence] = _State(end, arguments)
        (row,) = rows_of(logits)
        return row


@torch.inference_mode()
def measure_cache(model: Any) -> CacheSize:
    """Compute two short prompts and return the size of what the model keeps of a sequence."""
    short, long = 8, 24
    sizes = [_num_bytes(forward(model, [3] * length, None)[1]) for length in (short, long)]
    per_token = -(-(sizes[1] - sizes[0]) // (long - short))
    return CacheSize(max(0, sizes[0] - short * per_token), per_token)


def forward(model: Any, tokens: list[int], arguments: dict[str, Any] | None) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the last token's logits, fp32 [1, vocabulary], and the arguments of the next token's forward pass.

    `arguments` are those that the tokens before the last one left, the cache among them; None computes all tokens.
    """
    is_first = arguments is None
    arguments = _first_arguments(model, len(tokens)) if arguments is None else arguments
    inputs = model.prepare_inputs_for_generation(
        torch.tensor([tokens], device=model.device),
        next_sequence_length=None if is_first else 1,
        is_first_iteration=is_first,
        **arguments,
    )
    outputs = model(**inputs, return_dict=True)
    return outputs.logits[:, -1].float(), model._update_model_kwargs_for_generation(outputs, arguments)


def _first_arguments(model: Any, num_tokens: int) -> dict[str, Any]:
    """Return what `generate` gives to a prompt's forward pass beside its tokens."""
    parameters = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {"use_cache": True, "attention_mask": None}
    if "position_ids" in parameters:
        arguments["position_ids"] = torch.arange(num_tokens, device=model.device)[None]
    if "logits_to_keep" in parameters:
        arguments["logits_to_keep"] = 1
    model._prepare_cache_for_generation(
        GenerationConfig(), arguments, GenerationMode.GREEDY_SEARCH, batch_size=1, max_cache_length=0
    )
    return arguments


def _num_bytes(kept: Any) -> int:
    """Return the size of all tensors in nested containers and objects of transformers, in bytes.

    A view counts as all it is a part of, which it keeps in memory.
    """
    size, left, seen = 0, [kept], set()
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            size += one.untyped_storage().nbytes()
        elif isinstance(one, dict):
            left += one.values()
        elif isinstance(one, list | tuple):
            left += one
        elif type(one).__module__.startswith("transformers"):
            left += vars(one).values()
    return size
