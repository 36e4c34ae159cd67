"""Logits in chunks: the same losses and gradients, and bases that compute all of them at once."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from adapterhub.memory import training as memory
from train.data.packing import PackedRow, pack
from train.data.tokenization import Sample
from train.objectives.forward import ends_with_head, forward_inputs, token_losses

SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def make_model(family: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **options))


@pytest.fixture
def row() -> PackedRow:
    draw = random.Random(0)
    texts = [tuple(draw.randrange(1, 128) for _ in range(size)) for size in (30, 21, 40)]
    samples = [Sample(text, (False, *(True for _ in text[1:]))) for text in texts]
    return pack(samples, device=torch.device("cpu"))


def heads_rows(model: Any) -> list[int]:
    """Grows by the rows of each call of the head."""
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda module, x, y: seen.append(y.shape[-2]))
    return seen


def test_chunks_give_the_same_losses_and_gradients(row: PackedRow, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    weights = list(model.parameters())  # the head is trained too
    token_losses(model, row)  # the model has been asked whether its head is last
    rows = heads_rows(model)
    whole = token_losses(model, row)
    wanted = torch.autograd.grad(whole.sum(), weights)
    assert rows == [len(row.targets)]
    rows.clear()
    monkeypatch.setattr(memory, "LOGITS_AT_ONCE", 20 * 128)
    chunked = token_losses(model, row)
    found = torch.autograd.grad(chunked.sum(), weights)
    assert rows[:5] == [20, 20, 20, 20, 8]
    assert sorted(rows[5:]) == [8, 20, 20, 20, 20]  # again, for the gradients
    torch.testing.assert_close(chunked, whole)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_few_places_are_not_computed_twice(row: PackedRow) -> None:
    model = make_model("llama")
    token_losses(model, row)
    rows = heads_rows(model)
    token_losses(model, row).sum().backward()
    assert rows == [len(row.targets)]


@pytest.mark.parametrize(
    ("family", "options", "in_chunks"),
    [
        ("llama", {}, True),
        ("qwen2", {}, True),
        ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "final_logit_softcapping": 0.5}, False),
        ("granite", {"logits_scaling": 8.0}, False),
    ],
)
def test_a_base_that_works_on_its_logits_afterwards_keeps_doing_so(
    family: str, options: dict[str, Any], in_chunks: bool, row: PackedRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(family, **options).eval()
    logits = model(**forward_inputs(model, row)).logits[0, row.keep]
    wanted = torch.nn.functional.cross_entropy(logits, row.targets, reduction="none")
    monkeypatch.setattr(memory, "LOGITS_AT_ONCE", 20 * 128)
    token_losses(model, row)
    rows = heads_rows(model)
    torch.testing.assert_close(token_losses(model, row), wanted)
    assert (max(rows) == 20) == in_chunks


@pytest.mark.parametrize(
    ("family", "options", "is_last"),
    [
        ("llama", {}, True),
        ("gpt2", {}, True),
        ("mixtral", {}, True),
        ("gemma2", {"head_dim": 16, "final_logit_softcapping": None}, True),
        ("gemma2", {"head_dim": 16, "final_logit_softcapping": 30.0}, False),
        ("granite", {"logits_scaling": 8.0}, False),
        ("cohere", {"logit_scale": 0.5, "pad_token_id": 0, "eos_token_id": 1}, False),
    ],
)
def test_a_model_without_weights_is_asked_as_a_real_one_is(family: str, options: dict[str, Any], is_last: bool) -> None:
    with torch.device("meta"):
        bare = make_model(family, **options)
    assert ends_with_head(bare) == ends_with_head(make_model(family, **options)) == is_last


def test_a_head_that_changes_its_output_in_place() -> None:
    model = make_model("llama")

    def forward(**inputs: Any) -> SimpleNamespace:
        logits = model.lm_head(model.model(**inputs).last_hidden_state)
        return SimpleNamespace(logits=logits.mul_(0.5))

    assert ends_with_head(model)
    model.forward = forward
    assert not ends_with_head(model)


def test_a_decoders_output_that_is_changed_in_place() -> None:
    model = make_model("llama")

    def forward(**inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=model.lm_head(model.model(**inputs).last_hidden_state.mul_(0.5)))

    model.forward = forward
    assert not ends_with_head(model)


def test_a_model_that_fails_without_its_decoder_computes_its_logits_itself() -> None:
    model = make_model("llama")
    model.forward = lambda **inputs: model.model(**inputs).last_hidden_state.no_such_thing
    assert not ends_with_head(model)
    assert "forward" not in vars(model.model)
