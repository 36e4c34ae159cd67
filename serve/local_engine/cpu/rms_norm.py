"""RMS norms by one kernel call instead of six torch calls, where the results are the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from serve.local_engine.cpu.kernels import CpuKernels
from serve.local_engine.cpu.structs import row_dtype


class FastRmsNorm(nn.Module):
    """Llama's RMS norm; replaces the model's own."""

    def __init__(self, original: nn.Module, kernels: CpuKernels) -> None:
        """Replace `original`, which has a weight and an epsilon; it still norms what our kernel does not read."""
        super().__init__()
        self.weight: torch.Tensor = original.weight  # type: ignore[assignment]
        self.variance_epsilon: float = original.variance_epsilon  # type: ignore[assignment]
        self._original = original
        self._kernels = kernels

    def forward(self, x: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        """Normalize the last dimension of x, of any shape; with further arguments, such as a gate, as the original."""
        if x.dtype != self.weight.dtype or others or named:
            found: torch.Tensor = self._original(x, *others, **named)
            return found
        return self._kernels.rms_norm(x.contiguous(), self.weight, self.variance_epsilon)


def use_fast_norms(model: nn.Module, kernels: CpuKernels) -> None:
    """Replace the norms that our kernel reproduces on trial rows; others (Gemma's 1 + weight) stay."""
    for name, module in list(model.named_modules()):
        weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
        if not name or eps is None or not isinstance(weight, torch.Tensor) or weight.dim() != 1:
            continue
        if weight.dtype != row_dtype(weight):
            continue
        fast = FastRmsNorm(module, kernels)
        trial = torch.linspace(-2, 3, 2 * weight.numel(), dtype=weight.dtype).view(2, -1)
        if _is_same(module, fast, trial):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, fast)


def _is_same(module: nn.Module, fast: FastRmsNorm, trial: torch.Tensor) -> bool:
    try:
        with torch.no_grad():
            return torch.allclose(module(trial), fast(trial), rtol=1e-5, atol=1e-6)
    except (TypeError, AttributeError):  # it takes more than its rows: a gate
        return False
