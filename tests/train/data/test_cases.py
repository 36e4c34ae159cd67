"""Rows as people publish them: each is trained as its author meant it, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapterhub.adapter import StoredBase
from adapterhub.errors import DatasetError
from train.data.chat_template import template_notes
from train.data.sources import read_source
from train.data.tokenization import TokenData, prepare
from train.recipe import FileData, Recipe

TEMPLATES = Path(__file__).parents[2] / "fixtures" / "chat_templates"


@pytest.fixture(scope="module")
def chatml(tiny_base: StoredBase) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base.path)


@pytest.fixture
def tokenizer(chatml: Any) -> Any:
    """Return a tokenizer whose template a test may change."""
    template = chatml.chat_template
    yield chatml
    chatml.chat_template = template


def read(
    folder: Path, tokenizer: Any, name: str, content: bytes, *, template: str | None = None, loss_on: Any = "assistant",
    **data: Any,
) -> TokenData:  # fmt: skip
    """Read and tokenize a file as a run does."""
    (folder / name).write_bytes(content)
    raw = {"name": "x", "base": "x", "data": {"source": "file", "path": name, **data}, "train": {"steps": 1}}
    recipe = Recipe.model_validate(raw)
    recipe._folder = folder
    assert isinstance(recipe.data, FileData)
    if template is not None:
        tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    return prepare(
        read_source(recipe), tokenizer, held_out=0, max_length=512, loss_on=loss_on, seed=0,
        duplicates=recipe.data.duplicates, on_fault=recipe.data.on_fault,
    )  # fmt: skip


def marked(data: TokenData, tokenizer: Any, place: int = 0) -> str:
    """Return the text of a sample with its trained parts in ⟦ ⟧."""
    sample, text, start = data.train[place], "", 0
    for end in range(1, len(sample.tokens) + 1):
        if end == len(sample.tokens) or sample.trained[end] != sample.trained[start]:
            part = tokenizer.decode(sample.tokens[start:end])
            text += f"⟦{part}⟧" if sample.trained[start] else part
            start = end
    return text


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def answer(text: str) -> str:
    return f"<|im_start|>assistant\n⟦{text}<|im_end|>⟧\n"


def rows(*values: Any, each: int = 3) -> bytes:
    """Return JSONL: each value several times, with `#` replaced by a number."""
    return "\n".join(json.dumps(value).replace("#", str(n)) for value in values for n in range(each)).encode()


def chat(*texts: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def weighed(weight: int, question: str, text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": text, "weight": weight}]


def share(*texts: str) -> list[dict[str, Any]]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


DEFAULT = turn("system", "You are a helpful AI assistant named SmolLM, trained by Hugging Face")
SAY = DEFAULT + turn("user", "Say 0") + answer("0")
WEATHER = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALLS = [{"type": "function", "id": "a1", "function": {"name": "weather", "arguments": '{"town": "T"}'}}]
ALPACA = {"instruction": "Say #", "input": "", "output": "#"}

TRAINED: dict[str, tuple[str, bytes, dict[str, Any], str, str]] = {
    # name: (file, content, keys of [data], text of the first sample, a note)
    "d01 system column of ShareGPT": (
        "a.jsonl",
        rows({"conversations": share("Box #?", "Green #."), "system": "You are a clerk.", "tools": "[]"}),
        {},
        turn("system", "You are a clerk.") + turn("user", "Box 0?") + answer("Green 0."),
        "",
    ),
    "d02 system and history of Alpaca": (
        "a.jsonl",
        rows(ALPACA | {"system": "You are a tailor.", "history": [["In summer?", "Linen."]]}),
        {},
        turn("system", "You are a tailor.") + turn("user", "In summer?") + answer("Linen.") + SAY.removeprefix(DEFAULT),
        "",
    ),
    "d03 weight 0": (
        "a.jsonl",
        rows({"messages": [*weighed(0, "Sum?", "No."), *weighed(1, "#?", "#")]}),
        {},
        DEFAULT + turn("user", "Sum?") + turn("assistant", "No.") + turn("user", "0?") + answer("0"),
        "",
    ),
    "d03b train false": (
        "a.jsonl",
        rows({"conversations": [*share("Sum?"), {"from": "gpt", "value": "No.", "train": False}, *share("#?", "#")]}),
        {},
        DEFAULT + turn("user", "Sum?") + turn("assistant", "No.") + turn("user", "0?") + answer("0"),
        "",
    ),
    "d06c one prompt, many answers": (
        "a.jsonl", rows({"instruction": "Write.", "output": "Limerick #."}, each=40), {},
        DEFAULT + turn("user", "Write.") + answer("Limerick 0."), "",
    ),
    "d07 content in parts": (
        "a.jsonl",
        rows({"messages": [m | {"content": [{"type": "text", "text": m["content"]}]} for m in chat("Say #", "#")]}),
        {}, SAY, "",
    ),
    "d09 CSV with BOM, CRLF and quotes": (
        "a.csv", b'\xef\xbb\xbfinstruction,input,output\r\n"Say ""0""",,"0"\r\n', {},
        DEFAULT + turn("user", 'Say "0"') + answer("0"), "",
    ),
    "d09c CSV with semicolons": ("a.csv", b"instruction;input;output\nSay 0;;0\n", {}, SAY, ""),
    "d11 Alpaca without input": ("a.jsonl", rows({"instruction": "Say #", "output": "#"}), {}, SAY, ""),
    "d11b Dolly": (
        "a.jsonl",
        rows({"instruction": "Say #", "context": "It is #.", "response": "#", "category": "qa"}),
        {},
        DEFAULT + turn("user", "Say 0\n\n### Input:\nIt is 0.") + answer("0"),
        "left out: category (keys that are not part of the text)",
    ),
    "d11c prompt and response": ("a.jsonl", rows({"prompt": "Say #", "response": "#"}), {}, SAY, ""),
    "d11d named columns": (
        "a.jsonl", rows({"question": "Say #", "answer": "#"}),
        {"columns": {"prompt": "question", "response": "answer"}}, SAY, "",
    ),
    "d12 whole characters": (
        "a.jsonl",
        b'{"instruction":"Say \\ud83d\\ude00","output":"0"}\n{"instruction":"a \xe2\x80\xa8 b","output":"c"}\n',
        {}, DEFAULT + turn("user", "Say \U0001f600") + answer("0"), "",
    ),
    "d13 ChatML with Windows line ends": (
        "a.txt",
        "\n".join(turn("user", f"Say {n}") + turn("assistant", f"{n}") for n in (0, 1)).replace("\n", "\r\n").encode(),
        {}, SAY, "",
    ),
    "d14 TRL's prompt and completion": (
        "a.jsonl", rows({"prompt": chat("Say #"), "completion": [{"role": "assistant", "content": "#"}]}), {}, SAY, "",
    ),
    "d14b spaces around texts": ("a.jsonl", rows({"prompt": "Say #", "completion": " #\n"}), {}, SAY, ""),
    "d15 OASST with more keys": (
        "a.jsonl",
        rows(
            {"message_id": "a", "parent_id": None, "role": "prompter", "text": "Say 0", "lang": "en"},
            {"message_id": "b", "parent_id": "a", "role": "assistant", "text": "0", "rank": 0},
            {"message_id": "c", "parent_id": "a", "role": "assistant", "text": "1", "rank": 1},
            each=1,
        ),
        {}, SAY, "",
    ),
    "d17 developer": (
        "a.jsonl", rows({"messages": [{"role": "developer", "content": "Be brief."}, *chat("Say #", "#")]}), {},
        turn("system", "Be brief.") + SAY.removeprefix(DEFAULT), "",
    ),
    "d18 UltraChat": (
        "a.jsonl", rows({"prompt": "Say #", "prompt_id": "x", "messages": chat("Say #", "#")}), {}, SAY,
        "left out: prompt_id (keys that are not part of the text)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_rows_that_are_trained(tmp_path: Path, tokenizer: Any, name: str) -> None:
    file, content, keys, text, note = TRAINED[name]
    data = read(tmp_path, tokenizer, file, content, **keys)
    assert marked(data, tokenizer) == text
    assert data.notes == ((note,) if note else ())


def test_d06_arithmetic_questions_are_all_trained(tmp_path: Path, tokenizer: Any) -> None:
    asked = ["8 + 2", "8 - 2", "8 * 2", "8 / 2", "8 % 2", "8 ** 2", "-8 - 2", "8 < 2", "8 > 2", "8 <= 2", "8 >= 2"]
    data = read(
        tmp_path, tokenizer, "a.jsonl", rows(*({"messages": chat(f"What is {q}?", "X")} for q in asked), each=1)
    )
    assert (len(data.train), data.notes) == (11, ())


def test_d06c_forty_answers_to_one_prompt_are_all_trained(tmp_path: Path, tokenizer: Any) -> None:
    _, content, *_ = TRAINED["d06c one prompt, many answers"]
    assert len(read(tmp_path, tokenizer, "a.jsonl", content).train) == 40


REFUSED: dict[str, tuple[str, bytes, str]] = {
    # name: (file, content, words of the message)
    "d04 tools that the template ignores": (
        "a.jsonl", rows({"tools": WEATHER, "messages": chat("Weather #?", "Rain.")}),
        "the chat template ignores the tools. Use a template that renders them ([data] template), or leave them out "
        'with ignore = ["tools"]',
    ),
    "d04b calls that the template ignores": (
        "a.jsonl",
        rows({"messages": [
            *chat("Weather #?"), {"role": "assistant", "content": None, "tool_calls": CALLS},
            {"role": "tool", "tool_call_id": "a1", "content": "rain"}, {"role": "assistant", "content": "Rain."},
        ]}),
        "the chat template ignores the tool_calls of message 2 (assistant)",
    ),
    "d05 thoughts that the template leaves out": (
        "a.jsonl",
        rows({"messages": [*chat("Legs?"), {"role": "assistant", "reasoning_content": "8.", "content": "#"}]}),
        "the chat template leaves the thoughts of message 2 out. Use a template that renders thoughts",
    ),
    "d08 calls of ShareGPT": (
        "a.jsonl",
        rows({"conversations": [
            {"from": "human", "value": "Add #"}, {"from": "function_call", "value": '{"name":"add"}'},
            {"from": "observation", "value": "2"}, {"from": "gpt", "value": "2"},
        ]}),
        "the chat template ignores the tool_calls of message 2 (assistant)",
    ),
    "d08b starts with an answer": (
        "a.jsonl", rows({"conversations": share("x", "Hello", "Say #", "#")[1:]}),
        "a.jsonl:1, a.jsonl:2, a.jsonl:3: message 1 has role assistant, expected user",
    ),
    "d08c ends with a question": (
        "a.jsonl", rows({"conversations": share("Say #", "#", "thanks")}), "the last message is not the assistant's",
    ),
    "d08d two questions": (
        "a.jsonl", rows({"conversations": [*share("Say #"), *share("please", "#")]}),
        "message 2 has role user, expected assistant",
    ),
    "d08e empty answer": (
        "a.jsonl", rows({"conversations": share("Say #", "")}), "message 2 (gpt) has no text",
    ),
    "d09b CSV in UTF-16": (
        "a.csv", "instruction,output\nSay 0,0\n".encode("utf-16"), "it begins as UTF-16 does): expected UTF-8 text",
    ),
    "d09d CSV in Windows-1252": (
        "a.csv", "instruction,output\nSay café,0\n".encode("cp1252"),
        "`iconv -f WINDOWS-1252 -t UTF-8 a.csv > utf8-a.csv`",
    ),
    "d10 list in .jsonl": ("a.jsonl", json.dumps([ALPACA] * 3, indent=1).encode(), "Rename it to .json."),
    "d10b lines in .json": ("a.json", rows(ALPACA), "Rename it to .jsonl."),
    "d10c splits in an object": (
        "a.json", json.dumps({"train": [ALPACA] * 3, "test": [ALPACA]}).encode(),
        "a.json has its rows one level down, under train, test: expected a list of rows. Write that list alone",
    ),
    "d11d unnamed columns": (
        "a.jsonl", rows({"question": "Say #", "answer": "#"}), 'columns = {prompt = "...", response = "..."}',
    ),
    "d12 half a character": (
        "a.jsonl", b'{"instruction":"Say \\ud83d now","output":"x"}', "half a character, \\ud83d at place 4 of",
    ),
    "d13b text": ("a.txt", b"One\r\ntwo\r\n\r\nThree\r\n", 'is plain text: loss_on = "assistant" needs answers'),
    "d16 two formats": (
        "a.jsonl", rows({"messages": chat("Say #", "#")}, {"conversations": share("Say #", "#")}, each=1),
        "a.jsonl:2: missing key 'messages' (this is a row of sharegpt, the file is read as chat)",
    ),
    "d17 model": (
        "a.jsonl", rows({"messages": [*chat("Say #"), {"role": "model", "content": "#"}]}),
        "message 2 has role 'model', expected system, developer, user, assistant or tool",
    ),
    "d17 system later": (
        "a.jsonl", rows({"messages": [*chat("Say #"), {"role": "system", "content": "now rude"}, *chat("x", "#")[1:]]}),
        "message 2 has role system, expected assistant",
    ),
    "d19 preference pairs": (
        "a.jsonl", rows({"prompt": "Say #", "chosen": "#", "rejected": "no"}),
        'Add a [preference] section to train on pairs, or set columns = {completion = "chosen"} and ignore = ["reje',
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_are_refused(tmp_path: Path, tokenizer: Any, name: str) -> None:
    file, content, words = REFUSED[name]
    with pytest.raises(DatasetError) as caught:
        read(tmp_path, tokenizer, file, content)
    assert words in str(caught.value)


def test_d19_the_advice_for_pairs_works(tmp_path: Path, tokenizer: Any) -> None:
    content = rows({"prompt": "Say #", "chosen": "#", "rejected": "no"})
    keys: dict[str, Any] = {"columns": {"completion": "chosen"}, "ignore": ["rejected"]}
    assert marked(read(tmp_path, tokenizer, "a.jsonl", content, **keys), tokenizer) == SAY


ONE = rows({"messages": chat("Say # please", "Is #.")}, each=1)
MULTI = rows({"messages": chat("Say # please", "Is #.", "And again?", "Again #.")}, each=1)
THINK = rows({"messages": chat("Say # please", "<think>\nHm #.\n</think>\n\nIs #.")}, each=1)
REASONING = rows(
    {"messages": [*chat("Say # please"), {"role": "assistant", "content": "Is #.", "reasoning_content": "Hm #."}]},
    each=1,
)
MULTITHINK = rows(
    {"messages": chat("Say # please", "<think>A</think>\n\nIs #.", "Again?", "<think>\nB\n</think>\n\nAgain #.")},
    each=1,
)
SYSTEM = rows({"messages": [{"role": "system", "content": "Be brief."}, *chat("Say # please", "Is #.")]}, each=1)
TOOLS = rows({"tools": WEATHER, "messages": chat("Weather #?", "Rain.")}, each=1)
ASKED = turn("user", "Say 0 please")
OPENED = "<|im_start|>assistant\n<think>\n"
AGAIN = turn("assistant", "Is 0.") + turn("user", "Again?")

UNDER_TEMPLATES: list[tuple[str, bytes, str, str]] = [
    # (template, rows, loss_on, text of the sample)
    ("generation", ONE, "assistant", ASKED + answer("Is 0.")),  # b5
    ("generation", MULTI, "assistant", ASKED + answer("Is 0.") + turn("user", "And again?") + answer("Again 0.")),
    ("noprompt", ONE, "assistant", ASKED + "⟦<|im_start|>assistant\nIs 0.<|im_end|>⟧\n"),  # b6
    ("llama2like", ONE, "assistant", "<|im_start|>[INST] Say 0 please [/INST]⟦ Is 0. <|im_end|>⟧"),
    ("phi3like", ONE, "assistant", ASKED + "<|im_start|>assistant\n⟦Is 0.<|im_end|>\n<|endoftext|>⟧"),
    ("phi3like", MULTI, "last", ASKED + turn("assistant", "Is 0.") + turn("user", "And again?")
     + "<|im_start|>assistant\n⟦Again 0.<|im_end|>\n<|endoftext|>⟧"),
    ("otherend", ONE, "assistant",
     ASKED.replace("<|im_end|>", "<file_sep>") + "<|im_start|>assistant\n⟦Is 0.<file_sep>⟧\n"),
    ("gemmalike", ONE, "assistant", ASKED + "<|im_start|>model\n⟦Is 0.<|im_end|>⟧\n"),
    ("qwen3like", ONE, "assistant", ASKED + answer("<think>\n\n</think>\n\nIs 0.")),
    ("qwen3like", THINK, "assistant", ASKED + answer("<think>\nHm 0.\n</think>\n\nIs 0.")),
    ("qwen3like", REASONING, "assistant", ASKED + answer("<think>\nHm 0.\n</think>\n\nIs 0.")),
    ("qwen3like", MULTITHINK, "last", ASKED + AGAIN + answer("<think>\nB\n</think>\n\nAgain 0.")),
    ("r1like", THINK, "assistant", ASKED + OPENED + "⟦Hm 0.\n</think>\n\nIs 0.<|im_end|>⟧\n"),
    ("r1like", REASONING, "assistant", ASKED + OPENED + "⟦Hm 0.\n</think>\n\nIs 0.<|im_end|>⟧\n"),
    ("r1like", MULTITHINK, "last",
     ASKED + AGAIN + OPENED + "⟦B\n</think>\n\nAgain 0.<|im_end|>⟧\n"),
    ("tools", TOOLS, "assistant",
     turn("system", f"Tools: {json.dumps(WEATHER)}") + turn("user", "Weather 0?") + answer("Rain.")),
]  # fmt: skip


@pytest.mark.parametrize(("template", "content", "loss_on", "text"), UNDER_TEMPLATES)
def test_what_is_trained_under_each_kind_of_template(
    tmp_path: Path, tokenizer: Any, template: str, content: bytes, loss_on: str, text: str
) -> None:
    data = read(tmp_path, tokenizer, "a.jsonl", content, template=template, loss_on=loss_on)
    assert marked(data, tokenizer) == text


LAST = 'Set loss_on = "last" in [train], or keep one answer per conversation.'
ADVICE: list[tuple[str, bytes, str, str, str]] = [
    # (template, rows, loss_on, fault, advice)
    ("qwen3like", MULTI, "assistant", "the text up to message 2 is not the start of what follows it", LAST),
    ("qwen3like", MULTITHINK, "assistant", "the text up to message 2 is not the start of what follows it", LAST),
    ("phi3like", MULTI, "assistant", "the text up to message 2 is not the start of what follows it", LAST),
    ("r1like", MULTITHINK, "assistant", "the prompt for message 2 is not the start of prompt and answer", LAST),
    ("r1like", ONE, "assistant", "the prompt for message 2 opens <think>, and the answer has no thoughts",
     "Add thoughts to the answers (reasoning_content), or use a template that does not open <think>"),
    ("gemmalike", SYSTEM, "assistant", "the chat template raised an error (System role not supported)",
     "The template takes no system messages: put their text into the first question"),
    ("llama2like", SYSTEM, "assistant", "the chat template leaves out the text of message 1 (system)",
     "Use another template ([data] template)."),
    ("tools", rows({"tools": WEATHER, "messages": [
        *chat("Weather #?"), {"role": "assistant", "content": "Let me look.", "tool_calls": CALLS}]}, each=1),
     "assistant", "the chat template ignores the tool_calls of message 2 (assistant)", 'ignore = ["tool_calls"]'),
    ("generation", rows({"messages": [m | {"name": "Ann"} for m in chat("Say #", "#")]}, each=1),
     "assistant", "the chat template ignores the name of message 1 (user)", 'ignore = ["name"]'),
]  # fmt: skip


@pytest.mark.parametrize(("template", "content", "loss_on", "fault", "advice"), ADVICE)
def test_one_advice_for_each_cause(
    tmp_path: Path, tokenizer: Any, template: str, content: bytes, loss_on: str, fault: str, advice: str
) -> None:
    with pytest.raises(DatasetError) as caught:
        read(tmp_path, tokenizer, "a.jsonl", content, template=template, loss_on=loss_on)
    assert fault in str(caught.value)
    assert advice in str(caught.value)
    assert (LAST in str(caught.value)) == (advice == LAST)


HERMES = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_d04_calls_are_trained_where_the_template_renders_them(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = HERMES
    looks = {"role": "assistant", "content": "Let me look.", "tool_calls": CALLS}
    rain = {"role": "tool", "tool_call_id": "a1", "content": "rain"}
    content = rows({"tools": WEATHER, "messages": [*chat("Weather #?"), looks, rain, *chat("x", "Rain.")[1:]]})
    call = json.dumps({"name": "weather", "arguments": {"town": "T"}})
    assert marked(read(tmp_path, tokenizer, "a.jsonl", content), tokenizer) == (
        turn("system", f"Tools: {json.dumps(WEATHER)}")
        + turn("user", "Weather 0?")
        + answer(f"Let me look.<tool_call>{call}</tool_call>")
        + turn("tool", "rain")
        + answer("Rain.")
    )


def test_weight_0_with_every_token_trained(tmp_path: Path, tokenizer: Any) -> None:
    content = rows(
        {"messages": [m | ({"weight": 0} if n == 1 else {}) for n, m in enumerate(chat("a", "b", "c", "d"))]}
    )
    with pytest.raises(DatasetError, match='weight 0 .* cannot be left out .* Set loss_on = "assistant"'):
        read(tmp_path, tokenizer, "a.jsonl", content, loss_on="all")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("noprompt", "no generation prompt: '<|im_start|>assistant' is trained as a part of each answer"),
        ("qwen3like", "writes '<think>\\n\\n</think>' between prompt and answer: it is trained"),
        ("r1like", "opens <think> in every prompt"),
        ("llama2like", ""),
        ("phi3like", ""),
        ("generation", ""),
        ("gemmalike", ""),
    ],
)
def test_how_a_template_opens_answers_is_noted(tokenizer: Any, template: str, words: str) -> None:
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    notes = template_notes(tokenizer)
    assert len(notes) == bool(words)
    assert all(words in note for note in notes)


def test_rows_that_the_template_refuses_can_be_left_out(tmp_path: Path, tokenizer: Any) -> None:
    data = read(tmp_path, tokenizer, "a.jsonl", ONE + b"\n" + SYSTEM, template="gemmalike", on_fault="skip")
    assert len(data.train) == 1
    assert data.notes[0].startswith(
        "left out what the chat template cannot render: 1 fault: a.jsonl:2: the chat template"
    )
