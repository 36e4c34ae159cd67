"""A real vLLM server under our API: the same requests as to the fake server. `make test-vllm` runs it.

ADAPTERHUB_VLLM_PYTHON names the Python of vLLM's environment. One server for the whole file, on a tiny Llama in fp32.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from tiny_models import make_peft_adapter, make_tiny_base
from vllm_fixtures import TOKENS, VLLM, Served, model_of, processes_under, serving, whole_characters

from adapterhub.adapter import BaseRef, StoredBase
from adapterhub.bases.store import fingerprint
from adapterhub.package.manifest import MANIFEST_NAME, read_manifest
from adapterhub.packer import pack

pytestmark = VLLM

NAMES = ("a", "b", "c", "d")
PROMPTS = [list(range(1000 + 40 * number, 1012 + 41 * number)) for number in range(4)]
SLOTS = 4


@pytest.fixture(scope="module")
def base(smollm2: StoredBase, tmp_path_factory: pytest.TempPathFactory) -> StoredBase:
    """Make the tiny Llama with heads of 32, the smallest that vLLM's CPU attention takes."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    folder.mkdir()
    make_tiny_base(folder, smollm2, layers=2, seed=0, hidden=128)
    return StoredBase(folder, BaseRef("tests/tiny-llama", None, fingerprint(folder)))


@pytest.fixture(scope="module")
def served(base: StoredBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("vllm")
    for number, name in enumerate(NAMES):
        make_peft_adapter(root / "adapters" / name, base, rank=8, seed=number, use_rslora=name == "d")
        pack(root / "adapters" / name, base=base, name=name)
    with serving(base, root, NAMES, "--dtype", "float32", "--max-loras", str(SLOTS)) as found:
        yield found


@pytest.fixture(scope="module")
def reference(served: Served) -> dict[tuple[str, int], str]:
    """PEFT's and transformers' own greedy answers in fp32, one request at a time."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(served.base.path)
    model: Any = AutoModelForCausalLM.from_pretrained(served.base.path, dtype=torch.float32)
    found = {}
    for name in ("base", *NAMES):
        asked = model if name == "base" else PeftModel.from_pretrained(model, served.folders / name)
        for number, prompt in enumerate(PROMPTS):
            with torch.inference_mode():
                ids = asked.generate(
                    input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                    max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=2,
                )  # fmt: skip
            found[name, number] = whole_characters(tokenizer.decode(ids[0, len(prompt) :]))
        if name != "base":
            model = asked.unload()
    assert len(set(found.values())) == len(found), "adapters that answer alike prove nothing"
    return found


def test_models_are_listed_with_digest_and_precision(served: Served) -> None:
    cards = httpx.get(f"{served.url}/v1/models").json()["data"]
    assert [card["id"] for card in cards] == [served.base.path.name, *NAMES]
    assert cards[0]["precision"] == "float32 weights, computed in float32"
    assert all(card["digest"].startswith("sha256:") for card in cards[1:])


def test_one_at_a_time_the_answers_are_pefts(served: Served, reference: dict[tuple[str, int], str]) -> None:
    for (name, number), wanted in reference.items():
        assert served.tokens(model_of(served, name), PROMPTS[number]) == wanted, (name, number)


def test_in_a_mixed_batch_with_all_slots_full_the_answers_are_pefts(
    served: Served, reference: dict[tuple[str, int], str]
) -> None:
    """Stock vLLM 0.32 on a CPU answers the base's requests here with the adapter of the last slot."""
    with ThreadPoolExecutor(len(reference)) as pool:
        asked = {key: pool.submit(served.tokens, model_of(served, key[0]), PROMPTS[key[1]]) for key in reference}
        found = {key: answer.result() for key, answer in asked.items()}
    assert found == reference


def test_an_adapter_is_loaded_replaced_and_unloaded(served: Served, tmp_path: Path) -> None:
    texts = []
    for seed in (50, 51):
        make_peft_adapter(tmp_path / str(seed), served.base, rank=4, seed=seed)
        pack(tmp_path / str(seed), base=served.base, name="new")
        served.add(tmp_path / str(seed), f"new{seed}")
    assert served.load("new", "new50").status_code == 200
    texts.append(served.tokens("new", PROMPTS[0]))
    body = {"lora_name": "new", "lora_path": "new51", "load_inplace": True}
    assert served.post("/v1/load_lora_adapter", body).status_code == 200
    texts.append(served.tokens("new", PROMPTS[0]))
    assert texts[0] != texts[1]
    assert served.post("/v1/unload_lora_adapter", {"lora_name": "new"}).status_code == 200
    assert served.complete("new", PROMPTS[0]).status_code == 404


def test_what_cannot_be_served_is_refused_with_its_reason(served: Served, smollm2: StoredBase, tmp_path: Path) -> None:
    bases = {}
    for name, layers in (("deep", 3), ("other", 2)):
        make_tiny_base(tmp_path / name, smollm2, layers=layers, seed=7, hidden=128)
        bases[name] = StoredBase(tmp_path / name, BaseRef(f"tests/{name}", None, fingerprint(tmp_path / name)))
    for name, base, options in (
        ("dora", served.base, {"rank": 4, "use_dora": True}),
        ("wide", served.base, {"rank": 96}),
        ("deeper", bases["deep"], {"rank": 4}),
        ("other-base", bases["other"], {"rank": 4}),
    ):
        make_peft_adapter(tmp_path / name, base, seed=5, **options)  # type: ignore[arg-type]
        pack(tmp_path / name, base=base, name=name)
    # One that says it is for this base, and has tensors for a layer vLLM would drop without a word.
    claimed = read_manifest(tmp_path / "deeper").model_copy(update={"base": read_manifest(served.folders / "a").base})
    (tmp_path / "deeper" / MANIFEST_NAME).write_text(claimed.to_json())
    for name in ("dora", "wide", "deeper", "other-base"):
        served.add(tmp_path / name, name)
    for name, code, words in (
        ("dora", "adapter_unsupported", "DoRA"),
        ("wide", "adapter_rank_too_large", "rank 96"),
        ("deeper", "adapter_base_mismatch", "layers this base does not have"),
        ("other-base", "adapter_base_mismatch", "was made for tests/other"),
        ("nowhere", "model_not_found", "nowhere"),
    ):
        answer = served.load("x", name)
        assert 400 <= answer.status_code < 500, answer.text
        assert answer.json()["error"]["code"] == code
        assert words in answer.json()["error"]["message"]
    assert served.complete("nowhere", PROMPTS[0]).status_code == 404
    # Corrupt at rest: named, and never shown to vLLM.
    make_peft_adapter(tmp_path / "torn", served.base, rank=4, seed=6)
    pack(tmp_path / "torn", base=served.base, name="torn")
    served.add(tmp_path / "torn", "torn")
    for weights in served.home.rglob("adapter_model.safetensors"):
        if weights.read_bytes() == (tmp_path / "torn" / "adapter_model.safetensors").read_bytes():
            weights.chmod(0o644)
            weights.write_bytes(weights.read_bytes()[:-8] + b"\0" * 8)
    answer = served.load("x", "torn")
    assert answer.status_code == 422, answer.text
    assert served.tokens("a", PROMPTS[0])


def test_a_deleted_folder_harms_nobody(served: Served, tmp_path: Path) -> None:
    """vLLM itself dies when it must read a folder again that is gone."""
    names = [f"n{number}" for number in range(2 * SLOTS + 1)]  # more than vLLM keeps in memory
    for number, name in enumerate(names):
        make_peft_adapter(tmp_path / name, served.base, rank=4, seed=100 + number)
        pack(tmp_path / name, base=served.base, name=name)
        served.add(tmp_path / name, name)
    for name in names:
        assert served.load(name, name).status_code == 200
    last = served.tokens(names[-1], PROMPTS[1])
    for config in list((served.home / "adapters").rglob("adapter_config.json")):
        shutil.rmtree(config.parent)
    assert served.tokens(names[-1], PROMPTS[1]) == last  # still in one of our slots
    gone = served.complete(names[0], PROMPTS[1])  # not any more, and not to be had again
    assert (gone.status_code, gone.json()["error"]["code"]) == (422, "adapter_file_missing")
    for name in names:
        assert served.post("/v1/unload_lora_adapter", {"lora_name": name}).status_code == 200
    assert served.tokens("a", PROMPTS[0])


def test_a_killed_vllm_comes_back_with_its_adapters(served: Served, reference: dict[tuple[str, int], str]) -> None:
    workers = processes_under(served.process.pid)
    os.kill(workers[-1], signal.SIGKILL)
    statuses = set()
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        answer = served.complete("a", PROMPTS[0], max_tokens=1)
        statuses.add(answer.status_code)
        if answer.status_code == 200 and 503 in statuses:
            break
        time.sleep(0.2)
    assert statuses <= {200, 503}
    assert 503 in statuses
    for name in ("base", "a", "d"):
        assert served.tokens(model_of(served, name), PROMPTS[0]) == reference[name, 0]
