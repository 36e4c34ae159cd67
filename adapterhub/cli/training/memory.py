"""The command `memory`."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from adapterhub.cli.options import AsJson, say, show, show_json
from adapterhub.units import format_bytes
from serve.config import DeviceKind

if TYPE_CHECKING:
    from adapterhub.memory.estimate import Estimate, Item
    from adapterhub.memory.gpus import Fit
    from adapterhub.memory.training import Sharding

_TITLES = {
    "device": "on each device",
    "host": "host RAM",
    "disk": "disk",
    "spikes": "moments other than a step, within the range",
    "textbook": "rules of thumb",
}
_OF_A_RECIPE = {
    "method": "--method",
    "rank": "--rank",
    "tokens": "--tokens",
    "paged": "--paged",
    "checkpointing": "--checkpointing",
}
"""Parameters that a recipe sets -> their options."""


class _Method(StrEnum):
    qlora = "qlora"
    lora = "lora"
    full = "full"


def memory(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="Well-known name (llama2-70b), base on this machine, Hub id, or config.json "
            "[default: the recipe's base]."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="RECIPE", help="Recipe to estimate, a file or a shipped one; it sets what is trained."),
    ] = None,
    method: Annotated[
        _Method, typer.Option(help="LoRA on a 4-bit base (qlora), on a 16-bit base (lora), or full fine-tuning.")
    ] = _Method.qlora,
    rank: Annotated[int, typer.Option(min=1, max=65_536, help="LoRA rank.")] = 16,
    tokens: Annotated[
        int,
        typer.Option(
            min=1, max=1_000_000_000, help="Tokens per forward pass on one device (batch size x sequence length)."
        ),
    ] = 512,
    gpus: Annotated[int, typer.Option(min=1, max=65_536, help="Number of devices that train together.")] = 1,
    sharded: Annotated[
        bool,
        typer.Option("--sharded", help="Divide the base's layers among the devices (FSDP), as train --shard does."),
    ] = False,
    offload: Annotated[bool, typer.Option("--offload", help="With --sharded: keep the shards in host RAM.")] = False,
    paged: Annotated[bool, typer.Option("--paged", help="Use an optimizer whose state may move to host RAM.")] = False,
    checkpointing: Annotated[
        bool, typer.Option(help="Compute activations again in the backward pass instead of keeping them.")
    ] = True,
    adapters: Annotated[int, typer.Option(min=0, max=100_000, help="Number of adapters resident while serving.")] = 8,
    kv_tokens: Annotated[
        int, typer.Option(min=0, max=1_000_000_000_000, help="Tokens in the KV cache while serving, of all requests.")
    ] = 8192,
    device: Annotated[DeviceKind, typer.Option(help="Kind of device that trains and serves.")] = DeviceKind.CUDA,
    gpu_gb: Annotated[
        list[int] | None,
        typer.Option(
            min=1, max=10_000, help="Memory of a GPU, in GB: how many of them it takes [default: common sizes]."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate the memory that training and serving a model need.

    Lists item by item what the model's config.json implies, and how many GPUs it takes; loads no weights.
    """
    from adapterhub.errors import UsageError
    from adapterhub.memory.gpus import COMMON_GB, count_gpus
    from adapterhub.memory.lookup import find_model
    from adapterhub.memory.serving import ServingLoad, estimate_serving
    from adapterhub.memory.training import TrainingLoad, estimate_training
    from train.planning.load import DTYPE_BYTES, choose_dtype, estimate_recipe
    from train.recipe import adapter_size, find_recipe, read_recipe

    if offload and not sharded:
        raise UsageError("--offload keeps shards in host RAM: it needs --sharded. Add --sharded, or leave it out.")
    if sharded and gpus == 1:
        raise UsageError("--sharded divides the base among devices: expected --gpus 2 or more.")
    if recipe is None and model is None:
        raise UsageError("nothing to estimate: expected a model or --recipe. Run `adapterhub memory llama-7b`.")
    wanted = None
    if recipe is not None:
        _refuse_what_recipe_sets(context)
        wanted = read_recipe(find_recipe(recipe))
        rank, _ = adapter_size(wanted.lora)
    is_full = method is _Method.full if wanted is None else wanted.method == "full"
    is_quantized = method is _Method.qlora if wanted is None else wanted.quantization.kind != "none"
    _check_sharded(sharded, is_full=is_full)
    model = model or (wanted.base if wanted else "")
    found = find_model(model, report=say)
    shape = found.shape

    def trained_on(gpus: int, sharding: Sharding) -> Estimate:
        is_offloaded = offload and sharding == "layers"
        if wanted is not None:
            return estimate_recipe(
                wanted, shape, device=device.value, gpus=gpus, sharding=sharding, is_offloaded=is_offloaded
            )
        load = TrainingLoad(
            tokens=tokens, rank=rank, method="full" if is_full else "lora",
            quantization="nf4" if is_quantized else "none", is_paged=paged, is_checkpointed=checkpointing,
            dtype_bytes=DTYPE_BYTES[choose_dtype("float32" if is_full else None, device.value)],
            device=device.value, gpus=gpus, sharding=sharding, is_offloaded=is_offloaded,
        )  # fmt: skip
        return estimate_training(shape, load)

    serving = ServingLoad(
        adapters=adapters, rank=rank, kv_tokens=kv_tokens, is_quantized=is_quantized, device=device.value
    )
    estimates = {
        "training": trained_on(gpus, "layers" if sharded else "none"),
        "serving": estimate_serving(shape, serving),
    }
    sizes = (gpu_gb or COMMON_GB) if device is DeviceKind.CUDA else ()
    counts = {gb: count_gpus(gb, trained_on, estimates["serving"], is_divisible=not is_full) for gb in sizes}
    if as_json:
        raw: dict[str, object] = {name: _raw(estimate) for name, estimate in estimates.items()}
        raw["gpus"] = {f"{gb}": asdict(count) for gb, count in counts.items()}
        show_json(raw | {"notes": found.notes})
        return
    show(f"{model}: {shape.weights / 1e9:.3f} billion weights, {shape.linear_weights / 1e9:.3f} in linear layers")
    for note in found.notes:
        show(f"  {note}")
    for name, estimate in estimates.items():
        show()
        show(f"{name}: {_range(estimate)} on each device")
        for key, title in _TITLES.items():
            show(f"  {title}")
            for item in _items(estimate, key):
                show(f"    {format_bytes(item.size_bytes):>11}  {item.name}")
    if counts:
        show()
        show("GPUs that it takes (several: train --shard; serving with vLLM's --tensor-parallel-size)")
    for gb, count in counts.items():
        show(f"  of {gb} GB: {_words(count.training)} for training, {_words(count.serving)} for serving")


def _range(estimate: Estimate) -> str:
    low, high = format_bytes(estimate.low), format_bytes(estimate.high)
    return f"{format_bytes(estimate.size_bytes)} ({low} to {high})"


def _check_sharded(is_sharded: bool, *, is_full: bool) -> None:
    from adapterhub.errors import UsageError

    if is_sharded and is_full:
        raise UsageError("--sharded divides frozen weights, and full fine-tuning has none. Leave --sharded out.")


def _refuse_what_recipe_sets(context: typer.Context) -> None:
    from adapterhub.errors import UsageError

    sources = {option: context.get_parameter_source(name) for name, option in _OF_A_RECIPE.items()}
    given = [option for option, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if given:
        raise UsageError(f"--recipe sets {', '.join(given)}: expected one or the other. Leave {given[0]} out.")


def _raw(estimate: Estimate) -> dict[str, object]:
    parts = {key: {item.name: item.size_bytes for item in _items(estimate, key)} for key in _TITLES}
    return {"low_bytes": estimate.low, "high_bytes": estimate.high, **parts}


def _items(estimate: Estimate, key: str) -> tuple[Item, ...]:
    found: tuple[Item, ...] = getattr(estimate, key)
    return found


def _words(fit: Fit) -> str:
    if fit.gpus is None:
        return "too small"
    return f"{fit.gpus}{' (tight)' if fit.is_tight else ''}"
