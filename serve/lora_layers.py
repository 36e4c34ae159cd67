"""One base matmul for the whole batch, and a low-rank product per run of rows that share an adapter.

    y = W x + scale · B (A x)        LoRA, arXiv 2106.09685, section 4.1; alpha/r is folded into B at load

Rows arrive ordered by adapter (scheduler), so each adapter's rows are one slice in every layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from adapterhub.adapter import Adapter
from adapterhub.errors import AdapterNoEffect, AdapterUnsupported, IncompatibleBase, InvalidTensors, RankTooLarge
from adapterhub.lora_config import WEIGHTS_NAME, LoraConfig, lora_tensors, read_lora_config
from adapterhub.safetensors_header import read_header
from serve.scheduler import AdapterMix, Batch


@dataclass(frozen=True)
class LowRank:
    """One adapter on one linear layer: A [r, in], B [out, r] with the adapter's scaling folded in."""

    a: torch.Tensor
    b: torch.Tensor


Weights = dict[str, LowRank]
"""module name -> its low-rank update"""


@dataclass(frozen=True)
class Segment:
    """Rows start..end of the batch, all of one adapter mix."""

    start: int
    end: int
    mix: AdapterMix


def segments_of(batch: Batch) -> list[Segment]:
    """The runs of rows with the same adapters; rows of the bare base have none."""
    segments: list[Segment] = []
    row = 0
    for piece in batch.pieces:
        mix, end = piece.sequence.request.adapters, row + piece.num_tokens
        if mix and segments and segments[-1].mix == mix and segments[-1].end == row:
            segments[-1] = Segment(segments[-1].start, end, mix)
        elif mix:
            segments.append(Segment(row, end, mix))
        row = end
    return segments


def read_weights(adapter: Adapter, *, device: torch.device, max_rank: int) -> Weights:
    """Read and fold an adapter's tensors. Raises RankTooLarge, AdapterUnsupported, InvalidTensors.

    A and B are fp32 on CPU: one-row bf16 products are slower there than fp32 ones.
    """
    config = read_lora_config(adapter.path)
    if config.use_dora:
        raise AdapterUnsupported(f"adapter {adapter.manifest.name} uses DoRA, which this engine does not serve yet.")
    path = adapter.path / WEIGHTS_NAME
    modules = sorted({tensor.module for tensor in lora_tensors(read_header(path), config)})
    largest = max(config.rank_of(module) for module in modules)
    if largest > max_rank:
        raise RankTooLarge(
            f"adapter {adapter.manifest.name} has rank {largest}, this server takes at most {max_rank}: serve with "
            f"--max-lora-rank {largest}."
        )
    with safe_open(path, framework="pt", device="cpu") as file:
        return {module: _read_module(file, module, config, device) for module in modules}


def _read_module(file: Any, module: str, config: LoraConfig, device: torch.device) -> LowRank:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    a = file.get_tensor(f"base_model.model.{module}.lora_A.weight").float()
    b = file.get_tensor(f"base_model.model.{module}.lora_B.weight").float() * config.scaling_of(module)
    if not (a.isfinite().all() and b.isfinite().all()):
        raise InvalidTensors(f"{module} holds NaN or infinity: the training run diverged; train again.")
    return LowRank(a.to(device, dtype).contiguous(), b.to(device, dtype).contiguous())


@dataclass
class _Step:
    """The current batch's segments, shared by all layers."""

    segments: list[Segment] = field(default_factory=list)


class LoraLinear(nn.Module):
    """A linear layer of the base with the resident adapters beside it."""

    base: nn.Linear

    def __init__(self, base: nn.Linear, step: _Step) -> None:
        super().__init__()
        self.base = base
        self._step = step
        self.resident: dict[str, LowRank] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [1, N, in] -> [1, N, out]."""
        y: torch.Tensor = self.base(x)
        for segment in self._step.segments:
            rows = slice(segment.start, segment.end)
            for adapter in segment.mix:
                update = self.resident.get(adapter.digest)
                if update is None:  # this adapter leaves this layer alone
                    continue
                hidden = x[0, rows].to(update.a.dtype) @ update.a.T
                if adapter.scale != 1.0:
                    hidden = hidden * adapter.scale
                y[0, rows] += hidden @ update.b.T
        return y


class AdapterBank:
    """Every linear layer of a model, wrapped, and the adapters resident in them. Owned by the worker thread."""

    def __init__(self, model: nn.Module) -> None:
        self._step = _Step()
        self._layers: dict[str, LoraLinear] = {}
        head = model.get_output_embeddings()  # type: ignore[operator]
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and module is not head:
                parent_name, _, child = name.rpartition(".")
                self._layers[name] = LoraLinear(module, self._step)
                setattr(model.get_submodule(parent_name), child, self._layers[name])

    def begin(self, batch: Batch) -> None:
        """Announce the rows of the forward that follows."""
        self._step.segments = segments_of(batch)

    def check_fits(self, name: str, weights: Weights) -> None:
        """Every tensor must land on a layer of the right shape. Raises AdapterNoEffect, IncompatibleBase."""
        strangers = [module for module in weights if module not in self._layers]
        if len(strangers) == len(weights):
            raise AdapterNoEffect(
                f"no tensor of adapter {name} belongs to a linear layer of this base (first: {strangers[0]}): it was "
                "made for another architecture."
            )
        if strangers:
            raise IncompatibleBase(
                f"adapter {name} has tensors for {len(strangers)} layers this base does not have (first: "
                f"{strangers[0]}): it was made for a deeper or different model."
            )
        for module, update in weights.items():
            base = self._layers[module].base
            found = (base.in_features, base.out_features)
            wanted = (update.a.shape[1], update.b.shape[0])
            if found != wanted:
                raise IncompatibleBase(
                    f"adapter {name} expects {module} to be {wanted[0]} -> {wanted[1]}, this base has "
                    f"{found[0]} -> {found[1]}."
                )

    def install(self, digest: str, weights: Weights) -> None:
        for module, update in weights.items():
            self._layers[module].resident[digest] = update

    def remove(self, digest: str) -> None:
        for layer in self._layers.values():
            layer.resident.pop(digest, None)

    def is_resident(self, digest: str) -> bool:
        return any(digest in layer.resident for layer in self._layers.values())
