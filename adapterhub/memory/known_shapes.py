"""Shapes of well-known base models, so that their memory can be estimated without a download."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from adapterhub.adapter import BaseName
from adapterhub.memory.model_shape import ModelShape

MODEL_SHAPES = {
    "smollm2-135m": ModelShape(30, 576, 1536, 192, 49_152, is_tied=True),
    "llama-7b": ModelShape(32, 4096, 11_008, 4096, 32_000),
    "llama-13b": ModelShape(40, 5120, 13_824, 5120, 32_000),
    "llama-33b": ModelShape(60, 6656, 17_920, 6656, 32_000),
    "llama-65b": ModelShape(80, 8192, 22_016, 8192, 32_000),
    "llama-2-70b": ModelShape(80, 8192, 28_672, 1024, 32_000),
    "llama-3-8b": ModelShape(32, 4096, 14_336, 1024, 128_256),
    "llama-3-70b": ModelShape(80, 8192, 28_672, 1024, 128_256),
    "mistral-7b": ModelShape(32, 4096, 14_336, 1024, 32_000),
    "yi-34b": ModelShape(60, 7168, 20_480, 1024, 64_000),
    "qwen2.5-7b": ModelShape(28, 3584, 18_944, 512, 152_064),
    "qwen3-8b": ModelShape(36, 4096, 12_288, 1024, 151_936),
}
"""Layers, hidden, intermediate, key_value and vocabulary of each model, from its config.json."""

_T5 = {"model_type": "t5", "d_model": 1024, "d_kv": 128, "num_layers": 24, "vocab_size": 32_128}
KNOWN_CONFIGS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "t5-3b": {**_T5, "num_heads": 32, "d_ff": 16_384},
        "t5-11b": {**_T5, "num_heads": 128, "d_ff": 65_536},
        "mixtral-8x7b": {"model_type": "mixtral"},  # transformers' own default
    }
)
"""What the config.json of a well-known model of another shape says, where it differs from transformers' default."""

_NO_PART_OF_A_SHAPE = frozenset({"meta", "hf", "instruct", "chat", "base", "it", "preview", "bnb", "4bit", "8bit"})
"""Words of a model's name that do not tell its sizes: `-instruct` models have those of the model they come from."""


def known_name(text: str) -> str | None:
    """Return the well-known model that people mean: `llama 2 70b`, `meta-llama/Llama-2-70b-hf`; None for another."""
    words = re.split(r"[-_ ]+", text.strip().rpartition("/")[2].lower())
    kept = "-".join(word for word in words if word not in _NO_PART_OF_A_SHAPE and not re.fullmatch(r"v\d[\d.]*", word))
    kept = re.sub(r"^llama-?3\.1", "llama-3", kept)
    kept = re.sub(r"^llama-?2-(7b|13b)$", r"llama-\1", kept)
    return next((name for name in (*MODEL_SHAPES, *KNOWN_CONFIGS) if _letters(name) == _letters(kept)), None)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name)


def shape_of(base: BaseName) -> ModelShape | None:
    """Return the shape of a base of LLaMA's architecture that is known by its name, else None. Loads no torch."""
    name = known_name(str(base.name))
    return None if name is None else MODEL_SHAPES.get(name)
