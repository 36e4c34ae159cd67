"""Quantizers of transformers and bitsandbytes that read the weights in the dtype that they are stored in."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

METHOD = "bitsandbytes-stored"
"""Prefix of the names under which transformers finds these quantizers."""
_DEFAULT_BLOCK_SIZE = 64


@cache
def config_classes() -> tuple[Any, Any]:
    """Return the configs of our 4-bit and 8-bit quantizers.

    transformers' own cast weights to the compute dtype before quantizing them (2.3 % of relative difference between
    bf16 and fp32 on a base stored in fp32), and have no block size.
    """
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
    from transformers.utils.quantization_config import QuantizationMethod

    def keep_stored_dtype(quantizer: Any, model: Any) -> None:
        """Let weights that are quantized be read in the dtype that they are stored in; the others are cast."""
        names = [name for name, _ in model.named_parameters() if quantizer.param_needs_quantization(model, name)]
        plan_of = model._get_dtype_plan
        stored = f"^(?:{'|'.join(map(re.escape, names))})$"
        model._get_dtype_plan = lambda dtype: {stored: None} | plan_of(dtype)

    def named_as_bitsandbytes(quantizer: Any, model: Any) -> None:
        """Describe the loaded model as transformers' own quantizer would: it can be saved and loaded by anyone."""
        quantizer.quantization_config.quant_method = QuantizationMethod.BITS_AND_BYTES
        model.quantization_method = QuantizationMethod.BITS_AND_BYTES

    class StoredQuantizer4Bit(Bnb4BitHfQuantizer):  # type: ignore[misc]
        def _process_model_before_weight_loading(self, model: Any, device_map: Any, **options: Any) -> None:
            super()._process_model_before_weight_loading(model, device_map, **options)
            keep_stored_dtype(self, model)
            for parameter in model.parameters():
                if hasattr(parameter, "quant_type"):
                    # Loading makes the real parameter with the attributes of this empty one.
                    parameter.blocksize = self.quantization_config.block_size

        def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
            del model._get_dtype_plan
            for parameter in model.parameters():
                if hasattr(parameter, "quant_state"):
                    # The dtype that it is dequantized in: the stored one would round twice.
                    parameter.quant_state.dtype = self.quantization_config.bnb_4bit_compute_dtype
            if self.quantization_config.block_size == _DEFAULT_BLOCK_SIZE:
                named_as_bitsandbytes(self, model)
            return super()._process_model_after_weight_loading(model, **options)

    class StoredQuantizer8Bit(Bnb8BitHfQuantizer):  # type: ignore[misc]
        def _process_model_before_weight_loading(self, model: Any, device_map: Any, **options: Any) -> None:
            super()._process_model_before_weight_loading(model, device_map, **options)
            keep_stored_dtype(self, model)

        def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
            del model._get_dtype_plan
            named_as_bitsandbytes(self, model)
            return super()._process_model_after_weight_loading(model, **options)

    def registered(quantizer: Any, bits: int) -> Any:
        register_quantizer(f"{METHOD}-{bits}bit")(quantizer)
        made = type(f"StoredConfig{bits}Bit", (BitsAndBytesConfig,), {})
        return register_quantization_config(f"{METHOD}-{bits}bit")(made)

    return registered(StoredQuantizer4Bit, 4), registered(StoredQuantizer8Bit, 8)
