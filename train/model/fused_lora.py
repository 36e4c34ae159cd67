"""Compute a LoRA layer and its gradients as one operation, instead of PEFT's chain of operations.

The input is kept once, in its own dtype, for all layers that share it. A and B stay fp32 and are rounded to the dtype
of the base when they are used. Neither product nor sum is copied. In fp32 the results differ from PEFT's by the order
of sums only.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch

from adapterhub.bases.nf4 import frozen_weight, has_frozen_weight

_NAME = "default"


class _LoraProduct(torch.autograd.Function):
    """x W^T + bias + scaling (x A^T) B^T (LoRA, arXiv 2106.09685, section 4.1); frozen W is dequantized when used."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, dropped: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, layer: Any,
        scaling: float,
    ) -> torch.Tensor:  # fmt: skip
        """Compute the layer's output; `dropped` is x after dropout, the input of A (None: x itself)."""
        rows = x.reshape(-1, x.shape[-1])
        seen = rows if dropped is None else dropped.reshape(-1, x.shape[-1])
        low = seen @ a.to(x.dtype).T
        # Not a view: some models multiply the output in place.
        out = torch.nn.functional.linear(x, frozen_weight(layer), layer.bias)
        out.view(-1, out.shape[-1]).addmm_(low, b.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(seen, low, a, b)
        ctx.layer, ctx.scaling, ctx.is_dropped = layer, scaling, dropped is not None
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        seen, low, a, b = ctx.saved_tensors
        grad_rows = grad.reshape(-1, grad.shape[-1])
        grad_low = (grad_rows @ b.to(grad.dtype)).mul_(ctx.scaling)
        grad_b = (grad_rows.T @ low).to(b.dtype).mul_(ctx.scaling)
        grad_a = (grad_low.T @ seen).to(a.dtype)
        grad_x = grad_dropped = None
        if ctx.is_dropped:
            grad_dropped = (grad_low @ a.to(grad.dtype)).view(*grad.shape[:-1], -1)
        if ctx.needs_input_grad[0]:
            grad_x = grad_rows @ frozen_weight(ctx.layer)
            if not ctx.is_dropped:
                grad_x.addmm_(grad_low, a.to(grad.dtype))
            grad_x = grad_x.view(*grad.shape[:-1], -1)
        return grad_x, grad_dropped, grad_a, grad_b, None, None


def fuse_lora(model: Any) -> int:
    """Make PEFT's plain LoRA layers compute this product in training; return their number.

    A plain layer is a LoRA on a 4-bit or unquantized linear layer, without DoRA or another variant. Without gradients
    every layer computes as in PEFT, so that the evaluated model is the one PEFT reloads (to the bit, for an fp32
    base). So do fp16 models, because the range of fp16 is too small for the gradients.
    """
    if model.dtype == torch.float16:
        return 0
    fused = 0
    for module in model.modules():
        if _is_plain(module):
            module.forward = MethodType(_forward, module)
            fused += 1
    return fused


def _is_plain(module: Any) -> bool:
    if not has_frozen_weight(getattr(module, "base_layer", None)) or _NAME not in getattr(module, "lora_A", {}):
        return False
    halves = module.lora_A[_NAME], module.lora_B[_NAME]
    return not module.lora_variant and all(isinstance(h, torch.nn.Linear) and h.bias is None for h in halves)


def _forward(module: Any, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    found: torch.Tensor
    is_training = torch.is_grad_enabled() and not (module.disable_adapters or module.merged)
    if not is_training or module.active_adapters != [_NAME]:
        return type(module).forward(module, x, *args, **options)  # type: ignore[no-any-return]
    dropout = module.lora_dropout[_NAME]
    dropped = dropout(x) if module.training and isinstance(dropout, torch.nn.Dropout) else None
    a, b = module.lora_A[_NAME].weight, module.lora_B[_NAME].weight
    found = _LoraProduct.apply(x, dropped, a, b, module.base_layer, module.scaling[_NAME])  # type: ignore[no-untyped-call]
    return found
