"""An adapter's tensors as the engine computes with them, read from its folder. Knows no layer of any model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from safetensors import safe_open

from adapterhub.adapter import Adapter
from adapterhub.errors import AdapterUnsupported, InvalidTensors, RankTooLarge
from adapterhub.lora_config import WEIGHTS_NAME, LoraConfig, lora_tensors, read_lora_config
from adapterhub.safetensors_header import read_header
from serve.host_memory import HugePages


@dataclass(frozen=True)
class LowRank:
    """One adapter on one linear layer: y += scaling · B A x, A [r, in] and B transposed [r, out]."""

    a: torch.Tensor
    bt: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None
    """DoRA's m / ‖W + scaling · B A‖, fp32 [out] (arXiv 2402.09353, equation 5); until `divided`, m alone"""

    def divided(self, weight: torch.Tensor) -> LowRank:
        """With the magnitude divided by the norms of the adapted rows of `weight` [out, in], once for all steps."""
        if self.magnitude is None:
            return self
        update = self.scaling * (self.bt.float().T @ self.a.float())
        norms = torch.linalg.vector_norm(weight.to(update.device) + update, dim=1)
        return replace(self, magnitude=self.magnitude / norms)


@dataclass(frozen=True)
class EmbeddingUpdate:
    """One adapter on the embedding: y += scaling · B A[:, token]."""

    rows: torch.Tensor
    """A transposed, [vocabulary, r]"""
    bt: torch.Tensor
    """[r, width]"""
    scaling: float


@dataclass(frozen=True)
class FullWeight:
    """The whole weight [out, in] of an embedding or a head that an adapter brings along (PEFT's modules_to_save)."""

    weight: torch.Tensor


Weights = dict[str, LowRank | EmbeddingUpdate | FullWeight]
"""module name -> what the adapter changes about it"""


def in_one_block(weights: Weights) -> Weights:
    """The same with the halves of all low-rank updates one behind the other, in the order given, on huge pages.

    A decode step reads an adapter from end to end, which memory gives fastest so.
    """
    halves = [half for change in weights.values() if isinstance(change, LowRank) for half in (change.a, change.bt)]
    pages = HugePages(sum(map(HugePages.room_for, halves)))
    return {
        module: replace(change, a=pages.keep(change.a), bt=pages.keep(change.bt))
        if isinstance(change, LowRank)
        else change
        for module, change in weights.items()
    }


def read_weights(
    adapter: Adapter, *, device: torch.device, dtype_of: Callable[[torch.dtype], torch.dtype], max_rank: int
) -> Weights:
    """Read an adapter's tensors; `dtype_of` says what to keep a file's dtype in.

    Raises RankTooLarge, AdapterUnsupported, InvalidTensors.
    """
    config = read_lora_config(adapter.path)
    path = adapter.path / WEIGHTS_NAME
    modules: dict[str, dict[str, str]] = {}
    for tensor in lora_tensors(read_header(path), config):
        modules.setdefault(tensor.module, {})[tensor.kind] = tensor.key
    largest = max((config.rank_of(module) for module, keys in modules.items() if set(keys) != {"weight"}), default=0)
    if largest > max_rank:
        raise RankTooLarge(
            f"adapter {adapter.manifest.name} has rank {largest}, this server takes at most {max_rank}: serve with "
            f"--max-lora-rank {largest}."
        )
    with safe_open(path, framework="pt", device="cpu") as file:

        def read(key: str) -> torch.Tensor:
            tensor = file.get_tensor(key)
            # A sum is infinite or NaN where a term is, and ten times faster to ask; it may also overflow by itself.
            if not math.isfinite(tensor.sum().item()) and not tensor.isfinite().all():
                raise InvalidTensors(f"{key} holds NaN or infinity: the training run diverged; train again.")
            return tensor.to(device, dtype_of(tensor.dtype))  # type: ignore[no-any-return]

        return {module: _change(read, modules[module], module, config) for module in sorted(modules)}


def _change(
    read: Callable[[str], torch.Tensor], keys: dict[str, str], module: str, config: LoraConfig
) -> LowRank | EmbeddingUpdate | FullWeight:
    """`keys`: kind -> name of the tensor in the file."""
    if set(keys) == {"weight"}:
        return FullWeight(read(keys["weight"]).contiguous())
    if "lora_embedding_A" in keys:
        if config.use_dora:
            raise AdapterUnsupported(
                f"{module} is an embedding with DoRA, which is not served: train it with plain LoRA."
            )
        a, b = (read(keys[f"lora_embedding_{half}"]) for half in "AB")
        return EmbeddingUpdate(a.T.contiguous(), b.T.contiguous(), config.scaling_of(module))
    magnitude = keys.get("lora_magnitude_vector")
    return LowRank(
        a=read(keys["lora_A"]).contiguous(),
        bt=read(keys["lora_B"]).T.contiguous(),
        scaling=config.scaling_of(module),
        magnitude=None if magnitude is None else read(magnitude).float().flatten(),
    )
