"""The proof packed with an adapter, replayed by the engine that is to serve it."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
from conftest import make_tiny_base
from transformers import AutoTokenizer

from adapterhub.adapter import Adapter, BaseRef
from adapterhub.base_model import load_base
from adapterhub.base_store import StoredBase
from adapterhub.errors import ProbeMismatch
from adapterhub.manifest import Probe
from adapterhub.package import pack
from serve.local_engine import LocalEngine
from serve.prompt import PromptRenderer
from serve.proof import replay
from serve.wire import ChatRequest


@pytest.fixture(scope="module")
def packed(tiny_base: StoredBase, peft_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    folder = shutil.copytree(peft_folder, tmp_path_factory.mktemp("packed") / "adapter")
    return pack(folder, base=tiny_base)


def _replayed(base: StoredBase, adapter: Adapter) -> None:
    async def test() -> None:
        engine = LocalEngine(load_base(base, purpose="serve", dtype="float32"))
        try:
            await engine.load(adapter)
            await replay(engine, adapter)
        finally:
            await engine.close()

    asyncio.run(test())


def _with_probe(adapter: Adapter, probe: Probe | None) -> Adapter:
    return Adapter(adapter.path, adapter.manifest.model_copy(update={"probe": probe}))


def test_the_adapter_that_was_packed_passes(tiny_base: StoredBase, packed: Adapter) -> None:
    _replayed(tiny_base, packed)


def test_on_another_base_it_does_not(packed: Adapter, smollm2: StoredBase, tmp_path: Path) -> None:
    make_tiny_base(tmp_path, smollm2, layers=2, seed=7)
    with pytest.raises(ProbeMismatch, match="likely cause: another base"):
        _replayed(StoredBase(tmp_path, BaseRef("other", None, None)), packed)


def test_other_tokens_than_recorded_are_a_mismatch(tiny_base: StoredBase, packed: Adapter) -> None:
    probe = packed.manifest.probe
    assert probe is not None
    first = probe.answers[0]
    changed = first.model_copy(update={"tokens": [first.tokens[0] + 1, *first.tokens[1:]], "gaps": [9.0] * 12})
    with pytest.raises(ProbeMismatch, match=f"token 0 is {first.tokens[0]}"):
        _replayed(tiny_base, _with_probe(packed, probe.model_copy(update={"answers": [changed]})))


def test_other_leads_than_recorded_are_a_mismatch(tiny_base: StoredBase, packed: Adapter) -> None:
    probe = packed.manifest.probe
    assert probe is not None
    first = probe.answers[0]
    logits = [first.top_logits[0], *(logit - 5 for logit in first.top_logits[1:])]
    changed = first.model_copy(update={"top_logits": logits})
    with pytest.raises(ProbeMismatch, match="from the best"):
        _replayed(tiny_base, _with_probe(packed, probe.model_copy(update={"answers": [changed]})))


def test_an_adapter_without_a_proof_has_nothing_to_replay(tiny_base: StoredBase, packed: Adapter) -> None:
    _replayed(tiny_base, _with_probe(packed, None))


def test_an_adapters_own_end_token_and_stop_strings_end_its_answers(tiny_base: StoredBase) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base.path)
    prompts = PromptRenderer(tokenizer)
    assert prompts.end_token("<|im_start|>") == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert prompts.end_token(tokenizer.eos_token) is None  # the engine ends there anyhow
    assert prompts.end_token("<|no such token|>") is None
    assert prompts.end_token(None) is None
    request = ChatRequest.model_validate({"model": "x", "messages": [{"role": "user", "content": "Hi"}], "stop": "a"})
    sampling = request.sampling(max_tokens=4, extra_stop=["b"], end_tokens=[7], top_logprobs=None, index=0)
    assert (sampling.stop, sampling.stop_token_ids) == (("a", "b"), (7,))
