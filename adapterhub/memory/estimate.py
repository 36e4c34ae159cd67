"""What training or serving a model needs on each GPU, in host RAM and on disk, from its shape. Knows no engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from adapterhub.memory.model_shape import ModelShape
from adapterhub.memory.training import PROCESS_CPU, PROCESS_CUDA, SPREAD, Item, constant_bytes

Method = Literal["qlora", "lora", "full"]
Device = Literal["cpu", "cuda"]

_COLLECTIVES = 500 << 20
"""bytes of NCCL's buffers and streams on each GPU of several"""
_ALLOCATOR_SHARE = 0.15
"""of the memory that comes and goes within a step, kept by a caching allocator beside what is in use"""
_GATHERED_LAYERS = 3
"""layers whole at one time under FSDP: in use, fetched ahead, being freed"""
_LOGIT_BYTES = 18
"""a logit in Hugging Face's loss: bf16, fp32, its shifted copy, the log-softmax and that one's gradient"""
_SAVED_LOGIT_BYTES = 12
"""a logit where only trained places have one: bf16 and fp32, each with its gradient"""


@dataclass(frozen=True)
class TrainingSetting:
    """One training step on one GPU or CPU."""

    method: Method = "qlora"
    rank: int = 16
    modules: tuple[str, ...] = ()
    """adapted linear modules; none named: all"""
    tokens: int = 512
    """of one forward pass on one device: rows times length"""
    trained_tokens: int | None = None
    """places whose logits are computed; None: the loss needs them at every place, as in Hugging Face's models"""
    is_checkpointed: bool = True
    """activations of a layer computed again in the backward pass"""
    is_double_quantized: bool = True
    adapter_bytes: int = 4
    """of one adapter weight; its gradient takes the same"""
    moment_bytes: int = 8
    """of the optimizer, both moments of one parameter"""
    is_paged: bool = False
    """the optimizer's state moves to host RAM when the GPU is full"""
    gpus: int = 1
    is_sharded: bool = False
    """FSDP over all GPUs; else each holds everything"""
    is_offloaded: bool = False
    """shards live in host RAM and visit the GPU"""
    device: Device = "cuda"


@dataclass(frozen=True)
class ServingSetting:
    adapters: int = 0
    """resident at once"""
    rank: int = 16
    kv_tokens: int = 8192
    """budget of keys and values, over all conversations"""
    requests: int = 8
    """decoded together, each with a row of logits"""
    is_quantized: bool = True
    device: Device = "cuda"


@dataclass(frozen=True)
class Estimate:
    """Bytes. `low` to `high` is what one device needs: a range, as allocators and kernels differ."""

    device: tuple[Item, ...]
    host: tuple[Item, ...]
    disk: tuple[Item, ...]
    spikes: tuple[Item, ...]
    """peaks of moments other than a step; contained in the range"""
    textbook: tuple[Item, ...]
    low: int
    high: int

    @property
    def size_bytes(self) -> int:
        return _total(self.device)


def estimate_training(shape: ModelShape, setting: TrainingSetting) -> Estimate:
    """The peak of one step, and what surrounds it."""
    trainable = shape.weights if setting.method == "full" else shape.lora_weights(setting.rank, setting.modules)
    base, moving = _base(shape, setting), _activations(shape, setting)
    shards = setting.gpus if setting.is_sharded else 1
    resident = 0 if setting.is_offloaded else 1
    weight_bytes = 2 if setting.method == "full" else setting.adapter_bytes
    adapter = [Item("adapter", weight_bytes * trainable)] if setting.method != "full" else []
    optimizer = Item("optimizer, paged" if setting.is_paged else "optimizer", setting.moment_bytes * trainable)
    states = [*adapter, Item("gradients", weight_bytes * trainable), optimizer]
    held = [Item(item.name, resident * item.size_bytes // shards) for item in (*base, *states)]
    gathered = _gathered(shape, setting) if setting.is_sharded else []
    slack = Item("allocator", int(_ALLOCATOR_SHARE * _total((*moving, *gathered))) if setting.device == "cuda" else 0)
    device = (*held, *gathered, *moving, slack, *_process(setting.device, setting.gpus))
    total = _total(device)
    # Paged state may leave altogether, and does before an allocation fails.
    movable = next((item.size_bytes for item in held if item.name == "optimizer, paged"), 0)
    return Estimate(
        device=device,
        host=_host(setting, (*base, *states)),
        disk=_disk(shape, trainable, setting.moment_bytes),
        spikes=_spikes(shape, setting, base, trainable, shards),
        textbook=textbook(shape.weights, 0 if setting.method == "full" else trainable, gpus=setting.gpus),
        low=int((total - movable) * (1 - SPREAD)),
        high=int(total * (1 + SPREAD)),
    )


def estimate_serving(shape: ModelShape, setting: ServingSetting) -> Estimate:
    """Base, resident adapters, keys and values, and the logits of a decode step.

    A GPU holds adapters, keys and values in bf16; a CPU in fp32, in which it computes and adapters are saved here.
    """
    base = _base(shape, TrainingSetting(method="qlora" if setting.is_quantized else "lora"))
    number_bytes = 4 if setting.device == "cpu" else 2
    adapter_weights = shape.lora_weights(setting.rank)
    device = (
        *base,
        Item(f"{setting.adapters} adapters", setting.adapters * number_bytes * adapter_weights),
        Item("keys and values", 2 * number_bytes * shape.layers * shape.key_value * setting.kv_tokens),
        Item("logits", 6 * setting.requests * shape.vocabulary),
        *_process(setting.device, 1),
    )
    total = _total(device)
    return Estimate(
        device=device,
        host=(Item("process", PROCESS_CPU),),
        disk=(Item("base", 2 * shape.weights), Item("adapters", 4 * setting.adapters * adapter_weights)),
        spikes=(Item("loading the base", _loading(shape, base)),),
        textbook=(Item("4-bit inference, N/2", shape.weights // 2), Item("16-bit inference, 2N", 2 * shape.weights)),
        low=int(total * (1 - SPREAD)),
        high=int(total * (1 + SPREAD)),
    )


def textbook(base: int, adapter: int, *, gpus: int = 1) -> tuple[Item, ...]:
    """The rules of thumb for N weights and M of an adapter; none counts activations, constants or the process.

    Bits per weight are Dettmers': LoRA 16 + 0.4 + 0.8 + 0.4; QLoRA's 4 + 0.4 + 0.8 + 0.4, often printed as 5.2.
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


def _base(shape: ModelShape, setting: TrainingSetting) -> list[Item]:
    if setting.method != "qlora":
        return [Item("base, bf16", 2 * shape.weights)]
    constants = constant_bytes(shape.linear_weights, is_double=setting.is_double_quantized)
    return [
        Item("base, 4-bit codes", shape.linear_weights // 2),
        Item("quantization constants", constants),
        Item("embedding, head and norms, bf16", 2 * (shape.weights - shape.linear_weights)),
    ]


def _activations(shape: ModelShape, setting: TrainingSetting) -> list[Item]:
    tokens = setting.tokens
    layer = _layer_bytes(shape) * tokens
    if setting.trained_tokens is None:
        logits = _LOGIT_BYTES * tokens * shape.vocabulary
    else:
        logits = _SAVED_LOGIT_BYTES * setting.trained_tokens * shape.vocabulary
    if not setting.is_checkpointed:
        return [Item("activations", shape.layers * layer), Item("logits", logits)]
    # The loss is differentiated before the layers are: its logits are gone when a layer is computed again.
    workspace = layer + _layer_gradient_bytes(shape) * tokens + _dequantized(shape, setting)
    working = "logits" if logits >= workspace else "one layer, computed again"
    return [
        Item("activations, checkpointed", 2 * shape.layers * shape.hidden * tokens),
        Item(working, max(logits, workspace)),
    ]


def _layer_bytes(shape: ModelShape) -> int:
    """A token's saved tensors in one layer: fp32 inputs of norms and of seven adapted modules, bf16 the rest."""
    saved = 4 * (10 * shape.hidden + shape.intermediate)
    return saved + 2 * (2 * shape.hidden + 2 * shape.key_value + 3 * shape.intermediate)


def _layer_gradient_bytes(shape: ModelShape) -> int:
    """A token's gradients alive in one layer's backward: of gate, activation and up, and of the stream in fp32."""
    return 2 * 3 * shape.intermediate + 4 * 7 * shape.hidden


def _dequantized(shape: ModelShape, setting: TrainingSetting) -> int:
    """bf16 of the largest linear weight, as its product needs it."""
    widest = max(inputs * outputs for inputs, outputs in shape.layer_linears().values())
    return 2 * widest if setting.method == "qlora" else 0


def _gathered(shape: ModelShape, setting: TrainingSetting) -> list[Item]:
    layer = shape.linear_weights // shape.layers
    bytes_of = layer // 2 + constant_bytes(layer) if setting.method == "qlora" else 2 * layer
    return [
        Item(f"{_GATHERED_LAYERS} layers gathered", _GATHERED_LAYERS * bytes_of),
        Item("embedding and head gathered", 2 * shape.embedding_weights),
    ]


def _process(device: Device, gpus: int) -> list[Item]:
    if device == "cpu":
        return [Item("process", PROCESS_CPU)]
    context = Item("CUDA context", PROCESS_CUDA)
    return [context, Item("collectives", _COLLECTIVES)] if gpus > 1 else [context]


def _host(setting: TrainingSetting, parts: tuple[Item, ...]) -> tuple[Item, ...]:
    """Of all processes of one machine; on a CPU the device's memory is the host's."""
    processes = Item("processes", setting.gpus * PROCESS_CPU)
    moved = [item for item in parts if setting.is_offloaded or item.name == "optimizer, paged"]
    return (processes, *(Item(f"{item.name}, moved here", item.size_bytes) for item in moved))


def _disk(shape: ModelShape, trainable: int, moment_bytes: int) -> tuple[Item, ...]:
    return (
        Item("base, bf16", 2 * shape.weights),
        # While a checkpoint is written the one before is still there.
        Item("two checkpoints", 2 * (4 + moment_bytes) * trainable),
        Item("best weights and result", 2 * 4 * trainable),
    )


def _spikes(
    shape: ModelShape, setting: TrainingSetting, base: list[Item], trainable: int, shards: int
) -> tuple[Item, ...]:
    held = _total(base) // shards
    logits = 6 * setting.tokens * shape.vocabulary
    return (
        Item("loading the base", _loading(shape, base) // shards),
        Item("evaluation, without gradients", held + logits + 2 * 4 * shape.hidden * setting.tokens),
        Item("a checkpoint's copies, host", (4 + setting.moment_bytes) * trainable),
    )


def _loading(shape: ModelShape, base: list[Item]) -> int:
    """The base and one matrix in bf16 on its way."""
    return _total(base) + 2 * shape.vocabulary * shape.hidden


def _total(items: tuple[Item, ...] | list[Item]) -> int:
    return sum(item.size_bytes for item in items)
