"""A local engine on the tiny base, as the tests of its answers and of its faults both run it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from packages import FINGERPRINT
from tiny_models import TINY_VOCABULARY

from adapterhub.adapter import Adapter, StoredBase
from adapterhub.base_model import LoadedBase, load_base
from adapterhub.lora_config import WEIGHTS_NAME
from adapterhub.manifest import BaseEntry, Chat, FileEntry, Lora, Manifest
from serve.engine import Chunk, GenerationRequest, SamplingParams
from serve.local_engine import LocalEngine, LocalEngineConfig

NUM_TOKENS = 12
PROMPTS = tuple(tuple(random.Random(n).choices(range(100, TINY_VOCABULARY), k=3 + 7 * n)) for n in range(5))
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)


def unverified(folder: Path, number: int) -> Adapter:
    """An adapter as the engine sees it; what packing checks is not these tests' matter."""
    weights = folder / WEIGHTS_NAME
    size = weights.stat().st_size if weights.exists() else 0
    manifest = Manifest(
        name=folder.name,
        base=BaseEntry(id="tests/tiny-llama", fingerprint=FINGERPRINT, revision=str(number)),
        lora=Lora(method="lora", rank=1, alpha=1, scaling=1, targets=[]),
        chat=Chat(template_sha256="0" * 64, bos=None, eos=None, pad=None),
        files={WEIGHTS_NAME: FileEntry(sha256="0" * 64, size=size)},
    )
    return Adapter(folder, manifest)


def load_tiny(stored: StoredBase, dtype: str = "float32") -> LoadedBase:
    return load_base(stored, purpose="serve", dtype=dtype)


def reference_model(stored: StoredBase, adapter: Adapter | None, dtype: torch.dtype) -> Any:
    """transformers' and PEFT's model on an NF4 base of their own loading."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(stored.path, dtype=dtype, quantization_config=config)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # that kernel computes in bf16
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter.path))
    return model.eval()


def greedy(model: Any, prompt: tuple[int, ...]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=-1
    )
    return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


@asynccontextmanager
async def running(base: LoadedBase, config: LocalEngineConfig | None = None) -> AsyncIterator[LocalEngine]:
    engine = LocalEngine(base, config)
    try:
        yield engine
    finally:
        await engine.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 120))  # type: ignore[arg-type]


async def ask(engine: LocalEngine, request: GenerationRequest) -> list[Chunk]:
    return [chunk async for chunk in engine.generate(request)]


def tokens_of(chunks: list[Chunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.tokens]


async def idle(engine: LocalEngine) -> None:
    """The abort that ends each request has been obeyed; then the books must balance."""
    await engine.unload("sha256:nobody")
    engine.check()
