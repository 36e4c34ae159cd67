"""Packing: the same loss and gradients as one sample at a time, and one copy of the common prefix."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from train.data.packing import common_prefix, pack
from train.data.tokenization import Sample
from train.objectives.evaluation import held_out_loss, row_loss

CPU = torch.device("cpu")


def sample(*tokens: int, trained: int) -> Sample:
    """Return a sample whose last `trained` tokens are targets."""
    return Sample(tokens, tuple(place >= len(tokens) - trained for place in range(len(tokens))))


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=2, initializer_range=0.2, **sizes)).eval()


@pytest.fixture
def samples() -> list[Sample]:
    """Six of different lengths that share five first tokens."""
    draw = random.Random(0)
    ends = [[draw.randrange(128) for _ in range(draw.randint(3, 20))] for _ in range(6)]
    return [sample(1, 2, 3, 4, 5, 100 + place, *end, trained=len(end)) for place, end in enumerate(ends)]


def alone(model: Any, item: Sample) -> torch.Tensor:
    """Return the summed loss of one sample as the model itself computes it."""
    labels = [token if mark else -100 for token, mark in zip(item.tokens, item.trained, strict=True)]
    ids = torch.tensor([item.tokens])
    loss = model(input_ids=ids, labels=torch.tensor([labels])).loss * item.num_trained
    assert isinstance(loss, torch.Tensor)
    return loss


def packed(model: Any, items: list[Sample]) -> torch.Tensor:
    return row_loss(model, pack(items, device=CPU))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_loss_is_the_sum_of_the_samples_losses(model: Any, samples: list[Sample], attention: str) -> None:
    model.set_attn_implementation(attention)
    expected = torch.stack([alone(model, item) for item in samples]).sum()
    assert packed(model, samples).item() == pytest.approx(expected.item(), rel=1e-5)


def test_packed_gradients_are_those_of_the_samples(model: Any, samples: list[Sample]) -> None:
    weights = list(model.parameters())
    expected = torch.autograd.grad(torch.stack([alone(model, item) for item in samples]).sum(), weights)
    found = torch.autograd.grad(packed(model, samples), weights)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_samples_that_share_nothing(model: Any) -> None:
    items = [sample(1, 2, 3, trained=2), sample(9, trained=0), sample(4, 5, 6, 7, trained=3)]
    expected = alone(model, items[0]) + alone(model, items[2])
    assert packed(model, items).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_target_right_after_the_shared_tokens_counts_once_per_sample(model: Any) -> None:
    items = [sample(1, 2, 3, 7, 8, trained=2), sample(1, 2, 3, 9, trained=1), sample(1, 2, 3, 7, trained=1)]
    row = pack(items, device=CPU)
    assert row.targets.tolist() == [7, 8, 9, 7]
    assert row.keep.tolist() == [2, 3, 2, 2]
    expected = torch.stack([alone(model, item) for item in items]).sum()
    assert row_loss(model, row).item() == pytest.approx(expected.item(), rel=1e-5)


def test_shared_tokens_are_held_once(samples: list[Sample]) -> None:
    row = pack(samples, device=CPU)
    assert row.input_ids.shape[1] == sum(len(item.tokens) for item in samples) - 5 * (len(samples) - 1)
    assert row.position_ids[0, :8].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_trained_token_is_never_shared() -> None:
    assert common_prefix([sample(1, 2, 3, 4, trained=2), sample(1, 2, 3, 5, trained=1)]) == 2


def test_equal_samples_keep_a_token_each() -> None:
    assert common_prefix([sample(1, 2, 3, trained=0)] * 2) == 2


def test_measuring_rows_do_not_change_the_mean(model: Any, samples: list[Sample]) -> None:
    many = samples * 3
    loss, tokens = held_out_loss(model, many)
    assert tokens == sum(item.num_trained for item in many)
    expected = sum(alone(model, item).item() for item in samples) * 3 / tokens
    assert loss == pytest.approx(expected, rel=1e-5)


def test_measuring_leaves_the_mode_as_it_was(model: Any, samples: list[Sample]) -> None:
    model.train()
    held_out_loss(model, samples)
    assert model.training
    model.eval()


def test_measuring_nothing(model: Any) -> None:
    assert held_out_loss(model, []) == (0.0, 0)
