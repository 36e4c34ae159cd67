"""The memory of a training step, itemized from a model's shape and the load of the run.

This is the only training estimate: `adapterhub memory`, `adapterhub recipes`, `adapterhub train --plan`, the report of
a run and the advice after out-of-memory all show its items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from adapterhub.memory.estimate import (
    PROCESS_CPU,
    Device,
    Estimate,
    Item,
    constant_bytes,
    loading_peak,
    process_items,
    total,
)
from adapterhub.memory.model_shape import ModelShape

Method = Literal["lora", "full"]
QuantizationKind = Literal["nf4", "fp4", "int8", "none"]
LogitsMode = Literal["chunks", "whole", "capped", "every-token"]
LayerInputs = Literal["shared", "dropped", "copied"]
Sharding = Literal["none", "layers", "all"]

LOGITS_AT_ONCE = 1 << 23
"""Logits of a training step that are alive at one time: with their gradients 100 MB, whatever the vocabulary."""
_MEASURED_TRAINED = 512
"""Trained tokens of one forward pass of the held-out measurement, at most (train/objectives/evaluation.py)."""
_KERNELS_CPU = 200 << 20
"""Bytes of products that oneDNN compiles for the shapes of a step or two; measured, bf16, with the caches bounded, on a
CPU with AMX. A CPU with AVX512-BF16 alone holds almost none."""
_COLLECTIVES = 500 << 20
"""Bytes of NCCL's buffers and streams on each GPU of several."""
_ALLOCATOR_SHARE = 0.15
"""Share of a step's temporary memory that a caching allocator holds beside what is in use."""
_GATHERED_LAYERS = 3
"""Layers that are whole at one time under FSDP: in use, fetched ahead, being freed."""
_LOGIT_BYTES = 12
"""Bytes of a logit in our loss: bf16, fp32 and a gradient of each; or fp32, its log-probability and the gradient."""
_CAPPED_LOGIT_BYTES = 16
"""Bytes of a logit with a soft cap, which keeps its tanh for the gradient: measured, tiny Gemma 2, bf16 and fp32."""
_EVERY_TOKEN_LOGIT_BYTES = 18
"""Bytes of a logit in Hugging Face's loss: bf16, fp32, its shifted copy, the log-softmax and its gradient."""


@dataclass(frozen=True)
class WeightCounts:
    """Numbers of weights of a base and of what is trained on it."""

    linear: int
    """Frozen weights of the layers' linear modules, which quantization applies to."""
    other: int
    """Frozen weights outside the linear modules: embedding, head, norms."""
    trainable: int
    experts: int = 0
    """Frozen weights of experts in one tensor, which no quantization applies to; not among `other`."""


@dataclass(frozen=True)
class TrainingLoad:
    """One training run on one of its devices; the defaults are those of our training loop on one GPU."""

    tokens: int = 512
    """Tokens of the longest forward pass on one device (batch size x sequence length)."""
    trained_tokens: int | None = None
    """Tokens of that pass whose logits the loss needs; None: all of them."""
    method: Method = "lora"
    rank: int = 16
    modules: tuple[str, ...] = ()
    """Adapted linear modules; empty: all of them."""
    counts: WeightCounts | None = None
    """Exact numbers of weights; None: from the shape, the rank and the modules."""
    quantization: QuantizationKind = "nf4"
    block_size: int = 64
    is_double_quantized: bool = True
    dtype_bytes: int = 2
    """Bytes of a number in the compute dtype."""
    adapter_bytes: int = 4
    """Bytes of one trained weight; its gradient takes the same."""
    moment_bytes: int = 8
    """Bytes of both optimizer moments of one trained weight."""
    is_paged: bool = False
    """Whether the optimizer's state may move to host RAM when the GPU is full."""
    is_checkpointed: bool = False
    """Whether a layer's activations are computed again in the backward pass."""
    layer_inputs: LayerInputs = "shared"
    """What adapted layers keep of their inputs: one tensor for layers that share it; each layer's own after dropout,
    with its mask; or a copy for each layer in fp32, as PEFT's layers do."""
    logits: LogitsMode = "chunks"
    """How the loss computes logits: at trained tokens, `LOGITS_AT_ONCE` at a time; at all of them at once, for a base
    that scales or caps its logits after the head; or at every token, as Hugging Face's models do."""
    has_mask: bool = True
    """Whether attention reads a mask of tokens x tokens, which keeps packed samples apart."""
    gpus: int = 1
    """Number of devices that train together."""
    sharding: Sharding = "none"
    """What is divided among the devices: nothing; the layers' frozen weights, as `train --shard` does; or everything,
    as FSDP does elsewhere."""
    is_offloaded: bool = False
    """Whether the shards live in host RAM and visit the GPU."""
    device: Device = "cuda"


def places_at_once(vocabulary: int) -> int:
    """Return the number of trained tokens whose logits a training step computes together."""
    return max(16, LOGITS_AT_ONCE // vocabulary)


def estimate_training(shape: ModelShape, load: TrainingLoad) -> Estimate:
    """Return the peak of one training step, and what surrounds it. Raises KeyError for a module that is not there."""
    counts = load.counts or _counts(shape, load)
    base, states = _base(counts, load), _states(counts, load)
    held = [_on_device(item, load) for item in (*base, *states)]
    gathered, moving = _gathered(shape, counts, load), _step(shape, load)
    process = _process(load, temporary=total((*gathered, *moving)))
    return Estimate(
        device=(*held, *gathered, *moving, *process),
        host=_host(load, base, states),
        disk=(Item("base, bf16", 2 * shape.weights), *disk_items(counts.trainable, load.moment_bytes)),
        spikes=(
            loading_peak(shape, held[: len(base)]),
            Item("evaluation, without gradients", total(held[: len(base)]) + _evaluation(shape, load)),
            Item("copies for a checkpoint, in host RAM", (4 + load.moment_bytes) * counts.trainable),
        ),
        textbook=textbook(shape.weights, 0 if load.method == "full" else counts.trainable, gpus=load.gpus),
        # Paged state may leave the GPU altogether, and does before an allocation fails.
        uncertain_bytes=total(item for item in (*held, *process) if item.name in (_PAGED, _COMPILED)),
    )


def disk_items(trainable: int, moment_bytes: int) -> tuple[Item, ...]:
    """Return what a run writes at most at one time: a checkpoint is complete before the one before it is deleted."""
    return (
        Item("two checkpoints", 2 * (4 + moment_bytes) * trainable),
        Item("best weights and result", 2 * 4 * trainable),
    )


def textbook(base: int, adapter: int, *, gpus: int = 1) -> tuple[Item, ...]:
    """Return the rules of thumb for N base weights and M adapter weights.

    None of them counts activations, constants or the process. Bits per weight are Dettmers': LoRA 16 + 0.4 + 0.8 + 0.4;
    QLoRA 4 + 0.4 + 0.8 + 0.4, often printed as 5.2.
    """
    return (
        Item("full, fp32 Adam: 16N", 16 * base),
        Item("full, mixed precision: 12N", 12 * base),
        Item("full, sharded: 16N/GPUs", 16 * base // gpus),
        Item("LoRA: 4N + 16M", 4 * base + 16 * adapter),
        Item("QLoRA: N/2 + 16M", base // 2 + 16 * adapter),
        Item("LoRA: 17.6 bits a weight", int(2.2 * base)),
        Item("QLoRA: 5.6 bits a weight", int(0.7 * base)),
    )


_PAGED = "optimizer, paged"
_COMPILED = "compiled products"
_WORDS = {1: "8-bit", 2: "16-bit", 4: "32-bit"}


def _counts(shape: ModelShape, load: TrainingLoad) -> WeightCounts:
    if load.method == "full":
        return WeightCounts(linear=0, other=0, trainable=shape.weights)
    return WeightCounts(
        linear=shape.linear_weights,
        other=shape.weights - shape.linear_weights - shape.expert_weights,
        trainable=shape.lora_weights(load.rank, load.modules),
        experts=shape.expert_weights,
    )


def _weight_bytes(weights: int, load: TrainingLoad) -> int:
    """Return the bytes of frozen linear weights, without their quantization constants."""
    bits = {"nf4": 4, "fp4": 4, "int8": 8, "none": 8 * load.dtype_bytes}[load.quantization]
    return weights * bits // 8


def _constants(weights: int, load: TrainingLoad) -> int:
    # LLM.int8 has one constant per row of a matrix: negligible beside the codes.
    if load.quantization not in ("nf4", "fp4"):
        return 0
    return constant_bytes(weights, is_double=load.is_double_quantized, block_size=load.block_size)


def _base(counts: WeightCounts, load: TrainingLoad) -> list[Item]:
    kind = {"nf4": "4-bit codes", "fp4": "4-bit codes", "int8": "8-bit codes"}.get(load.quantization)
    items = [
        Item(f"base, {kind or _WORDS[load.dtype_bytes]}", _weight_bytes(counts.linear, load)),
        Item("quantization constants", _constants(counts.linear, load)),
        Item(f"experts, {_WORDS[load.dtype_bytes]}", load.dtype_bytes * counts.experts),
        Item("embedding, head and norms", load.dtype_bytes * counts.other),
    ]
    return [item for item in items if item.size_bytes]


def _states(counts: WeightCounts, load: TrainingLoad) -> list[Item]:
    trained = {4: "fp32", 2: "bf16"}[load.adapter_bytes]
    return [
        Item(f"{'trained weights' if load.method == 'full' else 'adapter'}, {trained}",
             load.adapter_bytes * counts.trainable),
        Item(f"gradients, {trained}", load.adapter_bytes * counts.trainable),
        Item(_PAGED if load.is_paged and load.device == "cuda" else "optimizer", load.moment_bytes * counts.trainable),
    ]  # fmt: skip


def _on_device(item: Item, load: TrainingLoad) -> Item:
    """Return what one device holds of an item of the base or of the training state."""
    if not _is_divided(item, load):
        return item
    is_away = load.is_offloaded and load.device == "cuda"
    return Item(item.name, 0 if is_away else item.size_bytes // load.gpus)


def _gathered(shape: ModelShape, counts: WeightCounts, load: TrainingLoad) -> list[Item]:
    """Return the shards that are put together for a moment."""
    if load.sharding == "none":
        return []
    layer = counts.linear // shape.layers
    if load.sharding == "layers":
        return [Item(f"{_GATHERED_LAYERS} layers gathered", _GATHERED_LAYERS * _weight_bytes(layer, load))]
    whole = _weight_bytes(layer, load) + _constants(layer, load)
    return [
        Item(f"{_GATHERED_LAYERS} layers gathered", _GATHERED_LAYERS * whole),
        Item("embedding and head gathered", load.dtype_bytes * shape.embedding_weights),
    ]


def _step(shape: ModelShape, load: TrainingLoad) -> list[Item]:
    """Return the memory that a step allocates and frees again."""
    dtype, tokens = load.dtype_bytes, load.tokens
    layer = _layer_bytes(shape, load) * tokens
    workspace = _layer_gradient_bytes(shape, dtype) * tokens + _dequantized(shape, load)
    activations = shape.layers * layer
    if load.is_checkpointed:
        activations = shape.layers * dtype * shape.hidden * tokens
        workspace += layer
    logits = _logits(shape, load)
    # The loss is differentiated before the layers are: its logits are gone when a layer needs its workspace.
    name = "logits" if logits >= workspace else "one layer's backward pass"
    mask = [Item("attention mask", dtype * tokens * tokens)] if load.has_mask else []
    return [Item("activations", activations), *mask, Item(name, max(logits, workspace))]


def _layer_bytes(shape: ModelShape, load: TrainingLoad) -> int:
    """Return the bytes that one token leaves in one layer for the backward pass.

    Both norms' inputs in fp32; in the compute dtype queries, keys and values repeated for each query head, attention's
    output, gate, its activation and up; and the inputs of adapted layers, which A's gradient needs. Of the shared
    inputs one is attention's output, which is counted already.
    """
    dtype, hidden, intermediate = load.dtype_bytes, shape.hidden, shape.intermediate
    kept = 8 * hidden + dtype * (4 * (shape.query or hidden) + 3 * intermediate)
    return (
        kept
        + {
            "shared": dtype * (2 * hidden + intermediate),
            "dropped": (dtype + 1) * (6 * hidden + intermediate),
            "copied": 4 * (6 * hidden + intermediate),
        }[load.layer_inputs]
    )


def _layer_gradient_bytes(shape: ModelShape, dtype: int) -> int:
    """Return the bytes of one token's gradients in one layer: gate, activation and up; the residual stream in fp32."""
    return dtype * 3 * shape.intermediate + 4 * 7 * shape.hidden


def _dequantized(shape: ModelShape, load: TrainingLoad) -> int:
    """Return the bytes of the largest linear weight in the compute dtype, as its product needs it."""
    widest = max(one.inputs * one.outputs for one in shape.linears)
    return 0 if load.quantization == "none" else load.dtype_bytes * widest


def _logits(shape: ModelShape, load: TrainingLoad) -> int:
    if load.logits == "every-token":
        return _EVERY_TOKEN_LOGIT_BYTES * load.tokens * shape.vocabulary
    logit = _CAPPED_LOGIT_BYTES if load.logits == "capped" else _LOGIT_BYTES
    return logit * _trained_at_once(shape, load) * shape.vocabulary


def _trained_at_once(shape: ModelShape, load: TrainingLoad) -> int:
    """Return the number of tokens whose logits are alive together."""
    trained = load.tokens if load.trained_tokens is None else load.trained_tokens
    return min(trained, places_at_once(shape.vocabulary)) if load.logits == "chunks" else trained


def _evaluation(shape: ModelShape, load: TrainingLoad) -> int:
    """Return the bytes of a forward pass without gradients."""
    trained = _trained_at_once(shape, load)
    logits = load.tokens if load.logits == "every-token" else min(trained, _MEASURED_TRAINED)
    return (load.dtype_bytes + 4) * logits * shape.vocabulary + 2 * 4 * shape.hidden * load.tokens


def _process(load: TrainingLoad, *, temporary: int) -> list[Item]:
    if load.device == "cpu":
        return [Item(_COMPILED, _KERNELS_CPU), *process_items("cpu")]
    collectives = [Item("collectives", _COLLECTIVES)] if load.gpus > 1 else []
    return [Item("allocator", int(_ALLOCATOR_SHARE * temporary)), *process_items("cuda"), *collectives]


def _host(load: TrainingLoad, base: list[Item], states: list[Item]) -> tuple[Item, ...]:
    """Return the memory of all processes of one machine; on a CPU the device's memory is the host's."""
    moved = [item for item in (*base, *states) if _is_moved(item, load)]
    return (
        Item("processes", load.gpus * PROCESS_CPU),
        *(Item(f"{item.name}, moved here", item.size_bytes) for item in moved),
    )


def _is_divided(item: Item, load: TrainingLoad) -> bool:
    return load.sharding == "all" or (load.sharding == "layers" and item.name.startswith("base, "))


def _is_moved(item: Item, load: TrainingLoad) -> bool:
    is_away = load.is_offloaded and _is_divided(item, load)
    return load.device == "cuda" and (is_away or item.name == _PAGED)
