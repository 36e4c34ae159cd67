"""Training runs on a tiny random Llama, and one on the real base: the folder, its record, and what can go wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from architectures import WINDOW
from preference_rows import preference_recipe
from tiny_models import make_base_of
from training import WEIGHTS, Interrupt, failing_loss, make_recipe, run, tensors_of
from transformers import AutoModelForCausalLM

from adapterhub.adapter import BaseRef, StoredBase
from adapterhub.errors import DatasetError, OutputNotFresh, RecipeError, TrainingFailed, UsageError
from adapterhub.files import sha256_of
from adapterhub.package.lora_config import lora_tensors, read_lora_config
from adapterhub.package.run_record import RunStep, read_run_record
from adapterhub.package.safetensors_header import read_header
from adapterhub.packer import pack
from train import trainer
from train.data.tokenization import Sample
from train.inputs import load_inputs
from train.loop.progress import Silent
from train.planning.plan import make_plan
from train.recipe import read_recipe

# peft asks transformers by a property's old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def test_the_folder_is_a_complete_adapter(tmp_path: Path, tiny_base: StoredBase) -> None:
    recipe = make_recipe(tmp_path)
    end = run(recipe, tiny_base, tmp_path / "out")
    folder = tmp_path / "out"
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        WEIGHTS,
        "chat_template.jinja",
        "recipe.toml",
        "report.html",
        "train_log.jsonl",
    ]
    tensors = lora_tensors(read_header(folder / WEIGHTS), read_lora_config(folder))
    assert len(tensors) == 2 * 7 * 2
    assert {tensor.info.dtype for tensor in tensors} == {"F32"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("tests/tiny-llama", None)
    assert config["target_modules"] == sorted(config["target_modules"])
    assert (folder / "chat_template.jinja").read_text() == (tiny_base.path / "chat_template.jinja").read_text()
    assert read_recipe(folder / "recipe.toml").to_toml() == recipe.to_toml()
    assert end.steps == 3


@pytest.mark.parametrize("preference", [None, "dpo"])
def test_a_base_without_a_chat_template_leaves_nothing(
    tmp_path: Path, tiny_base: StoredBase, preference: str | None
) -> None:
    bare = shutil.copytree(tiny_base.path, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    recipe = preference_recipe(tmp_path, preference) if preference else make_recipe(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DatasetError, match="the base has no chat template"):
        run(recipe, StoredBase(bare, BaseRef("tests/bare", None, tiny_base.ref.fingerprint)), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_the_record_says_what_was_trained(tmp_path: Path, tiny_base: StoredBase) -> None:
    recipe = make_recipe(tmp_path)
    end = run(recipe, tiny_base, tmp_path / "out")
    record = read_run_record(tmp_path / "out")
    assert record is not None
    assert record.base == tiny_base.ref
    assert record.quantization.compute_dtype == "float32"
    assert record.training.recipe_sha256 == sha256_of(tmp_path / "out" / "recipe.toml")
    assert (record.training.samples, record.training.steps, record.training.seed) == (8, 3, 0)
    assert record.training.trained_tokens == sum(step.trained_tokens for step in record.steps)
    assert [step.learning_rate for step in record.steps] == pytest.approx([5e-4, 1e-3, 5e-4])
    assert record.evaluations == tuple(end.evaluations)
    assert record.evaluations[0].data == "lines.jsonl, 4 held-out questions"


def test_training_lowers_the_loss_on_what_it_saw(tmp_path: Path, tiny_base: StoredBase) -> None:
    recipe = make_recipe(tmp_path, train={"steps": 30, "learning_rate": 0.02, "max_grad_norm": 1.0})
    run(recipe, tiny_base, tmp_path / "out")
    record = read_run_record(tmp_path / "out")
    assert record is not None
    assert record.steps[-1].loss < record.steps[0].loss / 2
    assert record.evaluations[0].adapter_loss < record.evaluations[0].base_loss


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, tiny_base: StoredBase) -> None:
    recipe = make_recipe(tmp_path)
    for name in ("one", "two"):
        run(recipe, tiny_base, tmp_path / name)
    other = make_recipe(tmp_path, data={"held_out": 0})
    run(other, tiny_base, tmp_path / "three")
    one, two, three = (sha256_of(tmp_path / name / WEIGHTS) for name in ("one", "two", "three"))
    assert one == two
    assert one != three
    assert sha256_of(tmp_path / "one/adapter_config.json") == sha256_of(tmp_path / "two/adapter_config.json")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_measuring_during_a_run_changes_no_byte(tmp_path: Path, tiny_base: StoredBase, dtype: str) -> None:
    for name, every in (("without", 0), ("with", 1)):
        recipe = make_recipe(tmp_path, train={"evaluate_every": every}, quantization={"compute_dtype": dtype})
        run(recipe, tiny_base, tmp_path / name)
    assert sha256_of(tmp_path / "without" / WEIGHTS) == sha256_of(tmp_path / "with" / WEIGHTS)


def test_accumulating_gives_what_a_large_batch_gives(tmp_path: Path, tiny_base: StoredBase) -> None:
    for name, size, times in (("large", 8, 1), ("small", 2, 4)):
        sizes = {"batch_size": size, "gradient_accumulation": times}
        # Without dropout, whose draws depend on the shapes; and longer answers in some samples than in others.
        run(make_recipe(tmp_path, lora={"dropout": 0.0}, train=sizes), tiny_base, tmp_path / name)
    large, small = tensors_of(tmp_path / "large"), tensors_of(tmp_path / "small")
    for name, tensor in large.items():
        torch.testing.assert_close(small[name], tensor, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("method", ["rslora", "dora"])
def test_the_method_reaches_the_adapter(tmp_path: Path, tiny_base: StoredBase, method: str) -> None:
    run(make_recipe(tmp_path, lora={"method": method}), tiny_base, tmp_path / "out")
    config = read_lora_config(tmp_path / "out")
    assert config.described().method == method
    lora_tensors(read_header(tmp_path / "out" / WEIGHTS), config)


def test_only_named_layers_are_adapted(tmp_path: Path, tiny_base: StoredBase) -> None:
    run(make_recipe(tmp_path, lora={"targets": ["q_proj", "v_proj"]}), tiny_base, tmp_path / "out")
    config = read_lora_config(tmp_path / "out")
    modules = {
        tensor.module.rpartition(".")[2] for tensor in lora_tensors(read_header(tmp_path / "out" / WEIGHTS), config)
    }
    assert modules == {"q_proj", "v_proj"}


def test_a_layer_the_base_does_not_have(tmp_path: Path, tiny_base: StoredBase) -> None:
    with pytest.raises(RecipeError) as caught:
        run(make_recipe(tmp_path, lora={"targets": ["q_proj", "query"]}), tiny_base, tmp_path / "out")
    assert "no linear layer query: expected down_proj, gate_proj" in str(caught.value)
    assert "a group (all-linear, attention, mlp, embeddings, head)" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_nothing_held_out_gives_no_evaluation(tmp_path: Path, tiny_base: StoredBase) -> None:
    assert run(make_recipe(tmp_path, data={"held_out": 0}), tiny_base, tmp_path / "out").evaluations == []


def test_an_empty_folder_is_fresh(tmp_path: Path, tiny_base: StoredBase) -> None:
    (tmp_path / "out").mkdir()
    run(make_recipe(tmp_path), tiny_base, tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).is_file()


@pytest.mark.parametrize("kind", ["full folder", "file"])
def test_an_output_that_holds_something(tmp_path: Path, tiny_base: StoredBase, kind: str) -> None:
    taken = tmp_path if kind == "full folder" else tmp_path / "file"
    recipe = make_recipe(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OutputNotFresh) as caught:
        run(recipe, tiny_base, taken)
    assert "already exists: expected a new or empty folder" in str(caught.value)


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, tiny_base: StoredBase) -> None:
    recipe = make_recipe(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tiny_base, tmp_path / "runs" / "out", progress=Interrupt())
    assert list((tmp_path / "runs").iterdir()) == []


def test_another_run_into_the_same_folder_is_not_overwritten(tmp_path: Path, tiny_base: StoredBase) -> None:
    class Rival(Silent):
        def step(self, done: RunStep, *, of: int) -> None:
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out" / "theirs").touch()

    with pytest.raises(OutputNotFresh) as caught:
        run(make_recipe(tmp_path), tiny_base, tmp_path / "out", progress=Rival())
    assert "another process created" in str(caught.value)
    assert (tmp_path / "out" / "theirs").exists()


def test_faulty_data_stops_a_run_before_the_base_is_loaded(
    tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "load_base", None)
    recipe = make_recipe(tmp_path)
    (tmp_path / "lines.jsonl").write_text("{}")
    with pytest.raises(DatasetError, match=r"lines\.jsonl:1"):
        run(recipe, tiny_base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_nan_loss(tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_loss(monkeypatch, None)
    with pytest.raises(TrainingFailed) as caught:
        run(make_recipe(tmp_path), tiny_base, tmp_path / "out")
    assert "loss nan and gradient norm nan at step 1 of 3" in str(caught.value)
    assert "Lower learning_rate (now 0.001)" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_memory_runs_out(
    tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    failing_loss(monkeypatch, error)
    with pytest.raises(TrainingFailed) as caught:
        run(make_recipe(tmp_path), tiny_base, tmp_path / "out")
    assert "halve batch_size" in str(caught.value)


def test_an_unknown_failure_is_not_renamed(
    tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_loss(monkeypatch, RuntimeError("size mismatch"))
    with pytest.raises(RuntimeError, match="size mismatch"):
        run(make_recipe(tmp_path), tiny_base, tmp_path / "out")


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt_oss", "lfm2"])
def test_held_out_loss_is_that_of_each_sample_alone(family: str, tmp_path: Path, smollm2: StoredBase) -> None:
    """Samples longer than the window, and those of a base that packs none."""
    base = make_base_of(tmp_path / "base", family, smollm2)
    recipe = make_recipe(tmp_path, quantization={"kind": "none", "compute_dtype": "float32"})
    data = load_inputs(recipe, base, start=None).objective._data
    held_out = [sample for sample in data.held_out if isinstance(sample, Sample)]
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).eval()
    losses = []
    for sample in held_out:
        ids, trained = torch.tensor(sample.tokens), torch.tensor(sample.trained[1:])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits[trained], ids[1:][trained], reduction="none"))
    assert max(len(sample.tokens) for sample in held_out) > WINDOW
    found = run(recipe, base, tmp_path / "out").evaluations[0].base_loss
    assert found == pytest.approx(torch.cat(losses).mean().item(), abs=2e-4)


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_a_sample_beyond_a_table_of_positions_is_refused_before_a_step(
    method: str, tmp_path: Path, smollm2: StoredBase
) -> None:
    kind = {"kind": "none", "compute_dtype": "float32"}
    recipe = make_recipe(tmp_path, quantization=kind).model_copy(update={"method": method, "virtual_tokens": 8})
    longest = load_inputs(recipe, make_base_of(tmp_path / "long", "gpt2", smollm2), start=None).objective.longest
    needed = longest + (8 if method == "prompt" else 0)
    base = make_base_of(tmp_path / "short", "gpt2", smollm2, n_positions=needed - 1)
    with pytest.raises(UsageError, match=f"the longest sample has {longest} tokens.*: the base has {needed - 1} pos"):
        run(recipe, base, tmp_path / "out")
    run(recipe, make_base_of(tmp_path / "enough", "gpt2", smollm2, n_positions=needed), tmp_path / "out")


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_what_is_trained_on_a_base_with_experts_is_packed(family: str, tmp_path: Path, smollm2: StoredBase) -> None:
    base = make_base_of(tmp_path / "base", family, smollm2)
    recipe = make_recipe(tmp_path)
    plan = make_plan(recipe, base, tmp_path / "out")
    assert "experts" in {layers.name for layers in plan.left_out}
    run(recipe, base, tmp_path / "out")
    adapter = pack(tmp_path / "out", base=base)
    named = sum(f".{layers.name}.lora_A" in name for name in tensors_of(adapter.path) for layers in plan.adapted)
    assert named == sum(layers.count for layers in plan.adapted)


def test_a_run_prints_its_choices_before_the_first_step(
    tmp_path: Path, tiny_base: StoredBase, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.train(make_recipe(tmp_path), tiny_base, tmp_path / "out")
    told = capsys.readouterr().err
    before = told[: told.index("step 1/3")]
    for part in ("8 samples to train on", "4 held out; 3 steps", "dtype: float32 (as asked)", "trainable parameters"):
        assert part in before


def test_three_steps_on_the_real_base(tmp_path: Path, smollm2: StoredBase) -> None:
    recipe = make_recipe(
        tmp_path, train={"batch_size": 2}, data={"held_out": 2}, quantization={"compute_dtype": "auto"}
    )
    end = run(recipe, smollm2, tmp_path / "out")
    record = read_run_record(tmp_path / "out")
    assert record is not None
    assert record.quantization.kind == "nf4"
    assert record.steps[-1].loss < record.steps[0].loss
    assert end.evaluations[0].adapter_loss < end.evaluations[0].base_loss
