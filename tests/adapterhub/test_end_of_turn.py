"""What ends an answer, from the chat template of training to the server's last token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from training import run
from transformers import AutoModelForCausalLM

import adapterhub
from adapterhub.adapter import BaseRef, StoredBase
from adapterhub.bases.store import fingerprint
from adapterhub.end_of_turn import end_of_turn, other_ends
from adapterhub.package.manifest import MANIFEST_NAME
from adapterhub.packer import pack
from train.recipe import read_recipe

TURN = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + END }}{% endfor %}"
TEMPLATES = {
    "a special token": (TURN.replace("END", "'<|im_end|>'"), "<|im_end|>"),
    "white space after it": (TURN.replace("END", "'<|im_end|>\\n'"), "<|im_end|>"),
    "white space before it": (TURN.replace("END", "' <|im_end|>\\n\\n'"), "<|im_end|>"),
    "several: the first one": (TURN.replace("END", "'<|im_end|><|endoftext|>\\n'"), "<|im_end|>"),
    "another one": (TURN.replace("END", "'<|endoftext|>'"), "<|endoftext|>"),
    "text": (TURN.replace("END", "'\\n### End'"), None),
    "text after it": (TURN.replace("END", "'<|im_end|>\\n###'"), None),
    "a template that fails": ("{{ raise_exception('never') }}", None),
    "a template that is not Jinja": ("{% for %}", None),
}


@pytest.fixture(scope="module")
def tokenizer(tiny_base: StoredBase) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base.path)


@pytest.mark.parametrize(("template", "expected"), TEMPLATES.values(), ids=TEMPLATES)
def test_the_end_of_a_turn_is_what_the_template_renders(tokenizer: Any, template: str, expected: str | None) -> None:
    found = end_of_turn(tokenizer, template)
    assert (None if found is None else tokenizer.decode([found])) == expected


def test_without_a_template_nothing_ends_a_turn(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tokenizer.decode([end_of_turn(tokenizer, None)]) == "<|im_end|>"
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert end_of_turn(tokenizer, None) is None


@pytest.fixture(scope="module")
def other_eos(tiny_base: StoredBase, tmp_path_factory: pytest.TempPathFactory) -> StoredBase:
    """A base whose EOS is <|endoftext|>, with a chat template that ends turns with <|im_end|>: as Qwen2.5's base."""
    folder = tmp_path_factory.mktemp("other-eos") / "base"
    shutil.copytree(tiny_base.path, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = model.get_input_embeddings().weight.data
    rows[2] = rows[3].flip(0)  # of <|im_end|>, which is zero as the padding's in the tiny base: no training reaches it
    model.save_pretrained(folder)
    for name, eos in (
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>"}),
        ("config.json", {"eos_token_id": 0, "pad_token_id": 0}),
        ("generation_config.json", {"eos_token_id": 0, "pad_token_id": 0}),
    ):
        raw = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(raw | eos))
    return StoredBase(folder, BaseRef("tests/other-eos", None, fingerprint(folder)), "apache-2.0")


@pytest.mark.parametrize(
    ("configured", "named"),
    [
        ({"eos_token_id": 0}, "<|endoftext|>"),
        ({"eos_token_id": [0, 1]}, "<|endoftext|>, <|im_start|>"),
        ({"eos_token_id": [0, 2]}, None),
        ({"eos_token_id": 2}, None),
        ({}, None),
        ([], None),
    ],
)
def test_a_plan_reports_a_base_that_names_several_ends(
    tokenizer: Any, tmp_path: Path, configured: object, named: str | None
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(configured))
    notes = other_ends(tmp_path, tokenizer)
    assert bool(notes) == bool(named)
    assert all(f"answers at {named}, the chat template at <|im_end|>" in note for note in notes)


@pytest.fixture(scope="module")
def capitals(other_eos: StoredBase, tmp_path_factory: pytest.TempPathFactory) -> adapterhub.Adapter:
    """An adapter that was trained on that base until it knows three answers by heart, and packed."""
    folder = tmp_path_factory.mktemp("capitals")
    known = [("France", "Paris."), ("Spain", "Madrid."), ("Italy", "Rome.")]
    rows = [
        {"messages": [{"role": "user", "content": f"Capital of {land}?"}, {"role": "assistant", "content": capital}]}
        for land, capital in known
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "capitals.toml").write_text(
        f'name = "capitals"\nbase = "{other_eos.path}"\n[data]\nsource = "file"\npath = "data.jsonl"\nheld_out = 0\n'
        "[lora]\nrank = 16\nalpha = 32\n[train]\nsteps = 60\nbatch_size = 3\nlearning_rate = 1e-2\nwarmup_steps = 0\n"
        'schedule = "constant"\n[quantization]\ncompute_dtype = "float32"\n'
    )
    run(read_recipe(folder / "capitals.toml"), other_eos, folder / "out")
    return pack(folder / "out", base=other_eos)


def test_an_answer_ends_where_training_ended_it(capitals: adapterhub.Adapter, other_eos: StoredBase) -> None:
    chat = capitals.manifest.chat
    assert (chat.eos, chat.stop_token_ids) == ("<|endoftext|>", [2])
    question = [{"role": "user", "content": "Capital of France?"}]
    with adapterhub.LLM(other_eos.path, adapters={"capitals": capitals}, dtype="float32") as llm:
        answer = llm.chat(question, adapter="capitals", temperature=0, max_tokens=16)
        assert (str(answer), answer.finish_reason) == ("Paris.", "stop")
        on = llm.chat(question, adapter="capitals", temperature=0, max_tokens=16, ignore_eos=True)
        assert (on.num_tokens, on.finish_reason) == (16, "length")
        asked = llm.chat(question, adapter="capitals", temperature=0, ignore_eos=True, stop="<|im_end|>")
        assert (str(asked), asked.finish_reason) == ("Paris.", "stop")


def test_a_package_of_the_format_before_ends_there_too(
    capitals: adapterhub.Adapter, other_eos: StoredBase, tmp_path: Path
) -> None:
    folder = shutil.copytree(capitals.path, tmp_path / "old")
    raw = json.loads((folder / MANIFEST_NAME).read_text())
    del raw["chat"]["stop_token_ids"]
    (folder / MANIFEST_NAME).write_text(json.dumps(raw | {"format": 1}))
    with adapterhub.LLM(other_eos.path, adapters={"capitals": folder}, dtype="float32") as llm:
        answer = llm.chat([{"role": "user", "content": "Capital of Italy?"}], adapter="capitals", temperature=0)
        assert (str(answer), answer.finish_reason) == ("Rome.", "stop")
