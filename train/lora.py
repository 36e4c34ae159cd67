"""Putting LoRA layers on a base and writing them out as PEFT does. The only door to peft in training."""

from __future__ import annotations

import json
from copy import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from adapterhub.adapter import Adapter, BaseRef
from adapterhub.errors import RecipeError
from adapterhub.files import write_atomic
from adapterhub.lora_config import CONFIG_NAME, WEIGHTS_NAME
from train.recipe import LoraSection


def add_lora(model: Any, lora: LoraSection) -> Any:
    """The model with trainable A and B (fp32, B = 0, so it computes what it did) on its target layers.

    fp32 beside a bf16 base is PEFT's way. Keeping A and B in bf16 would lose small updates and, measured on
    SmolLM2-135M with 485 tokens and one thread, save nothing outside the noise (3.6 s against 4.0 s a step).
    Raises RecipeError for targets the base does not have.
    """
    _check_targets(model, lora)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        # PEFT declares a whole number, and some servers insist on one.
        lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        use_rslora=lora.method == "rslora",
        use_dora=lora.method == "dora",
    )
    return get_peft_model(model, config)


def continue_lora(model: Any, start: Adapter, *, dropout: float) -> Any:
    """The model with a packed adapter's A and B on it, trainable (fp32)."""
    config = LoraConfig.from_pretrained(str(start.path))
    config.inference_mode, config.lora_dropout = False, dropout
    return PeftModel.from_pretrained(model, str(start.path), config=config, is_trainable=True)


def lora_of(start: Adapter, *, dropout: float) -> LoraSection:
    """What a packed adapter is, in a recipe's words."""
    lora = start.manifest.lora
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
    assert not outcome.unexpected_keys, outcome.unexpected_keys


def trainable(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def save_lora(model: Any, folder: Path, *, base: BaseRef) -> None:
    """adapter_model.safetensors (fp32) and adapter_config.json, which names the base by identity, not by path.

    Written without PEFT's own save, which adds a model card; its config keeps sets, whose order changes from
    run to run, so lists are sorted here.
    """
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    contiguous = {name: tensor.detach().float().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    save_file(contiguous, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    config = copy(model.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(str(folder))
    raw = json.loads((folder / CONFIG_NAME).read_bytes())
    raw |= {"base_model_name_or_path": base.id, "revision": base.hub_revision}
    if isinstance(raw["target_modules"], list):
        raw["target_modules"].sort()
    write_atomic(folder / CONFIG_NAME, json.dumps(raw, indent=2, sort_keys=True) + "\n")


def _check_targets(model: Any, lora: LoraSection) -> None:
    """PEFT passes over a name that matches nothing as long as another one matches."""
    head = model.get_output_embeddings()
    linear = {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    }
    layers = {name.rpartition(".")[2] for name in linear}
    # An adapter to go on from may name each of its layers whole.
    unknown = [] if isinstance(lora.targets, str) else sorted(set(lora.targets) - layers - linear)
    if unknown:
        raise RecipeError(
            f"[lora] targets: the base has no linear layer {', '.join(unknown)}; it has {', '.join(sorted(layers))}."
        )
