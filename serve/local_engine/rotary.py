"""Rotary embeddings that transformers rescales by the longest position of a batch, fixed for all sequences.

`longrope` (arXiv 2402.13753) has factors for short and for long texts; `dynamic` (NTK-aware interpolation) grows with
the text. Computed by the batch, an answer would depend on its neighbors, and cached keys on what ran beside them. So,
as vLLM does, the frequencies are chosen once, by the longest sequence that the server takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from adapterhub.choice import Choice

_RESCALED = ("dynamic", "longrope")


def fix_rotary(model: nn.Module, max_model_len: int) -> tuple[Choice, ...]:
    """Fix the frequencies of the model's rotary embeddings for sequences of `max_model_len` tokens; return the choice.

    A module's types are one name, or one for each type of layer (`dynamic_rope_update` of transformers).
    """
    last = torch.tensor([[max_model_len - 1]])
    choices: dict[str, Choice] = {}
    for module in model.modules():
        types = getattr(module, "rope_type", None)
        several = types if isinstance(types, dict) else {None: types}
        for layer_type, rope_type in several.items():
            if rope_type not in _RESCALED:
                continue
            given = {} if layer_type is None else {"layer_type": layer_type}
            weight = torch.zeros(1, dtype=torch.float32, device=_device(model))
            module(weight, last.to(weight.device), **given)  # chooses the frequencies, which then stay
            choices[rope_type] = Choice("rotary embedding", rope_type, f"fixed for sequences of {max_model_len} tokens")
        if isinstance(types, dict):
            module.rope_type = {k: "default" if v in _RESCALED else v for k, v in types.items()}
        elif types in _RESCALED:
            module.rope_type = "default"
    return tuple(choices.values())


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device
