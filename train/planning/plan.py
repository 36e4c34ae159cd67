"""A full dry run: data, marks, adapted layers, memory, time, disk and who can serve the result. Trains nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from transformers import AutoConfig, AutoModelForCausalLM

from adapterhub.adapter import Adapter, StoredBase
from adapterhub.bases.loading import choose_precision
from adapterhub.errors import BaseNotFound, IncompatibleBase
from adapterhub.memory.model_shape import ModelShape
from adapterhub.memory.training import SPREAD, TrainingLoad, places_at_once, training_memory
from train.data.packing import common_prefix
from train.data.tokenization import Sample
from train.distributed.world import current_world
from train.inputs import load_inputs, with_lora_of
from train.loop.schedule import step_batches
from train.model.lora import trainable
from train.model.methods import attach
from train.objectives.base import Objective
from train.objectives.mask_report import MaskReport, mask_report
from train.planning.preflight import HubAccess, disk_needed, disk_problems, free_bytes, hub_access, memory_problems
from train.recipe import LoraSection, Method, Recipe, adapter_size

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""what vLLM 0.32 takes for --max-lora-rank"""
_DEFAULT_MAX_RANK = 64
"""of `adapterhub serve --max-lora-rank`"""
_SHARE_OF_MATMUL_RATE = (0.25, 0.7)
"""of the machine's plain matmul rate that a step reaches: 0.54 measured on SmolLM2-135M with rows of 512 tokens"""


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Layers(_Closed):
    """Adapted layers of one name and shape."""

    name: str
    count: int
    inputs: int
    outputs: int


class MemoryItem(_Closed):
    name: str
    size_bytes: int


class Range(_Closed):
    low: float
    high: float


class Servable(_Closed):
    engine: Literal["adapterhub", "vllm"]
    can_serve: bool
    how: str
    """the option it needs, or why not"""


class Plan(_Closed):
    name: str
    base: str
    method: str
    device: str
    dtype: str
    steps: int
    tokens: int
    """tokens of all forward passes"""
    data: str
    data_sha256: str
    notes: list[str]
    masks: MaskReport
    parameters: int
    trainable_parameters: int
    adapted: list[Layers]
    memory: list[MemoryItem]
    memory_bytes: Range
    seconds: Range
    adapter_bytes: int
    disk_bytes: int
    """at most, while the run goes on"""
    disk_free_bytes: int
    hub: HubAccess
    stop: list[str]
    """strings a server ends an answer at, beside the end of text"""
    servable: list[Servable]
    problems: list[str]
    """what would stop the run, and what to do about it"""


def make_plan(recipe: Recipe, base: StoredBase, output: Path, *, start: Adapter | None = None) -> Plan:
    """What `train` would do with the same arguments. Raises RecipeError, DatasetError, BaseNotFound, UsageError,
    IncompatibleBase."""
    recipe = with_lora_of(recipe, start)
    inputs = load_inputs(recipe, base, start=start)
    objective = inputs.objective
    masks = mask_report(objective, inputs.tokenizer)
    masks.check()
    device, dtype = choose_precision(recipe.base_arguments()["dtype"], None)
    model = _on_meta(recipe, base, dtype.value)
    rows = list(_rows(recipe, objective))
    items = _memory(recipe, model, rows, device=device.value, dtype=dtype.value)
    total = sum(item.size_bytes for item in items)
    tokens = sum(map(_row_tokens, rows))
    adapter_bytes = 4 * model.trainable
    disk_bytes = disk_needed(model.trainable, recipe.train.moment_bytes)
    low, high = total * (1 - SPREAD), total * (1 + SPREAD)
    hub = hub_access()
    return Plan(
        name=recipe.name,
        base=str(base.ref),
        method=recipe.preference.method if recipe.preference else "sft",
        device=device.value,
        dtype=dtype.value,
        steps=recipe.train.num_steps(objective.num_samples),
        tokens=tokens,
        data=objective.describe(),
        data_sha256=objective.digest,
        notes=[*objective.notes, *masks.notes],
        masks=masks,
        parameters=model.parameters,
        trainable_parameters=model.trainable,
        adapted=_layers(model.adapted),
        memory=items,
        memory_bytes=Range(low=low, high=high),
        seconds=_seconds(_flops(rows, model.linear, model.trainable, model.head), dtype.value, device.value),
        adapter_bytes=adapter_bytes,
        disk_bytes=disk_bytes,
        disk_free_bytes=free_bytes(output),
        hub=hub,
        stop=list(inputs.stop),
        servable=servable(recipe.lora, method=recipe.method),
        problems=[
            *disk_problems(output, disk_bytes, base, model.parameters),
            *memory_problems(low, device.value),
            *hub.problems,
        ],
    )


def planned_memory(recipe: Recipe, base: StoredBase, objective: Objective) -> list[MemoryItem]:
    """The plan's memory items alone, for a run whose data is read already. Raises BaseNotFound, IncompatibleBase."""
    device, dtype = choose_precision(recipe.base_arguments()["dtype"], current_world().device)
    rows = list(_rows(recipe, objective))
    return _memory(recipe, _on_meta(recipe, base, dtype.value), rows, device=device.value, dtype=dtype.value)


def servable(lora: LoraSection, *, method: Method = "lora") -> list[Servable]:
    """Which engines take the adapter a recipe makes, and with which option."""

    def answer(ours: str, vllm: str, *, can_ours: bool = True, can_vllm: bool = False) -> list[Servable]:
        return [
            Servable(engine="adapterhub", can_serve=can_ours, how=ours),
            Servable(engine="vllm", can_serve=can_vllm, how=vllm),
        ]

    if method == "full":
        reason = "a whole model is no adapter: serve it as a base"
        return answer(reason, reason, can_ours=False)
    if method in ("prompt", "prefix"):
        reason = "a soft prompt changes no layer, so no package holds one: PEFT loads it"
        return answer(reason, reason, can_ours=False)
    if method == "head":
        return answer("as it is", "vLLM serves no whole heads: use lora")
    rank, _ = adapter_size(lora)
    ours = "as it is" if rank <= _DEFAULT_MAX_RANK else f"with --max-lora-rank {rank}"
    if lora.method == "dora":
        return answer(ours, "vLLM serves no DoRA: use lora or rslora")
    fitting = [allowed for allowed in VLLM_RANKS if allowed >= rank]
    if not fitting:
        return answer(ours, f"vLLM takes ranks up to {VLLM_RANKS[-1]}, this one is {rank}")
    return answer(ours, f"with --max-lora-rank {fitting[0]}", can_vllm=True)


@dataclass(frozen=True)
class _MetaModel:
    """The base and its adapter, without weights."""

    adapted: Any
    shape: ModelShape
    parameters: int
    """of the base"""
    linear: int
    """weights of linear layers but the output head, which loading holds in 4 bit"""
    head: int
    trainable: int


def _on_meta(recipe: Recipe, base: StoredBase, dtype: str) -> _MetaModel:
    try:
        config = AutoConfig.from_pretrained(base.path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    except (OSError, ValueError, KeyError) as error:
        raise BaseNotFound(f"{base.path} cannot be read as a base model: {error}") from error
    try:
        # A model of text and pictures keeps the sizes of its decoder one level down.
        shape = ModelShape.from_config(config.get_text_config().to_dict())
    except KeyError as error:
        raise IncompatibleBase(
            f"the config of {base.ref} has no number as {error.args[0]}, by which a run's memory is planned: use one "
            "of LLaMA's shape, such as `adapterhub base list` names."
        ) from error
    model.requires_grad_(False)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    head = model.get_output_embeddings()
    layers = (module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head)
    linear = sum(layer.weight.numel() for layer in layers)
    adapted = attach(model, recipe)
    return _MetaModel(
        adapted=adapted,
        shape=shape,
        parameters=parameters,
        linear=linear,
        head=head.weight.numel(),
        trainable=sum(parameter.numel() for parameter in trainable(adapted)),
    )


def _memory(
    recipe: Recipe, model: _MetaModel, rows: Sequence[Sequence[Sample]], *, device: str, dtype: str
) -> list[MemoryItem]:
    quantized = model.linear if recipe.quantization.kind != "none" else 0
    items = training_memory(
        model.shape,
        TrainingLoad(
            quantized=quantized,
            # Trained whole, the base's weights are the trained ones.
            unquantized=0 if recipe.method == "full" else model.parameters - quantized,
            trainable=model.trainable,
            row_tokens=max(map(_row_tokens, rows)),
            row_trained=min(
                max(sum(sample.num_trained for sample in row) for row in rows),
                places_at_once(model.shape.vocabulary),
            ),
            dtype_bytes=getattr(torch, dtype).itemsize,
            moment_bytes=recipe.train.moment_bytes,
            device="cuda" if device.startswith("cuda") else "cpu",
            weight_bits=8 if recipe.quantization.kind == "int8" else 4,
            block_size=recipe.quantization.block_size,
            is_double_quantized=recipe.quantization.double_quant,
            is_checkpointed=recipe.train.activation_checkpointing,
            layer_inputs="copied" if recipe.lora.method == "dora" else "dropped" if recipe.lora.dropout else "shared",
        ),
    )
    return [MemoryItem(name=item.name, size_bytes=item.size_bytes) for item in items]


def _layers(model: Any) -> list[Layers]:
    found: dict[tuple[str, int, int], int] = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            key = name.rpartition(".")[2], module.in_features, module.out_features
            found[key] = found.get(key, 0) + 1
    return [Layers(name=n, count=count, inputs=i, outputs=o) for (n, i, o), count in found.items()]


def _rows(recipe: Recipe, objective: Objective) -> Iterator[list[Sample]]:
    """The samples of each forward pass that carries gradients."""
    for places in step_batches(objective.lengths(), train=recipe.train, seed=recipe.seed):
        for row in places:
            yield [sample for place in row for sample in objective.samples_at(place)]


def _row_tokens(row: Sequence[Sample]) -> int:
    prefix = common_prefix(row)
    return prefix + sum(len(sample.tokens) - prefix for sample in row)


def _flops(rows: Sequence[Sequence[Sample]], frozen: int, num_trainable: int, head: int) -> float:
    """Multiplications and additions of all rows: frozen weights take a forward and a backward to their inputs,
    trained ones a backward to themselves too; the head works on trained places only."""
    tokens = sum(map(_row_tokens, rows))
    targets = sum(sample.num_trained for row in rows for sample in row)
    return tokens * (4.0 * frozen + 6.0 * num_trainable) + targets * 4.0 * head


def _seconds(flops: float, dtype: str, device: str) -> Range:
    rate = _matmul_rate(dtype, device)
    slow, fast = _SHARE_OF_MATMUL_RATE
    return Range(low=round(flops / (rate * fast), 1), high=round(flops / (rate * slow), 1))


def _matmul_rate(dtype: str, device: str) -> float:
    """Operations a second of this machine, from the fastest of a few products."""
    left = torch.ones(512, 1024, dtype=getattr(torch, dtype), device=device)
    right = torch.ones(1024, 1024, dtype=left.dtype, device=device)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        (left @ right).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2.0 * left.numel() * right.shape[1] / best
