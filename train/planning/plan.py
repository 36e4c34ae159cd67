"""A full dry run: data, masks, adapted layers, memory, time, disk, and the engines that can serve the result."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM

from adapterhub.adapter import Adapter, StoredBase
from adapterhub.bases.capabilities import Support, capability_of
from adapterhub.bases.checks import check_causal, read_config
from adapterhub.bases.loading import choose_precision
from adapterhub.bases.quantization import choose_kind
from adapterhub.end_of_turn import other_ends
from adapterhub.errors import BaseNotFound
from adapterhub.memory.counting import shape_of_model
from adapterhub.memory.estimate import Estimate, Item
from adapterhub.memory.model_shape import ModelShape
from adapterhub.memory.training import LogitsMode, WeightCounts, estimate_training
from adapterhub.strict import Strict
from train.data.packing import common_prefix
from train.data.tokenization import Sample
from train.distributed.world import current_world
from train.inputs import load_inputs, training_support, with_lora_of
from train.loop.schedule import step_batches
from train.model.lora import trainable
from train.model.lora_targets import linear_layers
from train.model.methods import attach
from train.objectives.base import Objective
from train.objectives.forward import ends_with_head, rows_of
from train.objectives.mask_report import MaskReport, mask_report
from train.planning.load import training_load
from train.planning.preflight import HubAccess, disk_needed, disk_problems, free_bytes, hub_access, memory_problems
from train.recipe import LoraSection, Method, Recipe, adapter_size

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM 0.32 accepts for --max-lora-rank."""
_DEFAULT_MAX_RANK = 64
"""Default of `adapterhub serve --max-lora-rank`."""
_SERVED = Support("batched")
_SHARE_OF_MATMUL_RATE = (0.25, 0.7)
"""Share of the machine's matmul rate that a step reaches: 0.54 measured on SmolLM2-135M, rows of 512 tokens."""


class Layers(Strict):
    """Adapted layers of one name and shape."""

    name: str
    count: int
    inputs: int
    outputs: int


class LeftOut(Strict):
    """Layers of one name that no adapter is on."""

    name: str
    count: int
    reason: str


class Range(Strict):
    """An expected range."""

    low: float
    high: float


class Servable(Strict):
    """Whether an engine can serve the result."""

    engine: Literal["adapterhub", "vllm"]
    can_serve: bool
    how: str
    """Option that it needs, or the reason why not."""


class Plan(Strict):
    """What a run would do and need."""

    name: str
    base: str
    method: str
    device: str
    dtype: str
    steps: int
    tokens: int
    """Number of tokens in all forward passes."""
    data: str
    data_sha256: str
    notes: list[str]
    masks: MaskReport
    parameters: int
    trainable_parameters: int
    adapted: list[Layers]
    left_out: list[LeftOut]
    rows: str
    """Why each sample is a row of its own; empty: samples are packed."""
    memory: list[Item]
    memory_bytes: Range
    seconds: Range
    adapter_bytes: int
    disk_bytes: int
    """Most bytes on disk during the run."""
    disk_free_bytes: int
    hub: HubAccess
    stop: list[str]
    """Strings at which a server ends an answer, beside the end of text."""
    servable: list[Servable]
    problems: list[str]
    """Reasons why the run would fail, each with what to do about it."""


def make_plan(recipe: Recipe, base: StoredBase, output: Path, *, start: Adapter | None = None) -> Plan:
    """Return what `train` would do with the same arguments.

    Raises RecipeError, DatasetError, BaseNotFound, UsageError, IncompatibleBase, BaseUnsupported.
    """
    recipe = with_lora_of(recipe, start)
    inputs = load_inputs(recipe, base, start=start)
    objective = inputs.objective
    masks = mask_report(objective, inputs.tokenizer)
    masks.check()
    device, dtype = choose_precision(recipe.base_arguments()["dtype"], None)
    model = _on_meta(recipe, base, dtype.value)
    rows = list(_rows(recipe, objective, inputs.support))
    memory = _memory(recipe, model, rows, device=device.value, dtype=dtype.value)
    tokens = sum(map(_row_tokens, rows))
    adapter_bytes = 4 * model.trainable
    disk_bytes = disk_needed(model.trainable, recipe.train.moment_bytes)
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
        notes=[*inputs.notes, *masks.notes, *other_ends(base.path, inputs.tokenizer)],
        masks=masks,
        parameters=model.parameters,
        trainable_parameters=model.trainable,
        adapted=_layers(model.adapted),
        left_out=model.left_out if recipe.method == "lora" else [],
        rows=inputs.support.reason,
        memory=list(memory.device),
        memory_bytes=Range(low=memory.low, high=memory.high),
        seconds=_seconds(_flops(rows, model.linear, model.trainable, model.head), dtype.value, device.value),
        adapter_bytes=adapter_bytes,
        disk_bytes=disk_bytes,
        disk_free_bytes=free_bytes(output),
        hub=hub,
        stop=list(inputs.stop),
        servable=servable(recipe.lora, method=recipe.method, serve=model.serve),
        problems=[
            *disk_problems(output, disk_bytes, base, model.parameters),
            *memory_problems(memory.low, device.value),
            *hub.problems,
        ],
    )


def planned_memory(recipe: Recipe, base: StoredBase, objective: Objective) -> Estimate:
    """Return the plan's memory alone, for a run whose data is read already, in each of the processes that train.

    Raises BaseNotFound, BaseUnsupported.
    """
    device, dtype = choose_precision(recipe.base_arguments()["dtype"], current_world().device)
    rows = list(_rows(recipe, objective, training_support(base)))
    return _memory(recipe, _on_meta(recipe, base, dtype.value), rows, device=device.value, dtype=dtype.value)


def servable(lora: LoraSection, *, method: Method = "lora", serve: Support = _SERVED) -> list[Servable]:
    """Return which engines serve the adapter that a recipe makes, and with which option; `serve` is the base's."""

    def answer(ours: str, vllm: str, *, can_ours: bool = True, can_vllm: bool = False) -> list[Servable]:
        return [
            Servable(engine="adapterhub", can_serve=can_ours and serve.mode != "refused", how=_how(ours, serve)),
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


def _how(option: str, serve: Support) -> str:
    if serve.mode == "refused":
        return serve.reason
    return f"{option}, one sequence at a time ({serve.reason})" if serve.mode == "single" else option


@dataclass(frozen=True)
class _MetaModel:
    """The base and its adapter, without weights."""

    adapted: Any
    shape: ModelShape
    parameters: int
    """Number of weights of the base."""
    linear: int
    """Number of weights in linear layers except the output head: those that are quantized."""
    head: int
    trainable: int
    logits: LogitsMode
    left_out: list[LeftOut]
    serve: Support


def _on_meta(recipe: Recipe, base: StoredBase, dtype: str) -> _MetaModel:
    try:
        config = read_config(base.path)
        check_causal(config, base.path)
        choose_kind(recipe.quantization.kind, config, base.path.name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BaseNotFound(f"{base.path} cannot be read as a base model: {error}") from error
    shape = shape_of_model(model)
    model.requires_grad_(False)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    head = model.get_output_embeddings()
    is_capped = bool(getattr(config.get_text_config(), "final_logit_softcapping", None))
    logits: LogitsMode = "chunks" if ends_with_head(model) else "capped" if is_capped else "whole"
    left_out = [LeftOut(name=n, count=count, reason=why) for n, count, why in linear_layers(model).count_left_out()]
    adapted = attach(model, recipe)
    return _MetaModel(
        adapted=adapted,
        shape=shape,
        parameters=parameters,
        linear=shape.linear_weights,
        head=head.weight.numel(),
        trainable=sum(parameter.numel() for parameter in trainable(adapted)),
        logits=logits,
        left_out=left_out,
        serve=capability_of(config).serve,
    )


def _memory(
    recipe: Recipe, model: _MetaModel, rows: Sequence[Sequence[Sample]], *, device: str, dtype: str
) -> Estimate:
    world = current_world()
    # Trained whole, the base's weights are the trained ones.
    frozen = 0 if recipe.method == "full" else model.parameters
    linear, experts = min(model.linear, frozen), min(model.shape.expert_weights, frozen)
    load = training_load(
        recipe,
        device=device,
        dtype=dtype,
        counts=WeightCounts(linear=linear, other=frozen - linear - experts, trainable=model.trainable, experts=experts),
        tokens=max(map(_row_tokens, rows)),
        trained_tokens=max(sum(sample.num_trained for sample in row) for row in rows),
        logits=model.logits,
        gpus=world.size,
        sharding="layers" if world.shards else "none",
        is_offloaded=world.shards == "host",
    )
    return estimate_training(model.shape, load)


def _layers(model: Any) -> list[Layers]:
    found: dict[tuple[str, int, int], int] = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            key = name.rpartition(".")[2], module.in_features, module.out_features
            found[key] = found.get(key, 0) + 1
    return [Layers(name=n, count=count, inputs=i, outputs=o) for (n, i, o), count in found.items()]


def _rows(recipe: Recipe, objective: Objective, support: Support) -> Iterator[list[Sample]]:
    """Yield the samples of each forward pass with gradients."""
    for places in step_batches(objective.lengths(), train=recipe.train, seed=recipe.seed):
        for row in current_world().share(places):
            samples = [sample for place in row for sample in objective.samples_at(place)]
            # The loss of a preference needs all samples of a row before the backward pass: they are in memory together.
            parts = [range(len(samples))] if recipe.preference else rows_of(support, samples)
            yield from ([samples[place] for place in part] for part in parts)


def _row_tokens(row: Sequence[Sample]) -> int:
    prefix = common_prefix(row)
    return prefix + sum(len(sample.tokens) - prefix for sample in row)


def _flops(rows: Sequence[Sequence[Sample]], frozen: int, num_trainable: int, head: int) -> float:
    """Return the multiplications and additions of all rows.

    Frozen weights take a forward pass and the gradient of their inputs, trained ones the gradient of themselves too;
    the head works on trained tokens only.
    """
    tokens = sum(map(_row_tokens, rows))
    targets = sum(sample.num_trained for row in rows for sample in row)
    return tokens * (4.0 * frozen + 6.0 * num_trainable) + targets * 4.0 * head


def _seconds(flops: float, dtype: str, device: str) -> Range:
    rate = _matmul_rate(dtype, device)
    slow, fast = _SHARE_OF_MATMUL_RATE
    return Range(low=round(flops / (rate * fast), 1), high=round(flops / (rate * slow), 1))


def _matmul_rate(dtype: str, device: str) -> float:
    """Return the operations per second of this device, from the fastest of a few products."""
    left = torch.ones(512, 1024, dtype=getattr(torch, dtype), device=device)
    right = torch.ones(1024, 1024, dtype=left.dtype, device=device)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        (left @ right).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2.0 * left.numel() * right.shape[1] / best
