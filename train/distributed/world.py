"""Distribute one training run over processes: samples, gradient sums, a sharded base.

The base is sharded (FSDP) or whole in each process; the adapter is whole in all of them. So optimizer, checkpoints
and output are those of a single process.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from adapterhub.errors import UsageError
from train.objectives.forward import bare_model

_TIMEOUT = timedelta(minutes=30)
"""Maximum wait for the slowest process at a collective: it may load and quantize a large base."""


Shards = Literal["device", "host"]
"""Where the shards of the base live: on the device, or in host memory until their layer is computed."""


@dataclass(frozen=True)
class World:
    """This process's place in the process group; a single process by default."""

    rank: int = 0
    size: int = 1
    shards: Shards | None = None
    """Where the shards of the base live; None: the base is whole in each process."""

    @property
    def sharding(self) -> str:
        """How the base is sharded, as a phrase that follows the number of processes."""
        phrases = {None: "", "device": ", base sharded", "host": ", base sharded in host memory"}
        return phrases[self.shards]

    @property
    def device(self) -> str | None:
        """GPU of this process; None: whatever a single process would choose."""
        if self.size == 1 or not torch.cuda.is_available():
            return None
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"

    def share(self, rows: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """Return this process's part of a step's forward passes.

        Every process gets the same number of passes, since gathering shards is a collective. A process without a
        sample of its own takes the first one; `sum_gradients` then gives it weight 0.
        """
        if self.size == 1:
            return rows
        places = [place for row in rows for place in row]
        own = places[self.rank :: self.size] or places[:1]
        num_rows = max(1, min(len(rows), len(places) // self.size))
        return [own[number::num_rows] for number in range(num_rows)]

    def has_own(self, rows: Sequence[Sequence[int]]) -> bool:
        """Return whether the step has a sample of this process's own."""
        return self.rank < sum(map(len, rows))

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter], loss: float, *, weight: float) -> float:
        """Average gradients and loss over the processes, weighted by `weight` (tokens); return the loss.

        One flat fp32 sum: the traffic is the size of the adapter, once a step.
        """
        if self.size == 1:
            return loss
        flat = torch.cat([_gradient(parameter).flatten().float() for parameter in parameters])
        numbers = flat.new_tensor([loss * weight, weight], dtype=torch.float64)
        flat *= weight
        dist.all_reduce(flat)
        dist.all_reduce(numbers)
        total = float(numbers[1])
        flat /= total
        start = 0
        for parameter in parameters:
            part = flat[start : start + parameter.numel()].view_as(parameter)
            parameter.grad = part.to(parameter.dtype)
            start += parameter.numel()
        return float(numbers[0]) / total

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set in any process, so that all take the same branch."""
        if self.size == 1:
            return flag
        value = torch.tensor([float(flag)], device=self.device or "cpu")
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def from_first(self, values: Sequence[float]) -> list[float]:
        """Return the first process's `values`, so that all take the same branch where hardware rounds differently."""
        if self.size == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64, device=self.device or "cpu")
        dist.broadcast(shared, src=0)
        found: list[float] = shared.tolist()
        return found

    def check_alike(self, what: str, digest: str | None) -> None:
        """Check that every process has this digest of `what`. Raises UsageError in all of them."""
        own = list(hashlib.sha256(str(digest).encode()).digest())
        if self.any(self.from_first(own) != own):
            raise UsageError(
                f"{what} of this run is not the same in all {self.size} processes: expected the first one's. Copy "
                "recipe, data, base and start adapter to every machine, or put them on storage that all see."
            )

    def barrier(self) -> None:
        """Wait until every process has come here."""
        if self.size > 1:
            self.any(False)


_SINGLE = World()
_current = _SINGLE


def current_world() -> World:
    return _current


def is_worker() -> bool:
    """Return whether torchrun started this process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def process_group(*, shards: Shards | None) -> Iterator[World]:
    """Join the process group that torchrun's environment describes; leave it at the end."""
    global _current
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=_TIMEOUT)
    _current = World(dist.get_rank(), dist.get_world_size(), shards)
    if _current.device:
        torch.cuda.set_device(_current.device)
    try:
        yield _current
    finally:
        _current = _SINGLE
        dist.destroy_process_group()


def shard_base(model: Any, world: World) -> None:
    """Shard each layer's frozen weights among the processes (PyTorch's FSDP2); adapters stay whole.

    NF4 codes stay bytes, so no floating-point storage type has to be declared for them. Each process keeps the
    quantization constants, 1.6 % of the base. Embedding and head stay whole: gathering them takes more memory than
    they do.
    """
    if world.shards is None or world.size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    # A GPU reads pinned memory directly. Without one, the shards are in host memory anyway.
    offload = CPUOffloadPolicy(pin_memory=world.device is not None) if world.shards == "host" else OffloadPolicy()
    mesh = init_device_mesh("cuda" if world.device else "cpu", (world.size,))
    # `generate` of transformers then runs until every process has its answer: each token gathers the shards.
    bare_model(model)._is_fsdp_managed_module = True
    for layer in _decoder_layers(model):
        adapters = {parameter for parameter in layer.parameters() if parameter.requires_grad}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, offload_policy=offload, ignored_params=adapters)


def frozen_bytes(model: Any) -> int:
    """Return the size of this process's part of the frozen weights, in bytes."""
    return sum(_local(parameter).nbytes for parameter in model.parameters() if not parameter.requires_grad)


def _decoder_layers(model: Any) -> Sequence[torch.nn.Module]:
    """Return the decoder's layers: the longest ModuleList of the model."""
    found = [list(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(found, key=len)


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _local(parameter: Any) -> torch.Tensor:
    local: torch.Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local
