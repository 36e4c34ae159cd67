"""The preference losses against each paper's formula written out."""

from __future__ import annotations

import math

import pytest
import torch

from train.objectives.losses import dpo_loss, kto_drift, kto_loss, orpo_loss


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_dpo_is_equation_7() -> None:
    policy_w, reference_w, policy_l, reference_l = -12.0, -14.5, -9.0, -8.0
    expected = -math.log(sigmoid(0.2 * (policy_w - reference_w) - 0.2 * (policy_l - reference_l)))
    found = dpo_loss(torch.tensor([policy_w - reference_w]), torch.tensor([policy_l - reference_l]), beta=0.2)
    assert found.tolist() == pytest.approx([expected])


def test_dpo_at_the_reference_is_log_2() -> None:
    assert dpo_loss(torch.zeros(3), torch.zeros(3), beta=0.1).tolist() == pytest.approx([math.log(2)] * 3)


def test_dpo_gradient_is_beta_times_the_weight_of_the_mistake() -> None:
    """Section 4 of the paper: beta * sigmoid(rejected reward - chosen reward), up for one and down for the other."""
    chosen, rejected = torch.tensor([0.5], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    dpo_loss(chosen, rejected, beta=0.3).sum().backward()  # type: ignore[no-untyped-call]
    weight = 0.3 * sigmoid(0.3 * (2.0 - 0.5))
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx((-weight, weight))


def test_kto_is_equation_8_on_both_sides() -> None:
    ratios, beta, drift = (1.5, -0.5), 0.4, 0.2
    expected = [2.0 - 2.0 * sigmoid(beta * (ratios[0] - drift)), 3.0 - 3.0 * sigmoid(beta * (drift - ratios[1]))]
    found = kto_loss(torch.tensor(ratios), torch.tensor([True, False]), beta=beta, drift=drift, weights=(2.0, 3.0))
    assert found.tolist() == pytest.approx(expected)


def test_kto_drift_is_a_mean_and_never_negative() -> None:
    assert kto_drift(torch.tensor([1.0, 2.0, -0.5])) == pytest.approx(2.5 / 3)
    assert kto_drift(torch.tensor([-1.0, 0.5])) == 0.0


def test_orpo_is_equations_3_to_7() -> None:
    def log_odds(mean: float) -> float:
        p = math.exp(mean)
        return math.log(p / (1 - p))

    chosen, rejected = -1.2, -0.7
    ratio = -math.log(sigmoid(log_odds(chosen) - log_odds(rejected)))
    found = orpo_loss(torch.tensor([chosen]), torch.tensor([rejected]), weight=0.25)
    assert found.tolist() == pytest.approx([-chosen + 0.25 * ratio])


def test_orpo_of_a_certain_reply_stays_a_number() -> None:
    means = torch.zeros(1, requires_grad=True)
    orpo_loss(means, torch.tensor([-3.0]), weight=1.0).sum().backward()  # type: ignore[no-untyped-call]
    assert means.grad is not None
    assert means.grad.isfinite().all()
