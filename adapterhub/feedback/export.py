"""Export feedback as training data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from adapterhub.feedback.store import Correction, ExportFormat, Thumb, Vote, outcome_of


def exported(rows: Iterable[Vote | Thumb | Correction], form: ExportFormat) -> list[dict[str, Any]]:
    """Rows for a trainer: TRL's conversational `dpo`, `kto` and `sft`, or `verdicts` for `adapterhub ratings`."""
    turn = {"dpo": _pairs, "kto": _labels, "sft": _examples, "verdicts": _verdict_rows}[form]
    return [line for row in rows for line in turn(row)]


def _verdict_rows(row: Vote | Thumb | Correction) -> Iterator[dict[str, Any]]:
    if isinstance(row, Vote):
        yield {"id": row.battle, "model_a": row.a.model, "model_b": row.b.model, "winner": outcome_of(row)}


def _pairs(row: Vote | Thumb | Correction) -> Iterator[dict[str, Any]]:
    better, worse = _better_and_worse(row)
    if better and worse and better != worse:
        yield {"prompt": _prompt(row), "chosen": _said(better), "rejected": _said(worse)}


def _better_and_worse(row: Vote | Thumb | Correction) -> tuple[str | None, str | None]:
    if isinstance(row, Correction):
        return row.text, row.answer.text
    if isinstance(row, Vote) and row.winner in ("a", "b"):
        return (row.a.text, row.b.text) if row.winner == "a" else (row.b.text, row.a.text)
    return None, None


def _labels(row: Vote | Thumb | Correction) -> Iterator[dict[str, Any]]:
    labelled: list[tuple[str | None, bool]]
    if isinstance(row, Thumb):
        labelled = [(row.answer.text, row.thumb == "up")]
    elif isinstance(row, Vote) and row.winner == "both_bad":
        labelled = [(row.a.text, False), (row.b.text, False)]
    else:
        better, worse = _better_and_worse(row)
        labelled = [(better, True), (worse, False)]
    for text, label in labelled:
        if text:
            yield {"prompt": _prompt(row), "completion": _said(text), "label": label}


def _examples(row: Vote | Thumb | Correction) -> Iterator[dict[str, Any]]:
    is_liked = isinstance(row, Thumb) and row.thumb == "up"
    good = row.answer.text if isinstance(row, Thumb) and is_liked else _better_and_worse(row)[0]
    if good:
        yield {"messages": [*_prompt(row), *_said(good)]}


def _prompt(row: Vote | Thumb | Correction) -> list[dict[str, str]]:
    return [message.model_dump() for message in row.messages]


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def to_jsonl(lines: Sequence[dict[str, Any]]) -> str:
    """JSONL."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
