"""All decoder layers of a Llama-like model as one call of our CPU kernels, with the same results."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from adapterhub.choice import Choice
from serve.local_engine.attention import CURRENT_STEP, KvCache
from serve.local_engine.cpu.kernels import CpuKernels
from serve.local_engine.cpu.structs import LANES, MAX_HEAD_DIM, DecoderLayer, DecoderLayers, Heads, WeightMatrix
from serve.local_engine.lora_layers import AdapterBank, LoraLinear

_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types that decoder.c computes: window, activation and rotary embedding are known to be its own."""


class FusedDecoder(nn.Module):
    """Replaces all decoder layers of a model, as one layer."""

    def __init__(self, model: Any, bank: AdapterBank, cache: KvCache, kernels: CpuKernels) -> None:
        super().__init__()
        config = model.config.get_text_config()
        layers = list(model.model.layers)
        first = layers[0].self_attn
        self._bank = bank
        self._kernels = kernels
        dim = cache.shape.head_dim
        self._layers = DecoderLayers(
            [_layer(layer, cache, config) for layer in layers],
            heads=Heads(config.num_attention_heads, config.num_key_value_heads, dim, 0, first.scaling, 0.0),
            intermediate=config.intermediate_size,
            block_size=cache.block_size,
            eps=layers[0].input_layernorm.variance_epsilon,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **_: Any,
    ) -> torch.Tensor:
        """Run all layers on hidden_states [1, N, hidden]; return the same shape."""
        hidden = hidden_states[0].clone(memory_format=torch.contiguous_format)
        cosine, sine = (part[0].contiguous() for part in position_embeddings)
        tiles = CURRENT_STEP.get().tiles
        self._kernels.run_layers(self._layers, hidden, (cosine, sine), tiles, self._bank.rows.kernel)
        return hidden[None]


def can_fuse(model: Any, cache: KvCache) -> tuple[bool, str]:
    """Return whether decoder.c computes the model's layers and reads their weights; if not, also the reason.

    Checks model type and activation, dtypes of states and KV cache, head size, and how weights and norms are stored.
    """
    config = model.config.get_text_config()
    if config.model_type not in _MODEL_TYPES or getattr(config, "hidden_act", None) != "silu":
        return False, f"only {', '.join(_MODEL_TYPES)} with silu are fused, this is {config.model_type}"
    if not hasattr(model.model, "layers") or not hasattr(model.model, "rotary_emb"):
        return False, "its language model is a part of another model"
    token = torch.zeros(1, 1, dtype=torch.long)
    states = model.get_input_embeddings()(token)
    if states.dtype != torch.float32 or cache.layers.dtype != torch.float32:
        return False, f"it computes in {str(states.dtype).removeprefix('torch.')}; only float32 is fused, and faster"
    dim = cache.shape.head_dim
    if dim % LANES or dim > MAX_HEAD_DIM or model.model.rotary_emb(states, token)[0].shape[-1] != dim:
        return (
            False,
            f"heads of {dim} numbers: expected a multiple of {LANES} up to {MAX_HEAD_DIM}, all of them rotated",
        )
    joined = [(layer.self_attn.q_proj, layer.mlp.gate_proj) for layer in model.model.layers]
    alone = [(layer.self_attn.o_proj, layer.mlp.down_proj) for layer in model.model.layers]
    if (
        any(len(q.group.widths) != 3 or len(gate.group.widths) != 2 for q, gate in joined)
        or any(linear.group.matrix is None for pair in (*joined, *alone) for linear in pair)
        or any(
            norm.dtype != torch.float32 for layer in model.model.layers for norm in _norms(layer) if norm is not None
        )
    ):
        return False, "its weights are stored in a way that our kernels do not read"
    return True, ""


def fuse_decoder(model: Any, bank: AdapterBank, cache: KvCache, kernels: CpuKernels) -> Choice:
    """Replace the model's layers by a FusedDecoder where it can; return the choice."""
    is_possible, reason = can_fuse(model, cache)
    if not is_possible:
        return Choice("decoder layers", "the model's own", reason)
    model.model.layers = nn.ModuleList([FusedDecoder(model, bank, cache, kernels)])
    return Choice("decoder layers", "fused", "one call of our CPU kernels computes them all")


def _layer(layer: Any, cache: KvCache, config: Any) -> DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp
    linears = (attention.q_proj, attention.o_proj, mlp.gate_proj, mlp.down_proj)
    qkv, output, gate_up, down = map(_projection, linears)
    input_norm, post_norm, query_norm, key_norm = _norms(layer)
    keys, values = cache.layers[attention.layer_idx]
    window = _window(attention, config)
    assert input_norm is not None
    assert post_norm is not None
    return DecoderLayer(qkv, output, gate_up, down, input_norm, post_norm, query_norm, key_norm, keys, values, window)


def _norms(layer: Any) -> list[torch.Tensor | None]:
    """Return the norm weights of a layer's input, before its MLP, of queries and of keys."""
    norms = (
        layer.input_layernorm, layer.post_attention_layernorm,
        getattr(layer.self_attn, "q_norm", None), getattr(layer.self_attn, "k_norm", None),
    )  # fmt: skip
    return [None if norm is None else norm.weight.detach() for norm in norms]


def _projection(linear: LoraLinear) -> tuple[WeightMatrix, int]:
    assert linear.group.matrix is not None
    return linear.group.matrix, linear.group.index


def _window(attention: Any, config: Any) -> int:
    """Return a layer's attention window, in tokens, 0 for none; Mistral's layers all use the config's."""
    of_layer = getattr(attention, "sliding_window", None)
    return int((config.sliding_window if config.model_type == "mistral" else of_layer) or 0)
