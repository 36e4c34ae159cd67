"""The probe packed with an adapter, replayed by the engine that is to serve it."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from tiny_models import make_tiny_base
from transformers import AutoTokenizer

from adapterhub.adapter import Adapter, BaseRef, StoredBase
from adapterhub.bases.loading import load_base
from adapterhub.errors import InvalidManifest, ProbeMismatch, RequestTooLong
from adapterhub.package.layout import open_adapter
from adapterhub.package.manifest import MANIFEST_NAME, Probe, parse_manifest
from adapterhub.packer import pack
from adapterhub.probe import replay as verify
from serve.adapters import probe as probe_module
from serve.adapters.probe import ProbedLoader, replay
from serve.api.prompts import PromptRenderer
from serve.api.schemas import ChatRequest
from serve.config import LocalEngineConfig
from serve.engine import Engine, Precision
from serve.local_engine.engine import LocalEngine


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
    probe = packed.probe
    assert probe is not None
    first = probe.answers[0]
    changed = first.model_copy(update={"tokens": [first.tokens[0] + 1, *first.tokens[1:]], "gaps": [9.0] * 12})
    with pytest.raises(ProbeMismatch, match=f"token 0 is {first.tokens[0]}"):
        _replayed(tiny_base, _with_probe(packed, probe.model_copy(update={"answers": [changed]})))


def test_other_leads_than_recorded_are_a_mismatch(tiny_base: StoredBase, packed: Adapter) -> None:
    probe = packed.probe
    assert probe is not None
    first = probe.answers[0]
    logits = [first.top_logits[0], *(logit - 5 for logit in first.top_logits[1:])]
    changed = first.model_copy(update={"top_logits": logits})
    with pytest.raises(ProbeMismatch, match="from the best"):
        _replayed(tiny_base, _with_probe(packed, probe.model_copy(update={"answers": [changed]})))


def test_an_adapter_without_a_probe_has_nothing_to_replay(
    tiny_base: StoredBase, packed: Adapter, tmp_path: Path
) -> None:
    folder = shutil.copytree(packed.path, tmp_path / "bare", ignore=shutil.ignore_patterns("probe.json"))
    bare = open_adapter(folder)
    assert bare.probe is None
    _replayed(tiny_base, bare)


def test_a_prompt_recorded_twice_is_asked_twice(tiny_base: StoredBase, packed: Adapter) -> None:
    probe = packed.probe
    assert probe is not None
    _replayed(tiny_base, _with_probe(packed, probe.model_copy(update={"answers": [probe.answers[0]] * 2})))


def test_a_probe_of_other_prompts_than_ours_is_replayed_as_recorded(tiny_base: StoredBase, packed: Adapter) -> None:
    probe = packed.probe
    assert probe is not None
    base = load_base(tiny_base, purpose="serve", dtype="float32")
    verify(base, _with_probe(packed, probe.model_copy(update={"answers": probe.answers[1:2]})))


def test_an_answer_that_fails_leaves_no_other_running(tiny_base: StoredBase, packed: Adapter) -> None:
    probe = packed.probe
    assert probe is not None
    long, short = sorted(probe.answers, key=lambda answer: -len(answer.prompt_tokens))[::2]
    most = len(short.prompt_tokens) + len(short.tokens)
    assert most < len(long.prompt_tokens) + len(long.tokens)
    proven = _with_probe(packed, probe.model_copy(update={"answers": [short, long]}))

    async def test() -> None:
        engine = LocalEngine(
            load_base(tiny_base, purpose="serve", dtype="float32"), LocalEngineConfig(max_model_len=most)
        )
        try:
            await engine.load(proven)
            with pytest.raises(RequestTooLong):
                await replay(engine, proven)
            await engine.unload(proven.digest)
            engine.check()
            assert engine.status().ready
        finally:
            await engine.close()

    asyncio.run(test())


class _Loading:
    """A ProbedLoader on a fake engine, whose probe's outcome is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, weights: str = "nf4", replays: bool = True) -> None:
        self.engine = FakeEngine(precision=Precision(weights, "float32"))
        self.lines: list[str] = []
        self.num_replayed = 0
        self.outcome: BaseException | None = None
        self.loader = ProbedLoader(self.engine, replays=replays, report=self.lines.append)

        async def replayed(engine: Engine, adapter: Adapter) -> None:
            assert adapter.digest in self.engine.loaded, "replayed before it was loaded"
            self.num_replayed += 1
            if self.outcome is not None:
                raise self.outcome

        monkeypatch.setattr(probe_module, "replay", replayed)

    def load(self, adapter: Adapter) -> None:
        asyncio.run(self.loader.load(adapter))


def test_an_adapter_is_probed_once_and_stays_loaded(packed: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    loading = _Loading(monkeypatch)
    loading.load(packed)
    asyncio.run(loading.engine.unload(packed.digest))
    loading.load(packed)
    assert (loading.num_replayed, loading.lines) == (1, [])
    assert loading.engine.loaded == {packed.digest}


@pytest.mark.parametrize(
    "outcome", [ProbeMismatch("other tokens"), RequestTooLong("too long"), asyncio.CancelledError()]
)
def test_an_adapter_whose_probe_fails_is_unloaded_and_probed_again(
    packed: Adapter, monkeypatch: pytest.MonkeyPatch, outcome: BaseException
) -> None:
    loading = _Loading(monkeypatch)
    loading.outcome = outcome
    for _ in range(2):
        with pytest.raises(type(outcome)):
            loading.load(packed)
        assert not loading.engine.loaded
    loading.outcome = None
    loading.load(packed)
    assert loading.num_replayed == 3


def test_on_other_weights_a_mismatch_is_reported_and_the_adapter_serves(
    packed: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading = _Loading(monkeypatch, weights="bfloat16")
    loading.outcome = ProbeMismatch("other tokens")
    loading.load(packed)
    loading.load(packed)
    assert loading.engine.loaded == {packed.digest}
    assert loading.num_replayed == 1
    assert ["recorded on nf4 weights" in loading.lines[0], "other tokens" in loading.lines[1]] == [True, True]
    assert len(loading.lines) == 2


def test_without_probes_adapters_are_loaded_alone(packed: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    loading = _Loading(monkeypatch, replays=False)
    loading.load(packed)
    assert (loading.engine.loaded, loading.num_replayed) == ({packed.digest}, 0)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"prompt_tokens": []}, "prompt_tokens"),
        ({"prompt_tokens": [-1]}, "prompt_tokens.0"),
        ({"tokens": [], "gaps": []}, "tokens"),
        ({"top_tokens": [], "top_logits": []}, "top_tokens"),
        ({"top_tokens": [5] * 21, "top_logits": [1.0] * 21}, "top_tokens"),
        ({"gaps": [1.0]}, "1 gaps for 12 tokens"),
        ({"top_logits": [1.0]}, "1 top_logits for 5 top_tokens"),
        ({"dtype": "float8"}, "dtype"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_probe_no_engine_could_replay_is_no_manifest(packed: Adapter, answer: dict[str, Any], said: str) -> None:
    raw = json.loads((packed.path / MANIFEST_NAME).read_text())
    raw["probe"] = packed.probe and packed.probe.model_dump(mode="json")
    if "dtype" in answer:
        raw["probe"] |= answer
    else:
        raw["probe"]["answers"][0] |= answer
    with pytest.raises(InvalidManifest, match=said):
        parse_manifest(json.dumps(raw).encode(), where="here")


def test_an_adapters_own_end_token_and_stop_strings_end_its_answers(tiny_base: StoredBase) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base.path)
    prompts = PromptRenderer(tokenizer)
    assert prompts.special_token("<|im_start|>") == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert prompts.special_token("<|no such token|>") is None
    assert prompts.special_token("the") is None  # a word of the vocabulary
    request = ChatRequest.model_validate({"model": "x", "messages": [{"role": "user", "content": "Hi"}], "stop": "a"})
    sampling = request.sampling(max_tokens=4, extra_stop=["b"], end_tokens=[7], top_logprobs=None)[0]
    assert (sampling.stop, sampling.stop_token_ids) == (("a", "b"), (7,))
