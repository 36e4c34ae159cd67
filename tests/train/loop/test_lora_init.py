"""Initial A and B: the best low-rank approximations, on a base that does not change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_methods import CPU, layers_of, load_fp32, logits, recipe_of
from engine_runs import PROMPTS
from training import run, tensors_of

from adapterhub.adapter import StoredBase
from adapterhub.bases.loading import load_base
from adapterhub.bases.nf4 import dense_weight
from adapterhub.errors import RecipeError
from train.data.packing import pack
from train.data.tokenization import Sample
from train.loop.lora_init import init_lora
from train.model.lora import add_lora
from train.objectives.base import Objective
from train.objectives.forward import token_losses
from train.recipe import LoraSection

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


class Looked:
    """What EVA asks of an objective."""

    def __init__(self, samples: list[Sample]) -> None:
        self._samples = samples
        self.num_samples = len(samples)

    def samples_at(self, place: int) -> list[Sample]:
        return [self._samples[place]]


def started(base: StoredBase, **lora: Any) -> tuple[Any, Objective]:
    torch.manual_seed(0)
    samples = [Sample((1, *prompt), (False, *(True for _ in prompt))) for prompt in PROMPTS]
    objective: Any = Looked(samples)
    section = LoraSection(rank=4, **lora)
    model = add_lora(load_fp32(base).model, section)
    init_lora(model, section, base=base.path, objective=objective)
    return model.eval(), objective


def halves(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def best_error(weight: torch.Tensor, rank: int) -> float:
    """Of the best approximation of that rank (Eckart and Young)."""
    return float(torch.linalg.svdvals(weight)[rank:].norm())


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_pissa_begins_at_the_principal_part_and_as_the_base(method: Any, tiny_base: StoredBase) -> None:
    model, _ = started(tiny_base, init="pissa", method=method)
    torch.testing.assert_close(logits(model), logits(load_fp32(tiny_base).model), rtol=1e-4, atol=1e-4)
    for layer in layers_of(model).values():
        a, b = halves(layer)
        weight = dense_weight(layer.get_base_layer())
        product = layer.scaling["default"] * b[:, :4] @ a[:4]
        assert float((weight - product).norm()) == pytest.approx(best_error(weight, 4), rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit"])
def test_pissa_keeps_what_it_began_with(optimizer: str, tmp_path: Path, tiny_base: StoredBase) -> None:
    recipe = recipe_of(tmp_path, lora={"init": "pissa"}, train={"optimizer": optimizer})
    run(recipe, tiny_base, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 64, True)
    first, _ = started(tiny_base, init="pissa")
    for name, layer in layers_of(first).items():
        a, b = halves(layer)
        now_a, now_b = (tensors_of(tmp_path / "out")[f"{name}.lora_{half}.weight"] for half in "AB")
        assert torch.equal(now_b[:, 4:], b[:, 4:])
        assert torch.equal(now_a[4:], a[4:])
        assert not torch.equal(now_b[:, :4], b[:, :4])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_loftq_takes_back_what_quantizing_lost(kind: Any, tiny_base: StoredBase) -> None:
    section = LoraSection(rank=4, init="loftq")
    model = add_lora(load_base(tiny_base, purpose="train", dtype="float32", kind=kind).model, section)
    init_lora(model, section, base=tiny_base.path, objective=None)  # type: ignore[arg-type]
    originals = load_base(tiny_base, purpose="train", dtype="float32", kind="none").model
    for name, layer in layers_of(model).items():
        original = originals.get_submodule(name.removeprefix("base_model.model.")).weight
        lost = original - dense_weight(layer.get_base_layer())
        a, b = halves(layer)
        left = float((lost - layer.scaling["default"] * b @ a).norm())
        assert left == pytest.approx(best_error(lost, 4), rel=1e-3)
        assert left < 0.95 * float(lost.norm())


def test_eva_begins_along_the_inputs_main_directions(tiny_base: StoredBase) -> None:
    model, objective = started(tiny_base, init="eva")
    torch.testing.assert_close(logits(model), logits(load_fp32(tiny_base).model), rtol=1e-5, atol=1e-5)
    inputs: dict[str, torch.Tensor] = {}
    layers = layers_of(model)
    for name, layer in layers.items():
        layer.register_forward_hook(lambda m, x, y, name=name: inputs.__setitem__(name, x[0][0]))
    samples = [sample for place in range(objective.num_samples) for sample in objective.samples_at(place)]
    with torch.no_grad():
        token_losses(model, pack(samples, device=CPU))
    for name, layer in layers.items():
        a, b = halves(layer)
        assert a.shape[0] == 4
        assert not b.any()
        seen = inputs[name] - inputs[name].mean(0)
        caught = float((seen @ torch.linalg.pinv(a) @ a).norm()) / float(seen.norm())
        most = float(torch.linalg.svdvals(seen)[:4].norm()) / float(seen.norm())
        assert caught > 0.98 * most


def test_eva_without_enough_tokens(tiny_base: StoredBase) -> None:
    section = LoraSection(rank=40, init="eva")
    model = add_lora(load_fp32(tiny_base).model, section)
    looked: Any = Looked([Sample((1, 2, 3), (False, True, True))])
    with pytest.raises(RecipeError, match="Lower rank in"):
        init_lora(model, section, base=tiny_base.path, objective=looked)


def test_pissa_of_too_large_a_rank(tiny_base: StoredBase) -> None:
    section = LoraSection(rank=64, init="pissa")
    model = add_lora(load_fp32(tiny_base).model, section)
    with pytest.raises(
        RecipeError, match=r"rank 64 is too large for .*k_proj of shape \[32, 64\]: expected at most 32"
    ):
        init_lora(model, section, base=tiny_base.path, objective=None)  # type: ignore[arg-type]
