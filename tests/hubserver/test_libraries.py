"""Unmodified libraries and the `hf` command against our hub, each in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_fixtures import ALICE, PEOPLE, start_hub
from huggingface_hub import HfApi

from adapterhub.adapter import StoredBase

Run = Callable[..., str]

_PUSHES = """
import importlib.util, sys, torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

torch.manual_seed(3)
tokens = torch.arange(40).reshape(2, 20)
tokenizer = AutoTokenizer.from_pretrained("alice/tiny")
# Rank 1500 makes the weights larger than what travels inside a commit.
lora = dict(r=1500, target_modules="all-linear", task_type="CAUSAL_LM")

def base():
    return AutoModelForCausalLM.from_pretrained("alice/tiny").eval()

@torch.no_grad()
def logits(model):
    return model.eval()(tokens).logits

model = get_peft_model(base(), LoraConfig(**lora, init_lora_weights=False))
expected = logits(model)
model.push_to_hub("alice/peft")
assert not torch.allclose(logits(base()), expected)
for name, loaded in (
    ("PeftModel", PeftModel.from_pretrained(base(), "alice/peft")),
    ("AutoPeftModel", AutoPeftModelForCausalLM.from_pretrained("alice/peft")),
    ("AutoModel", AutoModelForCausalLM.from_pretrained("alice/peft")),
):
    print(name, torch.equal(logits(loaded), expected))

common = dict(max_steps=1, per_device_train_batch_size=1, report_to=[], use_cpu=True, push_to_hub=True)
ids = tokenizer("a short text").input_ids
arguments = TrainingArguments(sys.argv[1] + "/t", **common, hub_model_id="alice/transformers")
data = [{"input_ids": ids, "labels": ids}]
trainer = Trainer(get_peft_model(base(), LoraConfig(**lora)), arguments, train_dataset=data, processing_class=tokenizer)
trainer.train()
trainer.push_to_hub()
if importlib.util.find_spec("trl"):
    from trl import SFTConfig, SFTTrainer
    arguments = SFTConfig(sys.argv[1] + "/s", **common, hub_model_id="alice/trl", bf16=False)
    data = Dataset.from_list([{"text": "a short text"}])
    trainer = SFTTrainer(
        base(), arguments, train_dataset=data, processing_class=tokenizer, peft_config=LoraConfig(**lora)
    )
    trainer.train()
    trainer.push_to_hub()
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, tiny_base: StoredBase) -> Iterator[str]:
    """A hub that has the tiny base as `alice/tiny`."""
    with start_hub(tmp_path_factory.mktemp("hub"), PEOPLE) as url:
        run = runner(url, tmp_path_factory.mktemp("client"))
        run("hf", "upload", "alice/tiny", str(tiny_base.path), ".")
        yield url


@pytest.fixture
def run(url: str, tmp_path: Path) -> Run:
    return runner(url, tmp_path)


@pytest.fixture(scope="module")
def pushed(url: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What was printed while PEFT, transformers and TRL pushed; in one process, whose imports take longest."""
    folder = tmp_path_factory.mktemp("libraries")
    return runner(url, folder)("python", "-c", _PUSHES, str(folder))


def runner(url: str, folder: Path) -> Run:
    """Runs a command of this environment as alice, with a home of its own; gives what it printed."""

    def run(*command: str) -> str:
        env = {**os.environ, "HF_ENDPOINT": url, "HF_TOKEN": ALICE, "HF_HOME": str(folder / "home"), "NO_COLOR": "1"}
        program = str(Path(sys.executable).with_name(command[0]))
        done = subprocess.run([program, *command[1:]], env=env, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize("loader", ["PeftModel", "AutoPeftModel", "AutoModel"])
def test_pushed_adapter_gives_equal_logits(pushed: str, loader: str) -> None:
    assert f"{loader} True" in pushed.splitlines()


@pytest.mark.parametrize("library", ["peft", "transformers", "trl"])
def test_library_pushes_with_the_settings_it_comes_with(url: str, pushed: str, library: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    api = HfApi(endpoint=url, token=ALICE)
    info = api.model_info(f"alice/{library}", files_metadata=True)
    files = {file.rfilename: file for file in info.siblings or []}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(files)
    assert files["adapter_model.safetensors"].lfs is not None
    assert "base_model:adapter:alice/tiny" in (info.tags or [])


def test_hf_command(url: str, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    weights = os.urandom(11 << 20)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "README.md").write_text("---\nbase_model: org/base\ntags: [lora]\n---\n")
    assert "alice" in run("hf", "auth", "whoami")
    assert "alice/songs" in run("hf", "repos", "create", "alice/songs")
    assert "alice/songs" in run("hf", "upload", "alice/songs", str(folder), ".", "--commit-message", "all")
    run("hf", "repos", "tag", "create", "alice/songs", "v1")
    assert "v1" in run("hf", "repos", "tag", "list", "alice/songs")
    run("hf", "download", "alice/songs", "--revision", "v1", "--local-dir", "got")
    assert (tmp_path / "got" / "adapter_model.safetensors").read_bytes() == weights
    found = run("hf", "models", "list", "--author", "alice", "--search", "songs", "--format", "json")
    assert [model["id"] for model in json.loads(found)] == ["alice/songs"]
    assert json.loads(run("hf", "models", "info", "alice/songs", "--format", "json"))["id"] == "alice/songs"
    run("hf", "repos", "tag", "delete", "alice/songs", "v1", "--yes")
    assert "v1" not in run("hf", "repos", "tag", "list", "alice/songs")
