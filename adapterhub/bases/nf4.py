"""Read the weights of quantized layers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterhub.tensor_address import address_of

if TYPE_CHECKING:
    import torch


def quantized_layers(model: Any) -> dict[str, Any]:
    """Return every 4-bit linear layer by name."""
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


@dataclass(frozen=True)
class Nf4Weights:
    """NF4 weights by rows, as bitsandbytes quantized them: code book value times the constant of its block."""

    codes: torch.Tensor
    """Codes, uint8 [out * in / 2]: two per byte, the first in the upper half."""
    absmax: torch.Tensor
    """Dequantized constants, fp32 [out * in / block_size]."""
    book: torch.Tensor
    """Code book, fp32 [16]."""
    block_size: int
    shape: tuple[int, int]
    """Shape (out, in)."""

    @classmethod
    def can_join(cls, layers: Sequence[Any]) -> bool:
        """Return whether `join` takes the layers: NF4 on the CPU, one input width of whole blocks, one block size."""
        from bitsandbytes.nn import Linear4bit

        return all(
            isinstance(layer, Linear4bit)
            and not layer.support_avx512bf16_for_cpu
            and layer.weight.quant_type == "nf4"
            and layer.weight.device.type == "cpu"
            and layer.in_features == layers[0].in_features
            and layer.in_features % layer.weight.blocksize == 0
            and layer.weight.blocksize == layers[0].weight.blocksize
            for layer in layers
        )

    @classmethod
    def join(cls, layers: Sequence[Any], *, keep: Callable[[torch.Tensor], torch.Tensor]) -> Nf4Weights:
        """Join the rows of layers. The layers keep working, as views of the joined codes.

        `keep` copies a tensor to where it is to stay.
        """
        import torch
        from bitsandbytes.functional import dequantize_blockwise

        states = [layer.weight.quant_state for layer in layers]
        constants = [
            dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
            for state in states
        ]
        codes = keep(torch.cat([layer.weight.data.flatten() for layer in layers]))
        start = 0
        for layer in layers:
            size = layer.weight.data.numel()
            layer.weight.data = codes[start : start + size].view(layer.weight.data.shape)
            start += size
        return cls(
            codes,
            keep(torch.cat([one.flatten().float() for one in constants])),
            states[0].code.float().contiguous(),
            states[0].blocksize,
            (sum(layer.out_features for layer in layers), layers[0].in_features),
        )


def dense_weight(layer: Any) -> torch.Tensor:
    """Return the weight of a linear layer, fp32 [out, in]; a quantized one's is its output for the unit vectors."""
    import torch

    if type(layer) is torch.nn.Linear:
        weight: torch.Tensor = layer.weight.detach().float()
        return weight
    with torch.inference_mode():
        units = torch.eye(layer.in_features, dtype=layer_dtype(layer), device=layer.weight.device)
        found = layer(units).float()
        without_bias: torch.Tensor = found if layer.bias is None else found - layer.bias.float()
        return without_bias.T.contiguous()


def has_frozen_weight(layer: Any) -> bool:
    """Return whether `frozen_weight` supports the layer: linear, in 4 bit or not quantized."""
    import torch
    from bitsandbytes.nn import Linear4bit

    return isinstance(layer, Linear4bit) or (isinstance(layer, torch.nn.Linear) and layer.weight.is_floating_point())


def frozen_weight(layer: Any) -> torch.Tensor:
    """Return such a layer's weight [out, in] in its compute dtype; 4-bit ones are dequantized at each call."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    weight: torch.Tensor = layer.weight
    if isinstance(layer, Linear4bit):
        state = getattr(weight, "quant_state", None) or layer.quant_state
        weight = dequantize_4bit(weight.data, state).to(layer_dtype(layer))
    return weight


def layer_dtype(layer: Any) -> torch.dtype:
    """Return the dtype that a linear layer computes in; an 8-bit one computes in the dtype of its input."""
    import torch

    dtype: torch.dtype = getattr(layer, "compute_dtype", None) or layer.weight.dtype
    return dtype if dtype.is_floating_point else torch.float32


class PackedNf4:
    """Packed NF4 layers that share their input, as one call of bitsandbytes' CPU kernel.

    Called without its wrapper, which spends as long as the kernel on a few rows, and with the layers' outputs side by
    side: few wide calls are faster than many narrow ones. The layers keep working, as views of the joined weights.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        import torch
        from bitsandbytes.cextension import lib

        for layer in layers:  # a first forward packs the weights in place
            layer(torch.zeros(1, layer.in_features, dtype=torch.bfloat16))
        states = [layer.weight.quant_state for layer in layers]
        self.in_features = layers[0].in_features
        self.out_features = sum(layer.out_features for layer in layers)
        self._block_size = states[0].blocksize
        self._weight = torch.cat([layer.weight.data for layer in layers])
        self._absmax = torch.cat([state.absmax for state in states], dim=1).contiguous()
        biases = [layer.bias for layer in layers]
        self._bias = torch.cat(biases) if biases[0] is not None else None
        out, width, block = self.out_features, self.in_features, self._block_size
        self._addresses = (
            address_of(self._weight, "packed NF4 weights", torch.uint8, out, width // 2),
            address_of(self._absmax, "packed NF4 constants", torch.bfloat16, width // block, out),
        )
        self._kernel = lib.gemv_4bit_inference_cpu_nf4_bf16
        start = 0
        for layer in layers:
            layer.weight.data = self._weight[start : start + layer.out_features]
            start += layer.out_features

    @classmethod
    def can_pack(cls, layers: Sequence[Any]) -> bool:
        """Return whether the layers can be packed as one: NF4 with one block size and input width, biased alike."""
        from bitsandbytes.nn import Linear4bit

        return all(
            isinstance(layer, Linear4bit)
            and layer.support_avx512bf16_for_cpu
            and layer.weight.quant_type == "nf4"
            and layer.weight.device.type == "cpu"
            and layer.in_features == layers[0].in_features
            and layer.weight.blocksize == layers[0].weight.blocksize
            and (layer.bias is None) == (layers[0].bias is None)
            for layer in layers
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., in] to [..., out] in its dtype. Computes in bf16, as the layers do by themselves."""
        import torch

        rows = x.reshape(-1, self.in_features).to(torch.bfloat16).contiguous()
        shape = (len(rows), self.out_features)
        out = torch.empty(shape, dtype=torch.bfloat16)
        number, address = ctypes.c_int64, ctypes.c_void_p
        weight, absmax = self._addresses
        self._kernel(
            number(shape[0]), number(shape[1]), number(self.in_features),
            address(address_of(rows, "rows", torch.bfloat16, shape[0], self.in_features)), address(weight),
            address(absmax), address(address_of(out, "a result", torch.bfloat16, *shape)),
            number(self._block_size), number(self.in_features), number(self.out_features),
        )  # fmt: skip
        if self._bias is not None:
            out += self._bias
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)
