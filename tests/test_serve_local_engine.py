"""The engine against PEFT and transformers' own generate: greedy tokens, in fp32, must be equal."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_peft_adapter, make_tiny_base
from packages import FINGERPRINT

from adapterhub.adapter import Adapter, BaseRef
from adapterhub.base_model import Choice, LoadedBase, load_base
from adapterhub.base_store import StoredBase, fingerprint
from adapterhub.errors import (
    AdapterLoadFailed,
    AdapterNoEffect,
    AdapterUnsupported,
    EngineStopped,
    IncompatibleBase,
    RankTooLarge,
    RequestTooLong,
    ServerBusy,
)
from adapterhub.manifest import BaseEntry, Chat, Lora, Manifest
from serve import model_runner
from serve.engine import AdapterScale, Chunk, FinishReason, GenerationRequest, SamplingParams
from serve.local_engine import LocalEngine, LocalEngineConfig
from serve.scheduler import SchedulerLimits

# PEFT, of adapters on an embedding that is tied to the head: what it warns of is merging, not serving.
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")

NUM_TOKENS = 12
PROMPTS = tuple(tuple(random.Random(n).choices(range(100, 49_000), k=3 + 7 * n)) for n in range(5))

KINDS: dict[str, dict[str, Any]] = {
    "lora rank 4": {"rank": 4},
    "lora rank 16": {"rank": 16},
    "rslora": {"rank": 8, "use_rslora": True},
    "attention only": {"rank": 8, "target_modules": ["q_proj", "v_proj"]},
    "dora": {"rank": 8, "use_dora": True},
    "embedding and head": {"rank": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "whole head": {"rank": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    "whole embedding": {"rank": 4, "target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
    "patterns": {"rank": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 40}},
}


def unverified(folder: Path, number: int) -> Adapter:
    """An adapter as the engine sees it; what packing checks is not this file's matter."""
    manifest = Manifest(
        name=folder.name,
        base=BaseEntry(id="tests/tiny-llama", fingerprint=FINGERPRINT, revision=str(number)),
        lora=Lora(method="lora", rank=1, alpha=1, scaling=1, targets=[]),
        chat=Chat(template_sha256="0" * 64, bos=None, eos=None, pad=None),
        files={},
    )
    return Adapter(folder, manifest)


@pytest.fixture(scope="module")
def adapters(tiny_base: StoredBase, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    root = tmp_path_factory.mktemp("adapters")
    found = {}
    for number, (name, options) in enumerate(KINDS.items()):
        make_peft_adapter(root / str(number), tiny_base, seed=number, **dict(options))
        found[name] = unverified(root / str(number), number)
    return found


def load_tiny(stored: StoredBase, dtype: str = "float32") -> LoadedBase:
    return load_base(stored, purpose="serve", dtype=dtype)


def reference(stored: StoredBase, adapter: Adapter | None, prompt: tuple[int, ...]) -> list[int]:
    """Greedy tokens of transformers and PEFT on an NF4 base of their own loading, fp32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(stored.path, dtype=torch.float32, quantization_config=config)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # that kernel computes in bf16
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter.path))
    return greedy(model.eval(), prompt)


def greedy(model: Any, prompt: tuple[int, ...]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=-1
    )
    return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def expected(tiny_base: StoredBase, adapters: dict[str, Adapter]) -> dict[tuple[str | None, int], list[int]]:
    named: dict[str | None, Adapter | None] = {None: None, **adapters}
    return {
        (name, number): reference(tiny_base, adapter, prompt)
        for name, adapter in named.items()
        for number, prompt in enumerate(PROMPTS)
    }


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


GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)


def test_the_references_differ_between_adapters(expected: dict[tuple[str | None, int], list[int]]) -> None:
    for number in range(len(PROMPTS)):
        answers = [tuple(tokens) for (_, prompt), tokens in expected.items() if prompt == number]
        assert len(set(answers)) == len(answers)


@pytest.mark.parametrize(
    "config",
    [
        LocalEngineConfig(),
        LocalEngineConfig(block_size=3, limits=SchedulerLimits(max_num_seqs=5, max_prefill_chunk=4)),
        # 22 blocks of 4 tokens: the longest answers fit alone, the mix does not, so sequences are preempted.
        LocalEngineConfig(kv_cache_bytes=22 * 4 * 512, block_size=4, limits=SchedulerLimits(max_prefill_chunk=16)),
    ],
    ids=["default", "small chunks", "preempting"],
)
@pytest.mark.parametrize("kernels", ["own", "torch"])
def test_every_request_of_random_mixes_equals_peft_alone(
    tiny_base: StoredBase,
    adapters: dict[str, Adapter],
    expected: dict[tuple[str | None, int], list[int]],
    config: LocalEngineConfig,
    kernels: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kernels == "torch":
        monkeypatch.setattr(model_runner, "load_kernels", lambda: (None, Choice("cpu kernels", "torch", "a test")))

    async def test() -> None:
        dice = random.Random(0)
        async with running(load_tiny(tiny_base), config) as engine:
            for adapter in adapters.values():
                await engine.load(adapter)

            async def one(number: int) -> None:
                name = dice.choice([None, *adapters])
                prompt = dice.randrange(len(PROMPTS))
                for _ in range(dice.randint(0, 40)):  # arrive while others run
                    await asyncio.sleep(0.001)
                mix = (AdapterScale(adapters[name].digest),) if name else ()
                request = GenerationRequest(str(number), PROMPTS[prompt], GREEDY, mix)
                assert tokens_of(await ask(engine, request)) == expected[name, prompt], (name, prompt)

            for _ in range(3):
                await asyncio.gather(*(one(number) for number in range(25)))
            await _idle(engine)
            if config.kv_cache_bytes < 1 << 20:
                assert engine.status().num_preemptions > 0

    run(test)


def test_tokens_and_logprobs_are_the_same_bits_in_any_company(
    tiny_base: StoredBase, adapters: dict[str, Adapter]
) -> None:
    """Alone, in a mix of all adapters, and with the prompt in small chunks."""
    sampling = replace(GREEDY, top_logprobs=3)

    async def answers(config: LocalEngineConfig, neighbours: list[str | None]) -> dict[str | None, list[Chunk]]:
        async with running(load_tiny(tiny_base), config) as engine:
            if not any(choice.value == "fused" for choice in engine.choices):
                pytest.skip("torch's own products differ with the number of rows")
            for adapter in adapters.values():
                await engine.load(adapter)

            async def one(name: str | None) -> list[Chunk]:
                mix = (AdapterScale(adapters[name].digest),) if name else ()
                return await ask(engine, GenerationRequest(str(name), PROMPTS[4], sampling, mix))

            return dict(zip(neighbours, await asyncio.gather(*map(one, neighbours)), strict=True))

    async def test() -> None:
        together = await answers(LocalEngineConfig(), [None, *adapters])
        chunked = LocalEngineConfig(block_size=3, limits=SchedulerLimits(max_prefill_chunk=5))
        for name in (None, "lora rank 16", "dora"):
            assert (await answers(LocalEngineConfig(), [name]))[name] == together[name]
            assert (await answers(chunked, [name, "rslora"]))[name] == together[name]

    run(test)


def test_a_repeated_prompt_is_shared_and_answered_with_the_same_bits(
    tiny_base: StoredBase, adapters: dict[str, Adapter]
) -> None:
    async def test() -> None:
        twin = unverified(adapters["dora"].path, 99)  # the same weights under another digest: nothing to share
        async with running(load_tiny(tiny_base), LocalEngineConfig(block_size=4)) as engine:
            for adapter in (adapters["dora"], twin):
                await engine.load(adapter)

            async def one(digest: str) -> list[Chunk]:
                sampling = replace(GREEDY, top_logprobs=3)
                return await ask(engine, GenerationRequest(digest, PROMPTS[4], sampling, (AdapterScale(digest),)))

            first, again, others = [await one(d) for d in (adapters["dora"].digest,) * 2 + (twin.digest,)]
            assert [chunks[0].num_shared for chunks in (first, again, others)] == [0, 28, 0]
            assert tokens_of(first) == tokens_of(again) == tokens_of(others)
            if any(choice.value == "fused" for choice in engine.choices):
                assert [chunk.logprobs for chunk in first] == [chunk.logprobs for chunk in again]

    run(test)


FUSED = ("llama", "mistral", "qwen2", "qwen3")


async def _idle(engine: LocalEngine) -> None:
    """The abort that ends each request has been obeyed; then the books must balance."""
    await engine.unload("sha256:nobody")
    engine.check()


def test_scale_zero_is_the_base_and_scales_add_up(tiny_base: StoredBase, adapters: dict[str, Adapter]) -> None:
    """One adapter at 0.4 beside itself at 0.6 (under another digest) is that adapter."""

    async def test() -> None:
        twin = unverified(adapters["rslora"].path, 99)
        async with running(load_tiny(tiny_base)) as engine:
            await engine.load(adapters["rslora"])
            await engine.load(twin)
            digest = adapters["rslora"].digest

            async def answer(*mix: AdapterScale) -> list[int]:
                return tokens_of(await ask(engine, GenerationRequest(str(mix), PROMPTS[2], GREEDY, mix)))

            base, zero, whole, halves = await asyncio.gather(
                answer(),
                answer(AdapterScale(digest, 0.0)),
                answer(AdapterScale(digest)),
                answer(AdapterScale(digest, 0.4), AdapterScale(twin.digest, 0.6)),
            )
            assert zero == base
            assert halves == whole != base

    run(test)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "phi3": {"pad_token_id": 0},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_of_standard_attention_answer_as_generate_does(
    family: str, tmp_path: Path, tiny_base: StoredBase
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
        **FAMILIES[family],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    wanted = [greedy(model, prompt) for prompt in PROMPTS]
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_base.path / name, tmp_path / name)
    base = load_base(StoredBase(tmp_path, BaseRef("x")), purpose="serve", dtype="float32", kind="none")

    async def test() -> None:
        async with running(base, LocalEngineConfig(limits=SchedulerLimits(max_prefill_chunk=7))) as engine:
            has_kernels = any(choice.value == "own" for choice in engine.choices)
            is_fused = any(choice.value == "fused" for choice in engine.choices)
            assert is_fused == (has_kernels and family in FUSED)
            requests = [GenerationRequest(str(n), prompt, GREEDY) for n, prompt in enumerate(PROMPTS)]
            answers = await asyncio.gather(*(ask(engine, request) for request in requests))
            assert [tokens_of(answer) for answer in answers] == wanted

    run(test)


def test_finish_reasons_and_stop_tokens(
    tiny_base: StoredBase, expected: dict[tuple[str | None, int], list[int]]
) -> None:
    async def test() -> None:
        async with running(load_tiny(tiny_base)) as engine:
            whole = await ask(engine, GenerationRequest("a", PROMPTS[1], GREEDY))
            assert [chunk.finish_reason for chunk in whole] == [None] * (NUM_TOKENS - 1) + [FinishReason.LENGTH]
            stop = expected[None, 1][4]
            cut = await ask(engine, GenerationRequest("b", PROMPTS[1], replace(GREEDY, stop_token_ids=(stop,))))
            assert tokens_of(cut) == expected[None, 1][:5]
            assert cut[-1].finish_reason is FinishReason.STOP

    run(test)


def test_a_closed_stream_is_aborted_and_leaves_nothing(tiny_base: StoredBase) -> None:
    async def test() -> None:
        async with running(load_tiny(tiny_base)) as engine:
            stream = engine.generate(GenerationRequest("a", PROMPTS[0], replace(GREEDY, max_tokens=400)))
            await anext(stream)
            await stream.aclose()
            await _idle(engine)

    run(test)


def test_a_prompt_that_cannot_fit_shows_both_numbers(tiny_base: StoredBase) -> None:
    async def test() -> None:
        async with running(load_tiny(tiny_base), LocalEngineConfig(max_model_len=20)) as engine:
            with pytest.raises(RequestTooLong, match=r"24 tokens.*12.*20"):
                await ask(engine, GenerationRequest("a", PROMPTS[3], GREEDY))

    run(test)


def test_a_full_queue_says_the_server_is_busy(tiny_base: StoredBase) -> None:
    async def test() -> None:
        config = LocalEngineConfig(max_queue=1, limits=SchedulerLimits(max_num_seqs=1))
        async with running(load_tiny(tiny_base), config) as engine:
            long = replace(GREEDY, max_tokens=400)
            streams = [engine.generate(GenerationRequest(str(n), PROMPTS[0], long)) for n in range(2)]
            await anext(streams[0])
            waiting = asyncio.ensure_future(anext(streams[1]))
            while engine.status().num_waiting == 0:
                await asyncio.sleep(0.001)
            with pytest.raises(ServerBusy):
                await ask(engine, GenerationRequest("third", PROMPTS[0], GREEDY))
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            for stream in streams:
                await stream.aclose()

    run(test)


def test_an_adapter_that_is_not_loaded_is_never_answered_by_the_base(tiny_base: StoredBase) -> None:
    async def test() -> None:
        async with running(load_tiny(tiny_base)) as engine:
            with pytest.raises(AdapterLoadFailed, match="not loaded"):
                await ask(engine, GenerationRequest("a", PROMPTS[0], GREEDY, (AdapterScale("sha256:none"),)))

    run(test)


def _refusal(base: StoredBase, adapter: Adapter, error: type[Exception], match: str, **config: int) -> None:
    async def test() -> None:
        async with running(load_tiny(base), LocalEngineConfig(**config)) as engine:
            with pytest.raises(error, match=match):
                await engine.load(adapter)
            assert engine.status().ready

    run(test)


def test_an_adapter_of_a_deeper_base_is_refused(smollm2: StoredBase, tiny_base: StoredBase, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    make_tiny_base(tmp_path / "base", smollm2, layers=3, seed=0)
    deeper = StoredBase(tmp_path / "base", BaseRef("deeper", None, fingerprint(tmp_path / "base")))
    make_peft_adapter(tmp_path / "adapter", deeper, rank=4, seed=0)
    _refusal(tiny_base, unverified(tmp_path / "adapter", 1), IncompatibleBase, "layers.2")


def test_an_adapter_of_another_width_is_refused(smollm2: StoredBase, tiny_base: StoredBase, tmp_path: Path) -> None:
    make_peft_adapter(tmp_path / "adapter", smollm2, rank=4, seed=0, target_modules=["layers.0.self_attn.q_proj"])
    _refusal(tiny_base, unverified(tmp_path / "adapter", 1), IncompatibleBase, "576")


def test_an_adapter_that_touches_no_layer_is_refused(tiny_base: StoredBase, tmp_path: Path) -> None:
    from packages import write_peft_folder
    from safetensors.numpy import load_file, save_file

    folder = write_peft_folder(tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {key.replace("self_attn", "attention"): value for key, value in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    _refusal(tiny_base, unverified(folder, 1), AdapterNoEffect, "another architecture")


def test_too_large_a_rank_is_refused(tiny_base: StoredBase, adapters: dict[str, Adapter]) -> None:
    _refusal(tiny_base, adapters["lora rank 16"], RankTooLarge, "--max-lora-rank 16", max_lora_rank=8)


def test_a_whole_layer_that_is_neither_embedding_nor_head_is_refused(tiny_base: StoredBase, tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "modules_to_save": ["layers.0.mlp.down_proj"]}
    make_peft_adapter(tmp_path / "adapter", tiny_base, rank=4, seed=0, **options)
    _refusal(tiny_base, unverified(tmp_path / "adapter", 1), AdapterUnsupported, r"down_proj \(modules_to_save\)")


def test_an_adapter_gone_from_disk_is_said(tiny_base: StoredBase, adapters: dict[str, Adapter], tmp_path: Path) -> None:
    folder = shutil.copytree(adapters["rslora"].path, tmp_path / "gone")
    (folder / "adapter_model.safetensors").unlink()
    _refusal(tiny_base, unverified(folder, 1), AdapterLoadFailed, "pull it again")


def test_a_dying_worker_fails_requests_and_readiness_and_hangs_nobody(
    tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with running(load_tiny(tiny_base)) as engine:

            def broken(batch: object) -> None:
                raise MemoryError("no more")

            monkeypatch.setattr(engine._runner, "run", broken)
            with pytest.raises(EngineStopped, match="no more"):
                await ask(engine, GenerationRequest("a", PROMPTS[0], GREEDY))
            assert not engine.status().ready
            with pytest.raises(EngineStopped):
                await ask(engine, GenerationRequest("b", PROMPTS[0], GREEDY))
            with pytest.raises(EngineStopped):
                await engine.unload("x")

    run(test)
