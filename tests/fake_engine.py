"""An engine without a model: it answers with the prompt's length, letter by letter. The API suite runs on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from adapterhub.adapter import Adapter
from adapterhub.errors import EngineStopped
from serve.adapter_cache import file_size
from serve.engine import Chunk, EngineStatus, FinishReason, GenerationRequest, Precision, TokenLogprob


@dataclass
class FakeEngine:
    max_model_len: int = 100
    dtype: str = "float32"
    precision: Precision = field(default_factory=lambda: Precision("nf4", "float32"))
    loaded: set[str] = field(default_factory=set)
    open_requests: set[str] = field(default_factory=set)
    stopped: bool = False
    load_error: Exception | None = None
    num_shared: dict[int, int] = field(default_factory=dict)
    """choice -> cached tokens of its prompt"""
    hold: asyncio.Event | None = None
    """answers stop after their first letter until this is set"""

    def size_of(self, adapter: Adapter) -> int:
        return file_size(adapter)

    async def load(self, adapter: Adapter) -> None:
        if self.load_error:
            raise self.load_error
        self.loaded.add(adapter.digest)

    async def unload(self, digest: str) -> None:
        self.loaded.discard(digest)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        if self.stopped:
            raise EngineStopped("the engine has stopped: restart the server.")
        assert all(adapter.digest in self.loaded for adapter in request.adapters)
        text = f"{len(request.prompt)} tokens, {len(request.adapters)} adapters"[: request.sampling.max_tokens]
        wanted = request.sampling.top_logprobs
        self.open_requests.add(request.id)
        try:
            for number, letter in enumerate(text, 1):
                if number == 2 and self.hold:
                    await self.hold.wait()
                data = letter.encode()
                top = (TokenLogprob(65, letter, data, -0.5),)[:wanted]
                logprobs = () if wanted is None else (TokenLogprob(65, letter, data, -0.5, top, number - 1),)
                is_last = number == len(text)
                reason = FinishReason.LENGTH if is_last else None
                shared = self.num_shared.get(int(request.id.rpartition("-")[2]), 0) if self.num_shared else 0
                yield Chunk(letter, number, (65,), reason, logprobs, shared)
        finally:
            self.open_requests.discard(request.id)

    def status(self) -> EngineStatus:
        return EngineStatus(
            not self.stopped,
            "stopped" if self.stopped else "ready",
            num_running=len(self.open_requests),
            has_ended=self.stopped,
        )

    async def close(self) -> None:
        self.stopped = True
