"""Run one batch through the model: one flattened forward over all sequences, down to the logits to sample from."""

from __future__ import annotations

import torch

from adapterhub.bases.loading import LoadedBase
from adapterhub.choice import Choice
from serve.local_engine.attention import KvCache, KvShape, PagedStep, use_paged_attention
from serve.local_engine.cpu.kernels import CpuKernels, load_kernels
from serve.local_engine.cpu.rms_norm import use_fast_norms
from serve.local_engine.fused_decoder import fuse_decoder
from serve.local_engine.guided_decoding import GuidedDecoder
from serve.local_engine.lora_layers import AdapterBank
from serve.local_engine.sampling import Sampler, SamplingRow, rows_of
from serve.local_engine.scheduler import Batch


def kv_dtype(base: LoadedBase) -> torch.dtype:
    """Return the KV cache's dtype: fp32 on CPU, where small bf16 products are slow; the model's own on a GPU."""
    return torch.float32 if base.model.device.type == "cpu" else base.model.dtype


class ModelRunner:
    """The model, its KV cache, its resident adapters and the sampler; owned by one thread.

    Adapters that are being loaded, guided decoding's masks and waiting logits are tensors outside it.
    """

    def __init__(self, base: LoadedBase, *, num_blocks: int, block_size: int) -> None:
        self._model = base.model
        self._device = base.model.device
        shape = KvShape.of(base.model.config.get_text_config(), kv_dtype(base))
        self._cache = KvCache(shape, num_blocks, block_size, self._device)
        self.guided_decoder = GuidedDecoder(base.tokenizer)
        self.sampler = Sampler(self._device)
        self._kernels: CpuKernels | None = None
        self.choices: tuple[Choice, ...] = ()
        if self._device.type == "cpu":
            self._kernels, choice = load_kernels()
            self.choices = (choice,)
        self.adapters = AdapterBank(self._model, self._kernels)
        use_paged_attention(self._model)
        if self._kernels is not None:
            use_fast_norms(self._model, self._kernels)
            self.choices += (fuse_decoder(self._model, self.adapters, self._cache, self._kernels),)

    @torch.inference_mode()
    def run(self, batch: Batch) -> dict[str, SamplingRow]:
        """Compute every chunk. Return the logits of each request whose chunk reaches the end of its sequence."""
        tokens: list[int] = []
        positions: list[int] = []
        last_rows: list[int] = []
        sampling: list[str] = []
        for chunk in batch.chunks:
            end = chunk.start + chunk.num_tokens
            tokens += chunk.sequence.tokens[chunk.start : end]
            positions += range(chunk.start, end)
            if chunk.samples:
                last_rows.append(len(tokens) - 1)
                sampling.append(chunk.sequence.request.id)
        self.adapters.begin(batch)
        logits = self._model(
            input_ids=torch.tensor([tokens], device=self._device),
            position_ids=torch.tensor([positions], device=self._device),
            use_cache=False,
            logits_to_keep=torch.tensor(last_rows, dtype=torch.long, device=self._device),
            paged=PagedStep(self._cache, batch, self._kernels),
        ).logits[0]
        return dict(zip(sampling, rows_of(logits.float()), strict=True))
