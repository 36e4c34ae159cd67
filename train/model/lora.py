"""Attach LoRA layers to a base, and save them as PEFT does."""

from __future__ import annotations

import json
import re
import warnings
from copy import copy
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from adapterhub.adapter import Adapter, BaseRef
from adapterhub.bases.peft_config import PATTERN_FIELDS, peft_config
from adapterhub.errors import RecipeError
from adapterhub.files import write_atomic
from adapterhub.package.lora_config import CONFIG_NAME, WEIGHTS_NAME
from train.model.lora_targets import choose_targets
from train.recipe import LoraSection, adapter_size

_LORA_B = re.compile(r"\.lora_(embedding_)?B\.")


def add_lora(model: Any, lora: LoraSection) -> Any:
    """Attach trainable A and B (fp32; B = 0, so outputs do not change) to the target layers; return the model.

    Raises RecipeError for targets that the base does not have.
    """
    rank, alpha = adapter_size(lora)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        # PEFT declares an integer, and some servers insist on one.
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,
        lora_dropout=lora.dropout,
        target_modules=choose_targets(model, lora),
        use_rslora=lora.method == "rslora",
        use_dora=lora.method == "dora",
        init_lora_weights="eva" if lora.init == "eva" else True,
        # Every layer keeps its rank: plans and servers count on that.
        eva_config=EvaConfig(rho=1.0) if lora.init == "eva" else None,
    )
    with warnings.catch_warnings():
        # PEFT warns about merging tied embeddings, which never happens here. The A matrices of EVA are small.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        warnings.filterwarnings("ignore", message="lora with eva initialization used with low_cpu_mem_usage=False")
        return use_fp32_master_weights(get_peft_model(model, config))


def use_fp32_master_weights(model: Any) -> Any:
    """Keep trained matrices in fp32 and compute with them in the dtype of their input; return the model.

    PEFT casts the input of every adapted layer to fp32 and keeps it for the backward pass. Here, as in mixed
    precision, the product on a bf16 base is in bf16, gradient and update in fp32. Measured on SmolLM2-135M, 8 x 64
    tokens, one thread: PEFT's speed, and a peak of 1.76 GB instead of 2.03 GB.
    """
    for module in model.modules():
        if not isinstance(module, torch.nn.Linear) or not module.weight.requires_grad:
            continue
        module.weight.data = module.weight.data.float()
        module.__class__ = _MasterLinear
    for module in model.modules():
        if isinstance(module, LoraLayer) and model.dtype == torch.bfloat16 and not any(module.use_dora.values()):
            # DoRA's norms stay in fp32, and the range of fp16 is too small for gradients.
            module.cast_input_dtype_enabled = False
    return model


class _MasterLinear(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), bias)


def continue_lora(model: Any, start: Adapter, *, dropout: float) -> Any:
    """Attach the A and B of a packed adapter, trainable (fp32); return the model."""
    config = peft_config(start.path, model)
    config.inference_mode, config.lora_dropout = False, dropout
    found = PeftModel.from_pretrained(model, str(start.path), config=config, is_trainable=True)
    as_written = LoraConfig.from_pretrained(str(start.path))
    for field in PATTERN_FIELDS:  # for the adapter that is saved, which has no others than its start
        setattr(config, field, getattr(as_written, field))
    return use_fp32_master_weights(found)


def lora_of(start: Adapter, *, dropout: float) -> LoraSection:
    """Return the [lora] section that describes a packed adapter. Raises RecipeError for an output head."""
    lora = start.manifest.lora
    if lora.method == "head":
        raise RecipeError(
            f"the start adapter {start.manifest.name} is an output head: expected a LoRA adapter. Leave start out to "
            "train a new one."
        )
    return LoraSection(
        method=lora.method,
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=dropout,
        targets="all-linear" if lora.targets == ["all-linear"] else tuple(lora.targets),
    )


def load_lora(model: Any, folder: Path) -> None:
    """Load the weights that `save_lora` wrote, bit for bit."""
    outcome = set_peft_model_state_dict(model, load_file(folder / WEIGHTS_NAME))
    # PEFT loads a soft prompt into its own encoder and reports the key as unexpected.
    unexpected = set(outcome.unexpected_keys) - {"prompt_embeddings"}
    assert not unexpected, unexpected


def trainable(model: Any) -> list[torch.nn.Parameter]:
    """Return the parameters that take gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def lora_b_parameters(model: Any) -> list[torch.nn.Parameter]:
    """Return the B matrices, which LoRA+ trains at a learning rate of their own."""
    named = model.named_parameters()
    return [parameter for name, parameter in named if parameter.requires_grad and _LORA_B.search(name)]


def save_lora(model: Any, folder: Path, *, base: BaseRef) -> None:
    """Write adapter_model.safetensors (fp32) and adapter_config.json, which names the base by identity, not by path.

    PEFT's own save adds a model card, and writes sets in an order that changes from run to run: lists are sorted here.
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
    if "fan_in_fan_out" in raw:
        # PEFT sets it for GPT-2's layers, when it loads the adapter too. A and B are the same either way.
        raw["fan_in_fan_out"] = False
    if "init_lora_weights" in raw:
        # How A and B were initialized does not matter to whoever loads them.
        raw |= {"init_lora_weights": True, "eva_config": None}
    write_atomic(folder / CONFIG_NAME, json.dumps(raw, indent=2, sort_keys=True) + "\n")
