"""Weights of any architecture, counted without weights."""

from __future__ import annotations

import pytest
import torch
from architectures import NOT_TINY, causal_lm_types, tiny_config, tiny_model
from transformers import AutoConfig

from adapterhub.memory.counting import meta_model, shape_of_model
from adapterhub.memory.known_shapes import MODEL_SHAPES
from adapterhub.memory.model_shape import ModelShape


def counted(model_type: str, **sizes: int) -> ModelShape:
    return shape_of_model(meta_model(AutoConfig.for_model(model_type, **sizes)))


def test_a_llama_is_counted_as_the_formula_says() -> None:
    known, found = MODEL_SHAPES["llama-7b"], counted("llama")
    assert found.weights == known.weights
    assert found.linear_weights == known.linear_weights
    assert found.cached_numbers == known.cached_numbers
    assert found.lora_weights(16) == known.lora_weights(16)
    names = ["q_proj", "down_proj", "embed_tokens", "lm_head"]
    assert found.lora_weights(8, names, is_dora=True) == known.lora_weights(8, names, is_dora=True)
    with pytest.raises(KeyError, match="w1"):
        found.lora_weights(8, ["q_proj", "w1"])


@pytest.mark.parametrize(
    ("model_type", "sizes", "billions", "active"),
    [
        ("mixtral", {}, 46.703, 12.880),  # arXiv 2401.04088: 47B and 13B
        ("deepseek_v3", {}, 671.026, 37.552),  # arXiv 2412.19437: 671B and 37B
        ("gpt2", {}, 0.124, 0.124),
        ("bert", {}, 0.110, 0.110),
        ("gemma2", {"num_hidden_layers": 26}, 2.614, 2.614),
        ("t5", {"d_model": 1024, "d_kv": 128, "num_heads": 128, "d_ff": 65_536, "num_layers": 24}, 11.307, 11.307),
    ],
)
def test_published_numbers_of_weights(model_type: str, sizes: dict[str, int], billions: float, active: float) -> None:
    shape = counted(model_type, **sizes)
    assert round(shape.weights / 1e9, 3) == billions
    assert shape.counted is not None
    assert round((shape.counted.active or 0) / 1e9, 3) == active


@pytest.mark.parametrize("model_type", ["gpt2", "falcon", "gpt_bigcode", "mixtral", "gemma3", "opt", "deepseek_v3"])
def test_the_cache_is_as_large_as_transformers_makes_it(model_type: str) -> None:
    model = tiny_model(model_type)
    with torch.inference_mode():
        cache = model(input_ids=torch.ones(1, 5, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert shape_of_model(model).cached_numbers == held / 5


def test_every_architecture_is_counted() -> None:
    for model_type in set(causal_lm_types()) - set(NOT_TINY):
        model = meta_model(tiny_config(model_type))
        shape = shape_of_model(model)
        assert shape.weights == sum(parameter.numel() for parameter in model.parameters()), model_type
        assert 0 < shape.linear_weights + shape.expert_weights < shape.weights, model_type
        assert shape.layers >= 1, model_type
