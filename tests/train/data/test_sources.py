"""Reading data sets: each bad line has its fault, with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapterhub.errors import DatasetError
from train.data import sources
from train.data.sources import read_chatterbot, read_file, read_shipped, read_source
from train.recipe import Recipe

GOOD = {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}]}


def write(folder: Path, *lines: object) -> Path:
    path = folder / "lines.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        read_file(path, name="lines")
    return str(caught.value)


def turns(*roles: str) -> dict[str, object]:
    return {"messages": [{"role": role, "content": "text"} for role in roles]}


def test_each_line_becomes_a_conversation(tmp_path: Path) -> None:
    source = read_file(write(tmp_path, GOOD, "", turns("system", "user", "assistant", "user", "assistant")), name="x")
    assert [len(conversation.messages) for conversation in source.examples] == [2, 5]
    assert source.examples[1].where == "lines.jsonl:3"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ({"text": "x"}, "missing key 'messages'"),
        ({"messages": "x"}, "'messages' is not a list"),
        ({"messages": []}, "the last message is not the assistant's"),
        ({"messages": ["hello"]}, "message 1 is not an object"),
        (turns("human", "assistant"), "message 1 has role 'human'"),
        (turns("user"), "the last message is not the assistant's"),
        (turns("assistant", "user", "assistant"), "message 1 has role assistant, expected user"),
        (turns("system", "assistant"), "message 2 has role assistant, expected user"),
        (turns("user", "user", "assistant"), "message 2 has role user, expected assistant"),
        (turns("user", "system", "assistant"), "message 2 has role system, expected assistant"),
        ({"messages": [{"role": "user", "content": " "}, *GOOD["messages"][1:]]}, "message 1 (user) has no text"),
        ({"messages": [{"role": "user", "content": 5}, *GOOD["messages"][1:]]}, "message 1 (user) has no text"),
        (
            {"messages": [{"role": "user", "content": "\ud83d"}, *GOOD["messages"][1:]]},
            "half a character, \\ud83d at place 0",
        ),
    ],
)
def test_a_bad_line_is_named_with_its_fault(tmp_path: Path, line: object, words: str) -> None:
    text = refusal(write(tmp_path, GOOD, line))
    assert f"lines.jsonl:2: {words}" in text


def test_ten_faults_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    text = refusal(write(tmp_path, *["{"] * 13))
    assert "13 faults: lines.jsonl:1, " in text
    assert "lines.jsonl:10 and 3 more: not JSON" in text
    assert "lines.jsonl:11" not in text


def test_different_faults_stand_on_a_line_each_and_ten_are_shown(tmp_path: Path) -> None:
    text = refusal(write(tmp_path, *[{"messages": [{"role": f"role {n}", "content": "x"}]} for n in range(13)]))
    shown = text.split("\n")
    assert shown[0] == "lines has 13 faults:"
    assert [line.partition(": ")[0] for line in shown[1:11]] == [f"  lines.jsonl:{n}" for n in range(1, 11)]
    assert shown[11] == "  and 3 more"
    assert shown[12].startswith("Correct these rows")


def test_an_empty_file(tmp_path: Path) -> None:
    assert "has no conversation" in refusal(write(tmp_path, ""))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "cannot read" in refusal(tmp_path / "none.jsonl")


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"\xff\xfe")
    assert "expected UTF-8 text" in refusal(path)


def test_the_captain_is_shipped_and_sound() -> None:
    assert len(read_shipped("captain").examples) == 320


def test_an_unknown_shipped_set_names_the_nearest() -> None:
    with pytest.raises(DatasetError) as caught:
        read_shipped("captian")
    assert "expected captain." in str(caught.value)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace the chatterbot corpus by a small one."""
    (tmp_path / "trivia.yml").write_text(
        "categories: [trivia]\nconversations:\n- ['What is 6 x 7?', 42]\n- no answer here\n- ['Who?', Me., You.]\n"
    )
    (tmp_path / "broken.yml").write_text("conversations: [")
    monkeypatch.setattr(sources, "_chatterbot_folder", lambda: tmp_path)
    return tmp_path


def test_a_topic_gives_questions_with_their_first_answers(corpus: Path) -> None:
    source = read_chatterbot("trivia")
    texts = [tuple(message.content for message in item.messages) for item in source.examples]
    assert texts == [("What is 6 x 7?", "42"), ("Who?", "Me.")]
    assert source.notes == ("left out 1 of 3 entries that are not a question and an answer",)


def test_an_unknown_topic_names_the_nearest(corpus: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        read_chatterbot("trivias")
    assert "expected trivia." in str(caught.value)


def test_a_topic_like_no_other_lists_all(corpus: Path) -> None:
    with pytest.raises(DatasetError, match="expected one of broken, trivia"):
        read_chatterbot("cookery")


def test_a_damaged_topic(corpus: Path) -> None:
    with pytest.raises(DatasetError, match="Reinstall chatterbot-corpus"):
        read_chatterbot("broken")


def test_the_corpus_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(sources, "package_files", missing)
    with pytest.raises(DatasetError, match="pip install chatterbot-corpus"):
        read_chatterbot("trivia")


def test_a_mix_has_the_examples_of_its_sources_with_their_weights(tmp_path: Path) -> None:
    write(tmp_path, GOOD | {"source": "web"}, GOOD)
    (tmp_path / "faq.csv").write_text("question;answer;author\nHi?;Ho.;Ann\n")
    named = {"columns": {"prompt": "question", "response": "answer"}, "ignore": ["author"]}
    sources = [
        {"source": "file", "path": "lines.jsonl", "weight": 2.0},
        {"source": "file", "path": "faq.csv", "weight": 0.5, **named},
        {"source": "shipped", "name": "captain"},
    ]
    raw = {"name": "x", "base": "x", "data": {"source": "mix", "sources": sources}, "train": {"steps": 1}}
    recipe = Recipe.model_validate(raw)
    recipe._folder = tmp_path
    found = read_source(recipe)
    assert (found.name, [(part.weight, len(part.examples)) for part in found.parts]) == (
        "lines.jsonl + faq.csv + captain",
        [(2, 2), (0.5, 1), (1, 320)],
    )
    assert found.examples == tuple(example for part in found.parts for example in part.examples)
    assert found.notes == ("lines.jsonl: left out: source (keys that are not part of the text)",)
