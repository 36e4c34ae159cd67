"""What A and B of a LoRA begin as, beyond PEFT's random A and zero B. The base stays as it is, to the bit.

Published PiSSA and LoftQ put another base under their adapter; one base that serves a thousand adapters cannot be
changed for one of them. Here each is an update of the plain quantized base, so what is trained is what is served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from safetensors import safe_open

from adapterhub.bases.nf4 import dense_weight
from adapterhub.errors import RecipeError
from train.data.packing import pack
from train.data.tokenization import Sample
from train.objectives.base import Objective
from train.recipe import LoraSection

_ADAPTER = "default"
_ROUNDS = 16
"""power iterations of a partial singular value decomposition (PEFT's own choice for PiSSA)"""
_EVA_SAMPLES = 32
"""training samples whose activations EVA looks at"""
_ROW_SAMPLES = 8


def start_lora(model: Any, lora: LoraSection, *, base: Path, objective: Objective) -> None:
    """Put the values in that `lora.init` asks for. Raises RecipeError for a rank that is too large for that."""
    if lora.init == "pissa":
        _start_at_principal_parts(model, lora.rank)
    elif lora.init == "loftq":
        _start_at_rounding_errors(model, lora.rank, base)
    elif lora.init == "eva":
        places = range(min(_EVA_SAMPLES, objective.num_samples))
        _start_along_activations(model, lora.rank, [s for place in places for s in objective.samples_at(place)])


@torch.no_grad()
def _start_at_principal_parts(model: Any, rank: int) -> None:
    """PiSSA (arXiv 2404.02948, section 3): B A begins as the best rank-r part of W, and learns from there.

    The paper takes that part out of the base. Here it is taken off in the adapter: [A; A0] and [B, -B0] are one LoRA
    of rank 2 r whose second half stays, which is what PEFT converts a trained PiSSA to.
    """
    for name, layer in _layers(model):
        a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        first, second = _factors(dense_weight(layer.get_base_layer()) / layer.scaling[_ADAPTER], rank, name)
        a.copy_(torch.cat([first, first]))
        b.copy_(torch.cat([second, -second], dim=1))
        a.register_hook(_without(slice(rank, None), 0))
        b.register_hook(_without(slice(rank, None), 1))


@torch.no_grad()
def _start_at_rounding_errors(model: Any, rank: int, base: Path) -> None:
    """LoftQ (arXiv 2310.08659, algorithm 1, one round): B A begins as the best rank-r part of W - Q, what quantizing
    took from the weights. PEFT's own (`replace_lora_weights_loftq`) does the same, on GPUs only."""
    files = {key: path for path in sorted(base.glob("*.safetensors")) for key in _keys(path)}
    for name, layer in _layers(model):
        key = f"{name.removeprefix('base_model.model.')}.weight"
        with safe_open(files[key], framework="pt", device="cpu") as file:
            original = file.get_tensor(key).float()
        held = dense_weight(layer.get_base_layer())
        first, second = _factors((original.to(held.device) - held) / layer.scaling[_ADAPTER], rank, name)
        layer.lora_A[_ADAPTER].weight.copy_(first)
        layer.lora_B[_ADAPTER].weight.copy_(second)


def _start_along_activations(model: Any, rank: int, samples: Sequence[Sample]) -> None:
    """EVA (arXiv 2410.07170, section 3): A begins as the directions in which a layer's inputs vary most; B as 0."""
    cuts = range(0, len(samples), _ROW_SAMPLES)
    rows = [pack(samples[cut : cut + _ROW_SAMPLES], device=model.device, dtype=model.dtype) for cut in cuts]
    rows = [row for row in rows if row.input_ids.shape[1] >= rank]
    if not rows:
        raise RecipeError(f"init = eva needs rows of at least rank ({rank}) tokens to look at: lower rank.")
    batches = [
        {"input_ids": row.input_ids, "position_ids": row.position_ids, "attention_mask": row.mask} for row in rows
    ]
    initialize_lora_eva_weights(
        model,
        batches,
        forward_fn=lambda model, inputs: model(**inputs, logits_to_keep=1, use_cache=False),
        prepare_model_inputs_fn=lambda inputs, config: None,
        # Rows have no padding: every place counts.
        prepare_layer_inputs_fn=lambda inputs, model_inputs, name: inputs[0].flatten(0, 1),
        # Every process looks at the same samples.
        gather_distributed_inputs=False,
        show_progress_bar=False,
    )


def _factors(weight: torch.Tensor, rank: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(A [r, in], B [out, r]) whose product is the best of that rank for `weight`, its singular values shared."""
    if rank > min(weight.shape):
        raise RecipeError(f"[lora] rank {rank} is more than {name} {list(weight.shape)} has: lower rank.")
    u, s, v = torch.svd_lowrank(weight, q=min(2 * rank, *weight.shape), niter=_ROUNDS)
    root = s[:rank].sqrt()
    return (v[:, :rank] * root).T.contiguous(), (u[:, :rank] * root).contiguous()


def _without(part: slice, dim: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A hook that keeps the gradient from `part`, which then stays as it is under any Adam."""

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        changed = gradient.clone()
        (changed if dim == 0 else changed.T)[part] = 0
        return changed

    return hook


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _keys(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())
