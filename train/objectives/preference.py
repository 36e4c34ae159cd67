"""Objectives of preference tuning: DPO and ORPO on preference pairs, KTO on labeled replies."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch

from adapterhub.package.manifest import Evaluation, Preference
from train.data.preferences import LabeledReply, PreferenceData, PreferencePair
from train.data.tokenization import Sample
from train.objectives.base import EvalResult, Objective
from train.objectives.evaluation import eval_mode, eval_rows, log_likelihoods
from train.objectives.losses import dpo_loss, kto_drift, kto_loss, orpo_loss
from train.recipe import PreferenceSection

_Group = tuple[list[Sample], list[Sample]]
"""(desirable, undesirable) replies; each of the first is compared with each of the second."""


class _PreferenceObjective(Objective):
    """Data, descriptions and reference log-likelihoods that both kinds of preference data share.

    The reference model is what training starts from. One pass before the first step gives its log-likelihoods, so no
    second model stays in memory, and a step costs no more than in supervised fine-tuning.
    """

    _data: PreferenceData

    def __init__(self, data: PreferenceData, section: PreferenceSection, *, num_held_out_pairs: int) -> None:
        self._data = data
        self._section = section
        self._num_held_out_pairs = num_held_out_pairs
        self._reference: dict[Sample, float] = {}

    @property
    def longest(self) -> int:
        return max(len(s.tokens) for item in (*self._data.train, *self._data.held_out) for s in item.samples)

    def lengths(self) -> list[int]:
        return [sum(len(sample.tokens) for sample in item.samples) for item in self._data.train]

    def describe(self) -> str:
        method = self._section.method.upper()
        return f"{self._data.name}: {method} on {self.num_samples} {self._unit}, {len(self._data.held_out)} held out"

    @property
    def _unit(self) -> str:
        return "labeled replies" if self._section.method == "kto" else "preference pairs"

    def samples_at(self, place: int) -> Sequence[Sample]:
        return self._data.train[place].samples

    def evaluations(self, *, base: EvalResult, before: EvalResult, after: EvalResult) -> list[Evaluation]:
        if not after.tokens or before.accuracy is None or after.accuracy is None:
            return []
        preference = Preference(
            method=self._section.method,
            pairs=self._num_held_out_pairs,
            accuracy_before=round(before.accuracy, 4),
            accuracy_after=round(after.accuracy, 4),
            loss_before=round(before.loss, 4),
            loss_after=round(after.loss, 4),
        )
        return [
            Evaluation(
                data=f"{self._data.name}, {len(self._data.held_out)} held-out {self._unit}",
                tokens=after.tokens,
                base_loss=round(base.nats_per_token, 4),
                adapter_loss=round(after.nats_per_token, 4),
                preference=preference,
            )
        ]


class PairObjective(_PreferenceObjective):
    """DPO or ORPO on preference pairs."""

    def __init__(self, data: PreferenceData, section: PreferenceSection) -> None:
        self._train = [pair for pair in data.train if isinstance(pair, PreferencePair)]
        self._held_out = [pair for pair in data.held_out if isinstance(pair, PreferencePair)]
        super().__init__(data, section, num_held_out_pairs=len(self._held_out))

    def set_reference(self, model: Any) -> None:
        if self._section.method == "dpo":
            self._reference = _all_log_likelihoods(
                model, [s for p in (*self._train, *self._held_out) for s in p.samples]
            )

    def backward(self, model: Any, batches: Sequence[Sequence[int]]) -> float:
        count = sum(map(len, batches))
        total = 0.0
        for places in batches:
            pairs = [self._train[place] for place in places]
            found = log_likelihoods(model, _side_by_side(pairs))
            loss = self._losses(pairs, found).sum() / count
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total

    def evaluate(self, model: Any) -> EvalResult:
        """Evaluate; pair accuracy compares log-likelihoods per token, so that length does not decide."""
        if not self._held_out:
            return EvalResult(0.0, 0.0, 0)
        samples = _side_by_side(self._held_out)
        found = _all_log_likelihoods(model, samples)
        values = torch.tensor([found[sample] for sample in samples])
        chosen, rejected = _per_token(values, samples).chunk(2)
        tokens = sum(pair.chosen.num_trained for pair in self._held_out)
        return EvalResult(
            loss=float(self._losses(self._held_out, values).mean()),
            nats_per_token=-float(values[: len(self._held_out)].sum()) / tokens,
            tokens=tokens,
            accuracy=float((chosen > rejected).float().mean()),
        )

    def _losses(self, pairs: Sequence[PreferencePair], found: torch.Tensor) -> torch.Tensor:
        samples = _side_by_side(pairs)
        if self._section.method == "orpo":
            return orpo_loss(*_per_token(found, samples).chunk(2), weight=self._section.beta)
        reference = found.new_tensor([self._reference[sample] for sample in samples])
        return dpo_loss(*(found - reference).chunk(2), beta=self._section.beta)


class KtoObjective(_PreferenceObjective):
    """KTO on labeled replies; a mismatched reply is cut at `max_length` tokens, prompt included, like every other."""

    def __init__(self, data: PreferenceData, section: PreferenceSection, *, max_length: int) -> None:
        self._train = [item for item in data.train if isinstance(item, LabeledReply)]
        self._held_out = [item for item in data.held_out if isinstance(item, LabeledReply)]
        self._mismatched = [sample.cut(max_length) for sample in _mismatched(self._train)]
        self._mismatched_held_out = [sample.cut(max_length) for sample in _mismatched(self._held_out)]
        self._groups = _groups_of(self._held_out)
        super().__init__(data, section, num_held_out_pairs=_num_pairs(self._groups))

    @property
    def longest(self) -> int:
        mismatched = (*self._mismatched, *self._mismatched_held_out)
        return max(super().longest, *(len(sample.tokens) for sample in mismatched))

    def set_reference(self, model: Any) -> None:
        own = [item.sample for item in (*self._train, *self._held_out)]
        self._reference = _all_log_likelihoods(model, [*own, *self._mismatched, *self._mismatched_held_out])

    def backward(self, model: Any, batches: Sequence[Sequence[int]]) -> float:
        count = sum(map(len, batches))
        drift = self._drift(model, [self._mismatched[place] for places in batches for place in places])
        total = 0.0
        for places in batches:
            items = [self._train[place] for place in places]
            found = log_likelihoods(model, [item.sample for item in items])
            loss = self._losses(items, found, drift).sum() / count
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total

    def evaluate(self, model: Any) -> EvalResult:
        """Evaluate; pair accuracy compares replies to one prompt, or all replies if no prompt has both labels."""
        desirable = [item.sample for item in self._held_out if item.is_desirable]
        if not self._num_held_out_pairs:
            return EvalResult(0.0, 0.0, 0)
        found = _all_log_likelihoods(model, [item.sample for item in self._held_out])
        values = torch.tensor([found[item.sample] for item in self._held_out])
        drift = self._drift(model, self._mismatched_held_out)
        tokens = sum(sample.num_trained for sample in desirable)
        per_token = {sample: value / sample.num_trained for sample, value in found.items()}
        return EvalResult(
            loss=float(self._losses(self._held_out, values, drift).mean()),
            nats_per_token=-sum(found[sample] for sample in desirable) / tokens,
            tokens=tokens,
            accuracy=_pair_accuracy(self._groups, per_token),
        )

    def _drift(self, model: Any, samples: Sequence[Sample]) -> float:
        found = _all_log_likelihoods(model, samples)
        return kto_drift(torch.tensor([found[sample] - self._reference[sample] for sample in samples]))

    def _losses(self, items: Sequence[LabeledReply], found: torch.Tensor, drift: float) -> torch.Tensor:
        reference = found.new_tensor([self._reference[item.sample] for item in items])
        desirable = torch.tensor([item.is_desirable for item in items], device=found.device)
        section = self._section
        weights = (section.desirable_weight, section.undesirable_weight)
        return kto_loss(found - reference, desirable, beta=section.beta, drift=drift, weights=weights)


def preference_objective(
    data: PreferenceData, section: PreferenceSection, *, max_length: int
) -> PairObjective | KtoObjective:
    """Return the objective of the section's method, for samples of at most `max_length` tokens."""
    if section.method == "kto":
        return KtoObjective(data, section, max_length=max_length)
    return PairObjective(data, section)


def _side_by_side(pairs: Sequence[PreferencePair]) -> list[Sample]:
    return [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]


def _per_token(values: torch.Tensor, samples: Sequence[Sample]) -> torch.Tensor:
    return values / values.new_tensor([sample.num_trained for sample in samples])


def _all_log_likelihoods(model: Any, samples: Sequence[Sample]) -> dict[Sample, float]:
    """Return each sample's log-likelihood, without gradients; sorted, so that replies to one prompt share a row."""
    found: dict[Sample, float] = {}
    distinct = sorted(set(samples), key=lambda sample: (sample.tokens, sample.trained))
    with eval_mode(model):
        for row in eval_rows(distinct):
            found.update(zip(row, log_likelihoods(model, row).tolist(), strict=True))
    return found


def _mismatched(items: Sequence[LabeledReply]) -> list[Sample]:
    """Return each prompt with the next reply to another prompt; the first follows the last."""
    prompts = [item.prompt for item in items]
    if len(set(prompts)) < 2:
        return [item.sample for item in items]
    other = [0] * len(items)
    # Backwards, each item copies from the one after it; twice, since the last items copy from the first.
    for place in reversed(range(2 * len(items))):
        here, after = place % len(items), (place + 1) % len(items)
        other[here] = after if prompts[after] != prompts[here] else other[after]
    return [_reply_to(prompts[here], items[there].sample, prompts[there]) for here, there in enumerate(other)]


def _reply_to(prompt: tuple[int, ...], reply: Sample, own_prompt: tuple[int, ...]) -> Sample:
    start = len(own_prompt)
    return Sample((*prompt, *reply.tokens[start:]), (*(False,) * len(prompt), *reply.trained[start:]))


def _groups_of(items: Sequence[LabeledReply]) -> list[_Group]:
    """Return a group for each prompt that has both labels, or one group of all replies when no prompt has."""
    by_prompt: dict[tuple[int, ...], _Group] = {}
    for item in items:
        desirable, undesirable = by_prompt.setdefault(item.prompt, ([], []))
        (desirable if item.is_desirable else undesirable).append(item.sample)
    groups = list(by_prompt.values())
    whole = [sample for group in groups for sample in group[0]], [sample for group in groups for sample in group[1]]
    return [group for group in groups if all(group)] or [whole]


def _pair_accuracy(groups: Sequence[_Group], value: dict[Sample, float]) -> float:
    """Return the share of pairs whose desirable reply has the greater value; n log n, by bisection."""
    correct = 0
    for desirable, undesirable in groups:
        values = sorted(value[sample] for sample in undesirable)
        correct += sum(bisect_left(values, value[sample]) for sample in desirable)
    return correct / _num_pairs(groups)


def _num_pairs(groups: Sequence[_Group]) -> int:
    return sum(len(desirable) * len(undesirable) for desirable, undesirable in groups)
