"""The plan against the run that it predicts, and the report on masks: what it counts, shows and stops."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from preference_rows import preference_recipe
from tiny_models import TINY_VOCABULARY, make_base_of
from training import WEIGHTS, make_recipe, run
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
)
from typer.testing import CliRunner

from adapterhub.adapter import StoredBase
from adapterhub.bases.capabilities import capability_of
from adapterhub.cli.main import app
from adapterhub.errors import DatasetError, RecipeError, UsageError
from adapterhub.memory import training as memory
from adapterhub.memory.model_shape import ModelShape
from adapterhub.memory.training import TrainingLoad, WeightCounts, estimate_training
from adapterhub.package.lora_config import lora_tensors, read_lora_config
from adapterhub.package.run_record import read_run_record
from adapterhub.package.safetensors_header import read_header
from adapterhub.packer import pack
from train.objectives.mask_report import MaskReport
from train.planning.plan import Plan, make_plan, servable
from train.recipe import LoraSection, read_recipe

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_plan_counts_what_the_run_makes(tmp_path: Path, tiny_base: StoredBase, method: str) -> None:
    recipe = make_recipe(tmp_path, lora={"method": method})
    plan = make_plan(recipe, tiny_base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(recipe, tiny_base, tmp_path / "out")
    tensors = lora_tensors(read_header(tmp_path / "out" / WEIGHTS), read_lora_config(tmp_path / "out"))
    record = read_run_record(tmp_path / "out")
    assert record is not None
    assert plan.trainable_parameters == sum(tensor.info.numel for tensor in tensors)
    assert sum(layer.count for layer in plan.adapted) == len({tensor.module for tensor in tensors})
    assert plan.data_sha256 == record.training.data_sha256
    assert (plan.steps, plan.masks.samples) == (record.training.steps, record.training.samples)
    header = (tmp_path / "out" / WEIGHTS).stat().st_size - plan.adapter_bytes
    assert 0 < header < 10_000


def test_a_plan_of_starting_from_an_adapter_counts_that_adapter(tmp_path: Path, tiny_base: StoredBase) -> None:
    run(make_recipe(tmp_path), tiny_base, tmp_path / "first")
    start = pack(tmp_path / "first", base=tiny_base)
    make_recipe(tmp_path)
    path = tmp_path / "mine.toml"
    path.write_text('start = "./first"\n' + path.read_text().replace("[lora]\nrank = 4\ndropout = 0.1\n", ""))
    plan = make_plan(read_recipe(path), tiny_base, tmp_path / "out", start=start)
    assert (
        plan.trainable_parameters == make_plan(make_recipe(tmp_path), tiny_base, tmp_path / "out").trainable_parameters
    )


def test_a_preference_plan_counts_both_replies(tmp_path: Path, tiny_base: StoredBase) -> None:
    plan = make_plan(preference_recipe(tmp_path, "dpo"), tiny_base, tmp_path / "out")
    assert plan.method == "dpo"
    assert plan.masks.samples == 2 * 8


def test_the_peak_of_a_run_on_the_real_base_lies_in_the_planned_range(tmp_path: Path, smollm2: StoredBase) -> None:
    """The first steps of a shipped recipe, by the command, alone in its process."""
    from train.recipe import shipped_recipes

    shipped = shipped_recipes()["demo-trivia"].read_text()
    (tmp_path / "short.toml").write_text(
        shipped.replace("epochs = 1", "steps = 3").replace("held_out = 40", "held_out = 0")
    )
    plan = make_plan(read_recipe(tmp_path / "short.toml"), smollm2, tmp_path / "out")
    assert plan.parameters == 134_515_008
    assert plan.trainable_parameters == 4_884_480
    assert 0 < plan.seconds.low < plan.seconds.high
    train_by_command(tmp_path, "short.toml")
    record = read_run_record(tmp_path / "out")
    assert record is not None
    assert plan.memory_bytes.low < record.peak_memory_bytes < plan.memory_bytes.high


def train_by_command(folder: Path, recipe: str) -> None:
    """Train into `out`, alone in a process: a peak belongs to the whole process."""
    code = "from adapterhub.cli.main import main; main()"
    command = [sys.executable, "-P", "-c", code, "train", recipe, "-o", "out"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def test_memory_follows_the_row_and_the_optimizer() -> None:
    shape = ModelShape(layers=2, hidden=64, intermediate=128, key_value=32, vocabulary=1000)

    def total(**changed: Any) -> int:
        load: dict[str, Any] = {"counts": WeightCounts(10**6, 10**5, 10**4), "tokens": 100, "device": "cpu"}
        return estimate_training(shape, TrainingLoad(**(load | changed))).size_bytes

    assert total(moment_bytes=2) == total() - 6 * 10**4
    assert total(tokens=200) > total()
    assert total(dtype_bytes=4) > total()


GEMMA2 = {
    "vocab_size": TINY_VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16,
}  # fmt: skip


@pytest.mark.parametrize(("cap", "is_whole"), [(30.0, True), (None, False)])
def test_all_logits_of_a_base_with_soft_caps_are_counted(
    tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch, cap: float | None, is_whole: bool
) -> None:
    monkeypatch.setattr(memory, "LOGITS_AT_ONCE", 16 * TINY_VOCABULARY)
    base = base_of(tmp_path / "base", Gemma2Config(**GEMMA2, final_logit_softcapping=cap), tiny_base)
    recipe = make_recipe(tmp_path, train={"loss_on": "all", "batch_size": 8})
    plan = make_plan(recipe, base, tmp_path / "out")
    logits = next((item.size_bytes for item in plan.memory if item.name == "logits"), 0)
    assert (logits > 5 * 16 * TINY_VOCABULARY * 12) == is_whole


def test_the_peak_of_a_base_with_soft_caps_lies_in_the_planned_range(tmp_path: Path, smollm2: StoredBase) -> None:
    """Four rows of 240 tokens over the vocabulary of SmolLM2: their logits are alive together."""
    config = Gemma2Config(**(GEMMA2 | {"vocab_size": 49_152, "hidden_size": 128, "head_dim": 32}))
    base = base_of(tmp_path / "base", config, smollm2)
    AutoModelForCausalLM.from_config(config).save_pretrained(base.path)
    lines = [{"text": f"{number} {'and so on, ' * 240}"} for number in range(100, 124)]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "capped.toml").write_text(
        f'name = "capped"\nbase = "{base.path}"\n[data]\nsource = "file"\npath = "lines.jsonl"\nformat = "text"\n'
        'held_out = 0\nmax_length = 240\n[train]\nsteps = 3\nbatch_size = 4\nloss_on = "all"\n'
    )
    plan = make_plan(read_recipe(tmp_path / "capped.toml"), base, tmp_path / "out")
    train_by_command(tmp_path, "capped.toml")
    record = read_run_record(tmp_path / "out")
    assert record is not None
    assert plan.memory_bytes.low < record.peak_memory_bytes < plan.memory_bytes.high


def base_of(folder: Path, config: PretrainedConfig, tokenizer_from: StoredBase) -> StoredBase:
    """A base of another architecture: a config and a tokenizer, no weights."""
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer_from.path / name, folder / name)
    return StoredBase(folder, tokenizer_from.ref)


def test_a_base_whose_config_has_other_words_for_its_sizes(tmp_path: Path, tiny_base: StoredBase) -> None:
    config = OPTConfig(
        vocab_size=TINY_VOCABULARY,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        word_embed_proj_dim=32,
    )
    base = base_of(tmp_path / "base", config, tiny_base)
    plan = make_plan(make_recipe(tmp_path), base, tmp_path / "out")
    items = {item.name: item.size_bytes for item in plan.memory}
    assert items["base, 4-bit codes"] == (4 * 32 * 32 + 2 * 32 * 64) // 2
    assert {layers.name for layers in plan.adapted} == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}


def test_another_quantization_than_the_checkpoint_has_is_found_before_the_run(
    tmp_path: Path, tiny_base: StoredBase
) -> None:
    config = LlamaConfig(vocab_size=TINY_VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    base = base_of(tmp_path / "base", config, tiny_base)
    with pytest.raises(UsageError, match="quantized as int8 and nf4 was asked for"):
        make_plan(make_recipe(tmp_path), base, tmp_path / "out")
    assert make_plan(make_recipe(tmp_path, quantization={"kind": "int8"}), base, tmp_path / "out").parameters > 0


def test_a_base_of_text_and_pictures_is_planned_by_its_text(tmp_path: Path, tiny_base: StoredBase) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"vocab_size": TINY_VOCABULARY, "head_dim": 16, "num_key_value_heads": 1}
    base = base_of(tmp_path / "base", Gemma3Config(text_config=text, vision_config=sizes), tiny_base)
    recipe = make_recipe(tmp_path, lora={"targets": ["q_proj"]})
    plan = make_plan(recipe, base, tmp_path / "out")
    assert [item.name for item in plan.memory] == [
        item.name for item in make_plan(recipe, tiny_base, tmp_path / "out").memory
    ]


def test_a_layer_the_base_does_not_have_is_found_before_the_run(tmp_path: Path, tiny_base: StoredBase) -> None:
    with pytest.raises(RecipeError, match="no linear layer query"):
        make_plan(make_recipe(tmp_path, lora={"targets": ["q_proj", "query"]}), tiny_base, tmp_path / "out")


@pytest.mark.parametrize(
    ("lora", "engine", "can_serve", "how"),
    [
        (LoraSection(rank=16), "vllm", True, "--max-lora-rank 16"),
        (LoraSection(rank=24), "vllm", True, "--max-lora-rank 32"),
        (LoraSection(rank=1024), "vllm", False, "up to 512"),
        (LoraSection(method="dora"), "vllm", False, "no DoRA"),
        (LoraSection(method="dora"), "adapterhub", True, "as it is"),
        (LoraSection(rank=128), "adapterhub", True, "--max-lora-rank 128"),
    ],
)
def test_who_can_serve_the_adapter(lora: LoraSection, engine: str, can_serve: bool, how: str) -> None:
    found = next(entry for entry in servable(lora) if entry.engine == engine)
    assert found.can_serve == can_serve
    assert how in found.how


def masks_of(folder: Path, base: StoredBase, **data: Any) -> MaskReport:
    return make_plan(make_recipe(folder, data=data), base, folder / "out").masks


def test_masks_are_counted(tmp_path: Path, tiny_base: StoredBase) -> None:
    found = masks_of(tmp_path, tiny_base)
    assert (found.samples, found.held_out, found.cut, found.untrained, found.ends_trained) == (8, 4, 0, 0, 8)
    assert (found.end_token, found.eos_token, found.pad_is_eos) == ("<|im_end|>", "<|im_end|>", True)
    assert sum(bin_.samples for bin_ in found.lengths) == 8
    trained = [span.text for row in found.rows for span in row if span.is_trained]
    assert len(trained) == 3
    assert all(text.startswith("It is") and text.endswith("<|im_end|>") for text in trained)


def test_cut_answers_are_counted_and_noted(tmp_path: Path, tiny_base: StoredBase) -> None:
    whole = masks_of(tmp_path, tiny_base)
    found = masks_of(tmp_path, tiny_base, max_length=whole.tokens // whole.samples - 1)
    assert 0 < found.ends_trained < found.samples
    assert any("cut before the end of the answer" in note for note in found.notes)


def test_answers_without_any_end_stop_the_run(tmp_path: Path, tiny_base: StoredBase) -> None:
    question = [{"role": "user", "content": "What is 11?"}]
    tokenizer = AutoTokenizer.from_pretrained(tiny_base.path)
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
    recipe = make_recipe(tmp_path, data={"max_length": len(prompt) + 2})  # "It is", and no more
    with pytest.raises(DatasetError) as caught:
        run(recipe, tiny_base, tmp_path / "out")
    assert "no sample trains the end of an answer" in str(caught.value)
    assert not (tmp_path / "out").exists()


def report(**changed: Any) -> MaskReport:
    sound: dict[str, Any] = {"samples": 2, "held_out": 0, "tokens": 9, "trained_tokens": 4, "cut": 0, "untrained": 0}
    sound |= {"ends_trained": 2, "end_token": "<e>", "eos_token": "<e>", "begins_twice": 0, "pad_is_eos": False}
    return MaskReport(**(sound | {"lengths": [], "rows": []} | changed))


def test_a_doubled_beginning_stops_the_run() -> None:
    with pytest.raises(DatasetError, match="1 samples begin with two"):
        report(begins_twice=1).check()


def test_an_end_that_is_not_the_tokenizers_is_noted() -> None:
    assert "the package records <e>, and servers stop at it" in report(eos_token="</s>").notes[0]
    assert report().notes == []


def test_samples_without_the_beginning_the_tokenizer_puts_first_are_noted() -> None:
    assert "3 samples do not begin with BOS" in report(begins_without=3).notes[0]


def test_more_left_out_than_trained_is_noted() -> None:
    assert report(untrained=5).notes == ["more samples were left out (5) than are trained (2)"]


def test_chunks_of_a_text_are_not_counted_as_cut() -> None:
    assert report(ends_trained=1).notes == []
    assert report(ends_trained=1, cut=1).notes == ["1 samples are cut before the end of the answer"]


def test_a_beginning_the_template_forgets_is_counted(tmp_path: Path, tiny_base: StoredBase) -> None:
    """SmolLM2's own tokenizer puts nothing first; one that does, under a template that does not."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_base.path, folder)
    raw = json.loads((folder / "tokenizer.json").read_text())
    begin = {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}
    single = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    raw["post_processor"] = {
        "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {"<|im_start|>": begin},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "bare.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    base = StoredBase(folder, tiny_base.ref)
    assert masks_of(tmp_path, base, template="bare.jinja").begins_without == 8
    assert masks_of(tmp_path, base).begins_without == 0
    assert masks_of(tmp_path, tiny_base, template="bare.jinja").begins_without == 0


def plan_by_command(recipe: Path, *options: str) -> str:
    done = CliRunner().invoke(app, ["train", str(recipe), "--plan", *options])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_command_shows_a_plan_and_prints_it_as_json(tmp_path: Path, tiny_base: StoredBase) -> None:
    make_recipe(tmp_path)
    path = tmp_path / "mine.toml"
    path.write_text(path.read_text().replace("smollm2-135m-instruct", str(tiny_base.path)))
    shown = plan_by_command(path)
    assert "nothing was trained" in shown
    assert "⟦It is" in shown
    assert Plan.model_validate(json.loads(plan_by_command(path, "--json"))).name == "mine"
    assert not Path("mine").exists()


def test_trained_text_is_green_on_a_terminal(
    tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from adapterhub.cli.training.train_plan_view import print_plan

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    print_plan(make_plan(make_recipe(tmp_path), tiny_base, tmp_path / "out"))
    shown = capsys.readouterr().out
    assert "\x1b[32m⟦It is" in shown
    assert "\x1b[2m" in shown


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("lfm2", ["one sample each (its conv layers would let one sample of a row see another)"]),
        ("qwen3_moe", ["left out: 2 x experts (the weights of all experts are one tensor", "left out: 2 x gate"]),
    ],
)
def test_a_plan_says_what_the_base_does_not_allow(
    family: str, told: list[str], tmp_path: Path, smollm2: StoredBase, capsys: pytest.CaptureFixture[str]
) -> None:
    from adapterhub.cli.training.train_plan_view import print_plan

    base = make_base_of(tmp_path / "base", family, smollm2)
    plan = make_plan(make_recipe(tmp_path), base, tmp_path / "out")
    print_plan(plan)
    shown = capsys.readouterr().out
    assert all(part in shown for part in told)
    config = AutoModelForCausalLM.from_pretrained(base.path).config
    served = capability_of(config).serve
    (ours,) = [engine for engine in plan.servable if engine.engine == "adapterhub"]
    assert ours.can_serve == (served.mode != "refused")
    assert ("one sequence at a time" in ours.how) == (served.mode == "single")
