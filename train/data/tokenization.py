"""From conversations to token samples: duplicates, split, chat template, which tokens are trained. No tensors."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from adapterhub.errors import DatasetError
from train.data.conversation import Conversation, Example, Source, Text, listed
from train.recipe import LossOn

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
    eos_token_id: int | None
    all_special_ids: list[int]
    added_tokens_decoder: dict[int, Any]

    def __call__(self, text: str, **kwargs: Any) -> Any: ...

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...

    def decode(self, token_ids: Any, **kwargs: Any) -> Any: ...


def prepare(
    source: Source,
    tokenizer: ChatTokenizer,
    *,
    held_out: float,
    max_length: int,
    loss_on: LossOn,
    seed: int,
    stop: Sequence[str] = (),
) -> TokenData:
    """Drop duplicates, split by question, tokenize. `held_out` is a fraction below 1, else a count of questions.

    `stop` are strings that end an answer under the chat template. Raises DatasetError for a split that leaves nothing
    to train on, conversations the chat template cannot render turn by turn, and data with no trained token.
    """
    if loss_on != "all" and any(isinstance(example, Text) for example in source.examples):
        raise DatasetError(f'{source.name} is plain text, which has no answers: set loss_on = "all" in [train].')
    distinct = drop_duplicates(source.examples)
    sides = split(distinct, held_out=held_out, seed=seed)
    notes = [*source.notes]
    if dropped := len(source.examples) - len(distinct):
        notes.append(f"{dropped} conversations ask what another one asks: left out before the split")
    found = Counter[str]()
    train, measured = (_tokenize_all(side, tokenizer, loss_on, max_length, stop, found) for side in sides)
    if not train:
        raise DatasetError(
            f"{source.name}: no sample has a trained token (max_length = {max_length}): raise max_length, or check "
            "that the conversations hold answers of the assistant."
        )
    notes += [f"{count} {what.format(max_length=max_length)}" for what, count in found.items() if count]
    return TokenData(source.name, train, measured, tuple(notes), found[_CUT], found[_UNTRAINED])


def drop_duplicates(examples: Iterable[Example]) -> list[Example]:
    """The first example of each distinct text of system and user, letter case and punctuation aside."""
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault("\n".join(map(_normalised, _asked(example))), example)
    return list(first.values())


def split(examples: Sequence[Example], *, held_out: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(to train on, held out). The order of sha256(seed, first question) decides, whatever the order of the file.

    Conversations that open with the same question stay on one side. Raises DatasetError when nothing is left.
    """
    openings = [_opening(example) for example in examples]
    questions = sorted(set(openings), key=lambda text: hashlib.sha256(f"{seed}\n{text}".encode()).digest())
    count = round(held_out * len(questions)) if held_out < 1 else int(held_out)
    if count >= len(questions):
        raise DatasetError(
            f"held_out = {held_out:g} leaves nothing to train on: the data has {len(questions)} distinct questions."
        )
    measured = set(questions[:count])
    sides: tuple[list[Example], list[Example]] = [], []
    for example, opening in zip(examples, openings, strict=True):
        sides[opening in measured].append(example)
    return sides


def tokenize(
    conversation: Conversation, tokenizer: ChatTokenizer, *, loss_on: LossOn, stop: Sequence[str] = ()
) -> Sample:
    """Render with the chat template and mark the trained tokens.

    The prompt of an answer (all before it, and the template's opening of an answer) must be a prefix of the whole,
    token for token: what follows it, up to and including the answer's end, is trained. So the mark needs no knowledge
    of the template. The end is a special token, or, under a template that ends only the last answer with one, the
    stop string after it. Raises ValueError when the template is not like that.
    """
    messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
    tokens = _render(tokenizer, messages, is_prompt=False)
    if tokens[:2] == [tokenizer.bos_token_id] * 2:
        raise ValueError("the chat template renders the beginning-of-text token twice")
    if loss_on == "all":
        _end_of_turn(tokens, 1, tokenizer)
        return Sample(tuple(tokens), (False, *[True] * (len(tokens) - 1)))
    trained = [False] * len(tokens)
    for place, message in enumerate(messages):
        is_last = place == len(messages) - 1
        if message["role"] != "assistant" or (loss_on == "last" and not is_last):
            continue
        prompt = _render(tokenizer, messages[:place], is_prompt=True)
        try:
            so_far = tokens if is_last else _render(tokenizer, messages[: place + 1], is_prompt=False)
            _check_prefix(so_far, tokens, f"the text up to message {place + 1} is not the start of what follows it")
            _check_prefix(prompt, so_far, f"the prompt for message {place + 1} is not the start of prompt and answer")
            end = _end_of_turn(so_far, len(prompt), tokenizer)
        except ValueError:
            if is_last or not stop or tokens[: len(prompt)] != prompt:
                raise
            end = _end_at_stop(messages, place, tokens, len(prompt), tokenizer, stop)
        trained[len(prompt) : end] = [True] * (end - len(prompt))
    return Sample(tuple(tokens), (False, *trained[1:]))


def tokenize_text(text: Text, tokenizer: ChatTokenizer, *, length: int) -> list[Sample]:
    """A text with its beginning and its end, all of it trained, in pieces of `length` tokens. Raises ValueError."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the base's tokenizer has no end of text, so the model would never stop")
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokens = (*first, *tokenizer(text.content, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    # A piece begins with the last token of the one before: only what comes first in a sample is not trained.
    pieces = [tokens[start : start + length] for start in range(0, len(tokens) - 1, length - 1)]
    return [Sample(piece, (False, *[True] * (len(piece) - 1))) for piece in pieces]


def _tokenize_all(
    examples: Sequence[Example], tokenizer: ChatTokenizer, loss_on: LossOn, max_length: int, stop: Sequence[str],
    found: Counter[str],
) -> tuple[Sample, ...]:  # fmt: skip
    check_has_template(tokenizer)
    samples: list[Sample] = []
    faults = []
    for example in examples:
        try:
            if isinstance(example, Text):
                samples += tokenize_text(example, tokenizer, length=max_length)
                continue
            sample = tokenize(example, tokenizer, loss_on=loss_on, stop=stop)
        except ValueError as error:
            faults.append(f"{example.where}: {error}")
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
        raise DatasetError(
            'the base has no chat template: set template in [data] ("guanaco", "alpaca", or a .jinja file), or use an '
            "instruction-tuned base."
        )


def check_rendered(faults: list[str]) -> None:
    """Raises DatasetError with what the chat template could not render."""
    if faults:
        raise DatasetError(
            f"the chat template cannot render this data turn by turn, {listed(faults)}. "
            'Set loss_on = "last", give each conversation one answer only, or use another template.'
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


def _end_at_stop(
    messages: Sequence[dict[str, str]], place: int, tokens: list[int], start: int, tokenizer: ChatTokenizer,
    stop: Sequence[str],
) -> int:  # fmt: skip
    """Index after the stop string that follows answer `place`, whose first token is `start`."""
    text = str(tokenizer.apply_chat_template(list(messages), tokenize=False))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if list(encoded["input_ids"]) != tokens:
        raise ValueError("the chat template's text has other tokens than its own")
    offsets = encoded["offset_mapping"]
    answer = messages[place]["content"].strip()
    begin = text.find(answer, offsets[start][0])
    ends = [at + len(one) for one in stop if begin >= 0 and (at := text.find(one, begin + len(answer))) >= 0]
    if not ends:
        raise ValueError(f"the chat template puts none of {', '.join(map(repr, stop))} after message {place + 1}")
    return next((at for at, (first, _) in enumerate(offsets) if first >= min(ends)), len(tokens))


def _end_of_turn(whole: list[int], start: int, tokenizer: ChatTokenizer) -> int:
    """Index after the turn's last special token; only white space may follow it."""
    special = special_ids(tokenizer)
    for end in range(len(whole), start, -1):
        if whole[end - 1] in special:
            return end
        if str(tokenizer.decode([whole[end - 1]])).strip():
            break
    raise ValueError("the chat template ends an answer with no special token, so the model would never stop")


def _asked(example: Example) -> Iterator[str]:
    if isinstance(example, Text):
        yield example.content
    else:
        yield from (message.content for message in example.messages if message.role != "assistant")


def _opening(example: Example) -> str:
    if isinstance(example, Text):
        return _normalised(example.content)
    return next(_normalised(message.content) for message in example.messages if message.role == "user")


def _normalised(text: str) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in text.casefold()).split()
    return " ".join(words) or text
