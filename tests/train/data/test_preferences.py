"""Preference data: what is read, split and trained, and what is refused with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from preference_rows import label, pair, turn

from adapterhub.adapter import StoredBase
from adapterhub.errors import DatasetError
from train.data.preferences import LabeledReply, PreferenceData, PreferencePair, read_preferences
from train.data.readers import read_rows
from train.recipe import PreferenceMethod


@pytest.fixture(scope="module")
def tokenizer(smollm2: StoredBase) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2.path)


def hh(question: str, answer: str) -> str:
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"


def read(
    folder: Path, lines: list[Any], tokenizer: Any, method: PreferenceMethod = "dpo", **changed: Any
) -> PreferenceData:
    path = folder / "votes.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    options: dict[str, Any] = {"held_out": 0.25, "max_length": 64, "seed": 0} | changed
    return read_preferences(read_rows(path), tokenizer, name=path.name, method=method, **options)


def fault(folder: Path, lines: list[Any], tokenizer: Any, method: PreferenceMethod = "dpo", **changed: Any) -> str:
    with pytest.raises(DatasetError) as caught:
        read(folder, lines, tokenizer, method, **changed)
    return str(caught.value)


def test_only_the_reply_and_its_end_are_trained(tmp_path: Path, tokenizer: Any) -> None:
    talk = pair(1)
    talk["prompt"] = [*turn("system", "Be brief."), *turn("user", "Hi"), *turn("assistant", "Ho"), *talk["prompt"]]
    found = read(tmp_path, [talk], tokenizer, held_out=0).train[0]
    assert isinstance(found, PreferencePair)
    for sample, text in ((found.chosen, "Aye, 1."), (found.rejected, "It is 1.")):
        trained = [token for token, mark in zip(sample.tokens, sample.trained, strict=True) if mark]
        assert tokenizer.decode(trained) == f"{text}<|im_end|>"


def test_pairs_of_one_question_stay_on_one_side(tmp_path: Path, tokenizer: Any) -> None:
    lines = [pair(n, rejected=f"No {k}, {{n}}.") for n in range(8) for k in range(3)]
    found = read(tmp_path, lines, tokenizer)
    assert (len(found.train), len(found.held_out)) == (18, 6)

    def prompts(side: Any) -> set[tuple[int, ...]]:
        return {item.chosen.tokens[: item.chosen.trained.index(True)] for item in side}

    assert not prompts(found.train) & prompts(found.held_out)


def test_a_repeated_line_counts_once(tmp_path: Path, tokenizer: Any) -> None:
    found = read(tmp_path, [pair(1), pair(1), pair(2)], tokenizer, held_out=0)
    assert len(found.train) == 2
    assert "left out 1 duplicate row" in found.notes
    assert len(read(tmp_path, [pair(1), pair(1), pair(2)], tokenizer, held_out=0, duplicates="keep").train) == 3


def test_labels_and_pairs_both_teach_kto(tmp_path: Path, tokenizer: Any) -> None:
    found = read(tmp_path, [label(1, True), label(2, False), pair(3)], tokenizer, "kto", held_out=0)
    assert [item.is_desirable for item in found.train if isinstance(item, LabeledReply)] == [True, False, True, False]
    assert "2 desirable and 2 undesirable replies" in found.notes


def test_the_digest_follows_the_labels(tmp_path: Path, tokenizer: Any) -> None:
    one = read(tmp_path, [label(1, True), label(2, False)], tokenizer, "kto", held_out=0)
    lines = [label(1, True) | {"label": False}, label(2, False) | {"label": True}]
    assert one.digest != read(tmp_path, lines, tokenizer, "kto", held_out=0).digest


def test_replies_that_a_cut_makes_equal_are_left_out(tmp_path: Path, tokenizer: Any) -> None:
    long = pair(1, chosen="Aye " * 40 + "{n}", rejected="Aye " * 40 + "no")
    found = read(tmp_path, [long, pair(2)], tokenizer, held_out=0)
    assert len(found.train) == 1
    assert any("nothing to compare after the cut" in note for note in found.notes)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "votes.jsonl:2: not JSON"),
        ("[]", "votes.jsonl:2: not a JSON object"),
        ({"messages": []}, 'votes.jsonl:2: "chosen" is not a text or a list of messages'),
        (pair(1) | {"prompt": 1}, '"prompt" is not a text or a list of messages'),
        (pair(1) | {"chosen": 1}, '"chosen" is not a text or a list of messages'),
        ({"chosen": hh("A", "B"), "rejected": hh("C", "D")}, "reply to different prompts"),
        (pair(1) | {"rejected": turn("user", "x")}, "message 2 has role user, expected assistant"),
        (pair(1) | {"rejected": pair(1)["chosen"]}, "chosen and rejected are the same"),
    ],
)
def test_a_line_with_a_fault(tmp_path: Path, tokenizer: Any, line: Any, said: str) -> None:
    assert said in fault(tmp_path, [pair(0), line], tokenizer)


def test_a_label_that_is_no_truth_value(tmp_path: Path, tokenizer: Any) -> None:
    text = fault(tmp_path, [label(1, True) | {"label": "yes"}], tokenizer, "kto")
    assert "\"label\" is 'yes', expected true or false" in text


def test_labels_do_not_teach_dpo(tmp_path: Path, tokenizer: Any) -> None:
    assert '"chosen" is not a text or a list of messages' in fault(tmp_path, [label(1, True)], tokenizer, "dpo")


def test_kto_needs_both_labels(tmp_path: Path, tokenizer: Any) -> None:
    text = fault(tmp_path, [label(1, True), label(2, True)], tokenizer, "kto", held_out=0)
    assert "labeled true and replies labeled false" in text


@pytest.mark.parametrize("lines", [[], ["", " "]])
def test_a_file_without_preference_pairs(tmp_path: Path, tokenizer: Any, lines: list[Any]) -> None:
    assert "has no preference pairs" in fault(tmp_path, lines, tokenizer)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot read"):
        read_rows(tmp_path / "none.jsonl")


def test_prompts_longer_than_max_length(tmp_path: Path, tokenizer: Any) -> None:
    assert "no reply in votes.jsonl has a trained token at max_length = 8" in fault(
        tmp_path, [pair(1)], tokenizer, held_out=0, max_length=8
    )


@pytest.mark.parametrize(
    "line",
    [
        {"chosen": hh("What is 1?", "Aye, 1."), "rejected": hh("What is 1?", "It is 1.")},
        {"prompt": "What is 1?", "chosen": "Aye, 1.", "rejected": "It is 1."},
        {key: [*pair(1)["prompt"], *pair(1)[key]] for key in ("chosen", "rejected")},
    ],
    ids=["hh-rlhf", "texts", "prompt within"],
)
def test_other_ways_to_write_a_pair_give_the_same_tokens(tmp_path: Path, tokenizer: Any, line: dict[str, Any]) -> None:
    same = read(tmp_path, [pair(1)], tokenizer, held_out=0)
    assert read(tmp_path, [line], tokenizer, held_out=0).digest == same.digest


def test_faulty_pairs_can_be_left_out(tmp_path: Path, tokenizer: Any) -> None:
    found = read(tmp_path, [pair(0), {"chosen": 1}, pair(2)], tokenizer, held_out=0, on_fault="skip")
    assert len(found.train) == 2
    assert found.notes[0].startswith("left out 1 fault: votes.jsonl:2:")


@pytest.mark.parametrize("method", ["dpo", "kto"])
@pytest.mark.parametrize("key", ["system", "margin", "history", "weight"])
def test_a_key_of_a_row_that_nobody_reads_is_refused(
    tmp_path: Path, tokenizer: Any, method: PreferenceMethod, key: str
) -> None:
    rows = [(label(n, bool(n % 2)) if method == "kto" else pair(n)) | {key: "x"} for n in range(12)]
    text = fault(tmp_path, rows, tokenizer, method)
    assert f'the row has the unknown key {key!r} (ignore = ["{key}"] in [data] leaves it out)' in text


def test_keys_that_describe_a_row_are_listed_once(tmp_path: Path, tokenizer: Any) -> None:
    found = read(tmp_path, [pair(n) | {"id": str(n), "score_chosen": 9.5} for n in range(12)], tokenizer)
    assert found.notes == ("left out: id, score_chosen (keys that are not part of the text)",)


def test_tools_that_the_template_ignores(tmp_path: Path, tokenizer: Any) -> None:
    rows = [pair(n) | {"tools": [{"name": "add", "parameters": {}}]} for n in range(12)]
    assert "the chat template ignores the tools" in fault(tmp_path, rows, tokenizer)
