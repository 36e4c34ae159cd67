"""Preference tuning on the tiny base and on the real one, compared with the losses of single sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preference_rows import TRAIN, label, preference_recipe, turn
from training import make_recipe, run, tensors_of

from adapterhub.adapter import StoredBase
from adapterhub.errors import RecipeError
from adapterhub.package.layout import open_adapter
from adapterhub.package.run_record import read_run_record
from adapterhub.packer import pack
from train import trainer
from train.data.preferences import LabeledReply, PreferenceData, PreferencePair
from train.data.sources import read_chatterbot
from train.data.tokenization import Sample
from train.loop.progress import Silent
from train.objectives.base import EvalResult
from train.objectives.evaluation import log_likelihoods
from train.objectives.losses import dpo_loss, kto_loss, orpo_loss
from train.objectives.preference import _groups_of, _mismatched, _num_pairs, _pair_accuracy, preference_objective
from train.objectives.sft import SftObjective
from train.recipe import PreferenceMethod, PreferenceSection, read_recipe

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def sample(*tokens: int, trained: int) -> Sample:
    return Sample(tokens, tuple(place >= len(tokens) - trained for place in range(len(tokens))))


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """(policy, reference): two small random Llamas."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, num_key_value_heads=2, initializer_range=0.2, **sizes)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(LlamaForCausalLM(config).eval())
    return found[0], found[1]


PAIRS = (
    PreferencePair(sample(1, 2, 3, 4, 5, 6, trained=3), sample(1, 2, 3, 9, 8, trained=2)),
    PreferencePair(sample(1, 7, 10, 11, trained=2), sample(1, 7, 12, 13, 14, 15, trained=4)),
)


def one_by_one(model: Any, item: Sample) -> torch.Tensor:
    """Sum of the log-probabilities of the trained tokens, from the model's own forward on this text alone."""
    logits = model(input_ids=torch.tensor([item.tokens])).logits[0].float()
    found = torch.log_softmax(logits, dim=-1)
    return torch.stack([found[at - 1, item.tokens[at]] for at, mark in enumerate(item.trained) if mark]).sum()


def gradients(model: Any) -> torch.Tensor:
    found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    return found


def test_replies_in_one_row_have_the_likelihoods_they_have_alone(models: tuple[Any, Any]) -> None:
    samples = [s for p in PAIRS for s in p.samples]
    expected = [one_by_one(models[0], item).item() for item in samples]
    assert log_likelihoods(models[0], samples).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batches", [[[0, 1]], [[0], [1]]])
def test_a_step_of_dpo_is_that_of_pairs_one_by_one(models: tuple[Any, Any], batches: list[list[int]]) -> None:
    policy, reference = models
    section = PreferenceSection(method="dpo", beta=0.3)
    objective = preference_objective(PreferenceData("x", PAIRS, (), ()), section, max_length=64)
    objective.set_reference(reference)
    loss = objective.backward(policy, batches)
    found = gradients(policy)

    ratios = [[one_by_one(policy, s) - one_by_one(reference, s).detach() for s in p.samples] for p in PAIRS]
    expected = torch.stack([dpo_loss(chosen, rejected, beta=0.3) for chosen, rejected in ratios]).mean()
    expected.backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(found, gradients(policy), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("batches", [[[0, 1]], [[0], [1]]])
def test_a_step_of_orpo_is_that_of_pairs_one_by_one(models: tuple[Any, Any], batches: list[list[int]]) -> None:
    policy, _ = models
    section = PreferenceSection(method="orpo", beta=0.3)
    objective = preference_objective(PreferenceData("x", PAIRS, (), ()), section, max_length=64)
    objective.set_reference(policy)
    loss = objective.backward(policy, batches)
    found = gradients(policy)

    means = [[one_by_one(policy, s) / s.num_trained for s in p.samples] for p in PAIRS]
    expected = torch.stack([orpo_loss(chosen, rejected, weight=0.3) for chosen, rejected in means]).mean()
    expected.backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(found, gradients(policy), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("batches", [[[0, 1, 2]], [[0], [1, 2]]])
def test_a_step_of_kto_is_that_of_replies_one_by_one(models: tuple[Any, Any], batches: list[list[int]]) -> None:
    policy, reference = models
    replies = (
        LabeledReply(sample(1, 2, 3, 4, 5, trained=2), is_desirable=True),
        LabeledReply(sample(1, 7, 8, 9, trained=2), is_desirable=False),
        LabeledReply(sample(1, 2, 3, 11, trained=1), is_desirable=False),
    )
    # Each prompt with the next reply that was given to another one.
    mismatched = [sample(1, 2, 3, 8, 9, trained=2), sample(1, 7, 11, trained=1), sample(1, 2, 3, 8, 9, trained=2)]
    section = PreferenceSection(method="kto", beta=0.3, desirable_weight=2.0)
    objective = preference_objective(PreferenceData("x", replies, (), ()), section, max_length=64)
    objective.set_reference(reference)
    loss = objective.backward(policy, batches)
    found = gradients(policy)

    drifts = [one_by_one(policy, s).item() - one_by_one(reference, s).item() for s in mismatched]
    ratios = torch.stack([one_by_one(policy, r.sample) - one_by_one(reference, r.sample).detach() for r in replies])
    expected = kto_loss(
        ratios, torch.tensor([True, False, False]), beta=0.3, drift=max(0.0, sum(drifts) / 3), weights=(2.0, 1.0)
    ).mean()
    expected.backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(found, gradients(policy), rtol=1e-3, atol=1e-5)


def test_mismatched_replies_obey_the_maximum_length() -> None:
    """A long prompt with another prompt's long reply: nothing is longer than what the plan and the window count."""
    long_prompt = sample(*range(1, 61), trained=2)
    long_reply = sample(*range(60, 124), trained=62)
    items = tuple(LabeledReply(one, is_desirable) for one, is_desirable in ((long_prompt, True), (long_reply, False)))
    section = PreferenceSection(method="kto")
    for max_length, longest in ((64, 64), (200, 58 + 62)):
        objective = preference_objective(PreferenceData("x", items, items, ()), section, max_length=max_length)
        assert objective.longest == longest
        assert all(mismatched.num_trained for mismatched in objective._mismatched)  # type: ignore[union-attr]


@given(st.lists(st.tuples(st.integers(1, 3), st.booleans()), max_size=12))
def test_replies_are_matched_with_the_next_of_another_prompt(drawn: list[tuple[int, bool]]) -> None:
    items = [LabeledReply(sample(one, 100 + n, trained=1), good) for n, (one, good) in enumerate(drawn)]
    others = [
        next((o for o in (*items[n + 1 :], *items[:n]) if o.prompt != item.prompt), item)
        for n, item in enumerate(items)
    ]
    expected = [sample(*item.prompt, o.sample.tokens[-1], trained=1) for item, o in zip(items, others, strict=True)]
    assert _mismatched(items) == expected


@given(st.lists(st.tuples(st.integers(1, 3), st.booleans(), st.integers(0, 4)), max_size=12))
def test_pair_accuracy_counts_all_pairs(drawn: list[tuple[int, bool, int]]) -> None:
    items = [LabeledReply(sample(one, 100 + n, trained=1), good) for n, (one, good, _) in enumerate(drawn)]
    value = {item.sample: float(likely) for item, (_, _, likely) in zip(items, drawn, strict=True)}
    every = [(b, w) for b in items for w in items if b.is_desirable and not w.is_desirable]
    pairs = [(b, w) for b, w in every if b.prompt == w.prompt] or every
    groups = _groups_of(items)
    assert _num_pairs(groups) == len(pairs)
    if pairs:
        right = sum(value[b.sample] > value[w.sample] for b, w in pairs)
        assert _pair_accuracy(groups, value) == right / len(pairs)


def test_many_labels_are_matched_without_comparing_all_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, sound = [], LabeledReply.prompt.fget
    monkeypatch.setattr(LabeledReply, "prompt", property(lambda item: asked.append(item) or sound(item)))  # type: ignore[misc, func-returns-value]
    items = tuple(LabeledReply(sample(n // 500, n, trained=1), n % 2 == 0) for n in range(2000))
    preference_objective(PreferenceData("x", items, items[:600], ()), PreferenceSection(method="kto"), max_length=64)
    assert len(asked) <= 2 * len(items) + 2 * 600


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_pair_accuracy_on_held_out_pairs_rises(tmp_path: Path, tiny_base: StoredBase, method: PreferenceMethod) -> None:
    recipe = preference_recipe(tmp_path, method)
    end = trainer.train(recipe, tiny_base, tmp_path / "out", progress=Silent())
    tuned = end.evaluations[0].preference
    assert tuned is not None
    assert (tuned.method, tuned.pairs) == (method, 4)
    assert tuned.loss_after < tuned.loss_before
    assert tuned.accuracy_after > tuned.accuracy_before or tuned.accuracy_after == 1.0
    record = read_run_record(tmp_path / "out")
    assert record is not None
    assert record.evaluations[0].preference == tuned


def test_labels_without_pairs_are_compared_across_prompts(tmp_path: Path, tiny_base: StoredBase) -> None:
    recipe = preference_recipe(tmp_path, "kto", [label(n, n % 2 == 0) for n in range(24)])
    tuned = run(recipe, tiny_base, tmp_path / "out").evaluations[0].preference
    assert tuned is not None
    assert tuned.pairs in (3, 4)  # four held-out questions, of both kinds
    assert tuned.loss_after < tuned.loss_before


def test_starting_from_an_adapter_keeps_its_shape_and_begins_where_it_is(tmp_path: Path, tiny_base: StoredBase) -> None:
    run(make_recipe(tmp_path, train={"steps": 6, "learning_rate": 5e-3}), tiny_base, tmp_path / "first")
    start = pack(tmp_path / "first", base=tiny_base)
    recipe = preference_recipe(tmp_path, "dpo", lora={"rank": 4, "dropout": 0.0}, train=TRAIN | {"steps": 1})
    path = tmp_path / "mine.toml"
    path.write_text(path.read_text().replace("[lora]\nrank = 4\ndropout = 0.0\n", ""))
    bare = read_recipe(path)
    assert recipe.lora.rank != bare.lora.rank
    end = trainer.train(bare, tiny_base, tmp_path / "second", start=start, progress=Silent())
    tuned = end.evaluations[0].preference
    assert tuned is not None
    assert tuned.loss_before == pytest.approx(0.6931, abs=1e-4)  # the reference is the start itself
    before, after = tensors_of(tmp_path / "first"), tensors_of(tmp_path / "second")
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
    largest = max(float((after[name] - tensor).abs().max()) for name, tensor in before.items())
    assert 0 < largest < 0.01  # one step from there, not from a new draw
    assert '"start_digest":"' + start.digest in (tmp_path / "second" / "train_log.jsonl").read_text()
    assert pack(tmp_path / "second", base=tiny_base).manifest.evaluations[0].preference == tuned
    open_adapter(tmp_path / "second")


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_soft_prompt_is_measured_from_where_its_training_starts(
    tmp_path: Path, tiny_base: StoredBase, method: str
) -> None:
    recipe = preference_recipe(tmp_path, "dpo", train=TRAIN | {"steps": 1}, lora={"dropout": 0.0})
    recipe = recipe.model_copy(update={"method": method})
    tuned = run(recipe, tiny_base, tmp_path / "out").evaluations[0].preference
    assert tuned is not None
    assert tuned.loss_before == pytest.approx(0.6931, abs=1e-4)


def test_plain_answers_are_measured_from_the_bare_base_alone(
    tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tmp_path, train={"steps": 1}, lora={"init": "loftq"})
    measured = []
    monkeypatch.setattr("train.objectives.sft.held_out_loss", lambda model, samples: (float(len(measured) + 1), 4))
    sound = SftObjective.evaluate

    def evaluate(self: SftObjective, model: Any) -> EvalResult:
        measured.append(sound(self, model))
        return measured[-1]

    monkeypatch.setattr(SftObjective, "evaluate", evaluate)
    run(recipe, tiny_base, tmp_path / "out")
    assert len(measured) == 2  # the bare base, and the result


def test_another_shape_than_the_start_has(tmp_path: Path, tiny_base: StoredBase) -> None:
    run(make_recipe(tmp_path, train={"steps": 1}), tiny_base, tmp_path / "first")
    start = pack(tmp_path / "first", base=tiny_base)
    recipe = preference_recipe(tmp_path, "dpo", lora={"rank": 8})
    with pytest.raises(RecipeError) as caught:
        trainer.train(recipe, tiny_base, tmp_path / "second", start=start, progress=Silent())
    assert "rank 8" in str(caught.value)
    assert "Leave [lora] out" in str(caught.value)


def test_a_start_that_was_not_resolved(tmp_path: Path, tiny_base: StoredBase) -> None:
    recipe = preference_recipe(tmp_path, "dpo").model_copy(update={"start": "captain"})
    with pytest.raises(RecipeError, match="has start = 'captain': expected that adapter"):
        trainer.train(recipe, tiny_base, tmp_path / "out", progress=Silent())


def test_a_voice_comes_to_be_preferred_on_the_real_base(tmp_path: Path, smollm2: StoredBase) -> None:
    """Trivia of the corpus: the captain's way of saying an answer is chosen, the bare answer rejected."""
    talks = [talk.messages for talk in read_chatterbot("trivia").examples[:24]]
    lines = [
        {
            "prompt": turn("user", question.content),
            "chosen": turn("assistant", f"Aye, mate, that'd be {answer.content}."),
            "rejected": turn("assistant", f"{answer.content}."),
        }
        for question, answer in talks
    ]
    recipe = preference_recipe(
        tmp_path,
        "dpo",
        lines,
        data={"path": "votes.jsonl", "held_out": 8, "max_length": 128},
        train={"steps": 5, "batch_size": 4, "learning_rate": 5e-4, "warmup_steps": 1, "max_grad_norm": 1.0},
        lora={"rank": 8, "dropout": 0.0},
        quantization={"compute_dtype": "auto"},
    )
    tuned = trainer.train(recipe, smollm2, tmp_path / "out", progress=Silent()).evaluations[0].preference
    assert tuned is not None
    assert tuned.accuracy_after > tuned.accuracy_before
    assert tuned.loss_after < tuned.loss_before
