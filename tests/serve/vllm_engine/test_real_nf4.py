"""SmolLM2 in NF4 on a real vLLM, through its bitsandbytes plugin, against transformers, bitsandbytes and PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tiny_models import make_peft_adapter
from vllm_fixtures import VLLM, Served, model_of, serving

from adapterhub.adapter import StoredBase
from adapterhub.bases.loading import load_base
from adapterhub.package.manifest import write_probe
from adapterhub.packer import pack

pytestmark = VLLM

NAMES = ("a", "b")
QUESTIONS = (
    "What is the capital of France?", "Name three colours.", "Why is the sky blue?", "Count to ten.", "Who are you?",
    "What is two plus two?", "Write a haiku about rain.", "How do I boil an egg?",
)  # fmt: skip
TOKENS = 24
NEAR_TIE = 0.5
"""logits; bf16 has steps of 0.125 where SmolLM2's are"""


@dataclass(frozen=True)
class Answer:
    prompt: list[int]
    words: list[str]
    """of each token"""
    gaps: list[float]
    """between the two best logits"""


@pytest.fixture(scope="module")
def folders(smollm2: StoredBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("nf4")
    for number, name in enumerate(NAMES):
        make_peft_adapter(root / "adapters" / name, smollm2, rank=8, seed=number)
        pack(root / "adapters" / name, base=smollm2, name=name)
    return root


@pytest.fixture(scope="module")
def reference(smollm2: StoredBase, folders: Path) -> dict[str, list[Answer]]:
    """Greedy answers of the same NF4 weights in bf16, one request at a time."""
    import torch
    from peft import PeftModel

    loaded = load_base(smollm2, purpose="serve", dtype="bfloat16")

    def ask(model: Any, question: str) -> Answer:
        inputs = loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            out = model.generate(
                **inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=2,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        prompt = inputs["input_ids"][0].tolist()
        best_two = [step[0].float().topk(2).values for step in out.logits]
        words = [loaded.tokenizer.decode([token]) for token in out.sequences[0, len(prompt) :].tolist()]
        return Answer(prompt, words, [float(pair[0] - pair[1]) for pair in best_two])

    found = {"base": [ask(loaded.model, question) for question in QUESTIONS]}
    for name in NAMES:
        model = PeftModel.from_pretrained(loaded.model, folders / "adapters" / name)
        found[name] = [ask(model, question) for question in QUESTIONS]
        model.unload()
    texts = {name: ["".join(answer.words) for answer in answers] for name, answers in found.items()}
    assert texts["base"] != texts["a"] != texts["b"], "adapters that answer alike prove nothing"
    return found


@pytest.fixture(scope="module")
def served(smollm2: StoredBase, folders: Path, reference: dict[str, list[Answer]]) -> Iterator[Served]:
    options = ("--vllm-arg=--quantization", "--vllm-arg=bitsandbytes", "--max-model-len", "512", "--max-loras", "2")
    with serving(smollm2, folders, NAMES, *options) as found:
        yield found


def test_the_base_is_reported_as_nf4(served: Served) -> None:
    cards = httpx.get(f"{served.url}/v1/models").json()["data"]
    assert cards[0]["precision"] == "nf4 weights, computed in bfloat16"


def test_answers_are_the_references_up_to_its_first_near_tie(
    served: Served, reference: dict[str, list[Answer]]
) -> None:
    """All at once, every slot in use; so the probes packed with the adapters passed, too, or there were no server."""
    with ThreadPoolExecutor(len(QUESTIONS) * len(reference)) as pool:
        asked = {
            (name, number): pool.submit(served.complete, model_of(served, name), answer.prompt, max_tokens=TOKENS)
            for name, answers in reference.items()
            for number, answer in enumerate(answers)
        }
    compared = dict.fromkeys(reference, 0)
    for (name, number), request in asked.items():
        wanted = reference[name][number]
        sure = next((place for place, gap in enumerate(wanted.gaps) if gap <= NEAR_TIE), TOKENS)
        found = request.result().json()["choices"][0]["logprobs"]["tokens"]
        assert found[:sure] == wanted.words[:sure], (name, QUESTIONS[number])
        compared[name] += sure
    print(f"tokens compared: {compared}")
    assert min(compared.values()) >= 12, compared


def test_a_probe_that_vllm_does_not_reproduce_is_refused(served: Served, tmp_path: Path) -> None:
    """On NF4 a difference is a fault; on other weights it is a note."""
    liar = tmp_path / "liar"
    make_peft_adapter(liar, served.base, rank=8, seed=9)
    probe = pack(liar, base=served.base, name="liar").probe
    assert probe is not None
    first = probe.answers[0]
    logits = [first.top_logits[0], *(logit - 5 for logit in first.top_logits[1:])]
    answers = [first.model_copy(update={"top_logits": logits}), *probe.answers[1:]]
    write_probe(liar, probe.model_copy(update={"answers": answers}))
    served.add(liar, "liar")
    answer = served.load("liar", "liar")
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "adapter_probe_mismatch")
