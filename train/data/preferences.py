"""Read and tokenize preference data: preference pairs, or labeled replies."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from adapterhub.errors import DatasetError
from train.data.conversation import Conversation, check_keys, counted, listed, messages_of, tools_of, with_advice
from train.data.formats import OnFault, hh_rlhf_turns, unused_keys, unused_note
from train.data.readers import Rows
from train.data.tokenization import ChatTokenizer, Sample, check_has_template, check_rendered, split, tokenize
from train.recipe import PreferenceMethod

_KEYS = ("prompt", "chosen", "rejected", "completion", "label", "tools")
_CUT, _UNTRAINED = "cut", "untrained"


@dataclass(frozen=True)
class PreferencePair:
    """A chosen and a rejected reply to one prompt. Only the replies are trained."""

    chosen: Sample
    rejected: Sample

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The chosen and the rejected text."""
        return (self.chosen, self.rejected)


@dataclass(frozen=True)
class LabeledReply:
    """A reply to a prompt, and whether it is desirable."""

    sample: Sample
    is_desirable: bool

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The one text."""
        return (self.sample,)

    @property
    def prompt(self) -> tuple[int, ...]:
        """Tokens of the prompt."""
        return self.sample.tokens[: self.sample.trained.index(True)]


@dataclass(frozen=True)
class PreferenceData:
    """Preference data of a run, all pairs or all labeled replies, with notes about what was left out."""

    name: str
    train: tuple[PreferencePair, ...] | tuple[LabeledReply, ...]
    held_out: tuple[PreferencePair, ...] | tuple[LabeledReply, ...]
    notes: tuple[str, ...]
    num_cut: int = 0
    num_untrained: int = 0
    """Number of examples left out because the cut left nothing to compare."""

    @property
    def digest(self) -> str:
        """Hex sha256 over the JSON of both splits' tokens, masks and labels."""
        part = [
            [
                [[s.tokens, [int(mark) for mark in s.trained]] for s in item.samples]
                + ([item.is_desirable] if isinstance(item, LabeledReply) else [])
                for item in side
            ]
            for side in (self.train, self.held_out)
        ]
        return hashlib.sha256(json.dumps(part, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class _Line:
    """One example: a labeled reply with its prompt, or the chosen reply of a pair and the `rejected` one."""

    reply: Conversation
    rejected: Conversation | None = None
    label: bool = True


def read_preferences(
    rows: Rows, tokenizer: ChatTokenizer, *, name: str, method: PreferenceMethod, held_out: float, max_length: int,
    seed: int, on_fault: OnFault = "stop", duplicates: Literal["remove", "keep"] = "remove",
) -> PreferenceData:  # fmt: skip
    """Parse, split by question, and tokenize rows in TRL's formats.

    A row has `prompt`, `chosen` and `rejected` (lists of messages, or texts), or for KTO `prompt`, `completion` and
    `label`, and may have `tools`. Without `prompt`, the prompt is what both replies begin with, as in hh-rlhf's
    dialogues. KTO reads a pair as two labeled replies. Raises DatasetError with file and line of each fault.
    """
    check_has_template(tokenizer)
    lines, notes = _read_lines(rows, name, method, on_fault)
    keyed = {(line.reply.messages, _messages(line.rejected), line.label, line.reply.tools): line for line in lines}
    distinct = list(keyed.values()) if duplicates == "remove" else lines
    if dropped := len(lines) - len(distinct):
        notes.append(f"left out {counted(dropped, 'duplicate row')}")
    counts = Counter[str]()
    faults: list[str] = []
    splits = split([line.reply for line in distinct], held_out=held_out, seed=seed)
    train, test = (
        _tokenize_all([distinct[place] for place in places], tokenizer, method, max_length, counts, faults)
        for places in splits
    )
    notes += check_rendered(faults, on_fault)
    if method == "kto":
        labeled = tuple(item for item in train if isinstance(item, LabeledReply))
        _check_both_labels(labeled, name)
        notes += _balance(labeled)
    if not train:
        raise DatasetError(
            f"no reply in {name} has a trained token at max_length = {max_length}: expected at least one. Raise "
            "max_length in [data]."
        )
    if num_cut := counts[_CUT]:
        notes.append(f"cut {counted(num_cut, 'reply', 'replies')} at max_length = {max_length} tokens")
    if num_untrained := counts[_UNTRAINED]:
        notes.append(f"left out {counted(num_untrained, 'example')} with nothing to compare after the cut")
    return PreferenceData(name, train, test, tuple(notes), num_cut, num_untrained)


def _messages(conversation: Conversation | None) -> Any:
    return None if conversation is None else conversation.messages


def _read_lines(
    rows: Rows, name: str, method: PreferenceMethod, on_fault: OnFault
) -> tuple[list[_Line], list[str]]:  # fmt: skip
    lines: list[_Line] = []
    faults = list(rows.faults)
    unused: dict[str, None] = {}
    for row in rows.rows:
        try:
            check_keys(row.value, _KEYS, what="the row has the")
            lines += _parse(row.value, row.where, method)
            unused |= dict.fromkeys(unused_keys(row.value, _KEYS))
        except ValueError as error:
            faults.append(f"{row.where}: {error}")
    if faults and on_fault == "stop":
        advice = 'Correct these rows, or set on_fault = "skip" in [data] to leave them out.'
        raise DatasetError(with_advice(f"{name} has {listed(faults)}", advice))
    if not lines:
        expected = '"completion" and "label"' if method == "kto" else '"chosen" and "rejected"'
        what = "labeled replies" if method == "kto" else "preference pairs"
        raise DatasetError(
            f'{name} has no {what}: expected "prompt", {expected} in each row. Check path and method in the recipe.'
        )
    return lines, [*([f"left out {listed(faults)}"] if faults else []), *unused_note(unused)]


def _parse(raw: dict[str, Any], where: str, method: PreferenceMethod) -> Iterable[_Line]:
    tools = tools_of(raw.get("tools"))
    if "completion" in raw and method == "kto":
        if not isinstance(raw.get("label"), bool):
            raise ValueError(f'"label" is {raw.get("label")!r}, expected true or false')
        turns = [*_prompt(raw), *_reply(raw, "completion")]
        return [_Line(Conversation(messages_of(turns), where, tools), label=raw["label"])]
    chosen, rejected = (messages_of(turns) for turns in _dialogues(raw))
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same")
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("chosen and rejected reply to different prompts")
    if method == "kto":
        return [_Line(Conversation(chosen, where, tools)), _Line(Conversation(rejected, where, tools), label=False)]
    return [_Line(Conversation(chosen, where, tools), rejected=Conversation(rejected, where, tools))]


def _dialogues(raw: dict[str, Any]) -> list[list[Any]]:
    """Return all messages of the chosen and of the rejected dialogue."""
    if "prompt" in raw:
        prompt = _prompt(raw)
        return [[*prompt, *_reply(raw, key)] for key in ("chosen", "rejected")]
    if isinstance(raw.get("chosen"), str) and isinstance(raw.get("rejected"), str):
        return [hh_rlhf_turns(raw[key]) for key in ("chosen", "rejected")]
    return [_reply(raw, key) for key in ("chosen", "rejected")]


def _prompt(raw: dict[str, Any]) -> list[Any]:
    prompt = raw.get("prompt")
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        raise ValueError('"prompt" is not a text or a list of messages')
    return prompt


def _reply(raw: dict[str, Any], key: str) -> list[Any]:
    reply = raw.get(key)
    if isinstance(reply, str):
        return [{"role": "assistant", "content": reply}]
    if not isinstance(reply, list):
        raise ValueError(f'"{key}" is not a text or a list of messages')
    return reply


def _tokenize_all(
    lines: Sequence[_Line], tokenizer: ChatTokenizer, method: PreferenceMethod, max_length: int, counts: Counter[str],
    faults: list[str],
) -> tuple[PreferencePair, ...] | tuple[LabeledReply, ...]:  # fmt: skip
    """Tokenize lines, count those that are cut or left out, and append those that cannot be rendered to `faults`."""
    kept: list[tuple[_Line, list[Sample]]] = []
    for line in lines:
        replies = [line.reply] if line.rejected is None else [line.reply, line.rejected]
        try:
            samples = [tokenize(reply, tokenizer, loss_on="last") for reply in replies]
        except ValueError as error:
            faults.append(f"{line.reply.where}: {error}")
            continue
        counts[_CUT] += sum(len(sample.tokens) > max_length for sample in samples)
        samples = [sample.cut(max_length) for sample in samples]
        # The cut may have made both replies equal.
        if all(sample.num_trained for sample in samples) and (len(samples) == 1 or samples[0] != samples[1]):
            kept.append((line, samples))
        else:
            counts[_UNTRAINED] += 1
    if method == "kto":
        return tuple(LabeledReply(samples[0], line.label) for line, samples in kept)
    return tuple(PreferencePair(samples[0], samples[1]) for _, samples in kept)


def _check_both_labels(labeled: Sequence[LabeledReply], name: str) -> None:
    if len({item.is_desirable for item in labeled}) < 2:
        raise DatasetError(
            f"{name} has replies with one label only: KTO needs replies labeled true and replies labeled false. Add "
            "the other ones, or lower held_out in [data]."
        )


def _balance(labeled: Sequence[LabeledReply]) -> list[str]:
    desirable = sum(item.is_desirable for item in labeled)
    return [f"{desirable} desirable and {len(labeled) - desirable} undesirable replies"]
