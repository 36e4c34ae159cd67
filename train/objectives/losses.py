"""The losses of DPO, KTO and ORPO, as functions of the log-likelihoods of replies."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

_ALMOST_CERTAIN = -1e-6
"""Upper bound of a log-likelihood, in nats per token: a reply of probability 1 has infinite odds."""


def dpo_loss(ratios_chosen: torch.Tensor, ratios_rejected: torch.Tensor, *, beta: float) -> torch.Tensor:
    """Return the [n] DPO losses of n pairs (arXiv 2305.18290, equation 7).

    Ratios [n] are log(policy / reference) of whole replies.
    """
    return -logsigmoid(beta * (ratios_chosen - ratios_rejected))


def kto_loss(
    ratios: torch.Tensor, desirable: torch.Tensor, *, beta: float, drift: float, weights: tuple[float, float]
) -> torch.Tensor:
    """Return the [n] KTO losses lambda_y - v(x, y) of n replies (arXiv 2402.01306, equation 8).

    `desirable` [n] is boolean, `drift` is the paper's z0 (see `kto_drift`), `weights` are lambda_D and lambda_U.
    """
    signs = torch.where(desirable, 1.0, -1.0)
    lambdas = torch.where(desirable, *weights)
    return lambdas * (1 - torch.sigmoid(signs * beta * (ratios - drift)))


def kto_drift(mismatched_ratios: torch.Tensor) -> float:
    """Return z0, an estimate of KL(policy || reference) from replies to other prompts (arXiv 2402.01306, section 4.1).

    Takes no gradient, and is never below 0.
    """
    return max(0.0, float(mismatched_ratios.mean()))


def orpo_loss(means_chosen: torch.Tensor, means_rejected: torch.Tensor, *, weight: float) -> torch.Tensor:
    """Return the [n] ORPO losses of n pairs (arXiv 2403.07691, equations 3, 4, 6 and 7).

    Means [n] are log-likelihoods per token, in nats.
    """
    odds_ratios = _log_odds(means_chosen) - _log_odds(means_rejected)
    return -means_chosen - weight * logsigmoid(odds_ratios)


def _log_odds(means: torch.Tensor) -> torch.Tensor:
    bounded = means.clamp(max=_ALMOST_CERTAIN)
    return bounded - torch.log(-torch.expm1(bounded))
