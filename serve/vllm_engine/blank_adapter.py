"""The blank adapter, which changes nothing: to try a server with, and to stand for the base where none is unsafe."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from adapterhub.compatibility import Shapes
from adapterhub.files import new_folder
from adapterhub.package.lora_config import CONFIG_NAME, WEIGHTS_NAME


def write_blank_adapter(folder: Path, shapes: Shapes) -> Path:
    """Write a LoRA of rank 1 and zeros on the first layer of the base. Return its folder."""
    module = next(name for name in shapes if any(part.isdigit() for part in name.split(".")))
    width_in, width_out = shapes[module]
    key = f"base_model.model.{module}"
    with new_folder(folder) as scratch:
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [module.rpartition(".")[2]]}
        (scratch / CONFIG_NAME).write_text(json.dumps(config))
        zeros = {f"{key}.lora_A.weight": torch.zeros(1, width_in), f"{key}.lora_B.weight": torch.zeros(width_out, 1)}
        save_file(zeros, scratch / WEIGHTS_NAME)
    return folder
