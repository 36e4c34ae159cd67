"""Which bases we train and serve as transformers computes them, and how: the only list of it.

The plan, the trainer, `pack` and both engines ask `capability_of`. It is a positive list: what is not on it is trained
one sample a row and served one sequence at a time, by the model's own forward pass and cache, or refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Mode = Literal["batched", "single", "refused"]
"""How a base is computed: many samples or sequences in one forward pass; one at a time; not at all."""


@dataclass(frozen=True)
class Support:
    """How a base is trained or served, and why not better."""

    mode: Mode
    reason: str = ""


@dataclass(frozen=True)
class Capability:
    """What we do with one base, known from its config before weights are read."""

    train: Support
    serve: Support


_BATCHED = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types whose only state is attention as our kernels and packed rows compute it; docs/models.md proves each."""


def capability_of(config: Any) -> Capability:
    """Return how a base with this transformers config is trained and served."""
    model_type = config.get_text_config().model_type
    if model_type in _BATCHED:
        return Capability(Support("batched"), Support("batched"))
    reason = f"{model_type} is not known to keep no state but attention's"
    return Capability(Support("single", reason), Support("single", reason))
