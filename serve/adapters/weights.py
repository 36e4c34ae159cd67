"""Read an adapter's tensors from its folder, as the local engine computes with them. Knows no layer of any model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from adapterhub.adapter import Adapter
from adapterhub.errors import AdapterUnsupported, InvalidTensors, RankTooLarge
from adapterhub.package.lora_config import WEIGHTS_NAME, LoraConfig, lora_tensors, read_lora_config
from adapterhub.package.safetensors_header import TensorInfo, read_header


@dataclass(frozen=True)
class LowRank:
    """One adapter on one linear layer: y += scaling · B A x, A [r, in] and B transposed [r, out]."""

    a: torch.Tensor
    bt: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None
    """DoRA's m / ‖W + scaling · B A‖, fp32 [out] (arXiv 2402.09353, equation 5); until `divided`, m alone."""

    def divided(self, weight: torch.Tensor) -> LowRank:
        """Return it with the magnitude divided by the norms of the adapted rows of `weight` [out, in]."""
        if self.magnitude is None:
            return self
        update = self.scaling * (self.bt.float().T @ self.a.float())
        norms = torch.linalg.vector_norm(weight.to(update.device) + update, dim=1)
        return replace(self, magnitude=self.magnitude / norms)


@dataclass(frozen=True)
class EmbeddingUpdate:
    """One adapter on the embedding: y += scaling · B A[:, token]."""

    rows: torch.Tensor
    """A transposed, [vocabulary, r]."""
    bt: torch.Tensor
    """B transposed, [r, width]."""
    scaling: float


@dataclass(frozen=True)
class FullWeight:
    """The whole weight [out, in] of an embedding or a head of an adapter (PEFT's modules_to_save)."""

    weight: torch.Tensor


_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}

Weights = dict[str, LowRank | EmbeddingUpdate | FullWeight]
"""Module name -> the adapter's change to it."""


def read_weights(
    adapter: Adapter, *, device: torch.device, dtype_of: Callable[[torch.dtype], torch.dtype], max_rank: int
) -> Weights:
    """Read an adapter's tensors; `dtype_of` maps a dtype of the file to the dtype to store.

    Raises RankTooLarge, AdapterUnsupported, InvalidTensors.
    """
    config = read_lora_config(adapter.path)
    path = adapter.path / WEIGHTS_NAME
    header = read_header(path)
    modules: dict[str, dict[str, str]] = {}
    for tensor in lora_tensors(header, config):
        modules.setdefault(tensor.module, {})[tensor.kind] = tensor.key
    largest = max((config.rank_of(module) for module, keys in modules.items() if set(keys) != {"weight"}), default=0)
    if largest > max_rank:
        raise RankTooLarge(
            f"adapter {adapter.manifest.name} has rank {largest}, this server takes at most {max_rank}: serve with "
            f"--max-lora-rank {largest}."
        )
    tensors = _read_tensors(path, header)

    def read(key: str) -> torch.Tensor:
        return tensors[key].to(device, dtype_of(tensors[key].dtype))

    return {module: _change(read, modules[module], module, config) for module in sorted(modules)}


def kept_bytes(adapter: Adapter, *, dtype_of: Callable[[torch.dtype], torch.dtype]) -> int:
    """Return the size of what `read_weights` returns, in bytes, from the header of the file.

    If the header cannot be read, return the size of the file: loading it raises the reason.
    """
    try:
        header = read_header(adapter.path / WEIGHTS_NAME)
    except (OSError, InvalidTensors):
        return adapter.manifest.files[WEIGHTS_NAME].size

    def width(key: str, info: TensorInfo) -> int:
        if "lora_magnitude_vector" in key or info.dtype not in _DTYPES:
            return 4  # bytes: magnitudes are divided by norms in fp32
        return dtype_of(_DTYPES[info.dtype]).itemsize

    return sum(info.numel * width(key, info) for key, info in header.items())


def _read_tensors(path: Path, header: dict[str, TensorInfo]) -> dict[str, torch.Tensor]:
    """Read the file at once and return its tensors as views: 420 calls, one for each, took longer than reading.

    Raises InvalidTensors for NaN, Inf, and an unexpected dtype.
    """
    data = torch.from_numpy(np.fromfile(path, np.uint8))
    if len(data) != max(info.end for info in header.values()):
        raise InvalidTensors(f"{path} was changed while it was read: load the adapter again.")
    if unexpected := next((key for key, info in header.items() if info.dtype not in _DTYPES), None):
        raise InvalidTensors(
            f"{unexpected} has dtype {header[unexpected].dtype}, expected one of {', '.join(_DTYPES)}; save it again."
        )

    def view(start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        part = data[start:end]
        return (part.clone() if start % dtype.itemsize else part).view(dtype)

    tensors = {key: view(info.start, info.end, _DTYPES[info.dtype]).view(info.shape) for key, info in header.items()}
    kinds = {info.dtype for info in header.values()}
    start = min(info.start for info in header.values())
    # A sum is non-finite where a term is, and ten times faster than isfinite; it may also overflow by itself.
    if len(kinds) > 1 or not math.isfinite(view(start, len(data), _DTYPES[kinds.pop()]).sum().item()):
        for key, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise InvalidTensors(f"{key} has NaN or Inf: the training run diverged; train again.")
    return tensors


def _change(
    read: Callable[[str], torch.Tensor], keys: dict[str, str], module: str, config: LoraConfig
) -> LowRank | EmbeddingUpdate | FullWeight:
    """Make the change of one module; `keys` are kind -> name of the tensor in the file."""
    # All but the halves of a linear layer's update are copied: a view would keep the whole file in memory.
    if set(keys) == {"weight"}:
        return FullWeight(read(keys["weight"]).clone())
    if "lora_embedding_A" in keys:
        if config.use_dora:
            raise AdapterUnsupported(
                f"{module} is an embedding with DoRA, which is not served: train it with plain LoRA."
            )
        a, b = (read(keys[f"lora_embedding_{half}"]) for half in "AB")
        a, b = (half.T.clone(memory_format=torch.contiguous_format) for half in (a, b))
        return EmbeddingUpdate(a, b, config.scaling_of(module))
    magnitude = keys.get("lora_magnitude_vector")
    return LowRank(
        a=read(keys["lora_A"]),
        bt=read(keys["lora_B"]).T,
        scaling=config.scaling_of(module),
        magnitude=None if magnitude is None else read(magnitude).float().flatten().clone(),
    )
