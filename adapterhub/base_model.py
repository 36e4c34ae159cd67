"""Loading a base model quantized, and saying what was chosen and why. The only door to bitsandbytes."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from adapterhub.adapter import BaseRef
from adapterhub.base_store import StoredBase
from adapterhub.errors import BaseNotFound, UsageError
from adapterhub.manifest import Quantization
from adapterhub.quantized_loading import loading_config
from adapterhub.tensor_address import address_of

if TYPE_CHECKING:
    import torch

Purpose = Literal["train", "serve"]

# When it is imported, bitsandbytes warns that a kernel could be downloaded; nothing here depends on that one.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Choice:
    """Something the program chose for the user, with the reason."""

    what: str
    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.what}: {self.value} ({self.reason})"


@dataclass(frozen=True)
class LoadedBase:
    """A base model in memory: the Hugging Face model and tokenizer, and how it is held."""

    model: Any
    tokenizer: Any
    ref: BaseRef
    quantization: Quantization
    choices: tuple[Choice, ...]


def load_base(
    stored: StoredBase,
    *,
    purpose: Purpose,
    dtype: str | None = None,
    device: str | None = None,
    kind: Literal["nf4", "fp4", "int8", "none"] = "nf4",
    double_quant: bool = True,
    block_size: int = 64,
    tokenizer: Any = None,
) -> LoadedBase:
    """Load a stored base with its linear layers, but for the output head, in 4 bit (arXiv 2305.14314, section 3).

    `kind` int8 holds them in 8 bit (LLM.int8), none as they are. `dtype` (bfloat16, float16, float32) and `device`
    (cpu, cuda, cuda:1, ...) are chosen when not given. `tokenizer` is the base's, where it has been read already: that
    takes as long as loading a small model.
    Raises UsageError for a device that is not there, BaseNotFound for a folder transformers cannot read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    where, precision = choose_precision(dtype, device)
    compute = getattr(torch, precision.value)
    quantization = Quantization(
        kind=kind,
        double_quant=double_quant,
        block_size=block_size,
        compute_dtype=precision.value,  # type: ignore[arg-type]
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            stored.path,
            dtype=compute,
            quantization_config=loading_config(quantization, compute),
            device_map={"": where.value},
        )
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(stored.path)
    except (OSError, ValueError, KeyError) as error:
        raise BaseNotFound(f"{stored.path} cannot be loaded as a base model: {error}") from error
    model.requires_grad_(False)
    model.eval()
    kernel = _choose_kernel(model, purpose, compute)
    return LoadedBase(model, tokenizer, stored.ref, quantization, (where, precision, *kernel))


def choose_precision(dtype: str | None, device: str | None) -> tuple[Choice, Choice]:
    """(device, dtype) a base would be loaded with. Raises UsageError for what is not there."""
    where = _choose_device(device)
    return where, _choose_dtype(dtype, where.value)


def quantized_layers(model: Any) -> dict[str, Any]:
    """Name -> module of every 4-bit linear layer."""
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


@dataclass(frozen=True)
class Nf4Weights:
    """NF4 weights by rows, as bitsandbytes quantized them: code book value times the constant of its block."""

    codes: torch.Tensor
    """uint8 [out * in / 2], two codes a byte, the first in the upper half"""
    absmax: torch.Tensor
    """fp32 [out * in / block_size]: the constants, themselves dequantized"""
    book: torch.Tensor
    """fp32 [16]"""
    block_size: int
    shape: tuple[int, int]
    """(out, in)"""

    @classmethod
    def fits(cls, layers: Sequence[Any]) -> bool:
        """Can these layers be joined by rows? NF4 on the CPU, one input width of whole blocks, one block size."""
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
        """The layers' rows one below the other; the layers keep working, as views of the joined codes.

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
    """fp32 [out, in] of a linear layer: as it is held, or a quantized one's own answer to the unit vectors."""
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
    """Can `frozen_weight` give this layer's? A linear one in 4 bit, or not quantized."""
    import torch
    from bitsandbytes.nn import Linear4bit

    return isinstance(layer, Linear4bit) or (isinstance(layer, torch.nn.Linear) and layer.weight.is_floating_point())


def frozen_weight(layer: Any) -> torch.Tensor:
    """[out, in] of such a layer in the dtype it computes in; 4-bit ones are unpacked anew, as bitsandbytes does."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    weight: torch.Tensor = layer.weight
    if isinstance(layer, Linear4bit):
        state = getattr(weight, "quant_state", None) or layer.quant_state
        weight = dequantize_4bit(weight.data, state).to(layer_dtype(layer))
    return weight


def layer_dtype(layer: Any) -> torch.dtype:
    """What a linear layer computes in; one in 8 bit computes in what it is given."""
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
    def fits(cls, layers: Sequence[Any]) -> bool:
        """Can these layers be joined? NF4 in one block size, packable, of one input width, biased alike."""
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
        """x [..., in] -> [..., out] in its dtype; computed in bf16, as the layers do by themselves."""
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


def _choose_device(wanted: str | None) -> Choice:
    import torch

    if wanted is not None:
        if wanted.startswith("cuda") and not torch.cuda.is_available():
            raise UsageError(f"device {wanted} was asked for, but torch sees no CUDA device: leave out --device.")
        return Choice("device", wanted, "as asked")
    if torch.cuda.is_available():
        return Choice("device", "cuda:0", torch.cuda.get_device_name(0))
    return Choice("device", "cpu", "no CUDA device")


def _choose_dtype(wanted: str | None, device: str) -> Choice:
    import torch

    if wanted is not None:
        if wanted not in ("bfloat16", "float16", "float32"):
            raise UsageError(f"dtype {wanted!r} is not one of bfloat16, float16, float32.")
        return Choice("dtype", wanted, "as asked")
    if device.startswith("cuda"):
        if torch.cuda.is_bf16_supported():
            return Choice("dtype", "bfloat16", "the GPU computes in bf16")
        return Choice("dtype", "float16", "the GPU has no bf16")
    if _cpu_has_bf16():
        return Choice("dtype", "bfloat16", "the CPU has AVX512-BF16")
    return Choice("dtype", "float32", "the CPU has no bf16 instructions, fp32 is faster there")


def _cpu_has_bf16() -> bool:
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


def _choose_kernel(model: Any, purpose: Purpose, compute: torch.dtype) -> tuple[Choice, ...]:
    """On CPUs with AVX512-BF16, bitsandbytes repacks weights in place at the first forward without gradients.

    That kernel computes in bf16 whatever the dtype asked for, and a repacked weight gives wrong gradients
    afterwards (grad_norm 2.15 -> 0.21 here, with a warning only): so it is switched off for training and
    for anything but bf16, and for layers whose shape it cannot hold.
    """
    import torch

    layers = quantized_layers(model).values()
    if not layers or not _cpu_has_bf16() or model.device.type != "cpu":
        return ()
    wanted = purpose == "serve" and compute == torch.bfloat16
    for layer in layers:
        fits = layer.out_features % 32 == 0 and layer.in_features % 64 == 0
        fits = fits and layer.in_features % layer.weight.blocksize == 0
        layer.support_avx512bf16_for_cpu = wanted and fits
    if wanted:
        return (Choice("nf4 kernel", "packed AVX512-BF16", "bf16 inference on this CPU"),)
    reason = "training needs true gradients" if purpose == "train" else f"{compute} was asked for"
    return (Choice("nf4 kernel", "dequantize + matmul", reason),)


def adamw(groups: list[dict[str, Any]], *, bits: Literal[8, 32], is_paged: bool) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW, its moments in 8 or 32 bits; paged ones may leave a GPU's memory (arXiv 2305.14314, 3)."""
    from bitsandbytes import optim

    kinds = {
        (8, False): optim.AdamW8bit,
        (8, True): optim.PagedAdamW8bit,
        (32, False): optim.AdamW32bit,
        (32, True): optim.PagedAdamW32bit,
    }
    return kinds[bits, is_paged](groups, weight_decay=0.0)  # type: ignore[no-any-return]
