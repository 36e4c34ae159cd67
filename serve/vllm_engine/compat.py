"""What vLLM can serve of an adapter: all it answers with a 500, or takes without a word, is said properly before.

Also the blank adapter, which changes nothing: to try a server with, and to stand for the base where none is unsafe.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from adapterhub.adapter import Adapter
from adapterhub.compatibility import Shapes, check_compatible
from adapterhub.errors import AdapterUnsupported
from adapterhub.files import new_folder
from adapterhub.package.lora_config import CONFIG_NAME, WEIGHTS_NAME, lora_tensors, read_lora_config
from adapterhub.package.safetensors_header import read_header
from serve.adapters.weights import read_weights

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""what --max-lora-rank takes"""


def check_fits(adapter: Adapter, shapes: Shapes, *, max_rank: int) -> None:
    """Kind, rank, tensors, shapes and depth.

    Raises AdapterUnsupported, RankTooLarge, InvalidTensors, AdapterNoEffect, IncompatibleBase.
    """
    reason = unservable(adapter)
    if reason is not None:
        raise AdapterUnsupported(f"adapter {adapter.manifest.name} {reason}: use --engine local, or train plain LoRA.")
    read_weights(adapter, device=torch.device("cpu"), dtype_of=lambda dtype: dtype, max_rank=max_rank)
    config = read_lora_config(adapter.path)
    check_compatible(
        adapter.manifest.name, config, lora_tensors(read_header(adapter.path / WEIGHTS_NAME), config), shapes
    )


def unservable(adapter: Adapter) -> str | None:
    """What no vLLM serves about an adapter, in words that follow its name; read from its config alone."""
    config = read_lora_config(adapter.path)
    if config.use_dora:
        return "uses DoRA, which vLLM does not serve"
    if config.saved_modules:
        return f"brings the whole of {', '.join(config.saved_modules)} (modules_to_save), which vLLM does not serve"
    largest = max(config.rank, *config.rank_pattern.values(), 0)
    return f"has rank {largest}, vLLM takes at most {RANKS[-1]}" if largest > RANKS[-1] else None


def write_blank(folder: Path, shapes: Shapes) -> Path:
    """A LoRA of rank 1 and zeros on the first layer of the base."""
    module = next(name for name in shapes if any(part.isdigit() for part in name.split(".")))
    width_in, width_out = shapes[module]
    key = f"base_model.model.{module}"
    with new_folder(folder) as scratch:
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [module.rpartition(".")[2]]}
        (scratch / CONFIG_NAME).write_text(json.dumps(config))
        zeros = {f"{key}.lora_A.weight": torch.zeros(1, width_in), f"{key}.lora_B.weight": torch.zeros(width_out, 1)}
        save_file(zeros, scratch / WEIGHTS_NAME)
    return folder
