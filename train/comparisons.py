"""Compared replies: pairs of a chosen and a rejected one, or replies with a label, as tokens. No tensors."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub.errors import DatasetError
from train.data import ChatTokenizer, Sample, check_has_template, check_rendered, split, tokenize
from train.formats import Conversation, listed, messages_of
from train.recipe import PreferenceMethod

_CUT = "replies were cut at max_length = {max_length} tokens"
_UNTRAINED = "comparisons have nothing to compare after the cut and were left out"


@dataclass(frozen=True)
class Pair:
    """Two replies to one prompt. Only the replies are trained."""

    chosen: Sample
    rejected: Sample

    @property
    def samples(self) -> tuple[Sample, ...]:
        return (self.chosen, self.rejected)


@dataclass(frozen=True)
class Labelled:
    """One reply to a prompt, and whether it is desirable."""

    sample: Sample
    is_desirable: bool

    @property
    def samples(self) -> tuple[Sample, ...]:
        return (self.sample,)

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.sample.tokens[: self.sample.trained.index(True)]


@dataclass(frozen=True)
class Comparisons:
    """What a preference run trains and measures on, all pairs or all labelled, and what was left out (in words)."""

    name: str
    train: tuple[Pair, ...] | tuple[Labelled, ...]
    held_out: tuple[Pair, ...] | tuple[Labelled, ...]
    notes: tuple[str, ...]
    num_cut: int = 0
    num_untrained: int = 0
    """comparisons left out, for the cut left nothing to compare"""

    @property
    def digest(self) -> str:
        """Hex sha256 over the JSON of both parts' tokens, marks and labels."""
        part = [
            [
                [[s.tokens, [int(mark) for mark in s.trained]] for s in item.samples]
                + ([item.is_desirable] if isinstance(item, Labelled) else [])
                for item in side
            ]
            for side in (self.train, self.held_out)
        ]
        return hashlib.sha256(json.dumps(part, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class _Line:
    """One line of a file: prompt and reply as conversations; `rejected` with a pair, `label` without."""

    reply: Conversation
    rejected: Conversation | None = None
    label: bool = True


def read_comparisons(
    path: Path, tokenizer: ChatTokenizer, *, method: PreferenceMethod, held_out: float, max_length: int, seed: int
) -> Comparisons:
    """TRL's conversational JSONL: `prompt` with `chosen` and `rejected` (lists of messages) a line, or, for KTO,
    with `completion` and `label`. KTO reads pairs too, as two labelled replies.

    The split is by question, as for conversations. Raises DatasetError with file and line of each fault.
    """
    check_has_template(tokenizer)
    lines = _read_lines(path, method)
    distinct = list({(line.reply.messages, _messages(line.rejected), line.label): line for line in lines}.values())
    notes = []
    if dropped := len(lines) - len(distinct):
        notes.append(f"{dropped} lines repeat another one: left out")
    by_place = {line.reply.where: line for line in distinct}
    found = Counter[str]()
    sides = split([line.reply for line in distinct], held_out=held_out, seed=seed)
    train, measured = (
        _tokenize_all([by_place[reply.where] for reply in side], tokenizer, method, max_length, found) for side in sides
    )
    name = path.name
    if method == "kto":
        labelled = tuple(item for item in train if isinstance(item, Labelled))
        _check_both_sides(labelled, name)
        notes += _balance(labelled)
    if not train:
        raise DatasetError(f"{name}: no reply has a trained token (max_length = {max_length}): raise max_length.")
    notes += [f"{count} {what.format(max_length=max_length)}" for what, count in found.items() if count]
    return Comparisons(name, train, measured, tuple(notes), found[_CUT], found[_UNTRAINED])


def _messages(conversation: Conversation | None) -> Any:
    return None if conversation is None else conversation.messages


def _read_lines(path: Path, method: PreferenceMethod) -> list[_Line]:
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read as a data set ({error}): expected a UTF-8 JSONL file.") from error
    lines: list[_Line] = []
    faults = []
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            lines += _parse(text, where, method)
        except ValueError as error:
            faults.append(f"{where}: {error}")
    if faults:
        raise DatasetError(f"{path} has {listed(faults)}. Correct these lines, or leave them out.")
    if not lines:
        expected = '"completion" and "label"' if method == "kto" else '"chosen" and "rejected"'
        raise DatasetError(f'{path} holds no comparison: expected an object with "prompt", {expected} a line.')
    return lines


def _parse(text: str, where: str, method: PreferenceMethod) -> Iterable[_Line]:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ValueError("not an object")
    if "completion" in raw and method == "kto":
        if not isinstance(raw.get("label"), bool):
            raise ValueError(f'"label" is {raw.get("label")!r}, expected true or false')
        return [_Line(_joined(raw, "completion", where), label=raw["label"])]
    chosen, rejected = _joined(raw, "chosen", where), _joined(raw, "rejected", where)
    if chosen.messages == rejected.messages:
        raise ValueError("chosen and rejected are the same")
    if method == "kto":
        return [_Line(_at(chosen, "a")), _Line(_at(rejected, "b"), label=False)]
    return [_Line(chosen, rejected=rejected)]


def _joined(raw: dict[str, Any], key: str, where: str) -> Conversation:
    for name in ("prompt", key):
        if not isinstance(raw.get(name), list):
            raise ValueError(f'no list of messages "{name}"')
    return Conversation(messages_of([*raw["prompt"], *raw[key]]), where)


def _at(conversation: Conversation, part: str) -> Conversation:
    """Two replies of one line need places of their own: the split tells conversations apart by place."""
    return Conversation(conversation.messages, f"{conversation.where}{part}")


def _tokenize_all(
    lines: Sequence[_Line], tokenizer: ChatTokenizer, method: PreferenceMethod, max_length: int, found: Counter[str]
) -> tuple[Pair, ...] | tuple[Labelled, ...]:
    faults = []
    kept: list[tuple[_Line, list[Sample]]] = []
    for line in lines:
        replies = [line.reply] if line.rejected is None else [line.reply, line.rejected]
        try:
            samples = [tokenize(reply, tokenizer, loss_on="last") for reply in replies]
        except ValueError as error:
            faults.append(f"{line.reply.where}: {error}")
            continue
        found[_CUT] += sum(len(sample.tokens) > max_length for sample in samples)
        samples = [sample.cut(max_length) for sample in samples]
        # Cut replies may have become equal, and then say nothing.
        if all(sample.num_trained for sample in samples) and (len(samples) == 1 or samples[0] != samples[1]):
            kept.append((line, samples))
        else:
            found[_UNTRAINED] += 1
    check_rendered(faults)
    if method == "kto":
        return tuple(Labelled(samples[0], line.label) for line, samples in kept)
    return tuple(Pair(samples[0], samples[1]) for _, samples in kept)


def _check_both_sides(labelled: Sequence[Labelled], name: str) -> None:
    if len({item.is_desirable for item in labelled}) < 2:
        raise DatasetError(f"{name}: KTO needs replies labelled true and replies labelled false to train on.")


def _balance(labelled: Sequence[Labelled]) -> list[str]:
    desirable = sum(item.is_desirable for item in labelled)
    return [f"{desirable} desirable and {len(labelled) - desirable} undesirable replies"]
