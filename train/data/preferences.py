"""Compared replies: pairs of a chosen and a rejected one, or replies with a label, as tokens. No tensors."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from adapterhub.errors import DatasetError
from train.data.conversation import Conversation, listed, messages_of
from train.data.formats import OnFault, hh_rlhf_turns
from train.data.readers import Rows
from train.data.tokenization import ChatTokenizer, Sample, check_has_template, check_rendered, split, tokenize
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
    rows: Rows, tokenizer: ChatTokenizer, *, name: str, method: PreferenceMethod, held_out: float, max_length: int,
    seed: int, on_fault: OnFault = "stop",
) -> Comparisons:  # fmt: skip
    """Rows of TRL's kinds: `prompt` with `chosen` and `rejected` (lists of messages, or texts), or, for KTO, with
    `completion` and `label`. Without a prompt it is what both replies begin with; hh-rlhf's dialogues are such rows.
    KTO reads pairs too, as two labelled replies.

    The split is by question, as for conversations. Raises DatasetError with file and line of each fault.
    """
    check_has_template(tokenizer)
    lines, notes = _read_lines(rows, name, method, on_fault)
    distinct = list({(line.reply.messages, _messages(line.rejected), line.label): line for line in lines}.values())
    if dropped := len(lines) - len(distinct):
        notes.append(f"{dropped} lines repeat another one: left out")
    by_place = {line.reply.where: line for line in distinct}
    found = Counter[str]()
    sides = split([line.reply for line in distinct], held_out=held_out, seed=seed)
    train, measured = (
        _tokenize_all([by_place[reply.where] for reply in side], tokenizer, method, max_length, found) for side in sides
    )
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


def _read_lines(
    rows: Rows, name: str, method: PreferenceMethod, on_fault: OnFault
) -> tuple[list[_Line], list[str]]:  # fmt: skip
    lines: list[_Line] = []
    faults = list(rows.faults)
    for row in rows.rows:
        try:
            lines += _parse(row.value, row.where, method)
        except ValueError as error:
            faults.append(f"{row.where}: {error}")
    if faults and on_fault == "stop":
        raise DatasetError(
            f'{name} has {listed(faults)}. Correct these rows, or leave them out with on_fault = "skip".'
        )
    if not lines:
        expected = '"completion" and "label"' if method == "kto" else '"chosen" and "rejected"'
        raise DatasetError(f'{name} holds no comparison: expected "prompt", {expected} in each row.')
    return lines, [f"left out {listed(faults)}"] if faults else []


def _parse(raw: dict[str, Any], where: str, method: PreferenceMethod) -> Iterable[_Line]:
    if "completion" in raw and method == "kto":
        if not isinstance(raw.get("label"), bool):
            raise ValueError(f'"label" is {raw.get("label")!r}, expected true or false')
        return [_Line(Conversation(messages_of([*_prompt(raw), *_said(raw, "completion")]), where), label=raw["label"])]
    chosen, rejected = (messages_of(turns) for turns in _both(raw))
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same")
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("chosen and rejected are no replies to the same prompt")
    better, worse = Conversation(chosen, where), Conversation(rejected, where)
    if method == "kto":
        return [_Line(_at(better, "a")), _Line(_at(worse, "b"), label=False)]
    return [_Line(better, rejected=worse)]


def _both(raw: dict[str, Any]) -> list[list[Any]]:
    """All messages of the chosen and of the rejected dialogue."""
    if "prompt" in raw:
        prompt = _prompt(raw)
        return [[*prompt, *_said(raw, key)] for key in ("chosen", "rejected")]
    if isinstance(raw.get("chosen"), str) and isinstance(raw.get("rejected"), str):
        return [hh_rlhf_turns(raw[key]) for key in ("chosen", "rejected")]
    return [_said(raw, key) for key in ("chosen", "rejected")]


def _prompt(raw: dict[str, Any]) -> list[Any]:
    prompt = raw.get("prompt")
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        raise ValueError('no list of messages "prompt"')
    return prompt


def _said(raw: dict[str, Any], key: str) -> list[Any]:
    said = raw.get(key)
    if isinstance(said, str):
        return [{"role": "assistant", "content": said}]
    if not isinstance(said, list):
        raise ValueError(f'no list of messages "{key}"')
    return said


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
