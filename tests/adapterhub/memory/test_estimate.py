"""The memory estimate against counts of architectures and published measurements of peaks."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapterhub.cli.main import app
from adapterhub.errors import AdapterHubError, BaseUnsupported
from adapterhub.memory.estimate import constant_bytes
from adapterhub.memory.known_shapes import MODEL_SHAPES
from adapterhub.memory.model_shape import ModelShape
from adapterhub.memory.serving import ServingLoad, estimate_serving
from adapterhub.memory.training import TrainingLoad, estimate_training, textbook

GB, GIB = 1e9, float(1 << 30)
SIX = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "gate_proj")
"""what answer.ai's fsdp_qlora adapts"""
HUGGING_FACE = TrainingLoad(is_checkpointed=True, layer_inputs="copied", logits="every-token", has_mask=False)
"""how the published runs compute: PEFT's layers, Hugging Face's loss, FlashAttention"""
PAPER = replace(HUGGING_FACE, rank=64, tokens=512, adapter_bytes=2, is_paged=True)
"""arXiv 2305.14314, figure 6"""
WIKI = replace(HUGGING_FACE, rank=8, adapter_bytes=4)
"""LLaMA-Factory's wiki: Llama-2-7B, all linear modules, batch 1, FlashAttention-2, A100"""
ANSWER = replace(
    HUGGING_FACE, rank=64, modules=SIX, adapter_bytes=2, moment_bytes=4, gpus=2, sharding="all", tokens=512
)
"""answer.ai, "Enabling 70B finetuning on consumer GPUs" benchmarks: all of it bf16, Adam too"""
PEFT_70B = replace(HUGGING_FACE, rank=8, tokens=2 * 2048, gpus=2, sharding="all")
"""PEFT's documentation of FSDP-QLoRA; batch and length from its examples/sft/run_peft_qlora_fsdp.sh"""


@dataclass(frozen=True)
class Published:
    source: str
    model: str
    load: TrainingLoad
    measured: float
    """bytes on one GPU"""

    @property
    def error(self) -> float:
        estimate = estimate_training(MODEL_SHAPES[self.model], self.load)
        return estimate.size_bytes / self.measured - 1


def _answer(model: str, rows: int, length: int, gib: float, **changed: object) -> Published:
    load = replace(ANSWER, tokens=rows * length, **changed)  # type: ignore[arg-type]
    return Published(f"answer.ai {load.quantization} {rows} x {length}", model, load, gib * GIB)


PUBLISHED = [
    *(
        Published("QLoRA figure 6", f"llama-{size}", PAPER, gb * GB)
        for size, gb in (("7b", 6.9), ("13b", 11.3), ("33b", 24.7), ("65b", 45.0))
    ),
    *(
        Published(f"LLaMA-Factory {tokens}", "llama-7b", replace(WIKI, tokens=tokens), gb * GB)
        for tokens, gb in ((1024, 6), (2048, 7), (4096, 9), (8192, 12), (16_384, 19), (32_768, 32))
    ),
    Published("LLaMA-Factory 4 x 1024", "llama-7b", replace(WIKI, tokens=4096), 9 * GB),
    Published("LLaMA-Factory 4 x 1024, 16 bit", "llama-7b", replace(WIKI, tokens=4096, quantization="none"), 17.5 * GB),
    Published("PEFT", "llama-2-70b", PEFT_70B, 35.6 * GB),
    Published("PEFT, offloaded", "llama-2-70b", replace(PEFT_70B, is_offloaded=True), 19.6 * GB),
    _answer("llama-7b", 1, 512, 4.98),
    _answer("llama-7b", 1, 2048, 5.21),
    _answer("llama-7b", 4, 2048, 11.22),
    _answer("llama-7b", 10, 2048, 20.97),
    _answer("llama-7b", 1, 512, 10.24, quantization="none"),
    _answer("llama-7b", 1, 2048, 10.22, quantization="none"),
    _answer("llama-7b", 4, 2048, 16.14, quantization="none"),
    _answer("llama-7b", 6, 2048, 21.35, quantization="none"),
    _answer("llama-7b", 8, 2048, 20.94, sharding="none"),
    _answer("llama-7b", 4, 2048, 22.04, sharding="none", quantization="none"),
    _answer("yi-34b", 2, 2048, 23.05),
    _answer("yi-34b", 4, 2048, 22.98, is_offloaded=True),
    _answer("llama-2-70b", 2, 2048, 14.92, is_offloaded=True),
    _answer("mistral-7b", 12, 2048, 22.54),
    _answer("mistral-7b", 1, 24_576, 22.54),
]


def test_the_median_error_against_published_peaks_is_at_most_a_tenth() -> None:
    assert statistics.median(abs(row.error) for row in PUBLISHED) <= 0.10


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row.source} {row.model}")
def test_no_published_peak_is_missed_by_more_than_a_quarter(row: Published) -> None:
    assert abs(row.error) <= 0.25


@pytest.mark.parametrize(
    ("model", "weights", "linear", "adapter", "base_mib"),
    [
        ("llama-7b", 6.738, 6.476, 159.9, 3686),
        ("llama-13b", 13.016, 12.688, 250.3, 6867),
        ("llama-33b", 32.529, 32.102, 487.6, 16_606),
        ("llama-65b", 65.286, 64.760, 799.5, 32_860),
        ("llama-2-70b", 68.977, 68.451, 828.4, 34_676),
        ("mistral-7b", 7.242, 6.979, 167.8, 3934),
    ],
)
def test_weights_are_counted_as_the_architecture_has_them(
    model: str, weights: float, linear: float, adapter: float, base_mib: int
) -> None:
    shape = MODEL_SHAPES[model]
    assert round(shape.weights / 1e9, 3) == pytest.approx(weights, abs=0.0011)
    assert round(shape.linear_weights / 1e9, 3) == pytest.approx(linear, abs=0.0011)
    assert round(shape.lora_weights(64) / 1e6, 1) == pytest.approx(adapter, abs=0.06)
    device = {item.name: item.size_bytes for item in estimate_training(shape, PAPER).device}
    base = device["base, 4-bit codes"] + device["quantization constants"] + device["embedding, head and norms"]
    assert base / (1 << 20) == pytest.approx(base_mib, rel=0.001)


def test_constants_take_half_a_bit_and_an_eighth_when_quantized_again() -> None:
    assert 8 * constant_bytes(1 << 20, is_double=False) / (1 << 20) == 0.5
    assert 8 * constant_bytes(1 << 20) / (1 << 20) == pytest.approx(0.127, abs=0.0005)


def test_the_textbook_row_is_the_formulas() -> None:
    found = {item.name: item.size_bytes for item in textbook(1000, 10, gpus=4)}
    assert found["full, fp32 Adam: 16N"] == 16_000
    assert found["full, mixed precision: 12N"] == 12_000
    assert found["full, sharded: 16N/GPUs"] == 4000
    assert found["LoRA: 4N + 16M"] == 4160
    assert found["QLoRA: N/2 + 16M"] == 660


def test_sharding_divides_what_is_held_and_offloading_moves_it_to_the_host() -> None:
    shape = MODEL_SHAPES["llama-2-70b"]
    one, two = (
        estimate_training(shape, replace(PEFT_70B, gpus=gpus, sharding="all" if gpus > 1 else "none")).device
        for gpus in (1, 2)
    )
    whole, part = (next(i.size_bytes for i in items if i.name == "base, 4-bit codes") for items in (one, two))
    assert part == whole // 2
    offloaded = estimate_training(shape, replace(PEFT_70B, is_offloaded=True))
    assert sum(i.size_bytes for i in offloaded.device if i.name == "base, 4-bit codes") == 0
    assert whole in [i.size_bytes for i in offloaded.host]


def test_products_that_only_some_cpus_compile_are_in_the_upper_end_alone() -> None:
    shape = ModelShape(layers=2, hidden=64, intermediate=128, key_value=32, vocabulary=1000)
    held = estimate_training(shape, replace(HUGGING_FACE, device="cpu"))
    compiled = next(item.size_bytes for item in held.device if item.name == "compiled products")
    assert held.low == int(0.75 * (held.size_bytes - compiled))
    assert held.high == int(1.25 * held.size_bytes)


def test_a_paged_optimizer_widens_the_range_downwards_only() -> None:
    shape = MODEL_SHAPES["llama-7b"]
    held, paged = (estimate_training(shape, replace(PAPER, is_paged=is_paged)) for is_paged in (False, True))
    assert paged.high == held.high
    assert paged.low < held.low
    assert "optimizer, paged, moved here" in [item.name for item in paged.host]


def test_serving_grows_by_each_adapter_and_each_cached_token() -> None:
    shape = MODEL_SHAPES["llama-3-8b"]

    def size(**changed: int) -> int:
        return estimate_serving(shape, ServingLoad(**changed)).size_bytes

    assert size(adapters=9) - size(adapters=8) == 2 * shape.lora_weights(16)
    # 32 layers, 8 heads of 128 for keys and for values, 2 bytes each: 128 KiB a token.
    assert size(kv_tokens=1001) - size(kv_tokens=1000) == 128 << 10


@pytest.mark.parametrize("size", [[64, 64], None, True, 0])
def test_a_config_whose_sizes_are_no_single_numbers(size: object) -> None:
    config = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 1000, "num_attention_heads": 4}
    with pytest.raises(KeyError, match="intermediate_size"):
        ModelShape.from_config(config | {"intermediate_size": size})


def test_the_verb_reads_names_and_configs_and_prints_a_range(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11_008, "vocab_size": 32_000}
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 32}))
    by_name, by_file = (
        CliRunner().invoke(app, ["memory", model, "--json"]) for model in ("llama-7b", str(tmp_path / "config.json"))
    )
    assert by_name.exit_code == by_file.exit_code == 0
    assert json.loads(by_name.stdout) | {"notes": []} == json.loads(by_file.stdout) | {"notes": []}
    training = json.loads(by_name.stdout)["training"]
    assert training["low_bytes"] < sum(training["device"].values()) < training["high_bytes"]
    shown = CliRunner().invoke(app, ["memory", "llama-65b", "--gpus", "2", "--sharded", "--paged"]).stdout
    for line in ("base, 4-bit codes", "quantization constants", "rules of thumb", "KV cache", "two checkpoints"):
        assert line in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-such-model"], "not a base on this machine"),
        (["llama-7b", "--offload"], "needs --sharded"),
        (["llama-7b", "--sharded"], "--gpus 2"),
        (["llama-7b", "--sharded", "--gpus", "2", "--method", "full"], "full fine-tuning has none"),
        ([], "expected a model or --recipe"),
        (["--recipe", "no-such-recipe"], "there is no recipe no-such-recipe"),
    ],
)
def test_what_cannot_be_estimated_is_reported(arguments: list[str], said: str, home: Path) -> None:
    outcome = CliRunner().invoke(app, ["memory", *arguments])
    assert isinstance(outcome.exception, AdapterHubError)
    assert said in str(outcome.exception)


def test_a_config_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    outcome = CliRunner().invoke(app, ["memory", str(tmp_path)])
    assert isinstance(outcome.exception, BaseUnsupported)
    assert "vit is no language model" in str(outcome.exception)


def test_a_chat_model_has_the_shape_of_the_model_it_comes_from(home: Path) -> None:
    outcome = CliRunner().invoke(app, ["memory", "smollm2-135m-instruct", "--rank", "16"])
    assert outcome.exit_code == 0, outcome.output
    assert "0.135 billion weights" in outcome.stdout
