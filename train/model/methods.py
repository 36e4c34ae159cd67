"""Attach, save and load what a run trains, by the recipe's method."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, PromptTuningInit, get_peft_model
from safetensors.torch import load_file

from adapterhub.adapter import BaseRef
from adapterhub.package.lora_config import NO_LAYERS
from train.model.lora import add_lora, load_lora, save_lora, use_fp32_master_weights
from train.model.lora_targets import leaf_name
from train.objectives.forward import bare_model
from train.recipe import Recipe


def attach(model: Any, recipe: Recipe) -> Any:
    """Attach what the recipe trains, and let only that take gradients; return the model. Raises RecipeError."""
    if recipe.method == "lora":
        found = add_lora(model, recipe.lora)
    elif recipe.method == "head":
        # PEFT trains a whole module only beside a LoRA: here a LoRA without layers.
        found = use_fp32_master_weights(get_peft_model(model, _head_config(model)))
    elif recipe.method == "full":
        found = model.requires_grad_(True)
    elif recipe.method == "prompt":
        init = PromptTuningInit.SAMPLE_VOCAB
        found = get_peft_model(
            model,
            PromptTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=recipe.virtual_tokens, prompt_tuning_init=init
            ),
        )
    else:
        found = get_peft_model(
            model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=recipe.virtual_tokens)
        )
    return configure_forward(found, recipe)


def configure_forward(model: Any, recipe: Recipe) -> Any:
    """Set NEFTune noise and activation checkpointing as [train] asks; return the model."""
    inner = bare_model(model)
    inner.get_input_embeddings().neftune_noise_alpha = recipe.train.neftune_alpha
    if recipe.train.activation_checkpointing:
        inner.activation_checkpointing_enable({"use_reentrant": False})
    return model


def adapter_disabled(model: Any) -> AbstractContextManager[None]:
    """Make the model compute what the base does, inside the context.

    A model that is trained whole has no adapter to disable: it is the base only before the first step.
    """
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()


def save_trained(model: Any, folder: Path, *, base: BaseRef, tokenizer: Any = None) -> None:
    """Write an adapter as PEFT does, or a whole model (and its tokenizer) as transformers does."""
    if isinstance(model, PeftModel):
        save_lora(model, folder, base=base)
    else:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        # safetensors makes files that only their owner can read.
        shutil.copymode(next(folder.glob("*config.json")), weights)


def load_trained(model: Any, folder: Path) -> None:
    """Load the weights that `save_trained` wrote, bit for bit."""
    if isinstance(model, PeftModel):
        load_lora(model, folder)
        return
    weights = dict(pair for path in sorted(folder.glob("*.safetensors")) for pair in load_file(path).items())
    outcome = model.load_state_dict(weights, strict=False)  # tied weights are written once
    assert not outcome.unexpected_keys, outcome.unexpected_keys


def _head_config(model: Any) -> LoraConfig:
    name = leaf_name(model, model.get_output_embeddings())
    return LoraConfig(task_type="CAUSAL_LM", r=1, lora_alpha=1, target_modules=NO_LAYERS, modules_to_save=[name])
