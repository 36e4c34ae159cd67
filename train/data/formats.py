"""Parse rows of the known data formats, and detect the format of rows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from adapterhub.errors import DatasetError
from train.data.conversation import (
    Conversation,
    Example,
    Message,
    Role,
    Source,
    Text,
    check_encodes,
    counted,
    listed,
    messages_of,
)
from train.data.oasst import top_ranked, trees_of
from train.data.readers import Row, Rows

FormatName = Literal[
    "chat", "chatml", "sharegpt", "vicuna", "alpaca", "prompt-completion", "oasst1", "guanaco", "chip2",
    "self-instruct", "hh-rlhf", "longform", "unnatural-instructions", "text",
]  # fmt: skip
OnFault = Literal["stop", "skip"]

_Parsed = tuple[Message, ...] | str
"""One conversation, or a text."""


@dataclass(frozen=True)
class Format:
    """A data format: the keys a row must have, and a parser of rows that raises ValueError."""

    keys: tuple[str, ...]
    parse: Callable[[dict[str, Any]], list[_Parsed]]


def examples_of(data: Rows, *, name: str, format: FormatName | None, on_fault: OnFault = "stop") -> Source:
    """Parse rows in the given format, or in that of the first row.

    Raises DatasetError when there are no examples, when the format is unknown, and for faulty rows: the first ten
    with file:line, and a count of the rest. With `on_fault` skip, faulty rows are left out and counted in the notes.
    """
    rows, faults = list(data.rows), list(data.faults)
    if rows:
        found = format or detect(rows[0], name)
        if found == "oasst1":
            rows, tree_faults = trees_of(rows)
            faults += tree_faults
    num_empty = 0
    examples: list[Example] = []
    for row in rows:
        try:
            parsed = _parse_row(row.value, FORMATS[found])
        except ValueError as error:
            faults.append(f"{row.where}: {error}")
            continue
        num_empty += not parsed
        for number, one in enumerate(parsed, start=1):
            where = row.where if len(parsed) == 1 else f"{row.where}#{number}"
            examples.append(Text(one, where) if isinstance(one, str) else Conversation(one, where))
    if faults and on_fault == "stop":
        raise DatasetError(
            f'{name} has {listed(faults)}. Correct these rows, or set on_fault = "skip" in [data] to leave them out.'
        )
    if not examples:
        why = f" ({listed(faults)})" if faults else ""
        raise DatasetError(
            f"{name} has no conversation in {counted(len(data.rows), 'row')}{why}: expected at least one. Check path "
            "and format in [data]."
        )
    notes = [f"left out {listed(faults)}"] if faults else []
    if num_empty:
        notes.append(f"left out {counted(num_empty, 'row')} without an answer")
    return Source(name, tuple(examples), tuple(notes))


def detect(row: Row, name: str) -> FormatName:
    """Detect a row's format by its keys, and by its text where formats share keys. Raises DatasetError."""
    value = row.value
    for keys, found in _BY_KEYS:
        if all(key in value for key in keys):
            if found == "self-instruct" and not all(isinstance(value[key], str) for key in keys):
                return "prompt-completion"
            return found
    if isinstance(text := value.get("text"), str):
        return next((found for mark, found in _BY_TEXT if re.search(mark, text)), "text")
    raise DatasetError(
        f"{name}: unknown format of {row.where}, which has the keys {', '.join(map(str, value)) or '(none)'}: expected "
        f"one of {', '.join(FORMATS)}. Set format in [data], or rename the keys."
    )


def alpaca_input(instruction: str, given: str) -> str:
    """Return the question of an Alpaca row, with its input under Alpaca's heading `### Input:`."""
    return f"{instruction}\n\n### Input:\n{given}" if given.strip() else instruction


def turns_of(text: str, mark: str, roles: dict[str, Role]) -> list[dict[str, str]]:
    """Split a text into messages at each match of `mark`, whose first group is a key of `roles`.

    Text before the first mark becomes a system message. Raises ValueError when there is no mark.
    """
    found = list(re.finditer(mark, text))
    if not found:
        raise ValueError(f"no turn begins with {' or '.join(roles)}")
    turns = []
    if before := text[: found[0].start()].strip():
        turns.append({"role": "system", "content": before})
    ends = [match.start() for match in found[1:]] + [len(text)]
    for match, end in zip(found, ends, strict=True):
        turns.append({"role": roles[match.group(1)], "content": text[match.end() : end].strip()})
    return turns


def hh_rlhf_turns(text: str) -> list[dict[str, str]]:
    """Split a dialogue of Anthropic's hh-rlhf into messages. Raises ValueError."""
    return turns_of(text, r"(?:^|\n\n)(Human|Assistant):", {"Human": "user", "Assistant": "assistant"})


def _parse_row(value: dict[str, Any], format: Format) -> list[_Parsed]:
    if missing := [key for key in format.keys if key not in value]:
        raise ValueError(f"missing key {' and '.join(map(repr, missing))}")
    return format.parse(value)


def _text_of(value: dict[str, Any], key: str, *, may_be_empty: bool = False) -> str:
    found = value.get(key)
    if may_be_empty and found is None:
        return ""
    if not isinstance(found, str):
        raise ValueError(f"{key!r} is not a string")
    if not found.strip() and not may_be_empty:
        raise ValueError(f"{key!r} is empty")
    check_encodes(found)
    return found


def _question_and_answer(question: str, answer: str) -> tuple[Message, ...]:
    return Message("user", question), Message("assistant", answer)


def _without_last_question(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """Remove the question without an answer that some of Guanaco's rows end with."""
    return turns[:-1] if turns and turns[-1]["role"] == "user" else turns


def _chat(value: dict[str, Any]) -> list[_Parsed]:
    if not isinstance(value["messages"], list):
        raise ValueError("'messages' is not a list")
    return [messages_of(value["messages"])]


def _chatml(value: dict[str, Any]) -> list[_Parsed]:
    text = _text_of(value, "text")
    turns = re.findall(r"<\|im_start\|>\s*(\w+)\n(.*?)<\|im_end\|>", text, re.DOTALL)
    rest = re.sub(r"<\|im_start\|>\s*\w+\n.*?<\|im_end\|>", "", text, flags=re.DOTALL).strip()
    if rest:
        raise ValueError(f"text outside of turns: {rest[:40]!r}")
    return [messages_of([{"role": role, "content": content.strip()} for role, content in turns])]


_SHAREGPT_ROLES: dict[str, Role] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
}  # fmt: skip


def _sharegpt(value: dict[str, Any]) -> list[_Parsed]:
    return [messages_of(_from_value(value), roles=_SHAREGPT_ROLES)]


def _vicuna(value: dict[str, Any]) -> list[_Parsed]:
    """Parse a ShareGPT row, and cut what precedes the first question or follows the last answer, as Vicuna did."""
    turns = _from_value(value)
    roles = [_SHAREGPT_ROLES.get(str(turn["role"])) for turn in turns]
    if "user" not in roles:
        return []
    start = roles.index("user")
    end = max((place + 1 for place, role in enumerate(roles) if role == "assistant"), default=0)
    kept = [*([turns[0]] if roles[0] == "system" else []), *turns[start:end]]
    return [messages_of(kept, roles=_SHAREGPT_ROLES)] if end > start else []


def _from_value(value: dict[str, Any]) -> list[dict[str, Any]]:
    turns = value["conversations"]
    if not isinstance(turns, list):
        raise ValueError("'conversations' is not a list")
    if invalid := [number for number, turn in enumerate(turns, start=1) if not isinstance(turn, dict)]:
        raise ValueError(f"message {invalid[0]} is not an object")
    return [{"role": turn.get("from"), "content": turn.get("value")} for turn in turns]


def _alpaca(value: dict[str, Any]) -> list[_Parsed]:
    given = _text_of(value, "input", may_be_empty=True)
    return [_question_and_answer(alpaca_input(_text_of(value, "instruction"), given), _text_of(value, "output"))]


def _prompt_completion(value: dict[str, Any]) -> list[_Parsed]:
    """Parse TRL's rows of messages; the completion follows the prompt."""
    if not isinstance(value["prompt"], list) or not isinstance(value["completion"], list):
        raise ValueError("'prompt' and 'completion' are not lists of messages")
    return [messages_of([*value["prompt"], *value["completion"]])]


def _oasst1(value: dict[str, Any]) -> list[_Parsed]:
    path = top_ranked(value)
    return [path] if path else []


def _guanaco(value: dict[str, Any]) -> list[_Parsed]:
    roles: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
    turns = _without_last_question(turns_of(_text_of(value, "text"), r"### (Human|Assistant):", roles))
    return [messages_of(turns)] if turns else []


def _chip2(value: dict[str, Any]) -> list[_Parsed]:
    turns = turns_of(_text_of(value, "text"), r"<(human|bot)>:", {"human": "user", "bot": "assistant"})
    return [messages_of(turns)]


def _self_instruct(value: dict[str, Any]) -> list[_Parsed]:
    # The published completions end with GPT-3's EOS.
    answer = _text_of(value, "completion").strip().removesuffix("<|endoftext|>").strip()
    if not answer:
        raise ValueError("'completion' is empty")
    return [_question_and_answer(_text_of(value, "prompt").strip(), answer)]


def _hh_rlhf(value: dict[str, Any]) -> list[_Parsed]:
    return [messages_of(hh_rlhf_turns(_text_of(value, "chosen")))]


def _longform(value: dict[str, Any]) -> list[_Parsed]:
    return [_question_and_answer(_text_of(value, "input"), _text_of(value, "output"))]


def _unnatural(value: dict[str, Any]) -> list[_Parsed]:
    """Parse every instance, and those of reformulated instructions in the full set (arXiv 2212.09689)."""
    instances = [*_list_of(value, "instances"), *_list_of(value, "reformulations")]
    if invalid := [number for number, one in enumerate(instances, start=1) if not isinstance(one, dict)]:
        raise ValueError(f"instance {invalid[0]} is not an object")
    return [_question_and_answer(_text_of(one, "instruction_with_input"), _text_of(one, "output")) for one in instances]


def _list_of(value: dict[str, Any], key: str) -> list[Any]:
    found = value.get(key) or []
    if isinstance(found, str):  # a column of a table
        try:
            found = json.loads(found)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{key!r} is not a JSON list ({error})") from error
    if not isinstance(found, list):
        raise ValueError(f"{key!r} is not a list")
    return found


def _plain(value: dict[str, Any]) -> list[_Parsed]:
    return [_text_of(value, "text")]


FORMATS: dict[FormatName, Format] = {
    "chat": Format(("messages",), _chat),
    "chatml": Format(("text",), _chatml),
    "sharegpt": Format(("conversations",), _sharegpt),
    "vicuna": Format(("conversations",), _vicuna),
    "alpaca": Format(("instruction", "output"), _alpaca),
    "prompt-completion": Format(("prompt", "completion"), _prompt_completion),
    "oasst1": Format(("prompt",), _oasst1),
    "guanaco": Format(("text",), _guanaco),
    "chip2": Format(("text",), _chip2),
    "self-instruct": Format(("prompt", "completion"), _self_instruct),
    "hh-rlhf": Format(("chosen",), _hh_rlhf),
    "longform": Format(("input", "output"), _longform),
    "unnatural-instructions": Format(("instances",), _unnatural),
    "text": Format(("text",), _plain),
}

_BY_KEYS: Sequence[tuple[tuple[str, ...], FormatName]] = (
    (("messages",), "chat"),
    (("conversations",), "sharegpt"),
    (("message_id", "parent_id", "role"), "oasst1"),
    (("message_tree_id", "prompt"), "oasst1"),
    (("instruction", "instances"), "unnatural-instructions"),
    (("instruction", "output"), "alpaca"),
    (("chosen", "rejected"), "hh-rlhf"),
    (("prompt", "completion"), "self-instruct"),
    (("input", "output"), "longform"),
)
_BY_TEXT: Sequence[tuple[str, FormatName]] = (
    (r"<\|im_start\|>", "chatml"),
    (r"^\s*### Human:", "guanaco"),
    (r"^\s*<human>:", "chip2"),
)
