"""Choose the layers of a base that a LoRA adapts: those that PEFT reloads, a package holds and the engines compute."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers.pytorch_utils import Conv1D

from adapterhub.errors import RecipeError
from train.recipe import LoraSection

_ATTENTION = re.compile(r"attn|attention")
"""Part of the name of the module that an attention layer belongs to."""

_EXPERTS = "the weights of all experts are one tensor, which no package holds"
_ROUTER = "it chooses experts and is no plain linear layer"
_OTHER_TOWER = "it is not part of the language model"
_CONVERTED = "PEFT takes layers of this name for the base's experts"
_MAMBA = "Mamba reads its weight without the adapter"


@dataclass(frozen=True)
class TargetLayers:
    """Linear layers of a base, without its output head, by dotted name."""

    adaptable: dict[str, torch.nn.Module]
    left_out: dict[str, str]
    """Layers that no adapter can be on -> the reason."""

    def count_left_out(self) -> list[tuple[str, int, str]]:
        """Return (last part of the name, number of layers, reason) of those left out."""
        counts = Counter((name.rpartition(".")[2], reason) for name, reason in self.left_out.items())
        return [(name, count, reason) for (name, reason), count in counts.items()]


def linear_layers(model: Any) -> TargetLayers:
    """Find the layers of a model without adapters, with or without weights (device meta)."""
    head, text = model.get_output_embeddings(), _language_model(model)
    left_out: dict[str, str] = {}
    adaptable: dict[str, torch.nn.Module] = {}
    for name, module in model.named_modules():
        is_text = text is None or name == text or name.startswith(f"{text}.")
        is_linear = isinstance(module, torch.nn.Linear | Conv1D) and module is not head
        if is_linear:
            reason = _reason(model, name, module) if is_text else _OTHER_TOWER
        else:
            reason = _reason_of_weights(name, module) if is_text else ""
        if reason:
            left_out[name] = reason
        elif is_linear:
            adaptable[name] = module
    for name in _converted(model, adaptable):
        left_out[name] = _CONVERTED
        del adaptable[name]
    return TargetLayers(adaptable, left_out)


def choose_targets(model: Any, lora: LoraSection) -> str | list[str]:
    """Return PEFT's `target_modules` for the recipe.

    PEFT ignores a name that matches nothing if another matches, and by "all-linear" adapts experts and vision towers
    too. Raises RecipeError for names that the base does not have, and for layers that no adapter can be on.
    """
    layers = linear_layers(model)
    if lora.targets == "all-linear":
        return sorted(layers.adaptable) if layers.left_out else "all-linear"
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    names = {name.rpartition(".")[2] for name in layers.adaptable}
    attention = {name.rpartition(".")[2] for name in layers.adaptable if _ATTENTION.search(name.rpartition(".")[0])}
    words = {
        "all-linear": names,
        "attention": attention,
        "mlp": names - attention,
        "embeddings": {leaf_name(model, embedding)},
        "head": {leaf_name(model, head)},
    }
    wanted = [lora.targets] if isinstance(lora.targets, str) else lora.targets
    found = set().union(*(words.get(word, {word}) for word in wanted))
    whole = {name for name in layers.adaptable if any(_is_named(name, target) for target in found)}
    ends = words["embeddings"] | words["head"]
    known = whole | ends
    unknown = sorted(
        target for target in wanted if target not in words and not any(_is_named(n, target) for n in known)
    )
    if unknown or not found:
        raise RecipeError(_refusal(layers, unknown or list(wanted), names, words))
    return sorted(whole | found & ends) if layers.left_out else sorted(found)


def _is_named(name: str, target: str) -> bool:
    """Apply PEFT's rule: a target is a module's dotted name, or its end."""
    return name == target or name.endswith(f".{target}")


def leaf_name(model: Any, wanted: torch.nn.Module) -> str:
    """Return the last part of a module's dotted name."""
    names: Iterator[str] = (name for name, module in model.named_modules() if module is wanted)
    return next(names).rpartition(".")[2]


def _refusal(layers: TargetLayers, unknown: list[str], names: set[str], words: dict[str, set[str]]) -> str:
    left_out = [f"{name}: {reason}" for name, _, reason in layers.count_left_out()]
    told = f" that an adapter can be on ({'; '.join(left_out)})" if left_out else ""
    return (
        f"the base has no linear layer {', '.join(unknown)}{told}: expected "
        f"{', '.join(sorted(names))}, or a group ({', '.join(words)}). Correct targets in [lora]."
    )


def _language_model(model: Any) -> str | None:
    """Return the dotted name of the language model in a model of text and pictures, None where it is the model."""
    if model.config is model.config.get_text_config():
        return None
    decoder = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder and name), None)


def _reason(model: Any, name: str, module: torch.nn.Module) -> str:
    """Return why no adapter can be on a linear layer of the language model, else nothing."""
    parent, _, leaf = name.rpartition(".")
    if leaf == "out_proj" and re.search("Mamba|Mixer", type(model.get_submodule(parent)).__name__):
        return _MAMBA
    return "" if _is_linear(module) else _ROUTER


def _is_linear(module: Any) -> bool:
    """Return whether a module of a linear class gives one row of outputs for a row of inputs, and nothing else."""
    if not type(module).__module__.startswith("transformers.models."):
        return True
    given = module.weight.new_zeros(1, module.in_features)
    try:
        found = module(given)
    except Exception:  # it takes other inputs: whatever it is, no adapter can be on it
        return False
    return isinstance(found, torch.Tensor) and found.shape == (1, module.out_features)


def _reason_of_weights(name: str, module: torch.nn.Module) -> str:
    """Return why no adapter can be on a module with weights of its own that is no linear layer, else nothing."""
    sizes = {parameter.dim() for parameter in module.parameters(recurse=False)}
    kind = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
    if 3 in sizes and "expert" in kind:
        return _EXPERTS
    return _ROUTER if 2 in sizes and "router" in kind else ""


def _converted(model: Any, layers: dict[str, torch.nn.Module]) -> set[str]:
    """Return the layers that PEFT would take for experts, when it trains them and when it loads the adapter.

    It maps the names that experts had in transformers 4 to their fused weights.
    """
    config = LoraConfig(target_modules=sorted(layers))
    asked = copy(config)
    try:
        convert_peft_config_for_transformers(asked, model, None)
    except ValueError:  # a name without the one that it is fused with
        return {name for name in layers if name.rpartition(".")[2] in ("gate_proj", "up_proj", "down_proj")}
    return set(layers) - set(asked.target_modules or ())
