"""What a recipe comes to before its base and data are here, from its figures alone. Loads nothing."""

from __future__ import annotations

from adapterhub.memory.estimate import Estimate, TrainingSetting, estimate_training
from adapterhub.memory.known_shapes import shape_of
from adapterhub.memory.training import places_at_once
from train.recipe import Recipe, adapter_size

_WORDS: dict[str, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "embeddings": (),
    "head": (),
}


def setting_of(recipe: Recipe) -> TrainingSetting:
    """One device, rows as long as they may be, every token of them trained: the most it can come to."""
    tokens = recipe.train.batch_size * recipe.data.max_length
    shape = shape_of(recipe.base_name)
    rank, _ = adapter_size(recipe.lora)
    adapted = "qlora" if recipe.quantization.kind in ("nf4", "fp4") else "lora"
    return TrainingSetting(
        method="full" if recipe.method == "full" else adapted,  # type: ignore[arg-type]
        rank=rank,
        modules=_modules(recipe.lora.targets),
        tokens=tokens,
        trained_tokens=tokens if shape is None else min(tokens, places_at_once(shape.vocabulary)),
        is_checkpointed=recipe.train.activation_checkpointing,
        is_double_quantized=recipe.quantization.double_quant,
        moment_bytes=recipe.train.moment_bytes,
        is_paged=recipe.train.optimizer.startswith("paged"),
    )


def _modules(targets: str | tuple[str, ...]) -> tuple[str, ...]:
    """Linear modules by name; none stands for all. LoRA on embedding and head is little beside them."""
    words = (targets,) if isinstance(targets, str) else targets
    if "all-linear" in words:
        return ()
    named = dict.fromkeys(name for word in words for name in _WORDS.get(word, (word,)))
    return tuple(named)


def estimate(recipe: Recipe) -> Estimate | None:
    """On a GPU; None for a base whose sizes are not known by its name."""
    shape = shape_of(recipe.base_name)
    return None if shape is None else estimate_training(shape, setting_of(recipe))


def described(recipe: Recipe) -> dict[str, str]:
    """A line of a list: what is learnt from, how, in how many steps, in how much memory."""
    data, train = recipe.data, recipe.train
    what = next((str(value) for key in ("path", "name", "topic") if (value := getattr(data, key, None))), "")
    length = f"{train.steps}" if train.steps else f"{train.epochs} epoch{'s' if (train.epochs or 1) > 1 else ''}"
    found = estimate(recipe)
    how = recipe.preference.method if recipe.preference else recipe.lora.method
    learns = f"{how} r {recipe.lora.rank}" if recipe.method == "lora" else recipe.method
    return {
        "base": recipe.base,
        "data": f"{what} ({data.source})" if what else data.source,
        "method": f"{recipe.quantization.kind}, {learns}",
        "steps": f"{length} x {train.batch_size * train.gradient_accumulation}",
        "memory": "" if found is None else f"up to {found.high / 1e9:.1f} GB",
    }
