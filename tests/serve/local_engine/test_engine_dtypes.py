"""Every dtype of `serve --dtype` on every kind of CPU: answers are PEFT's in that dtype, within what it rounds.

A CPU differs in two ways: whether bitsandbytes packs its weights for AVX512-BF16, and whether our kernels are there.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import GREEDY, PROMPTS, ask, greedy, load_tiny, reference_model, run, running, tokens_of, unverified
from safetensors.torch import load_file, save_file
from tiny_models import TINY_VOCABULARY, make_peft_adapter

from adapterhub.adapter import Adapter, BaseRef, StoredBase
from adapterhub.choice import Choice
from adapterhub.package.lora_config import WEIGHTS_NAME
from serve.config import LocalEngineConfig, SchedulerLimits
from serve.engine import AdapterScale, GenerationRequest
from serve.local_engine import model_runner

TOLERANCES = {"bfloat16": 0.3, "float16": 0.1, "float32": 1e-3}
"""of a log-probability: as far as two kernels of one dtype lie apart, which round at different places (found: 0.16,
0.03, 3e-6)"""
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 16},
    "dora": {"rank": 8, "use_dora": True},
    "all of it": {"rank": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
}

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")


@pytest.fixture(scope="module")
def qwen(tiny_base: StoredBase, tmp_path_factory: pytest.TempPathFactory) -> StoredBase:
    """Make a base with biases, and with one head of keys: 16 outputs, which cannot be packed, beside others."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("qwen")
    config = Qwen2Config(
        vocab_size=TINY_VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.2, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_base.path / name, folder / name)
    return StoredBase(folder, BaseRef("tests/tiny-qwen"), "apache-2.0")


@pytest.fixture(scope="module")
def bases(tiny_base: StoredBase, qwen: StoredBase) -> dict[str, StoredBase]:
    return {"llama": tiny_base, "qwen2": qwen}


@pytest.fixture(scope="module")
def adapters(bases: dict[str, StoredBase], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Adapter]:
    """Make adapters: (base, name) -> adapter."""
    root, found = tmp_path_factory.mktemp("adapters"), {}
    for base, stored in bases.items():
        for number, (name, options) in enumerate(ADAPTERS.items()):
            folder = root / f"{base}-{number}"
            make_peft_adapter(folder, stored, seed=number, **dict(options))
            found[base, name] = unverified(folder, number)
    return found


Logprobs = dict[tuple[str | None, int], torch.Tensor]
"""(adapter or None, number of the prompt) -> log-probabilities of the first token of the answer"""


@pytest.fixture(scope="module")
def expected(bases: dict[str, StoredBase], adapters: dict[tuple[str, str], Adapter]) -> Callable[[str, str], Logprobs]:
    """Compute PEFT's results: (base, dtype) -> log-probabilities."""

    @cache
    def find(base: str, dtype: str) -> Logprobs:
        found: Logprobs = {}
        for name in (None, *ADAPTERS):
            adapter = None if name is None else adapters[base, name]
            model = reference_model(bases[base], adapter, getattr(torch, dtype))
            with torch.no_grad():
                for number, prompt in enumerate(PROMPTS):
                    logits = model(torch.tensor([prompt])).logits[0, -1]
                    found[name, number] = logits.float().log_softmax(-1)
        return found

    return find


def _use_cpu(packing: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU with AVX512-BF16, where this is one, or without; with a compiler or without."""
    from bitsandbytes import functional, nn

    if packing == "packed" and not functional.has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16: nothing is packed here")
    if packing == "not packed":
        for module in (functional, nn.modules):
            monkeypatch.setattr(module, "has_avx512bf16", lambda: False)
    if kernels == "torch":
        monkeypatch.setattr(model_runner, "load_kernels", lambda: (None, Choice("cpu kernels", "torch", "a test")))


@pytest.mark.parametrize(
    ("dtype", "packing", "kernels", "base"),
    [
        ("bfloat16", "packed", "own", "llama"),
        ("bfloat16", "packed", "own", "qwen2"),
        ("bfloat16", "packed", "torch", "qwen2"),
        ("bfloat16", "not packed", "own", "llama"),
        ("bfloat16", "not packed", "own", "qwen2"),
        ("bfloat16", "not packed", "torch", "llama"),
        ("float16", "packed", "own", "llama"),
        ("float16", "not packed", "own", "qwen2"),
        ("float16", "not packed", "torch", "llama"),
        ("float32", "packed", "own", "qwen2"),
        ("float32", "not packed", "own", "qwen2"),
    ],
)
def test_log_probabilities_are_pefts_in_that_dtype(
    dtype: str,
    packing: str,
    kernels: str,
    base: str,
    bases: dict[str, StoredBase],
    adapters: dict[tuple[str, str], Adapter],
    expected: Callable[[str, str], Logprobs],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _use_cpu(packing, kernels, monkeypatch)
    sampling = replace(GREEDY, max_tokens=1, top_logprobs=10)

    async def test() -> None:
        loaded = load_tiny(bases[base], dtype)
        is_packed = any(choice.value == "packed AVX512-BF16" for choice in loaded.choices)
        assert is_packed == (packing == "packed" and dtype == "bfloat16")
        async with running(loaded) as engine:
            choices = {choice.what: choice for choice in engine.choices}
            if choices["cpu kernels"].value == "own":
                assert (choices["decoder layers"].value == "fused") == (dtype == "float32")
                assert dtype == "float32" or f"computes in {dtype}" in choices["decoder layers"].reason
            for name in ADAPTERS:
                await engine.load(adapters[base, name])
            for (name, number), wanted in expected(base, dtype).items():
                mix = (AdapterScale(adapters[base, name].digest),) if name else ()
                request = GenerationRequest(f"{name} {number}", PROMPTS[number], sampling, mix)
                (chunk,) = await ask(engine, request)
                for one in chunk.logprobs[0].top:
                    expected_one = pytest.approx(wanted[one.token].item(), abs=TOLERANCES[dtype])
                    assert one.logprob == expected_one, (name, number)

    run(test)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_keys_and_values_kept_as_on_a_gpu_answer_as_in_peft(
    dtype: str, tiny_base: StoredBase, adapters: dict[tuple[str, str], Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the model's own dtype, without our kernels: beginnings and rests of prompts, and rows of answers."""
    _use_cpu("not packed", "torch", monkeypatch)
    monkeypatch.setattr(model_runner, "kv_dtype", lambda base: base.model.dtype)
    adapter = adapters["llama", "lora"]
    sampling = replace(GREEDY, max_tokens=4, top_logprobs=5)

    async def test() -> None:
        config = LocalEngineConfig(limits=SchedulerLimits(max_prefill_chunk=10))
        async with running(load_tiny(tiny_base, dtype), config) as engine:
            assert engine._runner._cache.layers.dtype == getattr(torch, dtype)
            await engine.load(adapter)
            for used in (None, adapter):
                mix = (AdapterScale(adapter.digest),) if used else ()
                requests = [GenerationRequest(str(n), prompt, sampling, mix) for n, prompt in enumerate(PROMPTS)]
                answers = await asyncio.gather(*(ask(engine, request) for request in requests))
                model = reference_model(tiny_base, used, getattr(torch, dtype))
                for prompt, answer in zip(PROMPTS, answers, strict=True):
                    with torch.no_grad():
                        logits = model(torch.tensor([[*prompt, *tokens_of(answer)]])).logits[0, len(prompt) - 1 :]
                    for chunk, row in zip(answer, logits.float().log_softmax(-1), strict=False):
                        for one in chunk.logprobs[0].top:
                            assert one.logprob == pytest.approx(row[one.token].item(), abs=TOLERANCES[dtype])

    run(test)


KEPT_IN = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def test_halves_of_an_adapter_of_any_two_dtypes_answer_as_in_peft(
    tiny_base: StoredBase,
    adapters: dict[tuple[str, str], Adapter],
    tmp_path: Path,
) -> None:
    """A, B and, turn by turn, DoRA's magnitude: each half of a layer is read as its own tensor is kept."""
    made: dict[str, Adapter] = {}
    source = adapters["llama", "dora"].path
    for number, (a, b) in enumerate((a, b) for a in KEPT_IN for b in KEPT_IN):
        folder = tmp_path / f"{a}-{b}"
        shutil.copytree(source, folder)
        kinds = {"lora_A": a, "lora_B": b, "lora_magnitude_vector": list(KEPT_IN)[number % 3]}
        tensors = {
            key: tensor.to(next(KEPT_IN[kind] for part, kind in kinds.items() if part in key))
            for key, tensor in load_file(source / WEIGHTS_NAME).items()
        }
        save_file(tensors, folder / WEIGHTS_NAME, {"format": "pt"})
        made[folder.name] = unverified(folder, number)
    model = None
    wanted = {}
    for name, adapter in made.items():
        if model is None:
            model = reference_model(tiny_base, adapter, torch.float32)
        model.load_adapter(str(adapter.path), name)
        model.set_adapter(name)
        wanted[name] = greedy(model, PROMPTS[2])

    async def test() -> None:
        async with running(load_tiny(tiny_base)) as engine:
            for name, adapter in made.items():
                await engine.load(adapter)
                request = GenerationRequest(name, PROMPTS[2], GREEDY, (AdapterScale(adapter.digest),))
                assert tokens_of(await ask(engine, request)) == wanted[name], name

    run(test)
