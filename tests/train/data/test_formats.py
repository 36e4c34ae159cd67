"""Each data format on rows written as its authors publish them: parsing, detection and faults."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from adapterhub.errors import DatasetError
from train.data.conversation import Conversation, Source, Text
from train.data.formats import FORMATS, FormatName, OnFault, detect, examples_of
from train.data.readers import Row, Rows

U, A, S = "user", "assistant", "system"

ROWS: dict[FormatName, tuple[dict[str, Any], list[list[tuple[str, str]]]]] = {
    "chat": (
        {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}]},
        [[(U, "Hi?"), (A, "Ho.")]],
    ),
    "chatml": (
        {"text": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi?\n\nYou!<|im_end|>\n"
                 "<|im_start|>assistant\nHo.<|im_end|>\n"},
        [[(S, "Be brief."), (U, "Hi?\n\nYou!"), (A, "Ho.")]],
    ),
    "sharegpt": (
        {"id": "x_0", "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi?"},
                                        {"from": "gpt", "value": "Ho."}]},
        [[(S, "Be brief."), (U, "Hi?"), (A, "Ho.")]],
    ),
    "vicuna": (
        {"conversations": [{"from": "gpt", "value": "(cut off)"}, {"from": "human", "value": "Hi?"},
                           {"from": "gpt", "value": "Ho."}, {"from": "human", "value": "And?"}]},
        [[(U, "Hi?"), (A, "Ho.")]],
    ),
    "alpaca": (
        {"instruction": "Name the odd one.", "input": "cat, dog, car", "output": "car", "text": "Below is ..."},
        [[(U, "Name the odd one.\n\n### Input:\ncat, dog, car"), (A, "car")]],
    ),
    "guanaco": (
        {"text": "### Human: Hi?### Assistant: Ho.### Human: And?### Assistant: So on.### Human: More"},
        [[(U, "Hi?"), (A, "Ho."), (U, "And?"), (A, "So on.")]],
    ),
    "chip2": (
        {"text": "<human>: Hi?\n<bot>: Ho.\nHum.", "metadata": {"source": "unified_chip2"}},
        [[(U, "Hi?"), (A, "Ho.\nHum.")]],
    ),
    "prompt-completion": (
        {"prompt": [{"role": "user", "content": "Hi."}], "completion": [{"role": "assistant", "content": "Ho."}]},
        [[(U, "Hi."), (A, "Ho.")]],
    ),
    "self-instruct": (
        {"prompt": "Name a ship.\n\nOutput:", "completion": " The Beagle.<|endoftext|>"},
        [[(U, "Name a ship.\n\nOutput:"), (A, "The Beagle.")]],
    ),
    "hh-rlhf": (
        {"chosen": "\n\nHuman: Hi?\n\nAssistant: Ho.\n\nHuman: And?\n\nAssistant: Gladly.",
         "rejected": "\n\nHuman: Hi?\n\nAssistant: Ho.\n\nHuman: And?\n\nAssistant: No."},
        [[(U, "Hi?"), (A, "Ho."), (U, "And?"), (A, "Gladly.")]],
    ),
    "longform": ({"input": "Write at length.", "output": "At length."}, [[(U, "Write at length."), (A, "At length.")]]),
    "unnatural-instructions": (
        {"instruction": "Add.", "instances": [
            {"instruction_with_input": "Add. 1 and 2", "input": "1 and 2", "constraints": "None.", "output": "3"},
            {"instruction_with_input": "Add. 2 and 2", "input": "2 and 2", "constraints": "None.", "output": "4"}],
         "reformulations": [{"instruction": "Sum.", "instruction_with_input": "Sum 1 and 2", "output": "3"}]},
        [[(U, "Add. 1 and 2"), (A, "3")], [(U, "Add. 2 and 2"), (A, "4")], [(U, "Sum 1 and 2"), (A, "3")]],
    ),
    "oasst1": (
        {"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": {
            "message_id": "1", "text": "Hi?", "role": "prompter", "replies": [
                {"message_id": "2", "text": "Go away.", "role": "assistant", "rank": 1, "replies": []},
                {"message_id": "3", "text": "Ho.", "role": "assistant", "rank": 0, "replies": []}]}},
        [[(U, "Hi?"), (A, "Ho.")]],
    ),
    "text": ({"text": "It was a dark night.\nSo it was."}, []),
}  # fmt: skip


def read(*values: dict[str, Any], format: FormatName | None = None, on_fault: OnFault = "stop") -> Source:
    rows = tuple(Row(f"x:{number}", value) for number, value in enumerate(values, start=1))
    return examples_of(Rows(rows, ()), name="x", format=format, on_fault=on_fault)


def said(source: Source) -> list[list[tuple[str, str]]]:
    return [
        [(message.role, message.content) for message in item.messages]
        for item in source.examples
        if isinstance(item, Conversation)
    ]


def refusal(*values: dict[str, Any], format: FormatName | None = None) -> str:
    with pytest.raises(DatasetError) as caught:
        read(*values, format=format)
    return str(caught.value)


def test_every_format_is_known_by_name_and_tested() -> None:
    assert set(FORMATS) == set(get_args(FormatName)) == set(ROWS)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "text"])
def test_a_row_as_published_becomes_its_conversations(name: FormatName) -> None:
    row, expected = ROWS[name]
    assert said(read(row, format=name)) == expected


def test_plain_text_is_kept_as_it_is() -> None:
    row, _ = ROWS["text"]
    assert read(row).examples == (Text(row["text"], "x:1"),)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_detected_by_its_first_row(name: FormatName) -> None:
    # Vicuna's rows are ShareGPT's; only their cleaning differs, and that is asked for by name.
    assert detect(Row("x:1", ROWS[name][0]), "x") == ("sharegpt" if name == "vicuna" else name)


def test_conversations_of_one_row_have_places_of_their_own() -> None:
    found = read(ROWS["unnatural-instructions"][0])
    assert [item.where for item in found.examples] == ["x:1#1", "x:1#2", "x:1#3"]


def test_an_alpaca_row_without_input_is_the_instruction_alone() -> None:
    row = {"instruction": "Name a ship.", "input": "", "output": "The Beagle."}
    assert said(read(row)) == [[(U, "Name a ship."), (A, "The Beagle.")]]


def test_rows_of_unknown_format() -> None:
    text = refusal({"question": "Hi?", "reply": "Ho."})
    assert "unknown format of x:1, which has the keys question, reply: expected one of chat, chatml" in text


@pytest.mark.parametrize(
    ("format", "row", "words"),
    [
        ("chatml", {"text": "<|im_start|>user\nHi?<|im_end|> and more"}, "text outside of turns: 'and more'"),
        ("chatml", {"text": "<|im_start|>user\nHi?<|im_end|>"}, "the last message is not the assistant's"),
        ("sharegpt", {"conversations": [{"from": "bard", "value": "x"}]}, "role 'bard', expected human, user, gpt"),
        ("sharegpt", {"conversations": ["x"]}, "message 1 is not an object"),
        ("sharegpt", {"conversations": "x"}, "'conversations' is not a list"),
        ("sharegpt", ROWS["vicuna"][0], "message 1 has role assistant, expected user"),
        ("alpaca", {"instruction": "Do.", "input": 5, "output": "Done."}, "'input' is not a string"),
        ("alpaca", {"instruction": " ", "output": "Done."}, "'instruction' is empty"),
        ("alpaca", {"instruction": "Do."}, "missing key 'output'"),
        ("guanaco", {"text": "Hi? Ho."}, "no turn begins with Human or Assistant"),
        ("guanaco", {"text": "### Human: A### Human: B### Assistant: C"}, "message 2 has role user, expected"),
        ("chip2", {"text": "<human>: Hi?\n<bot>:"}, "message 2 (assistant) has no text"),
        ("self-instruct", {"prompt": "Do.", "completion": " <|endoftext|>"}, "'completion' is empty"),
        ("hh-rlhf", {"chosen": "\n\nHuman: Hi?"}, "the last message is not the assistant's"),
        ("longform", {"input": "x", "output": None}, "'output' is not a string"),
        ("unnatural-instructions", {"instances": ["x"]}, "instance 1 is not an object"),
        ("unnatural-instructions", {"instances": "["}, "'instances' is not a JSON list"),
        ("unnatural-instructions", {"instances": "[" * 100_000}, "'instances' is not a JSON list"),
        ("text", {"text": ""}, "'text' is empty"),
        ("chat", {"text": "Hi?"}, "missing key 'messages'"),
    ],
)
def test_a_row_that_is_not_as_its_format_wants_it(format: FormatName, row: dict[str, Any], words: str) -> None:
    text = refusal(ROWS[format][0], row, format=format)
    assert "x has 1 fault: x:2: " in text
    assert words in text
    assert 'on_fault = "skip"' in text


def test_faulty_rows_can_be_left_out_and_are_reported() -> None:
    found = read(ROWS["alpaca"][0], {"instruction": "Do."}, on_fault="skip")
    assert len(found.examples) == 1
    assert found.notes == ("left out 1 fault: x:2: missing key 'output'",)


def test_leaving_out_every_row_leaves_nothing() -> None:
    with pytest.raises(DatasetError, match=r"x has no conversation in 1 row \(1 fault: x:1: missing key 'output'\)"):
        read({"instruction": "Do."}, format="alpaca", on_fault="skip")


def test_rows_without_an_answer_are_counted() -> None:
    found = read(ROWS["vicuna"][0], {"conversations": [{"from": "gpt", "value": "x"}]}, format="vicuna")
    assert found.notes == ("left out 1 row without an answer",)
