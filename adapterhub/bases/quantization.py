"""The quantization of a base: as it is asked for, as a checkpoint has it, and as the layers in memory have it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from adapterhub.bases.nf4 import quantized_layers
from adapterhub.bases.quantizers import METHOD, config_classes
from adapterhub.errors import BaseUnsupported, UsageError
from adapterhub.package.manifest import Quantization

if TYPE_CHECKING:
    import torch

Kind = Literal["nf4", "fp4", "int8", "none"]


def choose_kind(wanted: Kind | None, config: Any, name: str) -> Kind:
    """Return the kind of quantization to load a base with: as asked, else as its checkpoint has it, else nf4.

    Raises UsageError where the checkpoint of `name` is quantized otherwise than asked, BaseUnsupported where another
    library than bitsandbytes quantized it.
    """
    has = checkpoint_kind(config, name)
    if has is None:
        return wanted or "nf4"
    if wanted not in (None, has):
        raise UsageError(
            f"{name} is quantized as {has} and {wanted} was asked for: expected {has}, since a checkpoint's weights "
            f"stay as they are. Ask for {has}, or use the base that is not quantized."
        )
    return has


def checkpoint_kind(config: Any, name: str) -> Kind | None:
    """Return how the checkpoint of a base is quantized; None: it is not. Raises BaseUnsupported as `choose_kind`."""
    found = _as_dict(getattr(config, "quantization_config", None))
    if not found:
        return None
    method = str(getattr(found.get("quant_method"), "value", found.get("quant_method", "bitsandbytes")))
    if found.get("load_in_8bit") or method == "bitsandbytes_8bit":
        return "int8"
    kind = found.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' default
    if method.startswith("bitsandbytes") and kind in ("nf4", "fp4"):
        return "nf4" if kind == "nf4" else "fp4"
    raise BaseUnsupported(
        f"{name} is quantized by {method}, which is not read here: expected weights in 16 or 32 bit, or quantized by "
        "bitsandbytes. Choose such a copy of the base."
    )


def keep_checkpoint(config: Any, compute: torch.dtype) -> None:
    """Let a quantized checkpoint compute in this dtype; the rest of its quantization is in its weights."""
    found = _as_dict(config.quantization_config)
    config.quantization_config = found | {"bnb_4bit_compute_dtype": str(compute).removeprefix("torch.")}


def quantization_of(model: Any, compute_dtype: str) -> Quantization:
    """Return how the linear layers of a model in memory are quantized. Raises BaseUnsupported where they differ."""
    from bitsandbytes.nn import Linear8bitLt

    dtype: Any = compute_dtype
    states = [layer.weight.quant_state for layer in quantized_layers(model).values()]
    found = {(state.quant_type, bool(state.nested), int(state.blocksize)) for state in states}
    if len(found) > 1:
        raise BaseUnsupported(
            f"the layers of this base are quantized in {len(found)} ways ({sorted(found)}): expected one. Choose "
            "another copy of the base."
        )
    for kind, is_double, block_size in found:
        return Quantization(kind=kind, double_quant=is_double, block_size=block_size, compute_dtype=dtype)
    is_int8 = any(isinstance(module, Linear8bitLt) for module in model.modules())
    return Quantization(kind="int8" if is_int8 else "none", compute_dtype=dtype)


def _as_dict(found: Any) -> dict[str, Any]:
    return dict(found if isinstance(found, dict) else found.to_dict()) if found else {}


def loading_config(quantization: Quantization, compute: torch.dtype) -> Any:
    """Return the quantization_config for `from_pretrained`.

    Weights are quantized from the dtype that they are stored in, so that their bits do not depend on `compute`. Every
    option is set, because the defaults of transformers, bitsandbytes and accelerate differ.
    """
    if quantization.kind == "none":
        return None
    four_bit, eight_bit = config_classes()
    if quantization.kind == "int8":
        # LLM.int8 (arXiv 2208.07339, section 3.2): input columns with a value beyond 6 are computed in 16 bit.
        config = eight_bit(load_in_8bit=True, llm_int8_threshold=6.0, llm_int8_has_fp16_weight=False)
        config.quant_method = f"{METHOD}-8bit"
        return config
    config = four_bit(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.kind,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_storage="uint8",
    )
    config.block_size = quantization.block_size
    config.quant_method = f"{METHOD}-4bit"
    return config
