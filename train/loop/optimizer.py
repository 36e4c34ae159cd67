"""Create the optimizer of a recipe; save and load its state as safetensors and JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from adapterhub.bases.loading import adamw
from adapterhub.choice import Choice
from adapterhub.files import write_atomic
from train.recipe import TrainSection

_NOT_DECAYED = ("bias", "layernorm", "rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")
"""Names of parameters without weight decay, as in transformers' `Trainer.get_decay_parameter_names`."""
_TENSORS, _NUMBERS = "optimizer.safetensors", "optimizer.json"


def make_optimizer(
    parameters: Sequence[torch.nn.Parameter],
    train: TrainSection,
    *,
    lora_b_parameters: Sequence[torch.nn.Parameter] = (),
    undecayed: Sequence[torch.nn.Parameter] = (),
) -> tuple[torch.optim.Optimizer, Choice]:
    """Return the optimizer, and the choice with its reason. Paged optimizers exist on CUDA only: else unpaged.

    `lora_b_parameters` are those of `parameters` that LoRA+ trains at a higher rate (`set_learning_rate`), `undecayed`
    those without weight decay.
    """
    bits: Any = 8 if train.optimizer.endswith("8bit") else 32
    is_paged = train.optimizer.startswith("paged")
    on_cuda = parameters[0].device.type == "cuda"
    groups = _groups(parameters, train, lora_b_parameters, undecayed)
    reason = "as asked" if on_cuda or not is_paged else "as asked, but unpaged: paging needs CUDA"
    if bits == 32 and not (is_paged and on_cuda):
        chosen: torch.optim.Optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        if train.optimizer == "adamw":
            reason = "LoRA's moments are small: 8 bytes a trainable parameter"
        value = "AdamW, fused"
    else:
        chosen = adamw(groups, bits=bits, is_paged=is_paged and on_cuda)
        value = f"{'paged ' if is_paged and on_cuda else ''}AdamW, {bits} bit"
    for group in chosen.param_groups:
        group["weight_decay"] = train.weight_decay if group["is_decayed"] else 0.0
    return chosen, Choice("optimizer", value, reason)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of A, and of B times the LoRA+ ratio."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_ratio"]


def undecayed_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the parameters that transformers' Trainer excludes from weight decay: norms and biases."""
    names = re.compile("|".join(_NOT_DECAYED))
    norms = {id(p) for m in model.modules() if isinstance(m, torch.nn.LayerNorm) for p in m.parameters()}
    return [p for name, p in model.named_parameters() if names.search(name.lower()) or id(p) in norms]


def _groups(
    parameters: Sequence[torch.nn.Parameter],
    train: TrainSection,
    lora_b_parameters: Sequence[torch.nn.Parameter],
    undecayed: Sequence[torch.nn.Parameter],
) -> list[dict[str, Any]]:
    """Return a group for each pair of rate and decay, in the order in which the parameters first need it."""
    faster, spared = set(map(id, lora_b_parameters)), set(map(id, undecayed))
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        ratio = train.lora_plus_ratio if id(parameter) in faster else 1.0
        groups.setdefault((ratio, id(parameter) not in spared), []).append(parameter)
    return [
        {"params": found, "rate_ratio": ratio, "is_decayed": is_decayed}
        for (ratio, is_decayed), found in groups.items()
    ]


def save_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write every tensor of the state to safetensors and every number to JSON."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, float] = {}
    for place, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            key = f"{place}.{name}"
            if isinstance(value, torch.Tensor):
                # A copy: parameters of one shape may share a quantization map, which safetensors refuses.
                tensors[key] = value.detach().cpu().clone().contiguous()
            else:
                numbers[key] = value
    save_file(tensors, folder / _TENSORS)
    write_atomic(folder / _NUMBERS, json.dumps(numbers))


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Load what `save_optimizer` wrote into an optimizer of the same kind over the same parameters."""
    numbers = json.loads((folder / _NUMBERS).read_text())
    parameters = _parameters(optimizer)
    with safe_open(folder / _TENSORS, framework="pt", device="cpu") as file:
        states: dict[int, dict[str, Any]] = {}
        for key in file.keys():  # noqa: SIM118 - not a dictionary
            states.setdefault(_place(key), {})[_name(key)] = file.get_tensor(key)
    for key, value in numbers.items():
        states.setdefault(_place(key), {})[_name(key)] = value
    for place, state in states.items():
        _fill(optimizer, place, parameters[place], state)


def _fill(optimizer: Any, place: int, parameter: torch.nn.Parameter, state: dict[str, Any]) -> None:
    if hasattr(optimizer, "init_state"):
        # bitsandbytes allocates its own buffers, paged ones where asked for; the values are copied into them.
        parameter.grad = torch.zeros_like(parameter)
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, place)
        parameter.grad = None
    current = optimizer.state[parameter]
    for name, value in state.items():
        if isinstance(current.get(name), torch.Tensor):
            current[name].copy_(value)
        else:
            current[name] = value.to(parameter.device) if isinstance(value, torch.Tensor) else value


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _place(key: str) -> int:
    return int(key.partition(".")[0])


def _name(key: str) -> str:
    return key.partition(".")[2]
