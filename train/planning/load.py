"""The memory load of a recipe: what it trains, in which numbers, on which device. Loads no model and no data."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from adapterhub.errors import RecipeError
from adapterhub.memory.estimate import Device, Estimate
from adapterhub.memory.known_shapes import shape_of
from adapterhub.memory.model_shape import ModelShape
from adapterhub.memory.training import LayerInputs, LogitsMode, Sharding, TrainingLoad, WeightCounts, estimate_training
from adapterhub.units import format_bytes
from train.recipe import Recipe, adapter_size

DTYPE_BYTES: Mapping[str, int] = MappingProxyType({"bfloat16": 2, "float16": 2, "float32": 4})
_MODULES: dict[str, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "embeddings": ("embed_tokens",),
    "head": ("lm_head",),
}


def training_load(
    recipe: Recipe,
    *,
    device: str,
    dtype: str,
    counts: WeightCounts,
    tokens: int | None = None,
    trained_tokens: int | None = None,
    logits: LogitsMode = "chunks",
    gpus: int = 1,
    sharding: Sharding = "none",
    is_offloaded: bool = False,
) -> TrainingLoad:
    """Return the load of the recipe's longest forward pass on one device.

    Without `tokens` and `trained_tokens` every sample is as long as it may be and trained from its second token on,
    the first that has a prediction: the most that the recipe can need.
    """
    rows, length = recipe.train.batch_size, recipe.data.max_length
    return TrainingLoad(
        tokens=rows * length if tokens is None else tokens,
        trained_tokens=rows * (length - 1) if trained_tokens is None else trained_tokens,
        method="full" if recipe.method == "full" else "lora",
        counts=counts,
        quantization=recipe.quantization.kind,
        block_size=recipe.quantization.block_size,
        is_double_quantized=recipe.quantization.double_quant,
        dtype_bytes=DTYPE_BYTES[dtype],
        moment_bytes=recipe.train.moment_bytes,
        is_paged=recipe.train.optimizer.startswith("paged"),
        is_checkpointed=recipe.train.activation_checkpointing,
        layer_inputs=_layer_inputs(recipe),
        logits=logits,
        gpus=gpus,
        sharding=sharding,
        is_offloaded=is_offloaded,
        device="cuda" if device.startswith("cuda") else "cpu",
    )


def estimate_recipe(
    recipe: Recipe,
    shape: ModelShape,
    *,
    device: Device,
    gpus: int = 1,
    sharding: Sharding = "none",
    is_offloaded: bool = False,
) -> Estimate:
    """Return the most the recipe can need on a base of this shape. Raises RecipeError for a layer it does not have."""
    load = training_load(
        recipe,
        device=device,
        dtype=choose_dtype(recipe.base_arguments()["dtype"], device),
        counts=_counts(recipe, shape),
        gpus=gpus,
        sharding=sharding,
        is_offloaded=is_offloaded,
    )
    return estimate_training(shape, load)


def choose_dtype(wanted: str | None, device: Device) -> str:
    """Return the dtype that training computes in on such a device; on a GPU that is not here, bf16 is assumed."""
    if wanted is not None:
        return wanted
    if device == "cuda":
        return "bfloat16"
    from adapterhub.bases.loading import choose_precision  # loads torch, which a list of recipes does without

    return choose_precision(None, "cpu")[1].value


def _layer_inputs(recipe: Recipe) -> LayerInputs:
    if recipe.lora.method == "dora":
        return "copied"
    return "dropped" if recipe.lora.dropout else "shared"


def _counts(recipe: Recipe, shape: ModelShape) -> WeightCounts:
    """Return the numbers of weights by the shape alone; a plan counts them on the model itself."""
    is_full = recipe.method == "full"
    return WeightCounts(
        linear=0 if is_full else shape.linear_weights,
        other=0 if is_full else shape.weights - shape.linear_weights - shape.expert_weights,
        trainable=_trainable(recipe, shape),
        experts=0 if is_full else shape.expert_weights,
    )


def _trainable(recipe: Recipe, shape: ModelShape) -> int:
    if recipe.method == "full":
        return shape.weights
    if recipe.method == "head":
        return shape.vocabulary * shape.hidden
    if recipe.method == "prompt":
        return recipe.virtual_tokens * shape.hidden
    if recipe.method == "prefix":
        return recipe.virtual_tokens * 2 * shape.layers * shape.key_value
    rank, _ = adapter_size(recipe.lora)
    try:
        return shape.lora_weights(rank, modules_of(recipe.lora.targets), is_dora=recipe.lora.method == "dora")
    except KeyError as error:
        raise RecipeError(
            f"targets names {error.args[0]}, which this base does not have: expected "
            f"{', '.join(sorted({one.name for one in shape.linears}))}. Run `adapterhub train RECIPE --plan`, which "
            "reads the base's layers."
        ) from error


def modules_of(targets: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the modules that a recipe's `targets` name; none stands for all linear ones."""
    words = (targets,) if isinstance(targets, str) else targets
    if set(words) == {"all-linear"}:
        return ()
    every = {"all-linear": (*_MODULES["attention"], *_MODULES["mlp"])} | _MODULES
    return tuple(dict.fromkeys(name for word in words for name in every.get(word, (word,))))


def summarize(recipe: Recipe, *, device: Device) -> dict[str, str]:
    """Return a row of the list of recipes: base, data, method, steps and memory."""
    data, train = recipe.data, recipe.train
    what = next((str(value) for key in ("path", "name", "topic") if (value := getattr(data, key, None))), "")
    length = f"{train.steps}" if train.steps else f"{train.epochs} epoch{'s' if (train.epochs or 1) > 1 else ''}"
    how = recipe.preference.method if recipe.preference else recipe.lora.method
    learns = f"{how} r {recipe.lora.rank}" if recipe.method == "lora" else recipe.method
    shape = shape_of(recipe.base_name)
    return {
        "base": recipe.base,
        "data": f"{what} ({data.source})" if what else data.source,
        "method": f"{recipe.quantization.kind}, {learns}",
        "steps": f"{length} x {train.batch_size * train.gradient_accumulation}",
        "memory": "" if shape is None else format_bytes(estimate_recipe(recipe, shape, device=device).size_bytes),
    }
