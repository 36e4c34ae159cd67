"""The quantization_config of transformers: 4 bit with a chosen block size, 8 bit, or none."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from adapterhub.package.manifest import Quantization

if TYPE_CHECKING:
    import torch

_METHOD = "bitsandbytes-blocks"


def loading_config(quantization: Quantization, compute: torch.dtype) -> Any:
    """Return the quantization_config for `from_pretrained`.

    Every option is set, because the defaults of transformers, bitsandbytes and accelerate differ.
    """
    from transformers import BitsAndBytesConfig

    if quantization.kind == "none":
        return None
    if quantization.kind == "int8":
        # LLM.int8 (arXiv 2208.07339, section 3.2): input columns with a value beyond 6 are computed in 16 bit.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0, llm_int8_has_fp16_weight=False)
    kind = BitsAndBytesConfig if quantization.block_size == 64 else _block_config()
    config = kind(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.kind,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_storage="uint8",
    )
    if quantization.block_size != 64:
        config.block_size = quantization.block_size
        config.quant_method = _METHOD
    return config


@cache
def _block_config() -> Any:
    """Return a 4-bit config with a block size, which transformers' own has not, and its quantizer."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    class BlockQuantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
        def _process_model_before_weight_loading(self, model: Any, device_map: Any, **options: Any) -> None:
            super()._process_model_before_weight_loading(model, device_map, **options)
            for parameter in model.parameters():
                if hasattr(parameter, "quant_type"):
                    # Loading makes the real parameter with the attributes of this empty one.
                    parameter.blocksize = self.quantization_config.block_size

    register_quantizer(_METHOD)(BlockQuantizer)
    return register_quantization_config(_METHOD)(type("BlockConfig", (BitsAndBytesConfig,), {}))
