"""Putting LoRA layers on a base and writing them out as PEFT does. The only door to peft in training."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from adapterhub.adapter import Adapter, BaseRef
from adapterhub.errors import RecipeError
from adapterhub.files import write_atomic
from adapterhub.package.lora_config import CONFIG_NAME, WEIGHTS_NAME
from train.recipe import LoraSection, adapter_size

_ATTENTION = re.compile(r"attn|attention")
"""in the name of the module a layer of attention belongs to"""
_SECOND = re.compile(r"\.lora_(embedding_)?B\.")


def add_lora(model: Any, lora: LoraSection) -> Any:
    """The model with trainable A and B (fp32, B = 0, so it computes what it did) on its target layers.

    Raises RecipeError for targets the base does not have.
    """
    rank, alpha = adapter_size(lora)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        # PEFT declares a whole number, and some servers insist on one.
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,
        lora_dropout=lora.dropout,
        target_modules=_targets(model, lora),
        use_rslora=lora.method == "rslora",
        use_dora=lora.method == "dora",
        init_lora_weights="eva" if lora.init == "eva" else True,
        # Every layer keeps its rank, so that a plan and a server know it.
        eva_config=EvaConfig(rho=1.0) if lora.init == "eva" else None,
    )
    with warnings.catch_warnings():
        # PEFT warns of merging where embedding and head are one; we merge nothing. EVA's A are small.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="lora with eva initialization used with low_cpu_mem_usage=False")
        return use_fp32_master_weights(get_peft_model(model, config))


def use_fp32_master_weights(model: Any) -> Any:
    """The model with its trained matrices in fp32, and computing with them in the dtype of their input.

    PEFT turns the input of every adapted layer into fp32 and keeps that for the backward pass. Of a bf16 base the
    product is in bf16 here, the gradient and the update in fp32, as mixed precision has it: on
    SmolLM2-135M, 8 x 64 tokens, one thread, at PEFT's speed with a peak of 1.76 GB against 2.03.
    """
    for module in model.modules():
        if not isinstance(module, torch.nn.Linear) or not module.weight.requires_grad:
            continue
        module.weight.data = module.weight.data.float()
        module.__class__ = _MasterLinear
    for module in model.modules():
        if isinstance(module, LoraLayer) and model.dtype == torch.bfloat16 and not any(module.use_dora.values()):
            # DoRA's norms stay in fp32, and fp16 has not the range for small gradients.
            module.cast_input_dtype_enabled = False
    return model


class _MasterLinear(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), bias)


def continue_lora(model: Any, start: Adapter, *, dropout: float) -> Any:
    """The model with a packed adapter's A and B on it, trainable (fp32)."""
    config = LoraConfig.from_pretrained(str(start.path))
    config.inference_mode, config.lora_dropout = False, dropout
    return use_fp32_master_weights(PeftModel.from_pretrained(model, str(start.path), config=config, is_trainable=True))


def lora_of(start: Adapter, *, dropout: float) -> LoraSection:
    """What a packed adapter is, in a recipe's words."""
    lora = start.manifest.lora
    if lora.method == "head":
        raise RecipeError(f"{start.manifest.name} is an output head, and runs go on from LoRA: start a new one.")
    return LoraSection(
        method=lora.method,
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=dropout,
        targets="all-linear" if lora.targets == ["all-linear"] else tuple(lora.targets),
    )


def load_lora(model: Any, folder: Path) -> None:
    """Put weights that `save_lora` wrote back into the layers they came from, bit for bit."""
    outcome = set_peft_model_state_dict(model, load_file(folder / WEIGHTS_NAME))
    # A soft prompt goes into PEFT's own encoder and is left over here.
    strangers = set(outcome.unexpected_keys) - {"prompt_embeddings"}
    assert not strangers, strangers


def trainable(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def lora_b_parameters(model: Any) -> list[torch.nn.Parameter]:
    """B of every adapted layer, which LoRA+ trains at a rate of its own."""
    named = model.named_parameters()
    return [parameter for name, parameter in named if parameter.requires_grad and _SECOND.search(name)]


def save_lora(model: Any, folder: Path, *, base: BaseRef) -> None:
    """adapter_model.safetensors (fp32) and adapter_config.json, which names the base by identity, not by path.

    Written without PEFT's own save, which adds a model card; its config keeps sets, whose order changes from
    run to run, so lists are sorted here.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    contiguous = {name: tensor.detach().float().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    save_file(contiguous, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    config = copy(model.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(str(folder))
    raw = json.loads((folder / CONFIG_NAME).read_bytes())
    raw |= {"base_model_name_or_path": base.id, "revision": base.hub_revision}
    if isinstance(raw.get("target_modules"), list):
        raw["target_modules"].sort()
    if "init_lora_weights" in raw:
        # What A and B began with is no matter of whoever loads them.
        raw |= {"init_lora_weights": True, "eva_config": None}
    write_atomic(folder / CONFIG_NAME, json.dumps(raw, indent=2, sort_keys=True) + "\n")


def leaf_name(model: Any, wanted: torch.nn.Module) -> str:
    """The last part of a module's dotted name."""
    names: Iterator[str] = (name for name, module in model.named_modules() if module is wanted)
    return next(names).rpartition(".")[2]


def _targets(model: Any, lora: LoraSection) -> str | list[str]:
    """What PEFT is to adapt. It passes over a name that matches nothing as long as another one matches."""
    if lora.targets == "all-linear":
        return "all-linear"
    head = model.get_output_embeddings()
    linear = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    layers = {name.rpartition(".")[2] for name in linear}
    attention = {name.rpartition(".")[2] for name in linear if _ATTENTION.search(name.rpartition(".")[0])}
    words = {
        "all-linear": layers,
        "attention": attention,
        "mlp": layers - attention,
        "embeddings": {leaf_name(model, model.get_input_embeddings())},
        "head": {leaf_name(model, head)},
    }
    wanted = [lora.targets] if isinstance(lora.targets, str) else lora.targets
    found = set().union(*(words.get(word, {word}) for word in wanted))
    # An adapter to go on from may name each of its layers whole.
    known = layers | set(linear) | words["embeddings"] | words["head"]
    unknown = sorted(name for name in wanted if name not in words and name not in known)
    if unknown or not found:
        raise RecipeError(
            f"[lora] targets: the base has no linear layer {', '.join(unknown or wanted)}; it has "
            f"{', '.join(sorted(layers))}, and {', '.join(words)} stand for several."
        )
    return sorted(found)
