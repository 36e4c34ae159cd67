"""All decoder layers of a Llama-like model as one call of our CPU kernels, wherever that gives the same numbers."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import nn

from adapterhub.base_model import Choice
from serve import cpu_kernels
from serve.attention import KvCache, PagedStep
from serve.cpu_kernels import LANES, MAX_HEAD_DIM, CpuKernels, Heads, Layer, Matrix, Shape
from serve.lora_layers import AdapterBank, LoraLinear

_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""models of which the window and everything else a short trial cannot show is known to be what decoder.c computes"""


class FusedDecoder(nn.Module):
    """Stands where the model's decoder layers were, as the only one."""

    def __init__(self, model: Any, bank: AdapterBank, cache: KvCache, kernels: CpuKernels) -> None:
        super().__init__()
        config = model.config.get_text_config()
        layers = list(model.model.layers)
        first = layers[0].self_attn
        self._kept = layers  # their weights are what the structs point to
        self._bank = bank
        self._kernels = kernels
        dim = cache.shape.head_dim
        heads = Heads(config.num_attention_heads, config.num_key_value_heads, dim, 0, first.scaling, 0.0)
        width, inner = config.hidden_size, config.intermediate_size
        self._shape = Shape(
            heads, cache.layers.shape[3], width, inner, cache.block_size, layers[0].input_layernorm.variance_epsilon
        )
        self._layers = (Layer * len(layers))(*(_layer(layer, cache, config) for layer in layers))
        queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
        self._room = width + max(2 * queries + 2 * keys, 3 * inner)
        """floats a row needs"""

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        paged: PagedStep,
        **_: Any,
    ) -> torch.Tensor:
        """hidden_states [1, N, hidden] -> the same after all layers."""
        hidden = hidden_states[0].clone(memory_format=torch.contiguous_format)
        cosine, sine = (part[0].contiguous() for part in position_embeddings)
        segments, tiles = self._bank.rows.kernel, paged.tiles.array
        step = cpu_kernels.Step(
            ctypes.addressof(tiles), ctypes.addressof(segments), cosine.data_ptr(), sine.data_ptr(),
            len(hidden), len(tiles), len(segments),
        )  # fmt: skip
        room = torch.empty(len(hidden) * self._room)
        self._kernels.run_layers(self._shape, self._layers, step, hidden, room)
        return hidden[None]


def fits(model: Any, cache: KvCache) -> bool:
    """Does the model have the layers decoder.c computes, with weights the kernels read?"""
    config = model.config.get_text_config()
    if config.model_type not in _MODEL_TYPES or getattr(config, "hidden_act", None) != "silu":
        return False
    dim = cache.shape.head_dim
    if dim % LANES or dim > MAX_HEAD_DIM or cache.layers.dtype != torch.float32:
        return False
    joined = [(layer.self_attn.q_proj, layer.mlp.gate_proj) for layer in model.model.layers]
    alone = [(layer.self_attn.o_proj, layer.mlp.down_proj) for layer in model.model.layers]
    rotary = model.model.rotary_emb(torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.long))[0]
    return (
        rotary.shape[-1] == dim
        and all(len(q.group.widths) == 3 and len(gate.group.widths) == 2 for q, gate in joined)
        and all(linear.group.matrix is not None for pair in (*joined, *alone) for linear in pair)
    )


def fuse_decoder(model: Any, bank: AdapterBank, cache: KvCache, kernels: CpuKernels) -> Choice:
    """Put a FusedDecoder in place of the model's layers when the model is one it computes."""
    if not fits(model, cache):
        return Choice("decoder layers", "the model's own", "only NF4 Llama, Mistral and Qwen in fp32 are fused")
    model.model.layers = nn.ModuleList([FusedDecoder(model, bank, cache, kernels)])
    return Choice("decoder layers", "fused", "one call of our CPU kernels computes them all")


def _layer(layer: Any, cache: KvCache, config: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    keys, values = cache.layers[attention.layer_idx]
    linears = (attention.q_proj, attention.o_proj, mlp.gate_proj, mlp.down_proj)
    norms = (
        layer.input_layernorm, layer.post_attention_layernorm,
        getattr(attention, "q_norm", None), getattr(attention, "k_norm", None),
    )  # fmt: skip
    return Layer(
        *(_matrix(linear) for linear in linears),
        *(None if norm is None else norm.weight.data_ptr() for norm in norms),
        keys.data_ptr(), values.data_ptr(), *(linear.group.index for linear in linears), _window(attention, config),
    )  # fmt: skip


def _matrix(linear: LoraLinear) -> Matrix:
    assert linear.group.matrix is not None
    return linear.group.matrix.struct


def _window(attention: Any, config: Any) -> int:
    """How far back a layer looks, 0 for all the way; Mistral's layers all use the config's."""
    of_layer = getattr(attention, "sliding_window", None)
    return int((config.sliding_window if config.model_type == "mistral" else of_layer) or 0)
