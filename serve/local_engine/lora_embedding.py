"""The embedding of a mixed batch, with each row's own adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from serve.adapters.weights import EmbeddingUpdate, FullWeight

if TYPE_CHECKING:
    from serve.local_engine.lora_segments import Segments


class LoraEmbedding(nn.Module):
    """Replaces the base's embedding."""

    def __init__(self, embedding: nn.Embedding, segments: Segments, dtype: torch.dtype) -> None:
        super().__init__()
        self._embedding = embedding
        self._dtype = dtype
        self._segments = segments
        self._resident: dict[str, EmbeddingUpdate | FullWeight] = {}

    @property
    def weight(self) -> torch.Tensor:
        return self._embedding.weight

    def install(self, digest: str, change: EmbeddingUpdate | FullWeight) -> None:
        self._resident[digest] = change

    def remove(self, digest: str) -> None:
        self._resident.pop(digest, None)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embed tokens [..., N] -> [..., N, width], in the model's dtype; the weight may be stored in a smaller one."""
        shape, tokens = tokens.shape, tokens.flatten()
        found: torch.Tensor = self._embedding(tokens).to(self._dtype)
        if any(a.digest in self._resident for segment in self._segments.python for a in segment.mix):
            self._segments.fit(len(tokens))
            for segment in self._segments.python:
                rows = slice(segment.start, segment.end)
                mine = [(self._resident[a.digest], a.scale) for a in segment.mix if a.digest in self._resident]
                before = found[rows].clone()
                for change, scale in mine:
                    found[rows] += scale * _delta(change, tokens[rows], before)
        return found.view(*shape, -1)


def _delta(change: EmbeddingUpdate | FullWeight, tokens: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    if isinstance(change, FullWeight):
        return change.weight[tokens].to(before.dtype) - before
    return change.scaling * change.rows[tokens].to(before.dtype) @ change.bt.to(before.dtype)
