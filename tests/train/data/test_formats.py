"""Each data format on rows written as its authors publish them: parsing, detection and faults."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from adapterhub.errors import DatasetError
from train.data.conversation import Conversation, Source, Text
from train.data.formats import FORMATS, FormatName, OnFault, arranged, detect, examples_of
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
    "dolly": (
        {"instruction": "Who wrote it?", "context": "Darwin wrote it.", "response": "Darwin.", "category": "closed_qa"},
        [[(U, "Who wrote it?\n\n### Input:\nDarwin wrote it."), (A, "Darwin.")]],
    ),
    "prompt-response": ({"prompt": "Hi?", "response": "Ho."}, [[(U, "Hi?"), (A, "Ho.")]]),
    "prompt-completion": (
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}],
         "completion": [{"role": "assistant", "content": "Ho."}]},
        [[(S, "Be brief."), (U, "Hi?"), (A, "Ho.")]],
    ),
    "openorca": (
        {"id": "niv.1", "system_prompt": "Be brief.", "question": "Hi?", "response": "Ho."},
        [[(S, "Be brief."), (U, "Hi?"), (A, "Ho.")]],
    ),
    "flan": ({"inputs": "Hi?", "targets": "Ho.", "task": "greet"}, [[(U, "Hi?"), (A, "Ho.")]]),
    "ultrachat": (
        {"id": "0", "data": ["Hi?", "Ho.", "And?", "So."]},
        [[(U, "Hi?"), (A, "Ho."), (U, "And?"), (A, "So.")]],
    ),
    "guanaco": (
        {"text": "### Human: Hi?### Assistant: Ho.### Human: And?### Assistant: So on.### Human: More"},
        [[(U, "Hi?"), (A, "Ho."), (U, "And?"), (A, "So on.")]],
    ),
    "chip2": (
        {"text": "<human>: Hi?\n<bot>: Ho.\nHum.", "metadata": {"source": "unified_chip2"}},
        [[(U, "Hi?"), (A, "Ho.\nHum.")]],
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


UNKNOWN = {"notes": "Be rude.", "functions": [{"name": "f"}], "weight": 0, "documents": [{"text": "x"}], "flag": False}


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("text", "oasst1")])
@pytest.mark.parametrize("key", UNKNOWN)
def test_a_key_that_no_format_reads_is_refused_in_every_format(name: FormatName, key: str) -> None:
    text = refusal(ROWS[name][0] | {key: UNKNOWN[key]}, format=name)
    assert f'the row has the unknown key {key!r} (ignore = ["{key}"] in [data] leaves it out)' in text


@pytest.mark.parametrize("key", ["notes", "weight", "train_detail", "function_call", "refusal"])
@pytest.mark.parametrize("name", ["chat", "sharegpt", "prompt-completion"])
def test_a_key_of_a_message_that_no_template_gets_is_refused(name: FormatName, key: str) -> None:
    row = json.loads(json.dumps(ROWS[name][0]))
    messages = next(value for value in reversed(row.values()) if isinstance(value, list))
    messages[-1][key] = {"weight": 0.5}.get(key, "x")
    words = "has weight 0.5, expected 0 or 1" if key == "weight" else f"unknown key {key!r}"
    assert words in refusal(row, format=name)


@pytest.mark.parametrize("empty", [None, "", [], {}])
def test_an_unknown_key_without_a_value_says_nothing(empty: object) -> None:
    row = {"messages": [m | {"refusal": empty} for m in ROWS["chat"][0]["messages"]], "functions": empty}
    assert read(row).notes == ()


def test_keys_that_only_describe_a_row_or_message_are_listed_once() -> None:
    chat = {"messages": [m | {"timestamp": "12:00"} for m in ROWS["chat"][0]["messages"]], "source": "web"}
    found = read(chat | {"prompt_id": "7"}, chat)
    assert found.notes == ("left out: source, prompt_id, timestamp (keys that are not part of the text)",)


@pytest.mark.parametrize(
    "name", ["chat", "sharegpt", "alpaca", "dolly", "prompt-response", "openorca", "self-instruct"]
)
def test_a_system_column_is_the_first_message(name: FormatName) -> None:
    row = {key: value for key, value in ROWS[name][0].items() if key != "system_prompt"}
    expected = [turn for turn in ROWS[name][1][0] if turn[0] != S]
    if name == "sharegpt":
        row["conversations"] = row["conversations"][1:]
    assert said(read(row | {"system": "Be kind."}, format=name)) == [[(S, "Be kind."), *expected]]


def test_two_system_messages_of_a_row() -> None:
    assert "system message and that of its messages differ" in refusal(ROWS["sharegpt"][0] | {"system": "Be kind."})
    assert said(read(ROWS["sharegpt"][0] | {"system": "Be brief."})) == ROWS["sharegpt"][1]
    assert "different system messages" in refusal(ROWS["openorca"][0] | {"system": "Be kind."})


@pytest.mark.parametrize("name", ["alpaca", "dolly", "prompt-response", "openorca"])
def test_history_comes_before_the_question(name: FormatName) -> None:
    row = ROWS[name][0] | {"history": [["One?", "1"], ["Two?", "2"]]}
    before, expected = [(U, "One?"), (A, "1"), (U, "Two?"), (A, "2")], ROWS[name][1][0]
    system = [turn for turn in expected if turn[0] == S]
    assert said(read(row, format=name)) == [[*system, *before, *expected[len(system) :]]]


@pytest.mark.parametrize("history", [["One?"], [["One?"]], [["One?", ""]], "One?", [["One?", "1", "2"]]])
def test_history_that_is_not_pairs(history: object) -> None:
    assert "'history'" in refusal(ROWS["alpaca"][0] | {"history": history})


def test_only_the_completion_of_trls_messages_is_trained() -> None:
    prompt = [*ROWS["chat"][0]["messages"], {"role": "user", "content": "And?"}]
    found = read({"prompt": prompt, "completion": [{"role": "assistant", "content": "So."}]}).examples[0]
    assert isinstance(found, Conversation)
    assert [message.is_trained for message in found.messages if message.role == "assistant"] == [False, True]


def test_the_prompt_of_an_ultrachat_row_is_its_first_question() -> None:
    assert said(read(ROWS["chat"][0] | {"prompt": "Hi?", "prompt_id": "x"})) == ROWS["chat"][1]
    assert "'prompt' is none of the questions" in refusal(ROWS["chat"][0] | {"prompt": "Who?"})


def test_columns_name_the_keys_of_a_format() -> None:
    rows = Rows((Row("x:1", {"question": "Hi?", "answer": "Ho.", "why": "So."}),), ())
    found = arranged(rows, columns={"prompt": "question", "response": "answer"}, ignore=["why"])
    assert said(examples_of(found, name="x", format=None)) == [[(U, "Hi?"), (A, "Ho.")]]


def test_a_column_under_a_key_that_the_row_has_too() -> None:
    rows = Rows((Row("x:1", {"question": "Hi?", "prompt": "Hm?", "response": "Ho."}),), ())
    found = arranged(rows, columns={"prompt": "question"}, ignore=[])
    assert found.faults == (
        "x:1: columns gives 'question' as 'prompt', which the row has too (ignore = [\"prompt\"] in [data] leaves it "
        "out)",
    )
    swapped = arranged(rows, columns={"prompt": "question", "question": "prompt"}, ignore=[])
    assert swapped.rows[0].value == {"prompt": "Hi?", "question": "Hm?", "response": "Ho."}


def test_ignored_keys_of_messages_are_left_out() -> None:
    rows = Rows((Row("x:1", {"messages": [m | {"mood": "good"} for m in ROWS["chat"][0]["messages"]]}),), ())
    assert said(examples_of(arranged(rows, columns={}, ignore=["mood"]), name="x", format=None)) == ROWS["chat"][1]


def test_keys_of_parts_and_calls_are_left_out_as_their_refusal_says() -> None:
    call = {"type": "function", "mood": 1, "function": {"name": "add", "arguments": {"mood": 2}, "mood": 3}}
    messages = [
        {"role": "user", "name": "Ada", "content": [{"type": "text", "text": "Hi?", "mood": 4}]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "Ho."},
    ]
    row = {"messages": messages, "tools": [{"name": "add", "mood": 5}]}
    assert "a part of message 1 (user) has the unknown key 'mood' (ignore = [\"mood\"] in [data]" in refusal(row)
    found = arranged(Rows((Row("x:1", row),), ()), columns={}, ignore=["mood", "name"])
    (example,) = examples_of(found, name="x", format=None).examples
    assert isinstance(example, Conversation)
    assert (example.messages[0].content, example.messages[0].name) == ("Hi?", "")
    assert json.loads(example.messages[1].tool_calls) == [
        {"type": "function", "function": {"name": "add", "arguments": {"mood": 2}}}
    ]
    assert json.loads(example.tools) == [{"type": "function", "function": {"name": "add", "mood": 5}}]


def test_a_column_that_no_row_has() -> None:
    rows = Rows((Row("x:1", {"prompt": "Hi?", "response": "Ho."}),), ())
    with pytest.raises(DatasetError, match="columns names 'sytem', which no row has: .* such as 'prompt', 'response'"):
        arranged(rows, columns={"system": "sytem"}, ignore=[])


HI = {"content": "Hi?"}
CALL = {"type": "function", "id": "a1", "function": {"name": "add", "arguments": '{"a": 1}'}}


@pytest.mark.parametrize(
    "call",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [{"id": "a1", "name": "add", "arguments": {"a": 1}}]},
    ],
)
def test_a_call_reaches_the_template_in_openais_form_with_its_arguments_parsed(call: dict[str, Any]) -> None:
    messages = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": None, **call},
        {"role": "tool", "tool_call_id": "a1", "name": "add", "content": "1"},
        {"role": "assistant", "content": "It is 1."},
    ]
    found = read({"messages": messages, "tools": [{"name": "add", "parameters": {}}]}).examples[0]
    assert isinstance(found, Conversation)
    assert found.messages[1].for_template() == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "a1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
    }
    assert found.messages[2].for_template() == {"role": "tool", "content": "1", "tool_call_id": "a1", "name": "add"}
    assert json.loads(found.tools) == [{"type": "function", "function": {"name": "add", "parameters": {}}}]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (
            [{"role": "user", "content": "x", "tool_calls": [CALL]}],
            "message 1 (user) has tool_calls, which only an answer",
        ),
        (
            [{"role": "user", "content": "x", "thinking": "Hm."}],
            "message 1 (user) has thoughts, which only an answer has",
        ),
        ([{"role": "user", "content": "x", "weight": 1}], "message 1 (user) has weight 1: only answers are trained"),
        ([{"role": "user", "content": "x", "train": "no"}], "has train 'no', expected true or false"),
        ([{"role": "assistant", "content": "x", "weight": 0, "train": True}], "which contradict each other"),
        ([{"role": "assistant", "content": "x", "reasoning": "a", "thinking": "b"}], "different thoughts under"),
        ([{"role": "assistant", "tool_calls": [{}]}], "a tool call of message 1 (assistant) names no function"),
        ([{"role": "assistant", "tool_calls": [{**CALL, "extra": 1}]}], "unknown key 'extra'"),
        ([{"role": "assistant", "tool_calls": "["}], "'tool_calls' of message 1 (assistant) is not JSON"),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}],
            "the arguments of f in message 1 (assistant) are not an object",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "a part of type 'image_url': only text",
        ),
        (
            [
                {"role": "user", "content": "x"},
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "user", "content": "y"},
            ],
            "message 3 has role user, expected tool",
        ),
        (
            [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}],
            "message 2 has role tool, expected assis",
        ),
    ],
)
def test_a_message_whose_keys_contradict_it(messages: list[dict[str, Any]], words: str) -> None:
    assert words in refusal({"messages": messages})


@pytest.mark.parametrize("tools", ["[", "{}x", [1], {"a": 1}, [{"type": "function", "function": {}}]])
def test_tools_that_are_none(tools: object) -> None:
    assert "tool" in refusal(ROWS["chat"][0] | {"tools": tools})
