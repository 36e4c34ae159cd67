"""Export feedback as training data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from adapterhub.feedback.store import Correction, ExportFormat, Thumb, Vote, winner_of


def export_rows(rows: Iterable[Vote | Thumb | Correction], form: ExportFormat) -> list[dict[str, Any]]:
    """Convert feedback to rows: TRL's conversational `dpo`, `kto` and `sft`, or `votes` for `adapterhub ratings`."""
    convert = {"dpo": _preference_rows, "kto": _label_rows, "sft": _chat_rows, "votes": _vote_rows}[form]
    return [line for row in rows for line in convert(row)]


def _vote_rows(row: Vote | Thumb | Correction) -> Iterator[dict[str, Any]]:
    if isinstance(row, Vote):
        yield {"id": row.battle, "model_a": row.a.model, "model_b": row.b.model, "winner": winner_of(row)}


def _preference_rows(row: Vote | Thumb | Correction) -> Iterator[dict[str, Any]]:
    chosen, rejected = _chosen_and_rejected(row)
    if chosen and rejected and chosen != rejected:
        yield {"prompt": _prompt(row), "chosen": _assistant_message(chosen), "rejected": _assistant_message(rejected)}


def _chosen_and_rejected(row: Vote | Thumb | Correction) -> tuple[str | None, str | None]:
    if isinstance(row, Correction):
        return row.text, row.answer.text
    if isinstance(row, Vote) and row.winner in ("a", "b"):
        return (row.a.text, row.b.text) if row.winner == "a" else (row.b.text, row.a.text)
    return None, None


def _label_rows(row: Vote | Thumb | Correction) -> Iterator[dict[str, Any]]:
    labelled: list[tuple[str | None, bool]]
    if isinstance(row, Thumb):
        labelled = [(row.answer.text, row.thumb == "up")]
    elif isinstance(row, Vote) and row.winner == "both_bad":
        labelled = [(row.a.text, False), (row.b.text, False)]
    else:
        chosen, rejected = _chosen_and_rejected(row)
        labelled = [(chosen, True), (rejected, False)]
    for text, label in labelled:
        if text:
            yield {"prompt": _prompt(row), "completion": _assistant_message(text), "label": label}


def _chat_rows(row: Vote | Thumb | Correction) -> Iterator[dict[str, Any]]:
    is_liked = isinstance(row, Thumb) and row.thumb == "up"
    good = row.answer.text if isinstance(row, Thumb) and is_liked else _chosen_and_rejected(row)[0]
    if good:
        yield {"messages": [*_prompt(row), *_assistant_message(good)]}


def _prompt(row: Vote | Thumb | Correction) -> list[dict[str, str]]:
    return [message.model_dump() for message in row.messages]


def _assistant_message(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def to_jsonl(lines: Sequence[dict[str, Any]]) -> str:
    """Return the rows as JSONL text."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
