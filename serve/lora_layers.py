"""One base matmul for the whole batch, and a low-rank product per run of rows that share an adapter.

    y = W x + scale · B (A x)        LoRA, arXiv 2106.09685, section 4.1; alpha/r is folded into B at load

Rows arrive ordered by adapter (scheduler), so each adapter's rows are one slice in every layer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from adapterhub.adapter import Adapter
from adapterhub.base_model import PackedNf4
from adapterhub.errors import AdapterNoEffect, AdapterUnsupported, IncompatibleBase, InvalidTensors, RankTooLarge
from adapterhub.lora_config import WEIGHTS_NAME, LoraConfig, lora_tensors, read_lora_config
from adapterhub.safetensors_header import read_header
from serve.cpu_kernels import CpuKernels, Update
from serve.scheduler import AdapterMix, Batch


@dataclass(frozen=True)
class LowRank:
    """One adapter on one linear layer: A [r, in] and B transposed [r, out], the adapter's scaling folded into B."""

    a: torch.Tensor
    bt: torch.Tensor


MAX_KERNEL_ROWS = 16
"""Longer segments go to torch, whose threads share one; the kernel gives a segment to one thread.

With one thread the kernel was no slower at any length tried (576 -> 1536, rank 16, bf16; microseconds, kernel / torch):
16 rows 38 / 80, 64 rows 127-139 / 119-185, 256 rows 450 / 1,780. So this bound is open to be raised once more threads
are measured.
"""

_SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""what Llama and its relatives call layers that read the same rows; asked with others, a group just computes again"""

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


def read_weights(adapter: Adapter, *, device: torch.device, dtype: torch.dtype, max_rank: int) -> Weights:
    """Read and fold an adapter's tensors. Raises RankTooLarge, AdapterUnsupported, InvalidTensors."""
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
        return {module: _read_module(file, module, config, device, dtype) for module in modules}


def _read_module(file: Any, module: str, config: LoraConfig, device: torch.device, dtype: torch.dtype) -> LowRank:
    a = file.get_tensor(f"base_model.model.{module}.lora_A.weight").float()
    b = file.get_tensor(f"base_model.model.{module}.lora_B.weight").float() * config.scaling_of(module)
    if not (a.isfinite().all() and b.isfinite().all()):
        raise InvalidTensors(f"{module} holds NaN or infinity: the training run diverged; train again.")
    return LowRank(a.to(device, dtype).contiguous(), b.T.to(device, dtype).contiguous())


@dataclass
class _Step:
    """The current batch's segments, shared by all layers; the version counts changes of them or of the residents."""

    segments: list[Segment] = field(default_factory=list)
    version: int = 0


class LinearGroup:
    """Linear layers of the base that share their input, computed together, with the resident adapters beside them."""

    def __init__(
        self,
        layers: Sequence[nn.Linear],
        matmul: Callable[[torch.Tensor], torch.Tensor],
        step: _Step,
        kernels: CpuKernels | None,
        weights_dtype: torch.dtype,
    ) -> None:
        self._weights_dtype = weights_dtype
        self.layers = layers
        self._matmul = matmul
        self._step = step
        self._kernels = kernels
        self._widths = [layer.out_features for layer in layers]
        self._resident: dict[str, list[tuple[int, LowRank]]] = {}
        """digest -> (first column of the layer's output, update)"""
        self._version = -1
        self._updates: ctypes.Array[Update] | None = None
        self._by_torch: list[Segment] = []
        self._input: torch.Tensor | None = None
        self._outputs: tuple[torch.Tensor, ...] = ()

    def install(self, digest: str, place: int, update: LowRank) -> None:
        self._resident.setdefault(digest, []).append((sum(self._widths[:place]), update))

    def remove(self, digest: str) -> None:
        self._resident.pop(digest, None)

    def has(self, digest: str) -> bool:
        return digest in self._resident

    def output(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """What the layer at `place` gives for x [1, N, in]; the first one asked computes all of them."""
        if self._input is not x or place == 0:
            self._outputs = torch.split(self._compute(x), self._widths, dim=-1)
            self._input = x
        found = self._outputs[place]
        if place == len(self._widths) - 1:
            self._input, self._outputs = None, ()
        return found

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        y = self._matmul(x)
        if self._version != self._step.version:
            self._plan()
        if self._updates is not None:
            assert self._kernels is not None
            self._kernels.low_rank_updates(x[0], y[0], self._updates, self._weights_dtype)
        for segment in self._by_torch:
            self._update_by_torch(segment, x[0, segment.start : segment.end], y[0, segment.start : segment.end])
        return y

    def _update_by_torch(self, segment: Segment, x: torch.Tensor, y: torch.Tensor) -> None:
        for adapter in segment.mix:
            for offset, update in self._resident.get(adapter.digest, ()):
                # fp32 on CPU, where bf16 would also round the hidden values
                dtype = torch.float32 if x.device.type == "cpu" else update.a.dtype
                hidden = x.to(dtype) @ update.a.to(dtype).T * adapter.scale
                y[:, offset : offset + update.bt.shape[1]] += hidden @ update.bt.to(dtype)

    def _plan(self) -> None:
        """Which segments the kernel takes, as its structs; kept while decoding goes on with the same rows."""
        self._by_torch = []
        updates: list[Update] = []
        for segment in self._step.segments:
            if self._kernels is None or segment.end - segment.start > MAX_KERNEL_ROWS:
                self._by_torch.append(segment)
            else:
                updates += self._chains(segment)
        self._updates = (Update * len(updates))(*updates) if updates else None
        self._version = self._step.version

    def _chains(self, segment: Segment) -> list[Update]:
        """The segment's updates; several adapters on the same columns follow each other in one chain."""
        by_column: dict[int, list[tuple[LowRank, float]]] = {}
        for adapter in segment.mix:
            for offset, update in self._resident.get(adapter.digest, ()):
                by_column.setdefault(offset, []).append((update, adapter.scale))
        return [
            _kernel_update(segment, offset, update, scale, chain=0 if number else len(chain))
            for offset, chain in by_column.items()
            for number, (update, scale) in enumerate(chain)
        ]


def _kernel_update(segment: Segment, offset: int, update: LowRank, scale: float, *, chain: int) -> Update:
    rank, out = update.bt.shape
    return Update(
        segment.start, segment.end, rank, out, offset, chain, scale, update.a.data_ptr(), update.bt.data_ptr()
    )


class LoraLinear(nn.Module):
    """Stands where a linear layer of the base was; its group does the work."""

    def __init__(self, group: LinearGroup, place: int) -> None:
        super().__init__()
        self._group = group
        self._place = place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [1, N, in] -> [1, N, out]."""
        return self._group.output(self._place, x)


class AdapterBank:
    """Every linear layer of a model, wrapped, and the adapters resident in them. Owned by the worker thread."""

    def __init__(self, model: nn.Module, kernels: CpuKernels | None = None) -> None:
        self.device = next(model.parameters()).device
        self.dtype = _weights_dtype(model, kernels)
        self._step = _Step()
        self._places: dict[str, tuple[LinearGroup, int]] = {}
        head = model.get_output_embeddings()  # type: ignore[operator]
        linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
        for names in _groups(linears):
            layers = [linears[name] for name in names]
            matmul = PackedNf4(layers) if PackedNf4.fits(layers) else layers[0]
            group = LinearGroup(layers, matmul, self._step, kernels, self.dtype)
            for place, name in enumerate(names):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, LoraLinear(group, place))
                self._places[name] = (group, place)

    def begin(self, batch: Batch) -> None:
        """Announce the rows of the forward that follows."""
        segments = segments_of(batch)
        if segments != self._step.segments:
            self._step.segments = segments
            self._step.version += 1

    def check_fits(self, name: str, weights: Weights) -> None:
        """Every tensor must land on a layer of the right shape. Raises AdapterNoEffect, IncompatibleBase."""
        strangers = [module for module in weights if module not in self._places]
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
            group, place = self._places[module]
            found = (group.layers[place].in_features, group.layers[place].out_features)
            wanted = (update.a.shape[1], update.bt.shape[1])
            if found != wanted:
                raise IncompatibleBase(
                    f"adapter {name} expects {module} to be {wanted[0]} -> {wanted[1]}, this base has "
                    f"{found[0]} -> {found[1]}."
                )

    def install(self, digest: str, weights: Weights) -> None:
        self._step.version += 1
        for module, update in weights.items():
            group, place = self._places[module]
            group.install(digest, place, update)

    def remove(self, digest: str) -> None:
        self._step.version += 1
        for group, _ in self._places.values():
            group.remove(digest)

    def is_resident(self, digest: str) -> bool:
        return any(group.has(digest) for group, _ in self._places.values())


def _weights_dtype(model: nn.Module, kernels: CpuKernels | None) -> torch.dtype:
    """What A and B are kept in: bf16 halves what a decode step reads, but only our kernel is fast with it on a CPU."""
    is_bf16 = model.dtype == torch.bfloat16
    is_gpu = next(model.parameters()).device.type != "cpu"
    return torch.bfloat16 if is_gpu or (is_bf16 and kernels is not None) else torch.float32


def _groups(linears: dict[str, nn.Linear]) -> list[list[str]]:
    """Names of layers to compute together: those known to share their input, where the kernel can join them."""
    groups = []
    left = dict(linears)
    for name in linears:
        parent, _, child = name.rpartition(".")
        siblings = next((names for names in _SHARED_INPUT if names[0] == child), ())
        names = [f"{parent}.{sibling}" for sibling in siblings]
        if name in left and names and all(n in left for n in names) and PackedNf4.fits([left[n] for n in names]):
            groups.append(names)
            for taken in names:
                del left[taken]
    return groups + [[name] for name in left]
