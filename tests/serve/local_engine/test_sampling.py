from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from adapterhub.errors import NonFiniteLogits
from serve.engine import GenerationRequest, SamplingParams
from serve.local_engine.sampling import Sampled, Sampler, filtered, penalized, rows_of
from serve.local_engine.scheduler import Sequence

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])


def _sampler() -> Sampler:
    return Sampler(torch.device("cpu"))


def _sample(sampler: Sampler, logits: torch.Tensor, *sequences: Sequence) -> list[Sampled]:
    rows = rows_of(logits.expand(len(sequences), -1))
    return [sampler.sample(row, sequence) for row, sequence in zip(rows, sequences, strict=True)]


def _sequence(
    params: SamplingParams, *, name: str = "r", prompt: tuple[int, ...] = (0,), answer: tuple[int, ...] = ()
) -> Sequence:
    sequence = Sequence.of(GenerationRequest(name, prompt, params))
    sequence.tokens += answer
    return sequence


def _draws(sampler: Sampler, sequence: Sequence, times: int = 20) -> list[int]:
    return [_sample(sampler, LOGITS, sequence)[0].token for _ in range(times)]


def test_temperature_zero_is_greedy() -> None:
    assert set(_draws(_sampler(), _sequence(SamplingParams(temperature=0)))) == {0}


def test_a_seed_repeats_the_answer_whatever_runs_beside_it() -> None:
    params = SamplingParams(seed=5)
    alone = _draws(_sampler(), _sequence(params))
    sampler, other = _sampler(), _sequence(SamplingParams(seed=9), name="other")
    mine = _sequence(params)
    beside = [_sample(sampler, LOGITS, other, mine)[1].token for _ in range(20)]
    assert beside == alone
    assert len(set(alone)) > 1


def test_a_forgotten_request_starts_its_seed_anew() -> None:
    sampler, sequence = _sampler(), _sequence(SamplingParams(seed=5))
    first = _draws(sampler, sequence)
    sampler.forget("r")
    assert _draws(sampler, sequence) == first


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(top_k=2), {0, 1}),
        (SamplingParams(top_k=99), {0, 1, 2, 3}),
        (SamplingParams(top_p=0.01), {0}),  # the best always stays
        (SamplingParams(top_p=0.7), {0, 1}),
        (SamplingParams(min_p=0.2), {0, 1}),
        (SamplingParams(temperature=0.01, min_p=0.2), {0}),
    ],
    ids=str,
)
def test_filters_keep_the_tokens_they_should(params: SamplingParams, kept: set[int]) -> None:
    probabilities = filtered(LOGITS, params)
    assert set(probabilities.nonzero().flatten().tolist()) == kept


@pytest.mark.parametrize(
    "params",
    [
        *(SamplingParams(temperature=value) for value in (0.0, 5e-324, 1e-45, 1e-38, 1e-10, 9e-6, 1e-5, 1e-3)),
        *(SamplingParams(top_p=value) for value in (1e-300, 1e-46, 1e-38, 1e-6)),
        *(SamplingParams(repetition_penalty=value) for value in (1e-300, 1e-39, 1e-38, 1e-10)),
        SamplingParams(repetition_penalty=1e-38, temperature=1e-4, top_p=1e-46, min_p=1.0),
        SamplingParams(min_p=1.0),
        SamplingParams(top_k=1),
        SamplingParams(temperature=1e-38, logit_bias=((1, -100.0),), top_k=10**30),
    ],
    ids=str,
)
def test_extremes_choose_the_best_token(params: SamplingParams) -> None:
    assert set(_draws(_sampler(), _sequence(params))) == {0}


def test_what_a_bias_lifts_beyond_fp32_is_chosen() -> None:
    largest = torch.finfo(torch.float32).max
    params = SamplingParams(logit_bias=((2, largest), (2, largest)))
    assert set(_draws(_sampler(), _sequence(params))) == {2}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_ends_its_own_request_with_the_reason(value: float, temperature: float) -> None:
    rows = rows_of(torch.stack([LOGITS, torch.tensor([0.0, value, 1.0, 2.0]), LOGITS]))
    sampler, params = _sampler(), SamplingParams(temperature=temperature, top_logprobs=1)
    with pytest.raises(NonFiniteLogits, match=r"the base computes NaN or Inf for token 1"):
        sampler.sample(rows[1], _sequence(params))
    assert sampler.sample(rows[2], _sequence(replace(params, temperature=0))).token == 0


def test_a_row_without_any_token_is_no_answer() -> None:
    (row,) = rows_of(torch.full((1, 4), -torch.inf))
    with pytest.raises(NonFiniteLogits):
        _sampler().sample(row, _sequence(SamplingParams(temperature=0)))


def test_a_token_that_cannot_come_has_a_log_probability_that_json_has() -> None:
    params = SamplingParams(temperature=0, top_logprobs=4)
    (found,) = _sample(_sampler(), torch.tensor([0.0, -torch.inf, -1e30, 1.0]), _sequence(params))
    assert dict(found.top)[1] == dict(found.top)[2] == -9999.0


def test_temperature_divides_the_logits() -> None:
    assert torch.equal(filtered(LOGITS, SamplingParams(temperature=0.5)), (LOGITS * 2).softmax(-1))


def test_presence_and_frequency_count_the_answer_only() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    after = penalized(LOGITS, _sequence(params, prompt=(1,), answer=(0, 0, 2)), params)
    assert (LOGITS - after).tolist() == pytest.approx([1.0, 0.0, 0.75, 0.0])


def test_repetition_weakens_positive_and_negative_logits_of_seen_tokens() -> None:
    params = SamplingParams(repetition_penalty=2.0)
    after = penalized(LOGITS, _sequence(params, prompt=(0, 3)), params)
    assert after.tolist() == [1.0, 1.0, 0.0, -2.0]
    assert LOGITS.tolist() == [2.0, 1.0, 0.0, -1.0]


def test_logprobs_are_those_of_the_model_before_temperature() -> None:
    params = SamplingParams(temperature=0, top_logprobs=2)
    (one,) = _sample(_sampler(), LOGITS, _sequence(params))
    expected = LOGITS.log_softmax(-1)
    assert one.logprob == pytest.approx(float(expected[0]))
    assert [token for token, _ in one.top] == [0, 1]
    assert math.isclose(one.top[1][1], float(expected[1]), rel_tol=1e-6)
    assert _sample(_sampler(), LOGITS, _sequence(replace(params, top_logprobs=None)))[0].logprob is None


def test_a_bias_moves_the_choice_and_not_the_reported_probabilities() -> None:
    params = SamplingParams(temperature=0, logit_bias=((2, 5.0), (0, -1.0)), top_logprobs=1)
    (found,) = _sample(_sampler(), LOGITS, _sequence(params))
    assert found.token == 2
    assert found.logprob == pytest.approx(float(LOGITS.log_softmax(0)[2]))
    assert found.top == ((0, pytest.approx(float(LOGITS.log_softmax(0)[0]))),)
