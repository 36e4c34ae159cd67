"""Shapes of well-known base models, so that their memory can be estimated without a download."""

from __future__ import annotations

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


def shape_of(base: BaseName) -> ModelShape | None:
    """Return the shape of a base that is known by its name, else None.

    `-instruct` and `-chat` models have the shape of the model they are tuned from.
    """
    name = str(base.name).lower()
    return MODEL_SHAPES.get(name) or MODEL_SHAPES.get(name.removesuffix("-instruct").removesuffix("-chat"))
