"""The shipped recipes: each parses, says what the paper says, and is planned on a base of its sizes without weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adapterhub.adapter import BaseName, BaseRef, StoredBase
from adapterhub.bases.store import known_bases
from adapterhub.cli.main import app
from adapterhub.memory.known_shapes import shape_of
from adapterhub.memory.model_shape import ModelShape
from train.planning.load import estimate_recipe, modules_of
from train.planning.plan import make_plan
from train.recipe import DatasetsData, FileData, LoraSection, Recipe, read_recipe, shipped_recipes

NAMES = [
    "demo-captain", "demo-coding", "demo-trivia", "fsdp-70b", "guanaco-13b", "guanaco-33b", "guanaco-65b", "guanaco-7b",
    "llama3-8b", "mistral", "qwen", "smollm2",
]  # fmt: skip

PAPER = {
    # arXiv 2305.14314, table 9 (OASST1) and appendix B.2: learning rate, dropout; below 1 % held by the scripts alone
    "guanaco-7b": (2e-4, 0.1),
    "guanaco-13b": (2e-4, 0.1),
    "guanaco-33b": (1e-4, 0.05),
    "guanaco-65b": (1e-4, 0.05),
}
TRAINABLE_M = {"guanaco-7b": 159.9, "guanaco-13b": 250.3, "guanaco-33b": 487.6, "guanaco-65b": 799.5, "fsdp-70b": 828.4}
"""millions of parameters, r = 64 on all linear layers, counted from the architectures"""


def recipe(name: str) -> Recipe:
    return read_recipe(shipped_recipes()[name])


def test_no_recipe_is_shipped_untested() -> None:
    assert sorted(shipped_recipes()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_shipped_recipe_parses_and_names_a_known_base(name: str) -> None:
    found = recipe(name)
    assert found.name == name
    assert found.base in known_bases()
    assert shape_of(found.base_name) is not None


@pytest.mark.parametrize("name", PAPER)
def test_guanaco_is_as_in_the_paper(name: str) -> None:
    found = recipe(name)
    rate, dropout = PAPER[name]
    assert (found.train.learning_rate, found.lora.dropout) == (rate, dropout)
    assert (found.train.steps, found.train.batch_size * found.train.gradient_accumulation) == (1875, 16)
    assert (found.lora.rank, found.lora.alpha, found.lora.targets) == (64, 16, "all-linear")
    assert (found.train.schedule, found.train.warmup_steps, found.train.max_grad_norm) == ("constant", 0, 0.3)
    assert (found.train.optimizer, found.train.weight_decay, found.train.group_by_length) == ("paged-adamw", 0, True)
    assert (found.quantization.kind, found.quantization.double_quant) == ("nf4", True)
    assert (found.quantization.block_size, found.quantization.compute_dtype) == (64, "bfloat16")
    assert (found.train.loss_on, found.data.template, found.data.max_length) == ("all", "guanaco", 512)
    assert isinstance(found.data, DatasetsData)
    assert found.data.path == "guanaco"


def outline(folder: Path, shape: ModelShape, tokenizer_from: StoredBase) -> StoredBase:
    """Config and tokenizer of a model with these sizes, as far as a plan needs them."""
    from transformers import LlamaConfig

    heads = shape.hidden // 64
    LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=heads, num_key_value_heads=shape.key_value // 64,
        tie_word_embeddings=shape.is_tied,
    ).save_pretrained(folder)  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer_from.path / name, folder / name)
    return StoredBase(folder, BaseRef("tests/outline"))


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("demo")])
def test_each_recipe_is_planned_without_weights(tmp_path: Path, tiny_base: StoredBase, name: str) -> None:
    found = recipe(name)
    shape = shape_of(found.base_name)
    assert shape is not None
    two_layers = replace(shape, layers=2)  # all are alike, and eighty take half a minute
    lines = [{"text": f"### Human: What is {n}?### Assistant: It is {'very ' * (n % 40)}odd."} for n in range(60)]
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    kept = found.data.model_dump(include={"max_length", "template", "stop"})
    data = FileData(source="file", path=str(tmp_path / "talks.jsonl"), held_out=10, **kept)
    local = found.model_copy(update={"data": data})
    plan = make_plan(local, outline(tmp_path / "base", two_layers, tiny_base), tmp_path / "out")
    assert plan.steps == found.train.num_steps(50)
    trainable = plan.trainable_parameters // 2 * shape.layers
    assert trainable == shape.lora_weights(found.lora.rank)
    assert sum(layer.count for layer in plan.adapted) == 7 * 2
    assert plan.stop == (["### Human:"] if found.data.template == "guanaco" else [])
    if name in TRAINABLE_M:
        assert trainable / 1e6 == pytest.approx(TRAINABLE_M[name], abs=0.1)
    assert 0 < plan.memory_bytes.low < plan.memory_bytes.high
    assert plan.servable[0].can_serve
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "gpu_gib"), [("guanaco-7b", 16), ("guanaco-13b", 24), ("guanaco-33b", 40), ("guanaco-65b", 48)]
)
def test_guanaco_needs_no_more_than_the_gpus_the_paper_names(name: str, gpu_gib: int) -> None:
    found = recipe(name)
    shape = shape_of(found.base_name)
    assert shape is not None
    assert estimate_recipe(found, shape, device="cuda").size_bytes < gpu_gib << 30


def test_the_70b_recipe_needs_its_shards() -> None:
    found = recipe("fsdp-70b")
    shape = shape_of(found.base_name)
    assert shape is not None
    assert estimate_recipe(found, shape, device="cuda").size_bytes > 36e9


ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        ("all-linear", ()),
        (("all-linear", "head"), (*ATTENTION, *MLP, "lm_head")),
        ("attention", ATTENTION),
        (("mlp", "embeddings", "q_proj"), (*MLP, "embed_tokens", "q_proj")),
    ],
)
def test_words_for_targets_are_estimated_as_their_layers(targets: Any, modules: tuple[str, ...]) -> None:
    assert modules_of(LoraSection(targets=targets).targets) == modules


def test_the_list_says_what_each_recipe_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = CliRunner().invoke(app, ["recipes"]).stdout
    line = next(line for line in shown.splitlines() if line.startswith("guanaco-65b"))
    for part in ("llama-65b", "guanaco (datasets)", "nf4, lora r 64", "1875 x 16", "GB"):
        assert part in line
    raw = json.loads(CliRunner().invoke(app, ["recipes", "--json"]).stdout)
    assert [entry["name"] for entry in raw] == NAMES
    assert all(entry["toml"].startswith("#") and entry["about"] for entry in raw)


def test_bases_of_the_recipes_parse_as_names() -> None:
    assert all(str(BaseName.parse(recipe(name).base)) == recipe(name).base for name in NAMES)
