"""Rows of samples: as the model computes each alone, one sample a row, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_methods import recipe_of
from architectures import tiny_model
from trained_right import TOLERANCE, mixed_samples, training_error
from training import make_recipe, run, tensors_of

from adapterhub.adapter import StoredBase
from adapterhub.bases.capabilities import capability_of
from adapterhub.bases.loading import load_base
from adapterhub.errors import IncompatibleBase, UsageError
from adapterhub.paths import HOME_VARIABLE, home
from train import trainer
from train.data.packing import pack
from train.loop.progress import Silent
from train.model import self_check
from train.model.fused_lora import fuse_lora
from train.model.methods import attach
from train.model.self_check import check_rows
from train.objectives.forward import row_support, token_losses
from train.recipe import Recipe

TOKENS = list(range(20, 60))
PACKED_FAMILIES = (
    "cohere2", "deepseek_v3", "falcon", "gemma2", "gemma3", "gemma3_text", "glm4", "gpt2", "gpt_neox", "gpt_oss",
    "granite", "llama", "llama4", "mistral", "mixtral", "nemotron", "olmo2", "olmo3", "olmoe", "opt", "phi3", "qwen2",
    "qwen3", "qwen3_moe", "smollm3",
)  # fmt: skip
SINGLE_FAMILIES = (
    "bloom", "falcon_h1", "gpt_neo", "granitemoehybrid", "lfm2", "mamba2", "mpt", "qwen3_5", "qwen3_next", "xlstm",
)  # fmt: skip


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return make_recipe(tmp_path)


class Notes(Silent):
    """Progress that keeps what a run prints."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def random_model(model_type: str) -> Any:
    """Return a model whose weights are large enough for every token to count."""
    model = tiny_model(model_type)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(5)
    return model


@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_packed_samples_longer_than_the_window_are_computed_as_alone(family: str) -> None:
    model = random_model(family)
    assert row_support(model).mode == "batched"
    assert training_error(model, mixed_samples(250)) < TOLERANCE


@pytest.mark.parametrize("family", SINGLE_FAMILIES)
def test_what_cannot_be_packed_is_computed_one_sample_a_row(family: str) -> None:
    model = random_model(family)
    support = row_support(model)
    assert (support.mode, bool(support.reason)) == ("single", True)
    samples = mixed_samples(250, lengths=(40, 23))
    assert training_error(model, samples) < TOLERANCE
    with pytest.raises(ValueError, match="several samples in one row"):
        token_losses(model, pack(samples, device=model.device))


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "bloom"])
def test_samples_behind_a_soft_prompt_are_computed_as_peft_does(family: str, tmp_path: Path) -> None:
    model = attach(random_model(family), recipe_of(tmp_path, method="prompt")).eval()
    assert training_error(model, mixed_samples(250)) < TOLERANCE


def test_a_hybrid_without_mamba_layers_is_packed() -> None:
    from architectures import tiny_config
    from transformers import AutoModelForCausalLM

    config = tiny_config("granitemoehybrid")
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    model = AutoModelForCausalLM.from_config(config).eval()
    assert row_support(model).mode == "batched"
    assert training_error(model, mixed_samples(250)) < TOLERANCE


@pytest.mark.parametrize("family", ["bert", "roberta", "bigbird_pegasus"])
def test_encoders_and_encoder_decoders_are_refused(family: str) -> None:
    from transformers import CONFIG_MAPPING

    support = capability_of(CONFIG_MAPPING[family]()).train
    assert support.mode == "refused"
    assert "not a causal language model" in support.reason


def rope_model(rope: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=256, max_position_embeddings=128, initializer_range=0.2, rope_parameters=rope, **sizes
    )
    return LlamaForCausalLM(config).eval()


def test_samples_beyond_the_original_length_of_longrope_are_rows_of_their_own() -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    model = rope_model({"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32, **factors})
    assert row_support(model).longest == 32
    assert training_error(model, mixed_samples(250)) < TOLERANCE


def test_samples_beyond_the_original_length_of_dynamic_ntk_are_refused(
    tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = rope_model({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}).config
    config.max_position_embeddings = 16
    monkeypatch.setattr("train.inputs.training_support", lambda base: capability_of(config).train)
    with pytest.raises(UsageError, match="Set max_length = 16 or less"):
        run(make_recipe(tmp_path), tiny_base, tmp_path / "out")


class Leaking(torch.nn.Module):
    """A layer that adds to each row of the batch a share of the row's tokens before."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + 0.1 * hidden.cumsum(dim=1)


class Remembering(torch.nn.Module):
    """A layer that adds what it was given in the forward pass before."""

    before: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found = hidden if self.before is None else hidden + self.before.mean()
        self.before = hidden.detach()
        return found


class Looking(torch.nn.Module):
    """A layer that adds to each token the one behind it."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + torch.cat([hidden[:, 1:], hidden[:, -1:]], dim=1)


def adapted(tiny_base: StoredBase, recipe: Recipe, broken: torch.nn.Module | None = None) -> Any:
    """Return the tiny base with an adapter, and with another layer before its first."""
    model = load_base(tiny_base, purpose="train", dtype="float32", kind=recipe.quantization.kind).model
    if broken is not None:
        layer = model.model.layers[0]
        layer.input_layernorm = torch.nn.Sequential(layer.input_layernorm, broken)
    torch.manual_seed(0)
    model = attach(model, recipe)
    fuse_lora(model)
    return model.train()


def test_a_model_that_computes_rows_right_is_asked_once(
    tiny_base: StoredBase, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(tiny_base, recipe)
    assert check_rows(model, recipe, "fp1:1", TOKENS) == ()
    monkeypatch.setattr(self_check, "_fault", lambda *arguments: "asked again")
    assert check_rows(model, recipe, "fp1:1", TOKENS) == ()
    with pytest.raises(IncompatibleBase, match="asked again"):
        check_rows(model, recipe, None, TOKENS)
    other = recipe.model_copy(update={"quantization": recipe.quantization.model_copy(update={"double_quant": False})})
    with pytest.raises(IncompatibleBase, match="asked again"):
        check_rows(model, other, "fp1:1", TOKENS)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    with pytest.raises(IncompatibleBase, match="asked again"):
        check_rows(model, recipe, "fp1:1", TOKENS)


def test_the_check_does_not_use_texts_that_an_adapter_may_know_by_heart() -> None:
    """Their losses are near 0, and rounding in bf16 is a large part of them: a sound base would be refused."""
    tokens = list(range(100, 164))
    first, second = self_check._samples(tokens)
    assert {*first.tokens, *second.tokens} <= set(tokens)
    assert not any(b - a == 1 for one in (first, second) for a, b in zip(one.tokens, one.tokens[1:], strict=False))


def test_a_leaking_layer_is_trained_one_sample_a_row(tiny_base: StoredBase, recipe: Recipe) -> None:
    model = adapted(tiny_base, recipe, Leaking())
    (told,) = check_rows(model, recipe, "fp1:1", TOKENS)
    assert told.startswith("rows: one sample each (the check of this run found")
    assert training_error(model.eval(), mixed_samples(250)) < TOLERANCE
    assert not (home() / "self-checks").exists()


@pytest.mark.parametrize(
    "broken",
    [Remembering(), Looking()],
    ids=["state between passes", "not causal"],
)
def test_a_layer_that_no_row_is_right_for_is_refused(
    broken: torch.nn.Module, tiny_base: StoredBase, recipe: Recipe
) -> None:
    model = adapted(tiny_base, recipe, broken)
    with pytest.raises(IncompatibleBase, match="right: what a token predicts depends on those behind it, or"):
        check_rows(model, recipe, "fp1:1", TOKENS)


def test_a_layer_without_a_backward_pass_is_refused(tiny_base: StoredBase, recipe: Recipe) -> None:
    class Detached(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no kernel for this processor")

    model = adapted(tiny_base, recipe, Detached())
    with pytest.raises(IncompatibleBase, match="a training step of it fails .no kernel for this processor"):
        check_rows(model, recipe, "fp1:1", TOKENS)


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.")
@pytest.mark.parametrize("method", ["lora", "head", "prompt", "prefix", "full"])
def test_the_check_changes_nothing_it_does_not_say(method: str, tiny_base: StoredBase, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, method=method)
    model = adapted(tiny_base, recipe)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert check_rows(model, recipe, "fp1:1", TOKENS) == ()
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


def test_a_run_after_a_check_ends_in_the_same_bytes(tmp_path: Path, tiny_base: StoredBase) -> None:
    recipe = make_recipe(tmp_path)
    run(recipe, tiny_base, tmp_path / "checked")
    run(recipe, tiny_base, tmp_path / "remembered")
    first, second = tensors_of(tmp_path / "checked"), tensors_of(tmp_path / "remembered")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_run_says_that_it_trains_one_sample_a_row(
    tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: Any, **options: Any) -> Any:
        loaded = load_base(*arguments, **options)
        layer = loaded.model.model.layers[0]
        layer.input_layernorm = torch.nn.Sequential(layer.input_layernorm, Leaking())
        return loaded

    monkeypatch.setattr(trainer, "load_base", load)
    notes = Notes()
    run(make_recipe(tmp_path), tiny_base, tmp_path / "out", progress=notes)
    assert any(line.startswith("rows: one sample each") for line in notes.lines)
