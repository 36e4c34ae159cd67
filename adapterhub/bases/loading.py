"""Load a base model quantized, and report what was chosen and why."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from adapterhub.adapter import BaseRef, StoredBase
from adapterhub.bases.checks import check_causal, check_files, check_vocabulary, read_config
from adapterhub.bases.nf4 import quantized_layers
from adapterhub.bases.quantization import (
    Kind,
    checkpoint_kind,
    choose_kind,
    keep_checkpoint,
    loading_config,
    quantization_of,
)
from adapterhub.bases.store import stored_base
from adapterhub.choice import Choice
from adapterhub.errors import BaseNotFound, UsageError
from adapterhub.package.manifest import Quantization

if TYPE_CHECKING:
    import torch

Purpose = Literal["train", "serve"]

# When it is imported, bitsandbytes warns that a kernel could be downloaded; nothing here depends on that one.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@dataclass(frozen=True)
class LoadedBase:
    """A base model in memory: the Hugging Face model and tokenizer, and its quantization."""

    model: Any
    tokenizer: Any
    ref: BaseRef
    quantization: Quantization
    choices: tuple[Choice, ...]


def load_base(
    base: StoredBase | str | Path,
    *,
    purpose: Purpose = "serve",
    dtype: str | None = None,
    device: str | None = None,
    kind: Kind | None = None,
    double_quant: bool = True,
    block_size: int = 64,
    tokenizer: Any = None,
) -> LoadedBase:
    """Load a base with its linear layers, but for the output head, in 4 bit (arXiv 2305.14314, section 3).

    `base` is a name (fetched unless it is here), a folder or an opened base. `kind` int8 holds the layers in 8 bit
    (LLM.int8), none as they are; by default it is nf4, or what the checkpoint has. The layers of a quantized checkpoint
    stay as they are, and `quantization` of the result says how that is. `dtype` (bfloat16, float16, float32) and
    `device` (cpu, cuda, cuda:1, ...) are chosen when not given. `tokenizer` is the base's, where it has been read
    already: that takes as long as loading a small model.
    Raises UsageError for a device that is not there, for unknown options and for another kind than a quantized
    checkpoint has; BaseNotFound for a folder that transformers cannot read; BaseUnsupported for another model than a
    causal language model of transformers. All of this is checked before a weight is read, but for missing weights.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    for name, value, allowed in (("purpose", purpose, get_args(Purpose)), ("kind", kind, (*get_args(Kind), None))):
        if value not in allowed:
            names = ", ".join(filter(None, allowed))
            raise UsageError(f"invalid {name} {value!r}: expected {names}. Choose one of them.")
    stored = stored_base(base)
    disable_progress_bar()
    where, precision = choose_precision(dtype, device)
    compute = getattr(torch, precision.value)
    config = read_config(stored.path)
    check_causal(config, stored.path)
    kind = choose_kind(kind, config, stored.path.name)
    check_files(stored.path)
    wanted = None
    if checkpoint_kind(config, stored.path.name) is None:
        wanted = loading_config(Quantization(kind=kind, double_quant=double_quant, block_size=block_size), compute)
    else:
        keep_checkpoint(config, compute)
    try:
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(stored.path, trust_remote_code=False)
        check_vocabulary(config, tokenizer, stored.path)
        model, found = AutoModelForCausalLM.from_pretrained(
            stored.path,
            config=config,
            dtype=compute,
            quantization_config=wanted,
            device_map={"": where.value},
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BaseNotFound(f"{stored.path} cannot be loaded as a base model: {error}") from error
    _check_weights(model, found, stored.path)
    model.requires_grad_(False)
    model.eval()
    kernel = _choose_kernel(model, purpose, compute)
    quantization = quantization_of(model, precision.value)
    return LoadedBase(model, tokenizer, stored.ref, quantization, (where, precision, *kernel))


def _check_weights(model: Any, found: Mapping[str, Any], folder: Path) -> None:
    """Check that the files have every weight of the model: transformers draws the others at random.

    `found` is transformers' loading info. Raises BaseNotFound.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    missing = sorted(found["missing_keys"])
    other = {name: f"{tuple(here)} instead of {tuple(wanted)}" for name, here, wanted in found["mismatched_keys"]}
    for name, layer in model.named_modules():  # transformers does not compare those that are quantized
        if isinstance(layer, Linear4bit | Linear8bitLt) and f"{name}.weight" not in missing:
            here = tuple(getattr(layer.weight, "quant_state", layer.weight).shape)
            if here != (layer.out_features, layer.in_features):
                other[f"{name}.weight"] = f"{here} instead of {(layer.out_features, layer.in_features)}"
    if faults := [*(f"{name} is missing" for name in missing), *(f"{name} is {size}" for name, size in other.items())]:
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise BaseNotFound(
            f"{folder} has other weights than its config.json says: {faults[0]}{more}. Fetch or save the base again, "
            "from one model."
        )


def load_tokenizer(base: StoredBase) -> Any:
    """Load the base's tokenizer. Raises BaseNotFound."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base.path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BaseNotFound(
            f"cannot load the tokenizer of {base.path} ({error}): expected a Hugging Face tokenizer. Fetch the base "
            "again."
        ) from error


def choose_precision(dtype: str | None, device: str | None) -> tuple[Choice, Choice]:
    """Return the (device, dtype) that a base would be loaded with. Raises UsageError for a missing device."""
    where = _choose_device(device)
    return where, _choose_dtype(dtype, where.value)


def _choose_device(wanted: str | None) -> Choice:
    import torch

    if wanted is not None:
        if wanted.startswith("cuda") and not torch.cuda.is_available():
            raise UsageError(f"device {wanted} is not available: torch sees no CUDA device. Leave out --device.")
        return Choice("device", wanted, "as asked")
    if torch.cuda.is_available():
        return Choice("device", "cuda:0", torch.cuda.get_device_name(0))
    return Choice("device", "cpu", "no CUDA device")


def _choose_dtype(wanted: str | None, device: str) -> Choice:
    import torch

    if wanted is not None:
        if wanted not in ("bfloat16", "float16", "float32"):
            raise UsageError(f"invalid dtype {wanted!r}: expected bfloat16, float16 or float32. Choose one of them.")
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
    """Choose whether bitsandbytes may repack weights in place, at the first forward without gradients on AVX512-BF16.

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
    """Return bitsandbytes' AdamW; moments in 8 or 32 bits; paged ones may leave GPU memory (arXiv 2305.14314, 3)."""
    from bitsandbytes import optim

    kinds = {
        (8, False): optim.AdamW8bit,
        (8, True): optim.PagedAdamW8bit,
        (32, False): optim.AdamW32bit,
        (32, True): optim.PagedAdamW32bit,
    }
    return kinds[bits, is_paged](groups, weight_decay=0.0)  # type: ignore[no-any-return]
