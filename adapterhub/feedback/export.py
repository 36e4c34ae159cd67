"""Export feedback as training data, with an account of what each row became."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from adapterhub.errors import UsageError
from adapterhub.feedback.store import (
    Correction,
    ExportFormat,
    FeedbackAnswer,
    FeedbackRow,
    Thumb,
    Vote,
    fault_of,
    has_equal_answers,
    winner_of,
)

Outcome = Literal["exported", "unusable", "about other adapters", "equal answers", "no judgement"]
_MAX_FAULTS = 5


@dataclass(frozen=True)
class ExportedRow:
    """What a stored row became."""

    id: str
    outcome: Outcome
    lines: tuple[dict[str, Any], ...] = ()
    """Its lines of training data; KTO makes two of a pair."""
    fault: str | None = None
    """Why it is unusable."""


@dataclass(frozen=True)
class Export:
    """All rows of an export, in the order of arrival."""

    rows: tuple[ExportedRow, ...]

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The lines of training data."""
        return [line for row in self.rows for line in row.lines]

    @property
    def notes(self) -> list[str]:
        """What was left out and why, for people."""
        counts = Counter(row.outcome for row in self.rows)
        notes = []
        if unusable := [f"{row.id}: {row.fault}" for row in self.rows if row.fault is not None]:
            more = [f"and {len(unusable) - _MAX_FAULTS} more"] if len(unusable) > _MAX_FAULTS else []
            listed = "; ".join([*unusable[:_MAX_FAULTS], *more])
            notes.append(f"left out {_counted(len(unusable))} that training cannot use: {listed}")
        if count := counts["about other adapters"]:
            notes.append(f"left out {_counted(count)} about other adapters")
        if count := counts["equal answers"]:
            notes.append(f"left out {_counted(count)} whose two answers are equal")
        if count := counts["no judgement"]:
            notes.append(f"left out {_counted(count)} that judge nothing for this format")
        return notes


def export_rows(rows: Iterable[FeedbackRow], form: ExportFormat, *, about: Collection[str] | None = None) -> Export:
    """Convert feedback to rows: TRL's conversational `dpo`, `kto` and `sft`, or `votes` for `adapterhub ratings`.

    `about` are names and digests of adapters: rows without an answer of one of them are left out. None: all rows stay.
    Only what was judged is a line's completion; the conversation before it is the prompt. Lines of training data carry
    the row's `id`.
    """
    return Export(tuple(_exported(row, form, about) for row in rows))


def training_export(rows: Iterable[FeedbackRow], method: str | None, *, about: Collection[str] | None) -> Export:
    """Export what the preference method trains on; None: the answers for supervised fine-tuning.

    Raises UsageError, with what was left out, when nothing remains.
    """
    form: ExportFormat = "sft" if method is None else "kto" if method == "kto" else "dpo"
    found = export_rows(rows, form, about=about)
    if not found.lines:
        unit = "answers" if method is None else "labeled replies" if method == "kto" else "preference pairs"
        why = f" ({'; '.join(found.notes)})" if found.notes else ""
        raise UsageError(
            f"there is no feedback to train from: {_counted(len(found.rows))}{why}, no {unit}. Collect votes with a "
            "winner, or corrections."
        )
    return found


def _exported(row: FeedbackRow, form: ExportFormat, about: Collection[str] | None) -> ExportedRow:
    kept, feedback = row
    if feedback is None:
        return ExportedRow(kept.id, "unusable", fault="it cannot be read: another version wrote it, or it is damaged")
    if about is not None and not any(answer.model in about or answer.digest in about for answer in _answers(feedback)):
        return ExportedRow(kept.id, "about other adapters")
    if form == "votes":
        return _vote_row(kept.id, feedback)
    if fault := fault_of(feedback):
        return ExportedRow(kept.id, "unusable", fault=fault)
    if has_equal_answers(feedback) and not _is_both_bad(feedback):
        return ExportedRow(kept.id, "equal answers")
    convert = {"dpo": _preference_rows, "kto": _label_rows, "sft": _completion_rows}[form]
    lines = tuple({"id": kept.id, "prompt": _prompt(feedback)} | line for line in convert(feedback))
    return ExportedRow(kept.id, "exported" if lines else "no judgement", lines)


def _answers(feedback: Vote | Thumb | Correction) -> list[FeedbackAnswer]:
    return [feedback.a, feedback.b] if isinstance(feedback, Vote) else [feedback.answer]


def _vote_row(name: str, feedback: Vote | Thumb | Correction) -> ExportedRow:
    if not isinstance(feedback, Vote):
        return ExportedRow(name, "no judgement")
    if has_equal_answers(feedback):
        return ExportedRow(name, "equal answers")
    line = {"id": feedback.battle, "model_a": feedback.a.model, "model_b": feedback.b.model}
    return ExportedRow(name, "exported", (line | {"winner": winner_of(feedback)},))


def _preference_rows(feedback: Vote | Thumb | Correction) -> Iterator[dict[str, Any]]:
    if pair := _chosen_and_rejected(feedback):
        yield {"chosen": _assistant_message(pair[0]), "rejected": _assistant_message(pair[1])}


def _label_rows(feedback: Vote | Thumb | Correction) -> Iterator[dict[str, Any]]:
    labelled: list[tuple[str, bool]] = []
    if isinstance(feedback, Thumb):
        labelled = [(feedback.answer.text, feedback.thumb == "up")]
    elif isinstance(feedback, Vote) and _is_both_bad(feedback):
        texts = [feedback.a.text] if has_equal_answers(feedback) else [feedback.a.text, feedback.b.text]
        labelled = [(text, False) for text in texts]
    elif pair := _chosen_and_rejected(feedback):
        labelled = [(pair[0], True), (pair[1], False)]
    for text, label in labelled:
        yield {"completion": _assistant_message(text), "label": label}


def _completion_rows(feedback: Vote | Thumb | Correction) -> Iterator[dict[str, Any]]:
    if isinstance(feedback, Thumb) and feedback.thumb == "up":
        yield {"completion": _assistant_message(feedback.answer.text)}
    elif pair := _chosen_and_rejected(feedback):
        yield {"completion": _assistant_message(pair[0])}


def _chosen_and_rejected(feedback: Vote | Thumb | Correction) -> tuple[str, str] | None:
    if isinstance(feedback, Correction):
        return feedback.text, feedback.answer.text
    if isinstance(feedback, Vote) and feedback.winner in ("a", "b"):
        a, b = feedback.a.text, feedback.b.text
        return (a, b) if feedback.winner == "a" else (b, a)
    return None


def _is_both_bad(feedback: Vote | Thumb | Correction) -> bool:
    return isinstance(feedback, Vote) and feedback.winner == "both_bad"


def _prompt(feedback: Vote | Thumb | Correction) -> list[dict[str, str]]:
    return [
        {"role": "system" if message.role == "developer" else message.role, "content": message.content}
        for message in feedback.messages
    ]


def _assistant_message(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _counted(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"


def to_jsonl(lines: Sequence[dict[str, Any]]) -> str:
    """Return the rows as JSONL text."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
