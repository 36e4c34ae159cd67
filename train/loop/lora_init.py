"""Initialize A and B of a LoRA by PiSSA, LoftQ or EVA, without changing the base.

Published PiSSA and LoftQ change the base under their adapter, which is impossible for a base that serves a thousand
adapters. Here each is an update of the plain quantized base, so the trained model is the served model.
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
from train.data.tokenization import Sample
from train.objectives.base import Objective
from train.objectives.evaluation import packed_rows
from train.objectives.forward import forward_inputs
from train.recipe import LoraSection

_ADAPTER = "default"
_ROUNDS = 16
"""Number of power iterations of the partial singular value decomposition (PEFT's choice for PiSSA)."""
_EVA_SAMPLES = 32
"""Number of training samples whose activations EVA uses."""
_ROW_SAMPLES = 8


def init_lora(model: Any, lora: LoraSection, *, base: Path, objective: Objective) -> None:
    """Initialize A and B as `lora.init` asks.

    Raises RecipeError for a rank that is too large for a layer, and for DoRA on a layer with a row of zeros.
    """
    _check_row_lengths(model)
    if lora.init == "pissa":
        _init_pissa(model, lora.rank)
    elif lora.init == "loftq":
        _init_loftq(model, lora.rank, base)
    elif lora.init == "eva":
        places = range(min(_EVA_SAMPLES, objective.num_samples))
        _init_eva(model, lora.rank, [s for place in places for s in objective.samples_at(place)])


def _check_row_lengths(model: Any) -> None:
    """Check that DoRA (arXiv 2402.09353, equation 5) divides by no length 0, which a padding token's row has."""
    for name, layer in _layers(model):
        for magnitude in layer.lora_magnitude_vector.values():
            lengths = magnitude.weight
            if num_zero := int((lengths == 0).sum()):
                raise RecipeError(
                    f"method = dora divides by the length of each row, and {num_zero} of {lengths.numel()} rows of "
                    f"{name} are 0. Leave embeddings and head out of targets, or set method = lora in [lora]."
                )


@torch.no_grad()
def _init_pissa(model: Any, rank: int) -> None:
    """Start B A at the best rank-r approximation of W (PiSSA, arXiv 2404.02948, section 3).

    The paper subtracts that part from the base. Here the adapter subtracts it: [A; A0] and [B, -B0] are one LoRA of
    rank 2 r whose second half is frozen, which is what PEFT converts a trained PiSSA to.
    """
    for name, layer in _layers(model):
        a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        first, second = _low_rank_factors(dense_weight(layer.get_base_layer()) / layer.scaling[_ADAPTER], rank, name)
        a.copy_(torch.cat([first, first]))
        b.copy_(torch.cat([second, -second], dim=1))
        a.register_hook(_freeze(slice(rank, None), 0))
        b.register_hook(_freeze(slice(rank, None), 1))


@torch.no_grad()
def _init_loftq(model: Any, rank: int, base: Path) -> None:
    """Start B A at the best rank-r approximation of the quantization error W - Q.

    LoftQ (arXiv 2310.08659, algorithm 1, one round). PEFT's `replace_lora_weights_loftq` does the same, on GPUs only.
    """
    files = {key: path for path in sorted(base.glob("*.safetensors")) for key in _keys(path)}
    for name, layer in _layers(model):
        key = f"{name.removeprefix('base_model.model.')}.weight"
        with safe_open(files[key], framework="pt", device="cpu") as file:
            original = file.get_tensor(key).float()
        quantized = dense_weight(layer.get_base_layer())
        error = (original.to(quantized.device) - quantized) / layer.scaling[_ADAPTER]
        first, second = _low_rank_factors(error, rank, name)
        layer.lora_A[_ADAPTER].weight.copy_(first)
        layer.lora_B[_ADAPTER].weight.copy_(second)


def _init_eva(model: Any, rank: int, samples: Sequence[Sample]) -> None:
    """Start A at the directions in which a layer's inputs vary most, and B at 0 (EVA, arXiv 2410.07170, section 3)."""
    cuts = range(0, len(samples), _ROW_SAMPLES)
    rows = [row for cut in cuts for row in packed_rows(model, samples[cut : cut + _ROW_SAMPLES])]
    batches = [forward_inputs(model, row) for row in rows if row.input_ids.shape[1] >= rank]
    if not batches:
        raise RecipeError(
            f"the data is too short for init = eva with rank {rank}: expected rows of at least {rank} tokens. Lower "
            "rank in [lora]."
        )
    initialize_lora_eva_weights(
        model,
        batches,
        forward_fn=lambda model, inputs: model(**inputs, logits_to_keep=1, use_cache=False),
        prepare_model_inputs_fn=lambda inputs, config: None,
        # Rows have no padding: every place counts.
        prepare_layer_inputs_fn=lambda inputs, model_inputs, name: inputs[0].flatten(0, 1),
        # Every process uses the same samples.
        gather_distributed_inputs=False,
        show_progress_bar=False,
    )


def _low_rank_factors(weight: torch.Tensor, rank: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [r, in] and B [out, r] with the best rank-r product for `weight`; each has the root of its spectrum."""
    if rank > min(weight.shape):
        raise RecipeError(
            f"rank {rank} is too large for {name} of shape {list(weight.shape)}: expected at most "
            f"{min(weight.shape)}. Lower rank in [lora]."
        )
    u, s, v = torch.svd_lowrank(weight, q=min(2 * rank, *weight.shape), niter=_ROUNDS)
    root = s[:rank].sqrt()
    return (v[:, :rank] * root).T.contiguous(), (u[:, :rank] * root).contiguous()


def _freeze(part: slice, dim: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a hook that sets the gradient of `part` to zero, so that no Adam moves it."""

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
