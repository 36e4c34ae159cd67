"""From conversations to token samples: duplicates, split, chat template, which tokens are trained. No tensors."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from adapterhub.errors import DatasetError
from train.formats import Conversation, Source, listed, read_chatterbot, read_jsonl, read_shipped
from train.recipe import ChatterbotData, LossOn, Recipe, ShippedData

_CUT = "samples were cut at max_length = {max_length} tokens"
_UNTRAINED = "samples have no trained token left and were left out"


@dataclass(frozen=True)
class Sample:
    """One conversation as tokens; `trained[i]` says that token i is a target. The first never is."""

    tokens: tuple[int, ...]
    trained: tuple[bool, ...]

    @property
    def num_trained(self) -> int:
        return sum(self.trained)

    def cut(self, length: int) -> Sample:
        """Its first `length` tokens."""
        return Sample(self.tokens[:length], self.trained[:length])


@dataclass(frozen=True)
class TokenData:
    """What a run trains and measures on, and what was left out on the way (in words)."""

    name: str
    train: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    notes: tuple[str, ...]
    num_cut: int = 0
    num_untrained: int = 0
    """left out, for no trained token was left in them"""

    @property
    def num_tokens(self) -> int:
        return sum(len(sample.tokens) for sample in self.train)

    @property
    def num_trained(self) -> int:
        return sum(sample.num_trained for sample in self.train)

    @property
    def digest(self) -> str:
        """Hex sha256 over the JSON of both parts' tokens and marks: equal exactly when the run's input is."""
        part = [[[s.tokens, [int(mark) for mark in s.trained]] for s in side] for side in (self.train, self.held_out)]
        return hashlib.sha256(json.dumps(part, separators=(",", ":")).encode()).hexdigest()


class ChatTokenizer(Protocol):
    """The part of a Hugging Face tokenizer used here."""

    chat_template: Any
    bos_token_id: int | None
    all_special_ids: list[int]
    added_tokens_decoder: dict[int, Any]

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...

    def decode(self, token_ids: Any, **kwargs: Any) -> Any: ...


def read_source(recipe: Recipe) -> Source:
    """The conversations the recipe's [data] names. Raises DatasetError."""
    data = recipe.data
    if isinstance(data, ChatterbotData):
        return read_chatterbot(data.topic)
    if isinstance(data, ShippedData):
        return read_shipped(data.name)
    return read_jsonl(recipe.folder / Path(data.path).expanduser(), name=Path(data.path).name)


def prepare(
    source: Source,
    tokenizer: ChatTokenizer,
    *,
    held_out: float,
    max_length: int,
    loss_on: LossOn,
    seed: int,
) -> TokenData:
    """Drop duplicates, split by question, tokenize. `held_out` is a fraction below 1, else a count of questions.

    Raises DatasetError for a split that leaves nothing to train on, conversations the chat template cannot
    render turn by turn, and data with no trained token.
    """
    distinct = drop_duplicates(source.conversations)
    sides = split(distinct, held_out=held_out, seed=seed)
    notes = [*source.notes]
    if dropped := len(source.conversations) - len(distinct):
        notes.append(f"{dropped} conversations ask what another one asks: left out before the split")
    found = Counter[str]()
    train, measured = (_tokenize_all(side, tokenizer, loss_on, max_length, found) for side in sides)
    if not train:
        raise DatasetError(
            f"{source.name}: no sample has a trained token (max_length = {max_length}): raise max_length, or check "
            "that the conversations hold answers of the assistant."
        )
    notes += [f"{count} {what.format(max_length=max_length)}" for what, count in found.items() if count]
    return TokenData(source.name, train, measured, tuple(notes), found[_CUT], found[_UNTRAINED])


def drop_duplicates(conversations: Iterable[Conversation]) -> list[Conversation]:
    """The first conversation of each distinct text of system and user, letter case and punctuation aside."""
    first: dict[str, Conversation] = {}
    for conversation in conversations:
        asked = (message.content for message in conversation.messages if message.role != "assistant")
        first.setdefault("\n".join(map(_normalised, asked)), conversation)
    return list(first.values())


def split(
    conversations: list[Conversation], *, held_out: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """(to train on, held out). The order of sha256(seed, first question) decides, whatever the order of the file.

    Conversations that open with the same question stay on one side. Raises DatasetError when nothing is left.
    """
    openings = {conversation.where: _opening(conversation) for conversation in conversations}
    questions = sorted(set(openings.values()), key=lambda text: hashlib.sha256(f"{seed}\n{text}".encode()).digest())
    count = round(held_out * len(questions)) if held_out < 1 else int(held_out)
    if count >= len(questions):
        raise DatasetError(
            f"held_out = {held_out:g} leaves nothing to train on: the data has {len(questions)} distinct questions."
        )
    measured = set(questions[:count])
    train = [conversation for conversation in conversations if openings[conversation.where] not in measured]
    return train, [conversation for conversation in conversations if openings[conversation.where] in measured]


def tokenize(conversation: Conversation, tokenizer: ChatTokenizer, *, loss_on: LossOn) -> Sample:
    """Render with the base's chat template and mark the trained tokens.

    The prompt of an assistant turn (all before it, and the template's opening of an answer) must be a prefix
    of the rendering with the turn: what follows it, up to and including the end-of-turn token, is trained.
    So the mark needs no knowledge of the template. Raises ValueError when the template is not like that.
    """
    messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
    tokens: list[int] = []
    trained: list[bool] = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, messages[:place], is_prompt=True)
        whole = _render(tokenizer, messages[: place + 1], is_prompt=False)
        _check_prefix(tokens, prompt, f"the text up to message {place} is not the start of what follows it")
        _check_prefix(prompt, whole, f"the prompt for message {place + 1} is not the start of prompt and answer")
        end = _end_of_turn(whole, len(prompt), tokenizer)
        trained += [False] * (len(prompt) - len(trained)) + [True] * (end - len(prompt))
        trained += [False] * (len(whole) - end)
        tokens = whole
    if tokens[:2] == [tokenizer.bos_token_id] * 2:
        raise ValueError("the chat template renders the beginning-of-text token twice")
    if loss_on == "all":
        trained = [True] * len(tokens)
    elif loss_on == "last":
        trained = [mark and place >= len(prompt) for place, mark in enumerate(trained)]
    return Sample(tuple(tokens), (False, *trained[1:]))


def _tokenize_all(
    conversations: list[Conversation], tokenizer: ChatTokenizer, loss_on: LossOn, max_length: int, found: Counter[str]
) -> tuple[Sample, ...]:
    check_has_template(tokenizer)
    samples, faults = [], []
    for conversation in conversations:
        try:
            sample = tokenize(conversation, tokenizer, loss_on=loss_on)
        except ValueError as error:
            faults.append(f"{conversation.where}: {error}")
            continue
        if len(sample.tokens) > max_length:
            found[_CUT] += 1
            sample = sample.cut(max_length)
        if sample.num_trained:
            samples.append(sample)
        else:
            found[_UNTRAINED] += 1
    check_rendered(faults)
    return tuple(samples)


def check_has_template(tokenizer: ChatTokenizer) -> None:
    """Raises DatasetError."""
    if not tokenizer.chat_template:
        raise DatasetError("the base has no chat template: use an instruction-tuned base (its name often says so).")


def check_rendered(faults: list[str]) -> None:
    """Raises DatasetError with what the chat template could not render."""
    if faults:
        raise DatasetError(
            f"the base's chat template cannot render this data turn by turn, {listed(faults)}. "
            "Give each conversation one answer only, or use another base."
        )


def _render(tokenizer: ChatTokenizer, messages: list[dict[str, str]], *, is_prompt: bool) -> list[int]:
    try:
        rendered = tokenizer.apply_chat_template(
            messages, add_generation_prompt=is_prompt, tokenize=True, return_dict=False
        )
    except Exception as error:  # Jinja templates raise what they like (raise_exception, undefined names)
        raise ValueError(f"the chat template refuses it ({error})") from error
    return list(rendered)


def _check_prefix(start: list[int], whole: list[int], otherwise: str) -> None:
    if whole[: len(start)] != start:
        raise ValueError(otherwise)


def special_ids(tokenizer: ChatTokenizer) -> frozenset[int]:
    return frozenset(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}


def _end_of_turn(whole: list[int], start: int, tokenizer: ChatTokenizer) -> int:
    """Index after the turn's last special token; only white space may follow it."""
    special = special_ids(tokenizer)
    for end in range(len(whole), start, -1):
        if whole[end - 1] in special:
            return end
        if str(tokenizer.decode([whole[end - 1]])).strip():
            break
    raise ValueError("the chat template ends an answer with no special token, so the model would never stop")


def _opening(conversation: Conversation) -> str:
    return next(_normalised(message.content) for message in conversation.messages if message.role == "user")


def _normalised(text: str) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in text.casefold()).split()
    return " ".join(words) or text
