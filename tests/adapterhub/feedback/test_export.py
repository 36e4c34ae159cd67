"""What each row of feedback becomes: its lines of training data, or the reason why it is left out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
from feedback_rows import UNUSABLE, answer, asked, correction, fifty_rows, store_all, thumb, vote
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from adapterhub.cli.main import app
from adapterhub.errors import UsageError
from adapterhub.feedback.export import Outcome, export_rows, to_jsonl, training_export
from adapterhub.feedback.store import Correction, FeedbackStore, Thumb, Vote, fault_of
from train.data.conversation import messages_of
from train.data.sources import read_file
from train.data.tokenization import drop_duplicates

DIGEST = "sha256:" + "c" * 64


@pytest.mark.parametrize("form", ["dpo", "kto", "sft"])
def test_fifty_rows_one_by_one(tmp_path: Path, form: Any) -> None:
    rows = fifty_rows(DIGEST)
    assert len(rows) == 50
    assert Counter(row.dpo for row in rows)["about other adapters"] == 15
    assert Counter(row.dpo for row in rows)["unusable"] == 10
    store = store_all(tmp_path / "f.sqlite", (row.body for row in rows))
    found = export_rows(store.rows(), form, about=["captain", DIGEST])
    assert [(row.id, row.outcome) for row in found.rows] == [
        (f"fb-{number}", getattr(row, form)) for number, row in enumerate(rows, start=1)
    ]
    assert {row.outcome for row in found.rows} <= set(get_args(Outcome))
    assert all(bool(row.lines) == (row.outcome == "exported") for row in found.rows)
    assert all(line["id"] == row.id for row in found.rows for line in row.lines)


def test_answers_of_fifty_rows_for_supervised_fine_tuning(tmp_path: Path) -> None:
    store = store_all(tmp_path / "f.sqlite", (row.body for row in fifty_rows(DIGEST)))
    (tmp_path / "sft.jsonl").write_text(to_jsonl(export_rows(store.rows(), "sft", about=["captain", DIGEST]).lines))
    source = read_file(tmp_path / "sft.jsonl", name="feedback")
    assert len(source.examples) == 19
    assert len(drop_duplicates(source.examples)[0]) == 18


def test_notes_count_what_was_left_out(tmp_path: Path) -> None:
    store = store_all(tmp_path / "f.sqlite", (row.body for row in fifty_rows(DIGEST)))
    notes = export_rows(store.rows(), "dpo", about=["captain", DIGEST]).notes
    assert notes[0].startswith("left out 10 rows that training cannot use: fb-41: the answer has no text; ")
    assert notes[0].endswith("; and 5 more")
    assert notes[1:] == [
        "left out 15 rows about other adapters",
        "left out 2 rows whose two answers are equal",
        "left out 6 rows that judge nothing for this format",
    ]


def test_nothing_to_train_on_names_what_was_left_out(tmp_path: Path) -> None:
    store = store_all(tmp_path / "f.sqlite", (row.body for row in fifty_rows(DIGEST)))
    with pytest.raises(UsageError, match=r"50 rows \(.*left out 49 rows about other adapters\), no preference pairs"):
        training_export(store.rows(), "dpo", about=["nobody"])


def test_only_the_judged_answer_is_the_completion(tmp_path: Path) -> None:
    """The conversation holds an answer that was disliked: it stays context."""
    disliked = thumb(asked("Capital of France?"), answer("Lyon."), "down")
    liked = thumb(asked("Capital of France?", "Lyon.", "Sure?"), answer("Sorry, Paris."), "up")
    store = store_all(tmp_path / "f.sqlite", [disliked, liked])
    assert export_rows(store.rows(), "sft").lines == [
        {"id": "fb-2", "prompt": liked["messages"], "completion": [{"role": "assistant", "content": "Sorry, Paris."}]}
    ]


@pytest.mark.parametrize(
    ("body", "labels"),
    [
        (vote(1, answer("Same."), answer(" Same.\n", "x"), "a"), []),
        (vote(1, answer("Same."), answer("Same.", "x"), "tie"), []),
        (vote(1, answer("Same."), answer("Same.", "x"), "both_bad"), [("Same.", False)]),
        (vote(1, answer("Same."), answer("Same. ", "x"), "both_bad"), [("Same.", False)]),
        (correction(asked("Hi?"), answer("Same."), "Same. "), []),
    ],
    ids=["won", "tie", "both bad", "both bad, but for white space", "correction"],
)
def test_equal_answers_are_no_pair(tmp_path: Path, body: dict[str, Any], labels: list[tuple[str, bool]]) -> None:
    store = store_all(tmp_path / "f.sqlite", [body])
    labelled = [(line["completion"][0]["content"], line["label"]) for line in export_rows(store.rows(), "kto").lines]
    assert labelled == labels
    assert [export_rows(store.rows(), form).lines for form in ("dpo", "sft", "votes")] == [[], [], []]
    assert store.pairwise_votes() == []


@pytest.mark.parametrize("name", UNUSABLE)
def test_one_unusable_row_does_not_block_the_others(tmp_path: Path, name: str) -> None:
    store = store_all(tmp_path / "f.sqlite", [UNUSABLE[name], correction(asked("Hi?"), answer("Ho."), "Hello.")])
    for method in ("dpo", "kto", "orpo", None):
        found = training_export(store.rows(), method, about=None)
        assert [row.outcome for row in found.rows] == ["unusable", "exported"]
    assert store.counts()
    store.pairwise_votes()


@pytest.mark.parametrize("name", [name for name, body in UNUSABLE.items() if isinstance(body, dict)])
def test_unusable_feedback_is_not_stored(tmp_path: Path, name: str) -> None:
    store = FeedbackStore(tmp_path / "f.sqlite")
    body = dict(UNUSABLE[name])  # type: ignore[arg-type]
    if body["kind"] == "vote":
        battle = store.begin_battle(["captain", "trivia"])
        body |= {"battle": battle.id, "a": {**body["a"], "model": battle.a}, "b": {**body["b"], "model": battle.b}}
    with pytest.raises(UsageError, match="training cannot use this feedback: "):
        store.add(_parsed(body), owner="me")
    assert store.rows() == []


def test_a_correction_that_changes_nothing_is_not_stored(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path / "f.sqlite")
    with pytest.raises(UsageError, match="the correction is the same as the answer"):
        store.add(_parsed(correction(asked("Hi?"), answer("Ho."), "Ho.")), owner="me")
    assert store.rows() == []


def test_the_developers_message_is_the_system_message(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path / "f.sqlite")
    messages = [{"role": "developer", "content": "Be brief."}, *asked("Hi?")]
    store.add(_parsed(correction(messages, answer("Ho."), "Hello.")), owner="me")
    assert export_rows(store.rows(), "dpo").lines[0]["prompt"][0] == {"role": "system", "content": "Be brief."}


_ROLES = st.sampled_from(["system", "user", "assistant", "tool", "critic"])
_MESSAGE = st.fixed_dictionaries({"role": _ROLES, "content": st.sampled_from(["x", " \n", ""])})
_LIKELY = st.lists(st.sampled_from(["x", "x", "x", " "]), min_size=1, max_size=5).map(lambda texts: asked(*texts))


@given(messages=st.one_of(_LIKELY, st.lists(_MESSAGE, min_size=1, max_size=5)), text=st.sampled_from(["x", "\t"]))
def test_training_takes_what_the_store_takes_and_nothing_else(messages: list[dict[str, str]], text: str) -> None:
    is_accepted = fault_of(_parsed(thumb(messages, answer(text), "up"))) is None
    try:
        messages_of([*messages, {"role": "assistant", "content": text}])
    except ValueError:
        assert not is_accepted
    else:
        assert is_accepted


def test_the_command_leaves_out_other_adapters_and_says_so(tmp_path: Path) -> None:
    store = store_all(tmp_path / "f.sqlite", (row.body for row in fifty_rows(DIGEST)))
    words = ["feedback", "export", "--format", "dpo", "--store", str(store.path)]
    everything = CliRunner().invoke(app, words)
    assert len(everything.stdout.splitlines()) == 17 + 7 + 4 + 1
    own = CliRunner().invoke(app, [*words, "--adapter", "captain", "--adapter", DIGEST])
    assert [json.loads(line)["id"] for line in own.stdout.splitlines()] == [f"fb-{n}" for n in range(1, 18)]
    assert "note: left out 15 rows about other adapters" in own.stderr


def _parsed(body: dict[str, Any]) -> Vote | Thumb | Correction:
    kinds: dict[str, Any] = {"vote": Vote, "thumb": Thumb, "correction": Correction}
    found: Vote | Thumb | Correction = kinds[body["kind"]].model_validate(body)
    return found
