"""Runs one batch through the model: flattened forward over all sequences, then sampling. All tensors live here."""

from __future__ import annotations

import torch

from adapterhub.base_model import Choice, LoadedBase
from serve.attention import KvCache, KvShape, PagedStep, use_paged_attention
from serve.constrained import Constraints
from serve.cpu_kernels import CpuKernels, load_kernels
from serve.fused_decoder import fuse_decoder
from serve.lora_layers import AdapterBank
from serve.norms import use_fast_norms
from serve.sampling import Sampled, Sampler
from serve.scheduler import Batch, Sequence


def kv_dtype(base: LoadedBase) -> torch.dtype:
    """fp32 on CPU, where small bf16 products are slow; the model's own dtype on a GPU."""
    return torch.float32 if base.model.device.type == "cpu" else base.model.dtype


class ModelRunner:
    """The model, its KV cache and its resident adapters; owned by one thread."""

    def __init__(self, base: LoadedBase, *, num_blocks: int, block_size: int) -> None:
        self._model = base.model
        self._device = base.model.device
        shape = KvShape.of(base.model.config.get_text_config(), kv_dtype(base))
        self._cache = KvCache(shape, num_blocks, block_size, self._device)
        self.constraints = Constraints(base.tokenizer)
        self._sampler = Sampler(self._device, self.constraints)
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
    def run(self, batch: Batch) -> dict[str, Sampled]:
        """Compute every piece; returns the next token of each request whose piece reaches its end."""
        tokens: list[int] = []
        positions: list[int] = []
        last_rows: list[int] = []
        sampling: list[Sequence] = []
        for piece in batch.pieces:
            end = piece.start + piece.num_tokens
            tokens += piece.sequence.tokens[piece.start : end]
            positions += range(piece.start, end)
            if piece.samples:
                last_rows.append(len(tokens) - 1)
                sampling.append(piece.sequence)
        self.adapters.begin(batch)
        logits = self._model(
            input_ids=torch.tensor([tokens], device=self._device),
            position_ids=torch.tensor([positions], device=self._device),
            use_cache=False,
            logits_to_keep=torch.tensor(last_rows, dtype=torch.long, device=self._device),
            paged=PagedStep(self._cache, batch, self._kernels),
        ).logits[0]
        sampled = self._sampler.sample(logits.float(), sampling)
        return {sequence.request.id: one for sequence, one in zip(sampling, sampled, strict=True)}

    def forget(self, sequence: Sequence) -> None:
        """The request ended: drop its random state."""
        self._sampler.forget(sequence.request.id)
