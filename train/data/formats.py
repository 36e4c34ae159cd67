"""Parse rows of the known data formats, and detect the format of rows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
    check_keys,
    counted,
    is_empty,
    is_inert,
    listed,
    messages_of,
    tools_of,
    with_advice,
)
from train.data.oasst import KEYS as OASST_KEYS
from train.data.oasst import top_ranked, trees_of
from train.data.readers import Row, Rows

FormatName = Literal[
    "chat", "chatml", "sharegpt", "vicuna", "alpaca", "dolly", "prompt-response", "prompt-completion", "openorca",
    "flan", "ultrachat", "oasst1", "guanaco", "chip2", "self-instruct", "hh-rlhf", "longform",
    "unnatural-instructions", "text",
]  # fmt: skip
OnFault = Literal["stop", "skip"]

_NUM_COLUMNS_SHOWN = 10
_USED_INSIDE = frozenset({"type", "text", "function", "name", "arguments"})
"""Keys of a message's parts and calls that `ignore` leaves in: there, they say what a message's keys do not."""

_Parsed = tuple[Message, ...] | str
"""One conversation, or a text."""


@dataclass(frozen=True)
class Format:
    """A data format: the keys of its rows, and a parser of rows that raises ValueError."""

    keys: tuple[str, ...]
    """Keys that a row must have."""
    parse: Callable[[dict[str, Any]], list[_Parsed]]
    optional: tuple[str, ...] = ()
    """Keys that a row may have, besides those of `is_inert`; any other key is refused."""


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
    unused: dict[str, None] = {}
    for row in rows:
        try:
            parsed = _parse_row(row.value, found)
            tools = tools_of(row.value.get("tools")) if "tools" in FORMATS[found].optional else ""
        except ValueError as error:
            faults.append(f"{row.where}: {error}")
            continue
        num_empty += not parsed
        unused |= dict.fromkeys(unused_keys(row.value, (*FORMATS[found].keys, *FORMATS[found].optional)))
        for number, one in enumerate(parsed, start=1):
            where = row.where if len(parsed) == 1 else f"{row.where}#{number}"
            examples.append(Text(one, where) if isinstance(one, str) else Conversation(one, where, tools))
    if faults and on_fault == "stop":
        raise DatasetError(
            with_advice(
                f"{name} has {listed(faults)}",
                'Correct these rows, or set on_fault = "skip" in [data] to leave them out.',
            )
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
    return Source(name, tuple(examples), (*notes, *unused_note(unused)))


def arranged(data: Rows, *, columns: Mapping[str, str], ignore: Collection[str]) -> Rows:
    """Return rows without the keys in `ignore`, of rows and of messages, and with columns under their formats' keys.

    `columns` maps a format's key to the column that holds it. A row with both is a fault. Raises DatasetError for a
    column that no row has.
    """
    if not columns and not ignore:
        return data
    names = {column: key for key, column in columns.items()}
    rows, faults = [], list(data.faults)
    for row in data.rows:
        kept = {
            key: value if names.get(key, key) == "tools" else _without(value, ignore)
            for key, value in row.value.items()
            if key not in ignore
        }
        if clash := [key for key, column in columns.items() if column in kept and key in kept and key not in names]:
            faults.append(
                f"{row.where}: columns gives {columns[clash[0]]!r} as {clash[0]!r}, which the row has too "
                f'(ignore = ["{clash[0]}"] in [data] leaves it out)'
            )
        else:
            rows.append(Row(row.where, {names.get(key, key): value for key, value in kept.items()}))
    if rows and (absent := [name for name in names if not any(name in row.value for row in data.rows)]):
        raise DatasetError(
            f"columns names {', '.join(map(repr, absent))}, which no row has: expected columns of the data, such as "
            f"{', '.join(map(repr, list(data.rows[0].value)[:_NUM_COLUMNS_SHOWN]))}. Correct columns in [data]."
        )
    return Rows(tuple(rows), tuple(faults))


def _without(value: Any, ignore: Collection[str]) -> Any:
    """Return a row's value; of a list of messages, leave out ignored keys, also those of their parts and calls."""
    if not isinstance(value, list):
        return value
    return [_message_without(item, ignore) if isinstance(item, dict) else item for item in value]


def _message_without(message: dict[str, Any], ignore: Collection[str]) -> dict[str, Any]:
    kept = {key: part for key, part in message.items() if key not in ignore}
    inner = set(ignore) - _USED_INSIDE
    for key in {"content", "tool_calls"} & kept.keys():
        kept[key] = _without(kept[key], inner)
    if isinstance(kept.get("function"), dict):
        kept["function"] = _message_without(kept["function"], inner)
    return kept


def unused_keys(value: dict[str, Any], used: Collection[str]) -> Iterator[str]:
    """Yield the keys of a row, besides those in `used`, and of its messages that only describe them."""
    yield from (key for key, part in value.items() if key not in used and not is_empty(part))
    for part in value.values():
        for message in part if isinstance(part, list) else ():
            if isinstance(message, dict):
                yield from (key for key in message if is_inert(key) and key != "tool_call_id" and key not in used)


def unused_note(keys: Collection[str]) -> list[str]:
    """Return the note about keys that are left out, if there are any."""
    return [f"left out: {', '.join(keys)} (keys that are not part of the text)"] if keys else []


def detect(row: Row, name: str) -> FormatName:
    """Detect a row's format by its keys, and by its text where formats share keys. Raises DatasetError."""
    value = row.value
    if "chosen" in value and "rejected" in value and ("prompt" in value or not isinstance(value["chosen"], str)):
        raise DatasetError(
            f"{name} has preference pairs (chosen and rejected): expected conversations. Add a [preference] section to "
            'train on pairs, or set columns = {completion = "chosen"} and ignore = ["rejected"] in [data].'
        )
    if (found := _format_of(value)) is not None:
        return found
    inside = [key for key, part in value.items() if isinstance(part, list) and part and isinstance(part[0], dict)]
    if inside and len(inside) == len(value):
        raise DatasetError(
            f"{name} has its rows one level down, under {', '.join(inside)}: expected a list of rows. Write that list "
            "alone to a file."
        )
    raise DatasetError(
        f"{name}: unknown format of {row.where}, which has the keys {', '.join(map(str, value)) or '(none)'}: expected "
        f"one of {', '.join(FORMATS)}. Set format in [data], or name the columns there: "
        'columns = {prompt = "...", response = "..."}.'
    )


def _format_of(value: dict[str, Any]) -> FormatName | None:
    for keys, found in _BY_KEYS:
        if all(key in value for key in keys):
            # A data set of texts came first; TRL's rows of the same keys hold messages.
            is_text = all(isinstance(value[key], str) for key in keys)
            return "prompt-completion" if found == "self-instruct" and not is_text else found
    if isinstance(texts := value.get("data"), list) and all(isinstance(text, str) for text in texts):
        return "ultrachat"
    if isinstance(text := value.get("text"), str):
        return next((found for mark, found in _BY_TEXT if re.search(mark, text)), "text")
    return None


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


def _parse_row(value: dict[str, Any], name: FormatName) -> list[_Parsed]:
    format = FORMATS[name]
    if missing := [key for key in format.keys if key not in value]:
        other = _format_of(value)
        hint = f" (this is a row of {other}, the file is read as {name})" if other not in (None, name, "text") else ""
        raise ValueError(f"missing key {' and '.join(map(repr, missing))}{hint}")
    check_keys(value, (*format.keys, *format.optional), what="the row has the")
    parsed = format.parse(value)
    system = _system_of(value, format)
    return [_with_system(system, one) for one in parsed] if system else parsed


def _system_of(value: dict[str, Any], format: Format) -> str:
    found = {_text_of(value, key, may_be_empty=True) for key in _SYSTEM_KEYS if key in format.optional}
    texts = [text for text in found if text.strip()]
    if len(texts) > 1:
        raise ValueError(f"different system messages under {' and '.join(_SYSTEM_KEYS)}")
    return texts[0] if texts else ""


def _with_system(system: str, parsed: _Parsed) -> _Parsed:
    assert not isinstance(parsed, str), "no format of texts has a system message"
    if parsed[0].role != "system":
        return Message("system", system), *parsed
    if parsed[0].content.strip() != system.strip():
        raise ValueError("the row's system message and that of its messages differ")
    return parsed


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


def _history(value: dict[str, Any]) -> tuple[Message, ...]:
    """Parse earlier turns, a list of pairs of question and answer."""
    turns: list[Message] = []
    for number, pair in enumerate(_list_of(value, "history"), start=1):
        if not isinstance(pair, list) or not all(isinstance(text, str) and text.strip() for text in pair):
            raise ValueError(f"turn {number} of 'history' is not a question and an answer")
        if len(pair) != 2:
            raise ValueError(f"turn {number} of 'history' has {len(pair)} texts, expected a question and an answer")
        for text in pair:
            check_encodes(text)
        turns += _question_and_answer(*pair)
    return tuple(turns)


def _without_last_question(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """Remove the question without an answer that some of Guanaco's rows end with."""
    return turns[:-1] if turns and turns[-1]["role"] == "user" else turns


def _chat(value: dict[str, Any]) -> list[_Parsed]:
    if not isinstance(value["messages"], list):
        raise ValueError("'messages' is not a list")
    messages = messages_of(value["messages"])
    prompt = _text_of(value, "prompt", may_be_empty=True).strip()
    if prompt and prompt not in (message.content.strip() for message in messages if message.role == "user"):
        raise ValueError("'prompt' is none of the questions in 'messages'")
    return [messages]


def _chatml(value: dict[str, Any]) -> list[_Parsed]:
    text = _text_of(value, "text").replace("\r\n", "\n")
    turns = re.findall(r"<\|im_start\|>\s*(\w+)\n(.*?)<\|im_end\|>", text, re.DOTALL)
    rest = re.sub(r"<\|im_start\|>\s*\w+\n.*?<\|im_end\|>", "", text, flags=re.DOTALL).strip()
    if rest:
        raise ValueError(f"text outside of turns: {rest[:40]!r}")
    return [messages_of([{"role": role, "content": content.strip()} for role, content in turns])]


_SHAREGPT_ROLES: dict[str, Role] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "function_call": "assistant", "observation": "tool", "tool": "tool",
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
    return [_renamed(turn) for turn in turns]


def _renamed(turn: dict[str, Any]) -> dict[str, Any]:
    """Return a ShareGPT turn in OpenAI's form; the value of a function_call is the call, or a list of calls."""
    names = {"from": "role", "value": "content"}
    if len({names.get(key, key) for key in turn}) < len(turn):
        raise ValueError("a message has both from and role, or both value and content")
    found = {names.get(key, key): value for key, value in turn.items()}
    if found.get("role") != "function_call":
        return found
    calls = _list_of({"content": f"[{found.pop('content', '')}]"}, "content")
    return {**found, "tool_calls": calls[0] if calls and isinstance(calls[0], list) else calls}


def _alpaca(value: dict[str, Any]) -> list[_Parsed]:
    return [_instruction(value, "input", "output")]


def _dolly(value: dict[str, Any]) -> list[_Parsed]:
    return [_instruction(value, "context", "response")]


def _instruction(value: dict[str, Any], given: str, answer: str) -> tuple[Message, ...]:
    question = alpaca_input(_text_of(value, "instruction"), _text_of(value, given, may_be_empty=True))
    return *_history(value), *_question_and_answer(question, _text_of(value, answer))


def _pair(question: str, answer: str) -> Callable[[dict[str, Any]], list[_Parsed]]:
    """Return a parser of rows with a question and an answer under these keys."""

    def parse(value: dict[str, Any]) -> list[_Parsed]:
        return [(*_history(value), *_question_and_answer(_text_of(value, question), _text_of(value, answer)))]

    return parse


def _prompt_completion(value: dict[str, Any]) -> list[_Parsed]:
    """Parse TRL's rows, texts or messages; only the completion is trained."""
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return _self_instruct(value)
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    after = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    if not isinstance(before, list) or not isinstance(after, list):
        raise ValueError("'prompt' and 'completion' are texts or lists of messages")
    messages = messages_of([*before, *after])
    return [(*(replace(message, is_trained=False) for message in messages[: len(before)]), *messages[len(before) :])]


def _ultrachat(value: dict[str, Any]) -> list[_Parsed]:
    texts = _list_of(value, "data")
    return [messages_of([{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)])]


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


_SYSTEM_KEYS = ("system", "system_prompt")
_COMMON = (*_SYSTEM_KEYS, "tools")
_SINGLE = (*_SYSTEM_KEYS, "tools", "history")

FORMATS: dict[FormatName, Format] = {
    "chat": Format(("messages",), _chat, (*_COMMON, "prompt")),
    "chatml": Format(("text",), _chatml),
    "sharegpt": Format(("conversations",), _sharegpt, _COMMON),
    "vicuna": Format(("conversations",), _vicuna, _COMMON),
    "alpaca": Format(("instruction", "output"), _alpaca, (*_SINGLE, "input", "text")),
    "dolly": Format(("instruction", "response"), _dolly, (*_SINGLE, "context")),
    "prompt-response": Format(("prompt", "response"), _pair("prompt", "response"), _SINGLE),
    "prompt-completion": Format(("prompt", "completion"), _prompt_completion, _COMMON),
    "openorca": Format(("question", "response"), _pair("question", "response"), _SINGLE),
    "flan": Format(("inputs", "targets"), _pair("inputs", "targets"), _SYSTEM_KEYS),
    "ultrachat": Format(("data",), _ultrachat, _SYSTEM_KEYS),
    "oasst1": Format(("prompt",), _oasst1, OASST_KEYS),
    "guanaco": Format(("text",), _guanaco),
    "chip2": Format(("text",), _chip2),
    "self-instruct": Format(("prompt", "completion"), _self_instruct, _SYSTEM_KEYS),
    "hh-rlhf": Format(("chosen",), _hh_rlhf, ("rejected",)),
    "longform": Format(("input", "output"), _pair("input", "output"), _SYSTEM_KEYS),
    "unnatural-instructions": Format(("instances",), _unnatural, ("instruction", "reformulations")),
    "text": Format(("text",), _plain),
}

_BY_KEYS: Sequence[tuple[tuple[str, ...], FormatName]] = (
    (("messages",), "chat"),
    (("conversations",), "sharegpt"),
    (("message_id", "parent_id", "role"), "oasst1"),
    (("message_tree_id", "prompt"), "oasst1"),
    (("instruction", "instances"), "unnatural-instructions"),
    (("instruction", "output"), "alpaca"),
    (("instruction", "response"), "dolly"),
    (("chosen", "rejected"), "hh-rlhf"),
    (("prompt", "completion"), "self-instruct"),
    (("prompt", "response"), "prompt-response"),
    (("question", "response"), "openorca"),
    (("inputs", "targets"), "flan"),
    (("input", "output"), "longform"),
)
_BY_TEXT: Sequence[tuple[str, FormatName]] = (
    (r"<\|im_start\|>", "chatml"),
    (r"^\s*### Human:", "guanaco"),
    (r"^\s*<human>:", "chip2"),
)
