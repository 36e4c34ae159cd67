"""The fused LoRA operation, compared with PEFT's chain of operations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training import make_recipe, tensors_of

from adapterhub.adapter import StoredBase
from adapterhub.bases.loading import load_base
from train import trainer
from train.data.packing import pack
from train.data.tokenization import Sample
from train.loop.progress import Silent
from train.model.fused_lora import fuse_lora
from train.model.lora import add_lora, trainable
from train.objectives.evaluation import row_loss
from train.objectives.forward import forward_inputs
from train.recipe import LoraSection

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

SAMPLES = [
    Sample((1, 4, 9, *range(20 + place, 27 + 2 * place)), (False,) * 5 + (True,) * (5 + place)) for place in range(3)
]


def adapted(base: StoredBase, dtype: str, kind: Any = "nf4", **lora: Any) -> Any:
    """With B drawn too, so that every gradient is there."""
    torch.manual_seed(0)
    model = add_lora(load_base(base, purpose="train", kind=kind, dtype=dtype).model, LoraSection(rank=4, **lora))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def loss_and_gradients(model: Any) -> tuple[float, list[torch.Tensor]]:
    loss = row_loss(model, pack(SAMPLES, device=model.device))
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), [parameter.grad for parameter in trainable(model) if parameter.grad is not None]


@pytest.mark.parametrize("lora", [{}, {"method": "rslora"}, {"dropout": 0.3}])
@pytest.mark.parametrize("kind", ["nf4", "none"])
def test_loss_and_gradients_are_pefts(tiny_base: StoredBase, kind: str, lora: dict[str, Any]) -> None:
    model = adapted(tiny_base, "float32", kind, **lora)
    torch.manual_seed(1)  # of the dropout
    expected, theirs = loss_and_gradients(model)
    model.zero_grad()
    assert fuse_lora(model) == 14
    torch.manual_seed(1)
    found, ours = loss_and_gradients(model)
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(ours) == len(theirs) == 28
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_in_bf16_gradients_stray_no_further_from_fp32_than_pefts(tiny_base: StoredBase) -> None:
    _, exact = loss_and_gradients(adapted(tiny_base, "float32"))
    _, theirs = loss_and_gradients(adapted(tiny_base, "bfloat16"))
    model = adapted(tiny_base, "bfloat16")
    fuse_lora(model)
    _, ours = loss_and_gradients(model)

    def strays(found: list[torch.Tensor]) -> float:
        flat, true = (torch.cat([one.flatten() for one in each]) for each in (found, exact))
        return float((flat - true).norm() / true.norm())

    assert {one.dtype for one in ours} == {torch.float32}
    assert strays(ours) < 1.1 * strays(theirs)


def test_the_bare_base_still_answers_with_the_adapter_switched_off(tiny_base: StoredBase) -> None:
    model = adapted(tiny_base, "float32")
    with model.disable_adapter():
        expected = model(input_ids=torch.tensor([[5, 6, 7]])).logits
        fuse_lora(model)
        torch.testing.assert_close(model(input_ids=torch.tensor([[5, 6, 7]])).logits, expected, rtol=0, atol=0)


def test_what_is_not_plain_keeps_pefts_way(tiny_base: StoredBase) -> None:
    assert fuse_lora(adapted(tiny_base, "float32", method="dora")) == 0


def test_a_run_ends_in_what_pefts_layers_end_in(
    tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tmp_path, lora={"dropout": 0.0})
    trainer.train(recipe, tiny_base, tmp_path / "ours", progress=Silent())
    monkeypatch.setattr(trainer, "fuse_lora", lambda model: 0)
    trainer.train(recipe, tiny_base, tmp_path / "theirs", progress=Silent())
    ours, theirs = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs")
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=2e-5)


def test_an_input_is_kept_once_for_the_layers_that_share_it(tiny_base: StoredBase) -> None:
    def kept(model: Any) -> int:
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        row = pack(SAMPLES, device=model.device)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layers = model.get_base_model().model  # without the head, whose logits outweigh two layers
            hidden = layers(**forward_inputs(model, row))
        del hidden
        return sum(size for place, size in sizes.items() if place not in weights)

    model = adapted(tiny_base, "bfloat16")
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.cast_input_dtype_enabled = True  # PEFT's own way, which ours leaves for all bf16 layers
    before = kept(model)
    fuse_lora(model)
    assert kept(model) < before
