"""How long a sequence a base has positions for: those of some are rows of a table."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch


@torch.no_grad()
def why_too_long(model: Any, length: int) -> str:
    """Return why a sequence of `length` tokens has more positions than a model in memory; empty where it has not.

    Rotary positions and distances have no last one. The model is asked for a position beyond its config's only.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is None or length <= longest or "position_ids" not in signature(model.forward).parameters:
        return ""
    token, last = (torch.tensor([[number]], device=model.device) for number in (3, length - 1))
    try:
        model(input_ids=token, position_ids=last, use_cache=False)
    except (IndexError, RuntimeError) as error:
        return f"the base has {longest} positions ({error})"
    return ""
