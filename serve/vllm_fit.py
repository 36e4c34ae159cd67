"""What vLLM can serve of an adapter: all it answers with a 500, or takes without a word, is said properly before.

Also the blank adapter, which changes nothing: to try a server with, and to stand for the base where none is unsafe.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from adapterhub.adapter import Adapter
from adapterhub.base_store import StoredBase
from adapterhub.errors import AdapterNoEffect, AdapterUnsupported, IncompatibleBase
from adapterhub.files import new_folder
from adapterhub.lora_config import CONFIG_NAME, WEIGHTS_NAME, read_lora_config
from serve.lora_weights import EmbeddingUpdate, FullWeight, Weights, read_weights

Shapes = dict[str, tuple[int, int]]

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""what --max-lora-rank takes"""


def check_fits(adapter: Adapter, shapes: Shapes, *, max_rank: int) -> None:
    """Kind, rank, tensors, shapes and depth.

    Raises AdapterUnsupported, RankTooLarge, InvalidTensors, AdapterNoEffect, IncompatibleBase.
    """
    reason = unservable(adapter)
    if reason is not None:
        raise AdapterUnsupported(f"adapter {adapter.manifest.name} {reason}: use --engine local, or train plain LoRA.")
    weights = read_weights(adapter, device=torch.device("cpu"), dtype_of=lambda dtype: dtype, max_rank=max_rank)
    check_shapes(adapter, weights, shapes)


def unservable(adapter: Adapter) -> str | None:
    """What no vLLM serves about an adapter, in words that follow its name; read from its config alone."""
    config = read_lora_config(adapter.path)
    if config.use_dora:
        return "uses DoRA, which vLLM does not serve"
    if config.saved_modules:
        return f"brings the whole of {', '.join(config.saved_modules)} (modules_to_save), which vLLM does not serve"
    largest = max(config.rank, *config.rank_pattern.values(), 0)
    return f"has rank {largest}, vLLM takes at most {RANKS[-1]}" if largest > RANKS[-1] else None


def module_shapes(base: StoredBase) -> Shapes:
    """(in, out) of every linear layer and embedding, from the base's config alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.path))
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            shapes[name] = (module.in_features, module.out_features)
        elif isinstance(module, torch.nn.Embedding):
            shapes[name] = (module.num_embeddings, module.embedding_dim)
    return shapes


def check_shapes(adapter: Adapter, weights: Weights, shapes: Shapes) -> None:
    """Raises AdapterNoEffect, IncompatibleBase: depth counts, too."""
    strangers = [module for module in weights if module not in shapes]
    name = adapter.manifest.name
    if len(strangers) == len(weights):
        raise AdapterNoEffect(f"no tensor of adapter {name} belongs to a layer of this base (first: {strangers[0]}).")
    if strangers:
        raise IncompatibleBase(
            f"adapter {name} has tensors for {len(strangers)} layers this base does not have (first: {strangers[0]}): "
            "it was made for a deeper or different model."
        )
    for module, change in weights.items():
        assert not isinstance(change, FullWeight), "unservable() refuses modules_to_save"
        first = change.rows.shape[0] if isinstance(change, EmbeddingUpdate) else change.a.shape[1]
        found = (first, change.bt.shape[1])
        if found != shapes[module]:
            raise IncompatibleBase(
                f"adapter {name} expects {module} to be {found[0]} -> {found[1]}, this base has "
                f"{shapes[module][0]} -> {shapes[module][1]}."
            )


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
