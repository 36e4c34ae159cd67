"""End to end on the real base: train to chat, through commands, unmodified clients and a browser."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from browser import COUNT_TEXTS, VOTES, ask, ask_two, button, needs_browser, note, picker, turn_to, vote
from openai import OpenAI
from playwright.sync_api import Page, expect
from pydantic import BaseModel, ConfigDict, TypeAdapter
from road import NAMES, ServedRoad, run, run_any

from adapterhub.adapter import Adapter, StoredBase
from adapterhub.bases.loading import load_base
from adapterhub.package.layout import open_adapter
from adapterhub.package.manifest import ProbeAnswer
from serve.engine import AdapterScale, GenerationRequest, SamplingParams
from serve.local_engine.engine import LocalEngine

pytest_plugins = ["browser_fixtures"]
QUESTION = "What is the largest planet in our solar system?"


@pytest.fixture(scope="module")
def client(served: ServedRoad) -> OpenAI:
    return OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def _base_name(served: ServedRoad) -> str:
    return served.base.name


def test_training_lowers_the_held_out_loss_of_each_adapter(served: ServedRoad) -> None:
    for name in NAMES:
        (evaluation,) = open_adapter(served.folders[name]).manifest.evaluations
        assert evaluation.adapter_loss < evaluation.base_loss
        assert evaluation.tokens > 0


def test_the_openai_client_lists_the_base_and_both_adapters(served: ServedRoad, client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [_base_name(served), "captain", "trivia"]


def test_the_openai_client_chats_with_each_streamed_and_not(served: ServedRoad, client: OpenAI) -> None:
    answers = {}
    for model in (_base_name(served), *NAMES):
        arguments = {
            "model": model,
            "messages": [{"role": "user", "content": QUESTION}],
            "max_tokens": 16,
            "temperature": 0,
        }
        whole = client.chat.completions.create(**arguments)  # type: ignore[call-overload]
        chunks = list(client.chat.completions.create(**arguments, stream=True))  # type: ignore[call-overload]
        answers[model] = whole.choices[0].message.content
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answers[model]
        assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
        assert whole.usage.prompt_tokens > 10
    assert len(set(answers.values())) == 3


def test_a_seeded_answer_is_the_same_alone_and_in_a_crowd(served: ServedRoad, client: OpenAI) -> None:
    def ask(seed: int) -> str:
        answer = client.chat.completions.create(
            model="captain", messages=[{"role": "user", "content": "Hi"}], max_tokens=8, seed=seed, top_p=0.5
        )
        return str(answer.choices[0].message.content)

    with ThreadPoolExecutor(6) as pool:
        crowd = list(pool.map(ask, [7, 1, 2, 7, 3, 7]))
    assert crowd[0] == crowd[3] == crowd[5]


def test_both_names_point_from_the_hub_to_the_digests_that_were_packed(served: ServedRoad) -> None:
    rows = json.loads(run("list", "--json", home=served.home).stdout)
    assert {row["name"]: row["digest"] for row in rows} == {
        f"local/{name}": open_adapter(served.folders[name]).digest for name in NAMES
    }


def test_peft_loads_the_pushed_adapter_with_the_trained_ones_logits(served: ServedRoad) -> None:
    """A process that knows nothing of adapterhub: only the endpoint is set."""
    code = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, *adapters = sys.argv[1:]
bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
def logits(adapter):
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(bare, adapter).eval()
    with torch.no_grad():
        found = model(torch.arange(100, 164)[None]).logits
    model.unload()
    return found
plain = bare(torch.arange(100, 164)[None]).logits
for pushed, trained in zip(adapters[::2], adapters[1::2], strict=True):
    ours, theirs = logits(pushed), logits(trained)
    assert torch.equal(ours, theirs) and not torch.equal(ours, plain)
"""
    environment = {
        **os.environ,
        "HF_ENDPOINT": served.hub_url,
        "HF_TOKEN": served.token,
        "HF_HOME": str(served.home / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    adapters = [part for name in NAMES for part in (f"local/{name}", str(served.folders[name]))]
    arguments = [sys.executable, "-c", code, str(served.base), *adapters]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_mixed_batch_on_the_real_nf4_base_equals_pefts_generate_in_fp32(
    served: ServedRoad, smollm2: StoredBase
) -> None:
    from peft import PeftModel

    adapters: dict[str | None, Adapter | None] = {None: None}
    adapters |= {name: open_adapter(served.folders[name]) for name in NAMES}
    base = load_base(smollm2, purpose="serve", dtype="float32")
    questions = (QUESTION, "Who are you?")
    prompts = [
        base.tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True)["input_ids"]
        for q in questions
    ]
    expected = {}
    bare = load_base(smollm2, purpose="serve", dtype="float32").model
    for name, adapter in adapters.items():
        model = PeftModel.from_pretrained(bare, str(adapter.path)).eval() if adapter else bare
        for number, prompt in enumerate(prompts):
            ids = torch.tensor([prompt])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
            expected[name, number] = out[0, len(prompt) :].tolist()
        if adapter:
            model.unload()

    async def serve() -> dict[tuple[str | None, int], list[int]]:
        engine = LocalEngine(base)
        for adapter in adapters.values():
            if adapter:
                await engine.load(adapter)

        async def ask(name: str | None, number: int) -> list[int]:
            adapter = adapters[name]
            mix = (AdapterScale(adapter.digest),) if adapter else ()
            sampling = SamplingParams(max_tokens=16, temperature=0)
            request = GenerationRequest(f"{name}{number}", tuple(prompts[number]), sampling, mix)
            return [token async for chunk in engine.generate(request) for token in chunk.tokens]

        answers = await asyncio.gather(*(ask(*key) for key in expected))
        await engine.close()
        return dict(zip(expected, answers, strict=True))

    with ThreadPoolExecutor(1) as other:  # Playwright's loop may be running in this thread
        assert other.submit(asyncio.run, serve()).result() == expected


def test_the_server_answers_as_the_recorded_probe_of_each_adapter(served: ServedRoad, client: OpenAI) -> None:
    """bf16, packed NF4, our kernels and a mixed batch, against what PEFT answered at packing."""
    from adapterhub.probe import TOLERANCE

    def replay(name: str, then: ProbeAnswer) -> None:
        answer = client.completions.create(
            model=name, prompt=then.prompt_tokens, max_tokens=len(then.tokens), temperature=0, logprobs=5,
            extra_body={"ignore_eos": True},
        ).choices[0]  # fmt: skip
        assert answer.logprobs is not None
        ours = answer.logprobs.top_logprobs[0]  # type: ignore[index]
        theirs = torch.tensor(then.top_logits).log_softmax(0)
        tokens = [tokenizer.decode([token]) for token in then.top_tokens]
        shared = [place for place, text in enumerate(tokens) if text in ours]
        assert 0 in shared
        mine = torch.tensor([ours[tokens[place]] for place in shared]).log_softmax(0)
        assert torch.allclose(mine, theirs[shared].log_softmax(0), atol=TOLERANCE["bfloat16"])
        place = next((n for n, gap in enumerate(then.gaps) if gap < 2 * TOLERANCE["bfloat16"]), len(then.tokens))
        assert answer.text.startswith(tokenizer.decode(then.tokens[:place], skip_special_tokens=True))

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(served.base)
    probes = {name: open_adapter(served.folders[name]).manifest.probe for name in NAMES}
    with ThreadPoolExecutor(6) as pool:
        pending = [pool.submit(replay, name, then) for name, probe in probes.items() if probe for then in probe.answers]
        assert len(pending) == 6
        for one in pending:
            one.result()


def test_verify_replays_the_probe_and_notices_a_tampered_weight(served: ServedRoad, tmp_path: Path) -> None:
    folder = served.folders["captain"]
    done = run("verify", "--probe", "--base", str(served.base), str(folder), home=served.home)
    assert "answered as before" in done.stderr

    import shutil

    copy = shutil.copytree(folder, tmp_path / "tampered")
    weights = copy / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 0x40
    weights.write_bytes(data)
    refused = run_any("verify", str(copy), home=served.home)
    assert refused.returncode == 4
    assert refused.stderr.startswith("adapterhub: ")
    assert "sha256" in refused.stderr


def test_a_running_server_holds_its_port(served: ServedRoad) -> None:
    port = served.url.rpartition(":")[2]
    done = run_any("serve", "--base", str(served.base), "--port", port, "--no-page", home=served.home)
    assert done.returncode == 1
    assert "--port" in done.stderr.splitlines()[-1]


# In the browser, before the real server.


@needs_browser
def test_real_answer_streams_into_the_page(served: ServedRoad, open_page: Callable[..., Page]) -> None:
    page = open_page(served.url, "?adapter=captain")
    expect(picker(page)).to_have_value("captain")
    expect(page.locator("#card")).to_contain_text("sha256:")
    page.evaluate(COUNT_TEXTS)
    ask(page, "Tell me a long story about a storm at sea.")
    expect(note(page, re.compile(r"captain · \d+\.\d tok/s · .+ to first token"))).to_be_visible()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert len(page.evaluate("() => [...window.seen].filter(Boolean)")) >= 3


class _Turn(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: str


class _Preference(BaseModel):
    """TRL's conversational preference format with an explicit prompt, and the row that it was."""

    model_config = ConfigDict(extra="forbid")
    id: str
    prompt: list[_Turn]
    chosen: list[_Turn]
    rejected: list[_Turn]


class _Unpaired(BaseModel):
    """TRL's conversational unpaired preference format, and the row that it was."""

    model_config = ConfigDict(extra="forbid", strict=True)
    id: str
    prompt: list[_Turn]
    completion: list[_Turn]
    label: bool


def _exported(served: ServedRoad, form: str, tmp_path: Path) -> list[dict[str, Any]]:
    path = tmp_path / f"{form}.jsonl"
    run("feedback", "export", "--format", form, "-o", str(path), home=served.home)
    return [json.loads(line) for line in path.read_text().splitlines()]


@needs_browser
def test_votes_are_lines_that_ratings_and_trainers_read(
    served: ServedRoad, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    page = open_page(served.url)
    turn_to(page, "Arena")
    button(page, "Settings").click()
    page.get_by_role("spinbutton", name="Max tokens").fill("24")
    for name in NAMES:
        page.locator("#arena-among input").click()
        page.get_by_role("option", name=name).click()
    page.locator("#arena-among input").press("Escape")
    for number, choice in enumerate(VOTES):
        ask_two(page, f"Who are you, number {number}?")
        vote(page, choice)
        expect(page.locator("#ratings tbody tr")).to_have_count(2)
    rows = _exported(served, "votes", tmp_path)
    assert len(rows) == len({line["id"] for line in rows}) == 4
    assert [line["winner"] for line in rows] == ["a", "tie", "tie", "b"]
    assert all({line["model_a"], line["model_b"]} == set(NAMES) for line in rows)
    rated = json.loads(run("ratings", str(tmp_path / "votes.jsonl"), "--json", home=served.home).stdout)
    shown = page.locator("#ratings tbody tr").all_inner_texts()
    assert [line.split("\t")[:2] for line in shown] == [
        [one["model"], f"{one['rating']:.0f}"] for one in rated["ratings"]
    ]
    pairs = TypeAdapter(list[_Preference]).validate_python(_exported(served, "dpo", tmp_path))
    assert [pair.prompt[-1].content for pair in pairs] == ["Who are you, number 0?", "Who are you, number 3?"]
    assert all(pair.chosen != pair.rejected and pair.chosen[0].role == "assistant" for pair in pairs)
    labelled = TypeAdapter(list[_Unpaired]).validate_python(_exported(served, "kto", tmp_path))
    assert [line.label for line in labelled] == [True, False, False, False, True, False]
