"""Run one forward pass of a packed row, up to the loss of each target."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from adapterhub.bases.capabilities import Support, capability_of
from adapterhub.memory.training import places_at_once
from train.data.packing import PackedRow, row_masks
from train.data.tokenization import Sample

_ends_with_head: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
"""Models whose forward pass was asked already -> `ends_with_head`."""

_one_a_row: WeakSet[Any] = WeakSet()
"""Models that compute packed samples otherwise than alone, as the check of a run found (model/self_check.py)."""


def token_losses(model: Any, row: PackedRow) -> torch.Tensor:
    """Return [T], the negative log-likelihood (nats, fp32) of each target of the row.

    Logits are computed for the targets only, and in chunks: those of a chunk are dropped after its losses and computed
    again for the gradient, so memory does not grow with the number of targets. A base that transforms its logits
    after the head (soft caps, scales) computes them itself, in one chunk.
    """
    inner = bare_model(model)
    inputs = forward_inputs(model, row) | {"use_cache": False}
    given = inputs.get("inputs_embeds", row.input_ids)
    keep = row.keep + (given.shape[1] - row.input_ids.shape[1])
    if not _known_to_end_with_head(inner):
        if "logits_to_keep" in signature(inner.forward).parameters:
            return _losses(inner(**inputs, logits_to_keep=keep).logits[0], row.targets)
        return _losses(inner(**inputs).logits[0, keep], row.targets)
    hidden: torch.Tensor = inner.get_decoder()(**inputs).last_hidden_state[0, keep]
    head = inner.get_output_embeddings()
    size = places_at_once(inner.config.get_text_config().vocab_size)

    def losses(part: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return _losses(head(part), targets)

    chunks = list(zip(torch.split(hidden, size), torch.split(row.targets, size), strict=True))
    if len(chunks) > 1 and torch.is_grad_enabled():
        return torch.cat([checkpoint(losses, *chunk, use_reentrant=False) for chunk in chunks])
    return torch.cat([losses(*chunk) for chunk in chunks])


def rows_of(support: Support, samples: Sequence[Sample]) -> list[list[int]]:
    """Return the indices of the samples of each row, so that a base with this support computes each as alone."""
    if support.mode != "batched":
        return [[place] for place in range(len(samples))]
    lengths = [len(sample.tokens) for sample in samples]
    longest = support.longest or max(lengths, default=0)
    together = [place for place, length in enumerate(lengths) if length <= longest]
    return [*([together] if together else []), *([place] for place, length in enumerate(lengths) if length > longest)]


def row_support(model: Any) -> Support:
    """Return whether the model trains on packed rows."""
    inner = bare_model(model)
    if inner in _one_a_row:
        return Support("single", "the check of this run found that packed samples see each other")
    return capability_of(inner.config).train


def use_single_rows(model: Any) -> None:
    """Train this model on one sample a row from now on."""
    _one_a_row.add(bare_model(model))


def bare_model(model: Any) -> Any:
    """Return the transformers model inside PEFT's wrapper, with the adapter layers in it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits.float(), targets, reduction="none")


class _DecoderOutput:
    """What a decoder returns, as far as a head reads it."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, place: int) -> torch.Tensor | None:
        return None if place else self.last_hidden_state


def ends_with_head(inner: Any) -> bool:
    """Return whether the output head is all there is between the decoder's output and the logits.

    Only then can `token_losses` compute logits in chunks. A plan asks the same of a model without weights (device
    meta). The forward pass is run with a decoder that returns a given tensor: the head must receive that tensor, and
    the logits must be the head's output, unchanged. Soft caps and scales change them.
    """
    ids = torch.tensor([[1, 2, 3]], device=inner.device)
    decoder, head = inner.get_decoder(), inner.get_output_embeddings()
    hidden = torch.zeros(1, 3, head.weight.shape[-1], dtype=inner.dtype, device=inner.device)
    untouched = hidden._version
    seen: list[tuple[torch.Tensor, torch.Tensor, int]] = []
    handle = head.register_forward_hook(lambda module, given, logits: seen.append((given[0], logits, logits._version)))
    own_forward = decoder.__dict__.get("forward")
    decoder.forward = lambda *args, **options: _DecoderOutput(hidden)
    try:
        with torch.no_grad():
            logits = inner(input_ids=ids, use_cache=False).logits
    except Exception:  # a forward pass unlike the others: it computes its logits itself, which is always right
        return False
    finally:
        handle.remove()
        del decoder.forward
        if own_forward is not None:
            decoder.forward = own_forward
    if len(seen) != 1:
        return False
    ((given, found, version),) = seen
    # Also a change in place, which keeps the storage, counts up the version.
    is_given = _is_same(given, hidden) and hidden._version == untouched
    return is_given and _is_same(logits, found) and logits._version == version


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether one tensor is the other, or a view of all of it."""
    is_shared = one.untyped_storage()._cdata == other.untyped_storage()._cdata
    return is_shared and (one.dtype, one.shape) == (other.dtype, other.shape)


def _known_to_end_with_head(inner: Any) -> bool:
    if inner not in _ends_with_head:
        _ends_with_head[inner] = ends_with_head(inner)
    return _ends_with_head[inner]


def forward_inputs(model: Any, row: PackedRow) -> dict[str, Any]:
    """Return the arguments of the model's forward pass for the row, with its masks, noise and soft prompt."""
    inner = bare_model(model)
    embedding = inner.get_input_embeddings()
    noise = getattr(embedding, "neftune_noise_alpha", 0.0) if model.training else 0.0
    # PEFT disables a soft prompt by replacing its own forward by the base's.
    has_prompt = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    prompt = model.active_peft_config if has_prompt and model.forward.__self__ is model else None
    inputs: dict[str, Any] = {}
    if noise or (prompt and prompt.peft_type != "PREFIX_TUNING"):
        inputs["inputs_embeds"] = embedding(row.input_ids)
    else:
        inputs["input_ids"] = row.input_ids
    if noise:
        inputs["inputs_embeds"] = inputs["inputs_embeds"] + _noise(inputs["inputs_embeds"], row.position_ids[0], noise)
    if prompt and prompt.peft_type == "PREFIX_TUNING":
        inputs["past_key_values"] = model.get_prompt(batch_size=1)
    elif prompt:
        before = model.get_prompt(batch_size=1).to(inputs["inputs_embeds"].dtype)
        inputs["inputs_embeds"] = torch.cat([before, inputs["inputs_embeds"]], dim=1)
    return inputs | _places(model, inner, row, prompt)


def _places(model: Any, inner: Any, row: PackedRow, prompt: Any) -> dict[str, Any]:
    """Return positions and masks of a packed row. A model that takes one sample a row makes both itself.

    Every sample attends to a soft prompt, which stands before the row as embedded tokens, or as keys and values of a
    cache.
    """
    if row_support(model).mode != "batched":
        if int(row.segments.max()) > 0:
            raise ValueError("several samples in one row of a model that computes one a row: expected rows_of")
        return {}
    count = prompt.num_virtual_tokens if prompt else 0
    segments = torch.cat([row.segments.new_full((count,), -1), row.segments])
    positions = torch.cat([torch.arange(count, device=segments.device), row.position_ids[0] + count])
    masks = row_masks(inner.config.get_text_config(), segments, positions, dtype=inner.dtype)
    skip = count if prompt and prompt.peft_type == "PREFIX_TUNING" else 0
    if isinstance(masks, dict):
        mask: Any = {kind: one[:, :, skip:] for kind, one in masks.items()}
    else:
        mask = masks[:, :, skip:]
    return {"position_ids": positions[None, skip:], "attention_mask": mask}


def _noise(embedded: torch.Tensor, positions: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return NEFTune noise (arXiv 2310.05914, algorithm 1): uniform within alpha / sqrt(L d).

    L is the length of the token's sample; the common prefix takes that of the first sample.
    """
    is_start = torch.cat([positions.new_zeros(1), (positions[1:] <= positions[:-1]).long()])
    is_end = torch.cat([is_start[1:], is_start.new_ones(1)]).bool()
    lengths = (positions[is_end] + 1)[is_start.cumsum(0)]
    scale = alpha / (lengths * embedded.shape[-1]).float().sqrt()
    return (torch.empty_like(embedded).uniform_(-1, 1) * scale[None, :, None]).to(embedded.dtype)
