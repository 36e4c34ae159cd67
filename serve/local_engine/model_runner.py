"""Run one batch through the model: one flattened forward over all sequences, down to the logits to sample from."""

from __future__ import annotations

from typing import Any, Literal, Protocol

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


def paged_shape(base: LoadedBase) -> KvShape:
    """Return the shape of a token's keys and values in the KV cache."""
    return KvShape.of(base.model.config.get_text_config(), kv_dtype(base))


def kernels_for(device: torch.device) -> tuple[CpuKernels | None, tuple[Choice, ...]]:
    """Return our kernels where the device has them, and the choice."""
    if device.type != "cpu":
        return None, ()
    kernels, choice = load_kernels()
    return kernels, (choice,)


def adapted(model: Any) -> tuple[AdapterBank, CpuKernels | None, tuple[Choice, ...]]:
    """Replace the model's linear layers by those that take adapters, computed by our kernels where there are some."""
    kernels, choices = kernels_for(model.device)
    return AdapterBank(model, kernels), kernels, choices


class Runner(Protocol):
    """The model, its resident adapters and the sampler; owned by one thread."""

    mode: Literal["batched", "single"]
    adapters: AdapterBank
    guided_decoder: GuidedDecoder
    sampler: Sampler

    def run(self, batch: Batch) -> dict[str, SamplingRow]:
        """Compute every chunk. Return the logits of each request whose chunk reaches the end of its sequence."""
        ...


class ModelRunner:
    """Runs all sequences of a batch in one forward pass, with paged attention; its state is the KV cache.

    Adapters that are being loaded, guided decoding's masks and waiting logits are tensors outside it.
    """

    mode: Literal["batched", "single"] = "batched"

    def __init__(self, base: LoadedBase, *, num_blocks: int, block_size: int) -> None:
        """Replace the model's attention, its linear layers, and what else our kernels compute."""
        self._model = base.model
        self._device = base.model.device
        self._cache = KvCache(paged_shape(base), num_blocks, block_size, self._device)
        self.guided_decoder = GuidedDecoder(base.tokenizer)
        self.sampler = Sampler(self._device)
        self.adapters, self._kernels, self.choices = adapted(self._model)
        self._own_children = [(module, dict(module._modules)) for module in self._model.modules()]
        self._own_attention = self._model.config._attn_implementation
        use_paged_attention(self._model)
        if self._kernels is not None:
            use_fast_norms(self._model, self._kernels)
            self.choices += (fuse_decoder(self._model, self.adapters, self._cache, self._kernels),)

    def undo(self) -> None:
        """Give the model back its own layers and attention; its linear layers stay those of the adapter bank."""
        for module, children in self._own_children:
            module._modules.clear()
            module._modules.update(children)
        self._model.set_attn_implementation(self._own_attention)

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
        with PagedStep(self._cache, batch, self._kernels).begun():
            logits = self._model(
                input_ids=torch.tensor([tokens], device=self._device),
                position_ids=torch.tensor([positions], device=self._device),
                use_cache=False,
                logits_to_keep=torch.tensor(last_rows, dtype=torch.long, device=self._device),
            ).logits[0]
        return dict(zip(sampling, rows_of(logits.float()), strict=True))
