"""The quantization_config of transformers: 4 bit with a chosen block size, 8 bit, or none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterhub.bases.quantizers import METHOD, config_classes
from adapterhub.package.manifest import Quantization

if TYPE_CHECKING:
    import torch


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
