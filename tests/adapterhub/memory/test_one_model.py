"""The commands, the report and the advice after out-of-memory show the same items for the same inputs."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import TINY_VOCABULARY, copy_tokenizer
from training import failing_loss, make_recipe, run
from transformers import LlamaConfig
from typer.testing import CliRunner

import train.recipe
from adapterhub.adapter import StoredBase
from adapterhub.choice import Choice
from adapterhub.cli.main import app
from adapterhub.errors import TrainingFailed
from adapterhub.memory.estimate import total
from adapterhub.memory.known_shapes import MODEL_SHAPES
from adapterhub.memory.model_shape import ModelShape
from adapterhub.package.run_record import REPORT_NAME
from adapterhub.units import format_bytes
from train.planning import plan as planning
from train.planning.plan import make_plan

LENGTH = 64
RECIPES: dict[str, dict[str, Any]] = {
    "dropout": {"lora": {"rank": 64, "dropout": 0.1}},
    "paged": {"train": {"activation_checkpointing": True, "optimizer": "paged-adamw"}},
    "dora on attention": {"lora": {"rank": 8, "method": "dora", "targets": "attention"}},
    "pissa": {"lora": {"rank": 4, "init": "pissa", "targets": ["q_proj", "down_proj"]}},
    "8 bit": {"quantization": {"kind": "int8"}, "train": {"optimizer": "adamw-8bit"}},
    "fp4, one quantization": {"quantization": {"kind": "fp4", "double_quant": False, "block_size": 128}},
    "16 bit": {"quantization": {"kind": "none", "compute_dtype": "bfloat16"}},
    "long rows": {"train": {"batch_size": 40}},
    "prompt": {"method": "prompt"},
    "prefix": {"method": "prefix"},
    "head": {"method": "head"},
    "full": {"method": "full", "quantization": {"kind": "none"}},
}  # fmt: skip
SHAPES = {
    "tied": ModelShape(2, 64, 128, 32, TINY_VOCABULARY, is_tied=True),
    "wide": ModelShape(3, 128, 384, 128, TINY_VOCABULARY),
}


def save_base(folder: Path, shape: ModelShape, tokenizer_from: StoredBase) -> Path:
    """Config and tokenizer of a base of this shape, without weights."""
    LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=4, num_key_value_heads=4 * shape.key_value // shape.hidden,
        tie_word_embeddings=shape.is_tied,
    ).save_pretrained(folder)  # fmt: skip
    save_file({"none": torch.zeros(1)}, folder / "model.safetensors")  # a plan reads no weights
    copy_tokenizer(tokenizer_from.path, folder)
    return folder


def save_recipe(path: Path, base: str, sections: dict[str, Any]) -> Path:
    """Write a recipe whose samples fill max_length and are trained whole; no two of them begin alike for long."""
    draw = random.Random(0)
    # A digit is a token. With the tokens of beginning and end: three samples, each from the last token of the other.
    count = LENGTH + 2 * (LENGTH - 1) - 2
    digits = ["".join(draw.choices("0123456789", k=count)) for _ in range(40)]
    path.with_suffix(".jsonl").write_text("\n".join(json.dumps({"text": text}) for text in digits))
    raw: dict[str, dict[str, Any]] = {
        "data": {"source": "file", "path": f"{path.stem}.jsonl", "format": "text", "held_out": 0, "max_length": LENGTH},
        "train": {"epochs": 1, "batch_size": 4, "loss_on": "all"},
    }
    method = sections.get("method")
    text = f'name = "mine"\nbase = {json.dumps(base)}\n' + (f'method = "{method}"\n' if method else "")
    for name in {**raw, **sections}:
        if name != "method":
            entries = raw.get(name, {}) | sections.get(name, {})
            text += f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in entries.items())
    path.write_text(text)
    return path


def printed(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.stdout


def sums(text: str, before: str) -> str:
    found = re.search(rf"^{before}\s*([\d.]+ \w+) \(", text, re.MULTILINE)
    assert found, text
    return found[1]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", RECIPES)
def test_memory_recipes_and_plan_have_the_same_items(
    tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch, name: str, shape: str, device: str
) -> None:
    folder = save_base(tmp_path / "base", SHAPES[shape], tiny_base)
    by_folder = save_recipe(tmp_path / "mine.toml", str(folder), RECIPES[name])
    by_name = save_recipe(tmp_path / "named.toml", "tests-llama", RECIPES[name])
    monkeypatch.setitem(MODEL_SHAPES, "tests-llama", SHAPES[shape])
    monkeypatch.setattr(train.recipe, "shipped_recipes", lambda: {"mine": by_name})
    if device == "cuda":  # as on a machine with such a GPU

        def choose(dtype: str | None, wanted: str | None) -> tuple[Choice, Choice]:
            return Choice("device", "cuda:0", "a test"), Choice("dtype", dtype or "bfloat16", "a test")

        monkeypatch.setattr(planning, "choose_precision", choose)
        monkeypatch.setattr(planning, "_matmul_rate", lambda dtype, device: 1e12)
        monkeypatch.setattr(planning, "memory_problems", lambda least, device: iter(()))

    raw_plan = json.loads(printed("train", str(by_folder), "--plan", "--json"))
    plan = {item["name"]: item["size_bytes"] for item in raw_plan["memory"]}
    options = ("memory", str(folder), "--recipe", str(by_folder), "--device", device)
    raw_memory = json.loads(printed(*options, "--json"))["training"]
    assert raw_memory["device"] == plan
    assert (raw_memory["low_bytes"], raw_memory["high_bytes"]) == tuple(raw_plan["memory_bytes"].values())

    shown = format_bytes(sum(plan.values()))
    assert sums(printed(*options), "training:") == shown
    assert sums(printed("train", str(by_folder), "--plan"), "memory") == shown
    (listed,) = json.loads(printed("recipes", "--device", device, "--json"))
    assert listed["memory"] == shown
    assert shown in printed("recipes", "--device", device)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("options", "sections"),
    [
        (["--rank", "8", "--no-checkpointing"], {"lora": {"rank": 8}}),
        (["--paged"], {"train": {"activation_checkpointing": True, "optimizer": "paged-adamw"}}),
        (["--method", "lora"], {"train": {"activation_checkpointing": True}, "quantization": {"kind": "none"}}),
        (
            ["--method", "full"],
            {"method": "full", "train": {"activation_checkpointing": True}, "quantization": {"kind": "none"}},
        ),
        (["--gpus", "2", "--sharded", "--offload"], {"train": {"activation_checkpointing": True}}),
    ],
)
def test_options_mean_what_a_recipe_means(
    tmp_path: Path, options: list[str], sections: dict[str, Any], device: str
) -> None:
    sections = {"lora": {"rank": 16}} | sections if "method" not in sections else sections
    rows = {"train": sections.get("train", {}) | {"batch_size": 40}}
    recipe = save_recipe(tmp_path / "mine.toml", "smollm2-135m", sections | rows)
    world = options if "--gpus" in options else []
    device_options = ["--device", device, "--json"]
    by_options = printed("memory", "smollm2-135m", "--tokens", str(40 * LENGTH), *options, *device_options)
    by_recipe = printed("memory", "--recipe", str(recipe), *world, *device_options)
    assert json.loads(by_options)["training"] == json.loads(by_recipe)["training"]


def test_the_report_shows_the_plans_items(tmp_path: Path, tiny_base: StoredBase) -> None:
    recipe = make_recipe(tmp_path)
    plan = make_plan(recipe, tiny_base, tmp_path / "out")
    run(recipe, tiny_base, tmp_path / "out")
    page = (tmp_path / "out" / REPORT_NAME).read_text()
    for item in plan.memory:
        name = item.name.replace("'", "&#39;")
        assert f'<td>{name}</td><td class="n">{format_bytes(item.size_bytes)}</td>' in page
    low, high = format_bytes(plan.memory_bytes.low), format_bytes(plan.memory_bytes.high)
    assert f"planned {format_bytes(total(plan.memory))} (range {low} to {high})" in page


def test_the_advice_after_out_of_memory_counts_the_plans_items(
    tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tmp_path)
    plan = make_plan(recipe, tiny_base, tmp_path / "out")
    failing_loss(monkeypatch, MemoryError())
    with pytest.raises(TrainingFailed) as caught:
        run(recipe, tiny_base, tmp_path / "out")
    named = re.search(r"of the ([\d.]+ \w+) planned, ([\d.]+ \w+) are for ([^:]+):", str(caught.value))
    assert named
    sizes = {item.name: format_bytes(item.size_bytes) for item in plan.memory}
    assert named[1] == format_bytes(total(plan.memory))
    assert named[2] == sizes[named[3]]


def test_what_a_recipe_sets_is_not_taken_from_options(tmp_path: Path) -> None:
    recipe = save_recipe(tmp_path / "mine.toml", "smollm2-135m", {})
    done = CliRunner().invoke(app, ["memory", "--recipe", str(recipe), "--rank", "8", "--paged"])
    assert "--recipe sets --rank, --paged" in str(done.exception)


def test_a_recipes_base_may_be_any_whose_config_is_here(tmp_path: Path, tiny_base: StoredBase) -> None:
    unknown = save_recipe(tmp_path / "unknown.toml", "no-such-base", {})
    assert "no-such-base is not a base" in str(CliRunner().invoke(app, ["memory", "--recipe", str(unknown)]).exception)
    recipe = save_recipe(tmp_path / "mine.toml", str(tiny_base.path), {})
    assert "training:" in printed("memory", "--recipe", str(recipe))
    shutil.copy(tiny_base.path / "config.json", tmp_path / "config.json")
    assert "training:" in printed("memory", str(tmp_path / "config.json"), "--recipe", str(recipe))
