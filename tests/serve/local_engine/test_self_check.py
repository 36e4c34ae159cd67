"""No base is served that is computed otherwise than its own forward pass does: it falls back, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from architectures import tiny_model
from served_right import loaded
from torch import nn

from adapterhub.adapter import BaseRef
from adapterhub.bases.capabilities import Capability, Support
from adapterhub.bases.loading import LoadedBase
from adapterhub.choice import Choice
from adapterhub.errors import BaseUnsupported, UsageError
from serve.config import LocalEngineConfig
from serve.local_engine import computation, lora_layers
from serve.local_engine.computation import Computation, start_computation
from serve.local_engine.lora_layers import LinearGroup
from serve.local_engine.self_check import TOLERANCE, expected_of

CONFIG = LocalEngineConfig(kv_cache_bytes=4 << 20, max_model_len=64)


class Leaking(nn.Module):
    """A layer whose rows see the row before them, whoever's it is."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        return self.layer(x + before)  # type: ignore[no-any-return]


class Remembering(nn.Module):
    """A layer that keeps what the last forward pass left, whoever's it was."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last = torch.zeros_like(x[:, :1]) if self.last is None or x.shape[1] > 1 else self.last
        self.last = x[:, -1:].clone()
        return self.layer(x + torch.cat([last, x[:, :-1]], dim=1))  # type: ignore[no-any-return]


def _broken(layer: Callable[[nn.Module], nn.Module]) -> LoadedBase:
    model = tiny_model("phi3")
    model.model.layers[0].mlp = layer(model.model.layers[0].mlp)
    return loaded(model)


def _printed(started: Computation) -> str:
    (found,) = [str(choice) for choice in started.choices if choice.what == "sequences"]
    return found


@pytest.mark.parametrize("layer", [Leaking, Remembering])
def test_a_layer_whose_state_leaks_between_rows_is_refused(layer: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(
        BaseUnsupported, match="phi3.* is not served: in a batch, .* differ .*; one sequence at a time,"
    ):
        start_computation(_broken(layer), CONFIG)


def _believe_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    support = Capability(Support("batched"), Support("batched"))
    monkeypatch.setattr(computation, "capability_of", lambda config: support)


@pytest.mark.parametrize("model_type", ["lfm2", "qwen3_5_text", "bloom", "diffllama"])
def test_a_base_that_is_wrong_in_a_batch_is_served_one_sequence_at_a_time(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the list of bases had it."""
    _believe_batched(monkeypatch)
    started = start_computation(loaded(tiny_model(model_type)), CONFIG)
    assert started.runner.mode == "single"
    assert _printed(started).startswith("sequences: one at a time (in a batch, log-probabilities after tokens")


def test_an_adapter_that_is_not_applied_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LinearGroup, "_update", lambda *_: None)
    with pytest.raises(BaseUnsupported, match="with an adapter"):
        start_computation(loaded(tiny_model("phi3")), CONFIG)


def test_a_layer_that_sees_some_rows_of_a_batch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Expert(nn.Module):
        """An MLP that only some rows reach."""

        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            chosen = x[..., 0] > 0
            return torch.zeros_like(x).masked_scatter(chosen[..., None].expand_as(x), self.layer(x[chosen]))

    started = start_computation(_broken(Expert), CONFIG)
    assert started.runner.mode == "single"
    assert "rows of a batch of" in _printed(started)


def test_the_random_adapter_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """An effect within the tolerance would prove nothing."""
    expected = expected_of(tiny_model("llama"))
    for number in range(len(expected.prompts)):
        effect = (expected.logprobs[number, True] - expected.logprobs[number, False]).abs().mean(-1)
        assert effect.min() > max(TOLERANCE.values()) / 2


@pytest.mark.parametrize("num_blocks", [1, 3, 9])
@pytest.mark.parametrize("model_type", ["llama", "lfm2"])
def test_a_cache_that_holds_few_tokens_is_checked_as_well(model_type: str, num_blocks: int) -> None:
    base = loaded(tiny_model(model_type))
    config = replace(CONFIG, block_size=4)
    room = start_computation(base, config).room
    small = replace(config, kv_cache_bytes=config.kv_cache_bytes // room.num_blocks * num_blocks)
    started = start_computation(loaded(tiny_model(model_type)), small)
    assert "compared with the model's own forward pass in" in _printed(started)


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "ctrl", "gptj", "gpt_bigcode"])
def test_a_length_beyond_a_table_of_positions_is_refused_at_the_start(model_type: str) -> None:
    longest = tiny_model(model_type).config.max_position_embeddings
    with pytest.raises(UsageError, match=f"--max-model-len {longest + 1}: the base has {longest} positions"):
        start_computation(loaded(tiny_model(model_type)), replace(CONFIG, max_model_len=longest + 1))
    assert start_computation(loaded(tiny_model(model_type)), replace(CONFIG, max_model_len=longest))


@pytest.mark.parametrize("model_type", ["llama", "lfm2"])
def test_rotary_positions_have_no_last_one(model_type: str) -> None:
    longest = tiny_model(model_type).config.max_position_embeddings
    started = start_computation(loaded(tiny_model(model_type)), replace(CONFIG, max_model_len=2 * longest))
    assert started.room.max_model_len == 2 * longest


def _fails(*_: Any) -> None:
    raise AssertionError("checked again")


@pytest.mark.parametrize("model_type", ["llama", "lfm2"])
@pytest.mark.usefixtures("home")
def test_a_base_that_passed_is_not_checked_again_until_something_changes(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(fingerprint: str | None, choices: tuple[Choice, ...] = ()) -> Computation:
        ref = BaseRef("tests/tiny", None, fingerprint)
        base = replace(loaded(tiny_model(model_type)), ref=ref, choices=choices)
        return start_computation(base, CONFIG)

    assert "forward pass in" in _printed(start("a" * 64))
    monkeypatch.setattr(computation, "expected_of", _fails)
    assert "at an earlier start" in _printed(start("a" * 64))
    for changed in ("b" * 64, None):
        with pytest.raises(BaseUnsupported, match="checked again"):
            start(changed)
    packed = (Choice("nf4 kernel", "packed AVX512-BF16", "bf16 inference on this CPU"),)
    with pytest.raises(BaseUnsupported, match="checked again"):
        start("a" * 64, packed)
    for owner, name, other in (
        (torch.backends.cpu, "get_cpu_capability", lambda: "another"),
        (computation, "kernels_for", lambda _: (None, ())),
    ):
        with monkeypatch.context() as patch, pytest.raises(BaseUnsupported, match="checked again"):
            patch.setattr(owner, name, other)
            start("a" * 64)


@pytest.mark.usefixtures("home")
def test_what_passed_in_a_cache_for_one_sequence_is_not_proven_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(config: LocalEngineConfig) -> Computation:
        return start_computation(
            replace(loaded(tiny_model("llama")), ref=BaseRef("tests/tiny", None, "a" * 64)), config
        )

    config = replace(CONFIG, block_size=4)
    num_blocks = start_computation(loaded(tiny_model("llama")), config).room.num_blocks
    start(replace(config, kv_cache_bytes=config.kv_cache_bytes // num_blocks * 3))
    monkeypatch.setattr(computation, "expected_of", _fails)
    with pytest.raises(BaseUnsupported, match="checked again"):
        start(config)


@pytest.mark.usefixtures("home")
def test_what_failed_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    _believe_batched(monkeypatch)
    for _ in range(2):
        base = replace(loaded(tiny_model("lfm2")), ref=BaseRef("tests/tiny", None, "a" * 64))
        assert start_computation(base, CONFIG).runner.mode == "single"
    monkeypatch.setattr(lora_layers.LinearGroup, "_update", lambda *_: None)
    base = replace(loaded(tiny_model("lfm2")), ref=BaseRef("tests/tiny", None, "a" * 64))
    with pytest.raises(BaseUnsupported, match="with an adapter"):
        start_computation(base, CONFIG)
