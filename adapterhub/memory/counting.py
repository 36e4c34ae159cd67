"""Count the weights of any architecture of transformers, on a model without weights."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from adapterhub.errors import BaseUnsupported
from adapterhub.memory.model_shape import CountedWeights, LayerSizes, ModelShape

_CHOSEN = ("num_experts_per_tok", "num_selected_experts", "moe_top_k", "moe_topk", "moe_k", "top_k_experts", "top_k")
"""Names under which configs state the number of experts that compute a token."""
_EXPERT = re.compile(r"(.*\bexperts)\.(\d+\.)?")
"""Module of all experts of a layer; a number follows where each is a module of its own."""
_WITHOUT_CACHE = ("linear_attention", "conv", "mamba", "recurrent", "mlp", "moe")
"""Kinds of layers, by transformers' names, whose memory does not grow with the tokens, or that have none."""


def meta_model(config: Any, *, dtype: Any = None) -> Any:
    """Return the language model of a transformers config on the meta device: every layer, no weights.

    Raises BaseUnsupported for a config of something else.
    """
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMaskedLM,
        AutoModelForSeq2SeqLM,
    )

    kinds = (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForImageTextToText, AutoModelForMaskedLM)
    kind = next((kind for kind in kinds if type(config) in kind._model_mapping), None)
    if kind is None:
        raise BaseUnsupported(
            f"{config.model_type} is no language model of transformers: its memory is not known. Expected a causal "
            "language model, an encoder or an encoder-decoder."
        )
    with torch.device("meta"):
        return kind.from_config(config, dtype=dtype or torch.bfloat16, trust_remote_code=False)


def shape_of_model(model: Any) -> ModelShape:
    """Return the shape of a model, which may be on the meta device, with its weights counted."""
    import torch
    from transformers.pytorch_utils import Conv1D

    config = model.config
    text = config.get_text_config()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    counted: set[int] = set()

    def is_counted(module: Any) -> bool:
        """Return whether the weight was met before: Zamba's layers share some."""
        known = id(module.weight) in counted
        counted.add(id(module.weight))
        return known

    linears = Counter(
        (name.rpartition(".")[2], *_sizes(module))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head and not is_counted(module)
    )
    layers = _size(text, "num_hidden_layers") or max(
        len(one) for one in model.modules() if isinstance(one, torch.nn.ModuleList)
    )
    if getattr(config, "is_encoder_decoder", False):
        layers += _size(text, "num_decoder_layers") or _size(text, "decoder_layers") or layers
    fused = {
        name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 3 and _EXPERT.match(name)
    }
    chosen = next((size for name in _CHOSEN if (size := _size(text, name))), None)
    hidden = _size(text, "hidden_size") or embedding.embedding_dim
    # An MLP's widest input is that of its last layer; a token passes as many experts as are chosen for it.
    widths = [inputs for _, inputs, _ in linears]
    widths += [(chosen or 1) * one[0].numel() // hidden for name, one in fused.items() if name.endswith("down_proj")]
    key_value = _key_value(text)
    return ModelShape(
        layers=layers,
        hidden=hidden,
        intermediate=max(widths),
        key_value=key_value,
        vocabulary=embedding.num_embeddings,
        query=(_size(text, "head_dim") or 0) * (_size(text, "num_attention_heads") or 0),
        is_tied=head is not None and head.weight is embedding.weight,
        counted=CountedWeights(
            linears=tuple(LayerSizes(*key, count) for key, count in sorted(linears.items())),
            total=sum(parameter.numel() for parameter in model.parameters()),
            experts=sum(parameter.numel() for parameter in fused.values()),
            active=_active(model, chosen),
            cached=_layers_with_cache(text, layers) * _cached(text, key_value),
        ),
    )


def _sizes(module: Any) -> tuple[int, int]:
    """Return (inputs, outputs) of a linear layer; transformers' Conv1D stores its weight the other way round."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    inputs, outputs = module.weight.shape
    return inputs, outputs


def _active(model: Any, chosen: int | None) -> int | None:
    """Return the number of weights that compute one token, all but those of the experts that are not chosen for it."""
    idle, total = 0.0, 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        found = _EXPERT.match(name)
        if found is None:
            continue
        if chosen is None:
            return None
        experts = len(model.get_submodule(found[1])) if found[2] else parameter.shape[0]
        idle += parameter.numel() * (1 - min(chosen, experts) / experts)
    return total - round(idle)


def _key_value(text: Any) -> int:
    heads = _size(text, "num_attention_heads") or 0
    head = _size(text, "head_dim") or ((_size(text, "hidden_size") or 0) // heads if heads else 0)
    groups = _size(text, "num_key_value_heads") or heads
    if getattr(text, "multi_query", False):  # Falcon's and StarCoder's names
        groups = _size(text, "num_kv_heads") or heads if getattr(text, "new_decoder_architecture", False) else 1
    return head * groups


def _cached(text: Any, key_value: int) -> int:
    """Return the numbers that one layer caches for one token: keys and values, or latent attention's part of both."""
    latent, rotary = _size(text, "kv_lora_rank"), _size(text, "qk_rope_head_dim")
    return latent + rotary if latent and rotary else 2 * key_value


def _layers_with_cache(text: Any, layers: int) -> int:
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if not kinds:
        return layers
    return sum(not any(kind.startswith(one) for one in _WITHOUT_CACHE) for kind in kinds)


def _size(text: Any, name: str) -> int | None:
    """Return a size by transformers' own name for it; None where there is not one number for all layers."""
    found = vars(text).get(text.attribute_map.get(name, name))
    return found if type(found) is int else None
