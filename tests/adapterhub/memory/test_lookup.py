"""Models by the names that people type, by files, and from a Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from architectures import tiny_config
from hub_fixtures import ALICE, PEOPLE, start_hub
from huggingface_hub import HfApi
from typer.testing import CliRunner

from adapterhub.cli.main import app
from adapterhub.errors import AdapterHubError
from adapterhub.memory.known_shapes import MODEL_SHAPES, known_name
from adapterhub.memory.lookup import find_model


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("llama2-70b", "llama-2-70b"),
        ("llama 2 70b", "llama-2-70b"),
        ("meta-llama/Llama-2-70b-hf", "llama-2-70b"),
        ("Llama-2-70b-chat-hf", "llama-2-70b"),
        ("llama-2-7b", "llama-7b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("meta-llama/Llama-3.1-8B", "llama-3-8b"),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b"),
        ("unsloth/llama-3-8b-bnb-4bit", "llama-3-8b"),
        ("T5-11B", "t5-11b"),
        ("google-t5/t5-11b", "t5-11b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("qwen2.5-7b-1m", None),
        ("llama-3-18b", None),
        ("llama-2-7b-32k", None),
        ("-", None),
    ],
)
def test_a_well_known_model_is_found_by_what_people_type(typed: str, meant: str | None) -> None:
    assert known_name(typed) == meant


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def test_a_hub_id_that_no_hub_answers_for_is_one_line(no_hub: None) -> None:
    with pytest.raises(AdapterHubError, match="acme/model is not a base on this machine, and no Hub gave its config"):
        find_model("acme/model")


def test_a_hub_id_is_counted_by_its_config(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_config("gpt2").save_pretrained(tmp_path / "model")
    with start_hub(tmp_path / "hub", PEOPLE) as url:
        api = HfApi(endpoint=url, token=ALICE)
        api.create_repo("alice/tiny")
        api.upload_folder(repo_id="alice/tiny", folder_path=tmp_path / "model")
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("HF_TOKEN", ALICE)
        found = find_model("alice/tiny")
    assert found.shape.weights == find_model(str(tmp_path / "model")).shape.weights


@pytest.mark.parametrize("name", ["config.json", "mixtral.json"])
def test_a_config_file_is_counted_and_its_experts_are_named(tmp_path: Path, name: str) -> None:
    tiny_config("mixtral").save_pretrained(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / name)
    found = find_model(str(tmp_path / name))
    assert found.shape.expert_weights == 2 * 4 * 3 * 64 * 128
    assert "leaves in 16 bit" in " ".join(found.notes)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "llama9"}, "llama9"),
        ({"hidden_size": 64}, "names no model_type and no num_attention_heads"),
        ({"model_type": "vit"}, "vit is no language model"),
        ({"model_type": "llama", "hidden_size": 66, "num_attention_heads": 4}, "cannot be used|contradicts"),
        ([], "JSON object"),
    ],
)
def test_a_config_whose_memory_is_not_known_is_named(tmp_path: Path, config: Any, said: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(config))
    with pytest.raises(AdapterHubError, match=said) as error:
        find_model(str(path))
    assert "adapterhub-" not in str(error.value)


def test_the_command_says_how_many_gpus_it_takes(home: Path) -> None:
    def gpus(*arguments: str) -> dict[str, Any]:
        done = CliRunner().invoke(app, ["memory", *arguments, "--json"])
        assert done.exit_code == 0, done.output
        found: dict[str, Any] = json.loads(done.stdout)["gpus"]
        return found

    # arXiv 2305.14314: 65B on one GPU of 48 GB. answer.ai: 70B on two of 24 GB, with the weights in host RAM.
    assert gpus("llama-65b", "--gpu-gb", "48")["48"]["training"]["gpus"] == 1
    offloaded = gpus("llama 2 70b", "--gpu-gb", "24", "--gpus", "2", "--sharded", "--offload")
    assert offloaded["24"]["training"] == {"gpus": 2, "is_tight": False}
    whole = gpus("llama-7b", "--method", "full", "--gpu-gb", "80", "--gpu-gb", "141")
    assert [whole[size]["training"]["gpus"] for size in ("80", "141")] == [None, 1]
    assert "of 24 GB: 1 for training" in CliRunner().invoke(app, ["memory", "llama-7b"]).stdout
    assert gpus("llama-7b", "--device", "cpu") == {}


def test_a_name_and_its_config_are_the_same_model(home: Path, tmp_path: Path) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28_672}
    config |= {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32_000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, known = find_model(str(tmp_path)).shape, MODEL_SHAPES["llama-2-70b"]
    assert (found.weights, found.linear_weights, found.cached_numbers) == (
        known.weights, known.linear_weights, known.cached_numbers,
    )  # fmt: skip
