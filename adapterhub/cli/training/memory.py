"""The command `memory`."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapterhub.cli.options import AsJson, show, show_json
from adapterhub.units import format_bytes
from serve.config import DeviceKind

if TYPE_CHECKING:
    from adapterhub.memory.estimate import Estimate, Item
    from adapterhub.memory.model_shape import ModelShape
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
            help="Well-known name (llama-7b), base on this machine, or config.json [default: the recipe's base]."
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
    as_json: AsJson = False,
) -> None:
    """Estimate the memory that training and serving a model need.

    Lists item by item what the model's config.json implies; loads no weights.
    """
    from adapterhub.errors import UsageError
    from adapterhub.memory.serving import ServingLoad, estimate_serving
    from adapterhub.memory.training import TrainingLoad, estimate_training
    from train.planning.load import DTYPE_BYTES, choose_dtype, estimate_recipe, shape_of_recipe
    from train.recipe import adapter_size, find_recipe, read_recipe

    if offload and not sharded:
        raise UsageError("--offload keeps shards in host RAM: it needs --sharded. Add --sharded, or leave it out.")
    if sharded and gpus == 1:
        raise UsageError("--sharded divides the base among devices: expected --gpus 2 or more.")
    sharding: Sharding = "layers" if sharded else "none"
    if recipe is None:
        if model is None:
            raise UsageError("nothing to estimate: expected a model or --recipe. Run `adapterhub memory llama-7b`.")
        _check_sharded(sharded, is_full=method is _Method.full)
        shape, is_quantized = _shape(model), method is _Method.qlora
        load = TrainingLoad(
            tokens=tokens, rank=rank, method="full" if method is _Method.full else "lora",
            quantization="nf4" if is_quantized else "none", is_paged=paged, is_checkpointed=checkpointing,
            dtype_bytes=DTYPE_BYTES[choose_dtype("float32" if method is _Method.full else None, device.value)],
            device=device.value, gpus=gpus, sharding=sharding, is_offloaded=offload,
        )  # fmt: skip
        training = estimate_training(shape, load)
    else:
        _refuse_what_recipe_sets(context)
        wanted = read_recipe(find_recipe(recipe))
        _check_sharded(sharded, is_full=wanted.method == "full")
        model, shape = model or wanted.base, shape_of_recipe(wanted) if model is None else _shape(model)
        rank, _ = adapter_size(wanted.lora)
        is_quantized = wanted.quantization.kind != "none"
        training = estimate_recipe(
            wanted, shape, device=device.value, gpus=gpus, sharding=sharding, is_offloaded=offload
        )
    serving = ServingLoad(
        adapters=adapters, rank=rank, kv_tokens=kv_tokens, is_quantized=is_quantized, device=device.value
    )
    estimates = {"training": training, "serving": estimate_serving(shape, serving)}
    if as_json:
        show_json({name: _raw(estimate) for name, estimate in estimates.items()})
        return
    show(f"{model}: {shape.weights / 1e9:.3f} billion weights, {shape.linear_weights / 1e9:.3f} in linear layers")
    for name, estimate in estimates.items():
        show()
        show(f"{name}: {_range(estimate)} on each device")
        for key, title in _TITLES.items():
            show(f"  {title}")
            for item in _items(estimate, key):
                show(f"    {format_bytes(item.size_bytes):>11}  {item.name}")


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


def _shape(model: str) -> ModelShape:
    """Return the shape of a model. Raises BaseNotFound for an unknown name, UsageError for another kind of config."""
    from adapterhub.adapter import BaseName
    from adapterhub.bases.store import find_base
    from adapterhub.errors import BaseNotFound, InvalidRef, UsageError
    from adapterhub.memory.known_shapes import MODEL_SHAPES, shape_of
    from adapterhub.memory.model_shape import ModelShape

    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    elif not path.is_file():
        try:
            named = BaseName.parse(model)
            if (known := shape_of(named)) is not None:
                return known
            path = find_base(named).path / "config.json"
        except (BaseNotFound, InvalidRef) as error:
            names = ", ".join(MODEL_SHAPES)
            raise BaseNotFound(
                f"{model} is not a base on this machine: expected a config.json, its folder, or one of {names}."
            ) from error
    try:
        return ModelShape.from_config(json.loads(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as a config.json: {error}.") from error
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is not a decoder's config.json ({error} is missing or not a number): expected a text model."
        ) from error


def _raw(estimate: Estimate) -> dict[str, object]:
    parts = {key: {item.name: item.size_bytes for item in _items(estimate, key)} for key in _TITLES}
    return {"low_bytes": estimate.low, "high_bytes": estimate.high, **parts}


def _items(estimate: Estimate, key: str) -> tuple[Item, ...]:
    found: tuple[Item, ...] = getattr(estimate, key)
    return found
