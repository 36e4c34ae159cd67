"""Rotary embeddings that transformers rescales by the longest position of a batch, fixed for all sequences.

`longrope` (arXiv 2402.13753) has factors for short and for long texts; `dynamic` (NTK-aware interpolation) grows with
the text. Computed by the batch, an answer would depend on its neighbors, and cached keys on what ran beside them. So,
as vLLM does, the frequencies are chosen once, by the longest sequence that the server takes; by default that is the
length of the original training, within which transformers chooses the same for every sequence.
"""

from __future__ import annotations

from typing import Any

import torch

from adapterhub.choice import Choice

_RESCALED = ("dynamic", "longrope")


def fix_rotary(model: Any, max_model_len: int) -> tuple[Choice, ...]:
    """Fix the frequencies of the model's rotary embeddings for sequences of `max_model_len` tokens; return the choice.

    A module's types are one name, or one for each type of layer (`dynamic_rope_update` of transformers).
    """
    last = torch.tensor([[max_model_len - 1]], device=model.device)
    found: set[str] = set()
    for module in model.modules():
        types = getattr(module, "rope_type", None)
        for layer_type, rope_type in (types if isinstance(types, dict) else {None: types}).items():
            if rope_type in _RESCALED:
                found.add(rope_type)
                # Chooses the frequencies, which then stay.
                module(last.float(), last, **({} if layer_type is None else {"layer_type": layer_type}))
        if isinstance(types, dict):
            module.rope_type = {kind: _fixed(rope_type) for kind, rope_type in types.items()}
        elif types is not None:
            module.rope_type = _fixed(types)
    reason = f"fixed for sequences of {max_model_len} tokens, so that no answer depends on its neighbors"
    return tuple(Choice("rotary embedding", rope_type, reason) for rope_type in sorted(found))


def _fixed(rope_type: str) -> str:
    return "default" if rope_type in _RESCALED else rope_type
