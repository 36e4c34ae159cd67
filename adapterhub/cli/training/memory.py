"""The verb that foretells memory."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapterhub.cli.app import app
from adapterhub.cli.options import AsJson

if TYPE_CHECKING:
    from adapterhub.memory.estimate import Estimate
    from adapterhub.memory.model_shape import ModelShape
    from adapterhub.memory.training import Item

_TITLES = {
    "device": "on each GPU or CPU",
    "host": "host RAM",
    "disk": "disk",
    "spikes": "other moments, within the range",
    "textbook": "the textbook says",
}


class _Method(StrEnum):
    qlora = "qlora"
    lora = "lora"
    full = "full"


class _Device(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


@app.command()
def memory(
    model: Annotated[str, typer.Argument(help="llama-7b, mistral-7b, ...; a base on this machine; or a config.json.")],
    method: Annotated[_Method, typer.Option(help="What is trained, and how the base is held.")] = _Method.qlora,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapter, on all linear modules.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="Of one forward pass: rows times length.")] = 512,
    gpus: Annotated[int, typer.Option(min=1, help="Devices that train together.")] = 1,
    sharded: Annotated[bool, typer.Option("--sharded", help="FSDP: each device holds a part of the base.")] = False,
    offload: Annotated[bool, typer.Option("--offload", help="With --sharded: parts live in host RAM.")] = False,
    paged: Annotated[bool, typer.Option("--paged", help="An optimizer whose state may move to host RAM.")] = False,
    checkpointing: Annotated[bool, typer.Option(help="Activations computed again in the backward pass.")] = True,
    adapters: Annotated[int, typer.Option(min=0, help="Resident while serving.")] = 8,
    kv_tokens: Annotated[int, typer.Option(min=0, help="Keys and values while serving, of all requests.")] = 8192,
    device: Annotated[_Device, typer.Option(help="Where it runs.")] = _Device.cuda,
    as_json: AsJson = False,
) -> None:
    """Estimate what training and serving a model need in memory, item by item, from its config alone."""
    from adapterhub.errors import UsageError
    from adapterhub.memory.estimate import ServingSetting, TrainingSetting, estimate_serving, estimate_training

    if offload and not sharded:
        raise UsageError("--offload moves shards to host RAM: it needs --sharded.")
    if sharded and gpus == 1:
        raise UsageError("--sharded divides the base among devices: expected --gpus 2 or more.")
    shape = _shape(model)
    training = TrainingSetting(
        method=method.value, rank=rank, tokens=tokens, gpus=gpus, is_sharded=sharded, is_offloaded=offload,
        is_paged=paged, is_checkpointed=checkpointing, device=device.value,
    )  # fmt: skip
    serving = ServingSetting(
        adapters=adapters, rank=rank, kv_tokens=kv_tokens, is_quantized=method == "qlora", device=device.value
    )
    estimates = {"training": estimate_training(shape, training), "serving": estimate_serving(shape, serving)}
    if as_json:
        typer.echo(json.dumps({name: _raw(estimate) for name, estimate in estimates.items()}, indent=1))
        return
    typer.echo(f"{model}: {shape.weights / 1e9:.3f} billion weights, {shape.linear_weights / 1e9:.3f} in linear layers")
    for name, estimate in estimates.items():
        typer.echo(f"\n{name}: {_gb(estimate.low)} to {_gb(estimate.high)} on each device")
        for key, title in _TITLES.items():
            typer.echo(f"  {title}")
            for item in _items(estimate, key):
                typer.echo(f"    {_gb(item.size_bytes):>11}  {item.name}")


def _shape(model: str) -> ModelShape:
    """Raises BaseNotFound for an unknown name, UsageError for a config that is no decoder's."""
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
                f"{model} is no base on this machine: expected a config.json, its folder, or one of {names}."
            ) from error
    try:
        return ModelShape.from_config(json.loads(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as a config.json: {error}.") from error
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is no decoder's config.json ({error} is missing or no number): a model of text is expected."
        ) from error


def _raw(estimate: Estimate) -> dict[str, object]:
    parts = {key: {item.name: item.size_bytes for item in _items(estimate, key)} for key in _TITLES}
    return {"low_bytes": estimate.low, "high_bytes": estimate.high, **parts}


def _items(estimate: Estimate, key: str) -> tuple[Item, ...]:
    found: tuple[Item, ...] = getattr(estimate, key)
    return found


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
