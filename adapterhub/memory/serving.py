"""The memory of a server: the base, resident adapters, the KV cache, and the logits of a decode step."""

from __future__ import annotations

from dataclasses import dataclass

from adapterhub.memory.estimate import PROCESS_CPU, Device, Estimate, Item, constant_bytes, loading_peak, process_items
from adapterhub.memory.model_shape import ModelShape


@dataclass(frozen=True)
class ServingLoad:
    """What one server holds beside the base."""

    adapters: int = 0
    """Number of resident adapters."""
    rank: int = 16
    kv_tokens: int = 8192
    """Tokens in the KV cache, over all conversations."""
    requests: int = 8
    """Number of sequences decoded together, each with a row of logits."""
    is_quantized: bool = True
    device: Device = "cuda"


def estimate_serving(shape: ModelShape, load: ServingLoad) -> Estimate:
    """Return what a server needs on its device.

    A GPU holds adapters and KV cache in bf16; a CPU in fp32, in which it computes and adapters are saved here.
    """
    base = _base(shape, is_quantized=load.is_quantized)
    number_bytes = 4 if load.device == "cpu" else 2
    adapter_weights = shape.lora_weights(load.rank)
    return Estimate(
        device=(
            *base,
            Item(f"{load.adapters} adapters", load.adapters * number_bytes * adapter_weights),
            Item("KV cache", number_bytes * shape.cached_numbers * load.kv_tokens),
            Item("logits", 6 * load.requests * shape.vocabulary),
            *process_items(load.device),
        ),
        host=(Item("process", PROCESS_CPU),),
        disk=(Item("base", 2 * shape.weights), Item("adapters", 4 * load.adapters * adapter_weights)),
        spikes=(loading_peak(shape, base),),
        textbook=(Item("4-bit inference, N/2", shape.weights // 2), Item("16-bit inference, 2N", 2 * shape.weights)),
    )


def _base(shape: ModelShape, *, is_quantized: bool) -> list[Item]:
    """Return the base's items; weights that are bf16 values stay in bf16 on a CPU too."""
    if not is_quantized:
        return [Item("base, bf16", 2 * shape.weights)]
    experts = [Item("experts, 16-bit", 2 * shape.expert_weights)] if shape.expert_weights else []
    return [
        Item("base, 4-bit codes", shape.linear_weights // 2),
        Item("quantization constants", constant_bytes(shape.linear_weights)),
        *experts,
        Item("embedding, head and norms", 2 * (shape.weights - shape.linear_weights - shape.expert_weights)),
    ]
