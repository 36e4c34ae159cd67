"""Sizes of models, and what a step of our training loop holds, itemised. Loads nothing and measures nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from adapterhub.memory.model_shape import ModelShape

SPREAD = 0.25
"""how far a measured peak may lie from the sum: allocators, kernels' scratch space, other libraries"""
PROCESS_CPU = 650 << 20
"""bytes of interpreter, torch and transformers before a model is loaded; measured, Python 3.11, torch 2.13"""
_KERNELS_CPU = 200 << 20
"""bytes of products that oneDNN compiles for the shapes of a step or two; measured, bf16, as the command bounds them"""
PROCESS_CUDA = 600 << 20
"""bytes of a CUDA context with bitsandbytes' and cuBLAS' kernels"""
LOGITS_AT_ONCE = 1 << 23
"""logits of a training step alive at one time: with their gradients 100 MB, whatever the row and the vocabulary"""
_BLOCK, _NESTED_BLOCK = 64, 256
"""weights per quantization constant, constants per second-level constant (arXiv 2305.14314, section 3)"""


@dataclass(frozen=True)
class TrainingLoad:
    """What a training step holds, beside the model's shape."""

    quantized: int
    """weights held in few bits"""
    unquantized: int
    trainable: int
    row_tokens: int
    """tokens of the longest forward pass"""
    row_trained: int
    """places of the longest forward pass whose logits are alive together"""
    dtype_bytes: int
    moment_bytes: int
    """of the optimizer, both moments of one parameter"""
    device: Literal["cpu", "cuda"]
    weight_bits: Literal[4, 8] = 4
    """of a quantized weight"""
    block_size: int = 64
    is_double_quantized: bool = True
    is_checkpointed: bool = False
    layer_inputs: Literal["shared", "dropped", "copied"] = "shared"
    """what adapted layers keep of their inputs: them as they came, one tensor for layers that share it; each one's own
    after dropout, with its mask; a copy for each in fp32, as PEFT's layers do"""


@dataclass(frozen=True)
class Item:
    name: str
    size_bytes: int


def places_at_once(vocabulary: int) -> int:
    """Places of a row whose logits a training step computes together."""
    return max(16, LOGITS_AT_ONCE // vocabulary)


def constant_bytes(quantized: int, *, is_double: bool = True, block_size: int = _BLOCK) -> int:
    """One constant a block: fp32, or 8 bit with fp32 constants of their own for 256 (2305.14314, section 3)."""
    constants = quantized // block_size
    return constants + 4 * (constants // _NESTED_BLOCK) if is_double else 4 * constants


def training_memory(shape: ModelShape, load: TrainingLoad) -> list[Item]:
    """The peak of a step of train/loop/steps.py, by what takes it."""
    dtype, tokens = load.dtype_bytes, load.row_tokens
    hidden, intermediate = shape.hidden, shape.intermediate
    # Kept for the backward pass, a token and layer: both norms' inputs in fp32; in the compute dtype queries, keys and
    # values repeated for each query head, attention's output, gate, its activation and up.
    per_token = 8 * hidden + dtype * (4 * (shape.query or hidden) + 3 * intermediate)
    # The inputs of adapted layers, which A's gradient needs; of the shared ones one is attention's output.
    per_token += {
        "shared": dtype * (2 * hidden + intermediate),
        "dropped": (dtype + 1) * (6 * hidden + intermediate),
        "copied": 4 * (6 * hidden + intermediate),
    }[load.layer_inputs]
    activations = shape.layers * per_token * tokens
    if load.is_checkpointed:
        activations = (shape.layers * dtype * hidden + per_token) * tokens
    constants = constant_bytes(load.quantized, is_double=load.is_double_quantized, block_size=load.block_size)
    return [
        Item(f"base, {load.weight_bits}-bit codes", load.quantized * load.weight_bits // 8),
        # LLM.int8 has one constant a row of a matrix: nothing beside the codes.
        Item("quantization constants", constants if load.weight_bits == 4 else 0),
        Item("weights left unquantized", dtype * load.unquantized),
        Item("adapter, fp32", 4 * load.trainable),
        Item("gradients, fp32", 4 * load.trainable),
        Item("optimizer", load.moment_bytes * load.trainable),
        Item("activations", activations),
        Item("attention mask", dtype * tokens * tokens),
        # The compute dtype's logits and their gradient, fp32 logits and theirs.
        Item("logits", (2 * dtype + 8) * load.row_trained * shape.vocabulary),
        *([Item("compiled products", _KERNELS_CPU)] if load.device == "cpu" else []),
        Item("process", PROCESS_CPU if load.device == "cpu" else PROCESS_CUDA),
    ]
