"""Several processes training one adapter: who takes which samples, sums of gradients, a base in shards.

The base is divided among the processes (FSDP, or whole in each), the adapter is whole in all of them. So optimizer,
checkpoints and what is saved are those of a single process. Starts no processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

_PATIENCE = timedelta(minutes=30)
"""for the slowest process between two meetings: loading and quantizing a large base"""


Shards = Literal["device", "host"]
"""where the parts of a divided base live: with the processor that computes, or in host memory until their layer does"""


@dataclass(frozen=True)
class World:
    """This process among those that train together; alone by default."""

    rank: int = 0
    size: int = 1
    shards: Shards | None = None
    """None: the base is whole in each process"""

    @property
    def division(self) -> str:
        """Of the base among the processes, in words behind their number."""
        where = {None: "", "device": ", base divided among them", "host": ", base divided among them in host memory"}
        return where[self.shards]

    @property
    def device(self) -> str | None:
        """The GPU this process owns; None: whatever a single process would choose."""
        if self.size == 1 or not torch.cuda.is_available():
            return None
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"

    def share(self, rows: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """This process's part of a step's forward passes, as many for each process: shards are gathered together.

        A process without a sample of its own takes the first one; `sum_gradients` then gives it no weight.
        """
        if self.size == 1:
            return rows
        places = [place for row in rows for place in row]
        mine = places[self.rank :: self.size] or places[:1]
        num_rows = max(1, min(len(rows), len(places) // self.size))
        return [mine[number::num_rows] for number in range(num_rows)]

    def has_own(self, rows: Sequence[Sequence[int]]) -> bool:
        return self.rank < sum(map(len, rows))

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter], loss: float, *, weight: float) -> float:
        """Replace gradients, and return the loss, by the mean over processes weighted by `weight` (tokens).

        One flat fp32 sum: traffic is the adapter's size, once a step.
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

    def any(self, wish: bool) -> bool:
        """Whether some process says so: all of them go the same way."""
        if self.size == 1:
            return wish
        said = torch.tensor([float(wish)], device=self.device or "cpu")
        dist.all_reduce(said, op=dist.ReduceOp.MAX)
        return bool(said.item())

    def barrier(self) -> None:
        if self.size > 1:
            self.any(False)


_ALONE = World()
_current = _ALONE


def current_world() -> World:
    return _current


def is_worker() -> bool:
    """Was this process started by torchrun?"""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def joined(*, shards: Shards | None) -> Iterator[World]:
    """The world that torchrun's environment describes, until it is left."""
    global _current
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)
    _current = World(dist.get_rank(), dist.get_world_size(), shards)
    if _current.device:
        torch.cuda.set_device(_current.device)
    try:
        yield _current
    finally:
        _current = _ALONE
        dist.destroy_process_group()


def shard_base(model: Any, world: World) -> None:
    """Divide each layer's frozen weights among the processes; adapters stay whole (PyTorch's FSDP2).

    Codes stay bytes: no floating-point type has to be declared for them, and quantization constants, 1.6 % of the
    base, stay with each process. Embedding and head are left whole, since gathering them takes more than they do.
    """
    if world.shards is None or world.size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    # A GPU reads pinned memory by itself. Without one, the parts are in host memory anyhow.
    offload = CPUOffloadPolicy(pin_memory=world.device is not None) if world.shards == "host" else OffloadPolicy()
    mesh = init_device_mesh("cuda" if world.device else "cpu", (world.size,))
    for layer in _decoder_layers(model):
        adapters = {parameter for parameter in layer.parameters() if parameter.requires_grad}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, offload_policy=offload, ignored_params=adapters)


def held_bytes(model: Any) -> int:
    """Bytes of the frozen weights that this process holds."""
    return sum(_local(parameter).nbytes for parameter in model.parameters() if not parameter.requires_grad)


def _decoder_layers(model: Any) -> Sequence[torch.nn.Module]:
    """The longest list of modules of one kind: a decoder's layers."""
    found = [list(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(found, key=len)


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _local(parameter: Any) -> torch.Tensor:
    local: torch.Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local
