"""Turn conversations into token samples: remove duplicates, split, render, mark the trained tokens."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from adapterhub.end_of_turn import special_ids
from adapterhub.errors import DatasetError
from train.data.conversation import Conversation, Example, Source, Text, counted, listed
from train.data.formats import OnFault
from train.recipe import LossOn

_CUT, _UNTRAINED = "cut", "untrained"


@dataclass(frozen=True)
class Sample:
    """A conversation as tokens; `trained[i]` marks token i as a target. The first token never is."""

    tokens: tuple[int, ...]
    trained: tuple[bool, ...]

    @property
    def num_trained(self) -> int:
        """Number of trained tokens."""
        return sum(self.trained)

    def cut(self, length: int) -> Sample:
        """Return the first `length` tokens."""
        return Sample(self.tokens[:length], self.trained[:length])


@dataclass(frozen=True)
class TokenData:
    """Training and held-out samples of a run, with notes about what was left out."""

    name: str
    train: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    notes: tuple[str, ...]
    num_cut: int = 0
    num_untrained: int = 0
    """Number of samples left out because no trained token remained."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens to train on, trained or not."""
        return sum(len(sample.tokens) for sample in self.train)

    @property
    def num_trained(self) -> int:
        """Number of trained tokens."""
        return sum(sample.num_trained for sample in self.train)

    @property
    def digest(self) -> str:
        """Hex sha256 over the JSON of both splits' tokens and masks: equal exactly when the run's input is."""
        splits = [[[s.tokens, [int(mark) for mark in s.trained]] for s in part] for part in (self.train, self.held_out)]
        return hashlib.sha256(json.dumps(splits, separators=(",", ":")).encode()).hexdigest()


class ChatTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

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
    on_fault: OnFault = "stop",
) -> TokenData:
    """Remove duplicates, split by question, and tokenize.

    `held_out` is a fraction of the questions when below 1, else their number. `stop` are strings that end an answer
    under the chat template. Raises DatasetError for a split that leaves nothing to train on, for data without a trained
    token, and for conversations that the chat template cannot render turn by turn; with `on_fault` skip, these are left
    out and counted in the notes.
    """
    if loss_on != "all" and any(isinstance(example, Text) for example in source.examples):
        raise DatasetError(
            f'{source.name} is plain text: loss_on = "{loss_on}" needs answers. Set loss_on = "all" in [train].'
        )
    distinct = drop_duplicates(source.examples)
    splits = split(distinct, held_out=held_out, seed=seed)
    notes = [*source.notes]
    if dropped := len(source.examples) - len(distinct):
        notes.append(f"left out {counted(dropped, 'conversation')} with the same questions as another one")
    counts = Counter[str]()
    faults: list[str] = []
    train, test = (
        _tokenize_all([distinct[place] for place in places], tokenizer, loss_on, max_length, stop, counts, faults)
        for places in splits
    )
    notes += check_rendered(faults, on_fault)
    if not train:
        raise DatasetError(
            f"no sample of {source.name} has a trained token at max_length = {max_length}: expected at least one. "
            "Raise max_length in [data], or check that the conversations have answers."
        )
    if num_cut := counts[_CUT]:
        notes.append(f"cut {counted(num_cut, 'sample')} at max_length = {max_length} tokens")
    if num_untrained := counts[_UNTRAINED]:
        notes.append(f"left out {counted(num_untrained, 'sample')} without a trained token")
    return TokenData(source.name, train, test, tuple(notes), num_cut, num_untrained)


def drop_duplicates(examples: Iterable[Example]) -> list[Example]:
    """Keep the first example of each system and user text, ignoring letter case and punctuation."""
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault("\n".join(map(_normalized, _prompt_texts(example))), example)
    return list(first.values())


def split(examples: Sequence[Example], *, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Split by question; return the places of (training examples, held-out examples) in `examples`.

    The order of sha256(seed, first question) decides, so the order of the file does not matter. Conversations with the
    same first question stay in one split. Raises DatasetError when nothing is left to train on.
    """
    openings = [_opening(example) for example in examples]
    questions = sorted(set(openings), key=lambda text: hashlib.sha256(f"{seed}\n{text}".encode()).digest())
    count = round(held_out * len(questions)) if held_out < 1 else int(held_out)
    if count >= len(questions):
        raise DatasetError(
            f"held_out = {held_out:g} leaves nothing to train on: expected fewer than the {len(questions)} distinct "
            "questions of the data. Lower held_out in [data]."
        )
    held_out_questions = set(questions[:count])
    splits: tuple[list[int], list[int]] = [], []
    for place, opening in enumerate(openings):
        splits[opening in held_out_questions].append(place)
    return splits


def tokenize(
    conversation: Conversation, tokenizer: ChatTokenizer, *, loss_on: LossOn, stop: Sequence[str] = ()
) -> Sample:
    """Render with the chat template and mark the trained tokens.

    The prompt of an answer (all before it, and the generation prompt) must be a prefix of the whole, token for token.
    What follows it, up to and including the end of the answer, is trained. So no knowledge of the template is needed.
    The end is a special token, or the stop string after the answer, under a template that ends only the last answer
    with a special token. Raises ValueError for templates that do not render this way.
    """
    messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
    tokens = _render(tokenizer, messages, is_prompt=False)
    if tokens[:2] == [tokenizer.bos_token_id] * 2:
        raise ValueError("the chat template renders BOS twice")
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
    """Tokenize a text with BOS and EOS into chunks of `length` tokens, all of them trained. Raises ValueError."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the base's tokenizer has no EOS, so the model would never stop")
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokens = (*first, *tokenizer(text.content, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    # Chunks overlap by one token, since the first token of a sample is not trained.
    chunks = [tokens[start : start + length] for start in range(0, len(tokens) - 1, length - 1)]
    return [Sample(chunk, (False, *[True] * (len(chunk) - 1))) for chunk in chunks]


def _tokenize_all(
    examples: Sequence[Example], tokenizer: ChatTokenizer, loss_on: LossOn, max_length: int, stop: Sequence[str],
    counts: Counter[str], faults: list[str],
) -> tuple[Sample, ...]:  # fmt: skip
    """Tokenize examples, count those that are cut or left out, and append those that cannot be rendered to `faults`."""
    check_has_template(tokenizer)
    samples: list[Sample] = []
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
            counts[_CUT] += 1
            sample = sample.cut(max_length)
        if sample.num_trained:
            samples.append(sample)
        else:
            counts[_UNTRAINED] += 1
    return tuple(samples)


def check_has_template(tokenizer: ChatTokenizer) -> None:
    """Check that the tokenizer has a chat template. Raises DatasetError."""
    if not tokenizer.chat_template:
        raise DatasetError(
            "the base has no chat template: expected one, or template in [data]. Set template to guanaco, alpaca or a "
            ".jinja file, or use an instruction-tuned base."
        )


def check_rendered(faults: list[str], on_fault: OnFault) -> list[str]:
    """Raise DatasetError when the chat template could not render some conversations; with skip, return a note."""
    if faults and on_fault == "stop":
        raise DatasetError(
            f"the chat template cannot render this data turn by turn: {listed(faults)}. "
            'Set loss_on = "last" in [train], keep one answer per conversation, or use another template.'
        )
    return [f"left out what the chat template cannot render: {listed(faults)}"] if faults else []


def _render(tokenizer: ChatTokenizer, messages: list[dict[str, str]], *, is_prompt: bool) -> list[int]:
    try:
        rendered = tokenizer.apply_chat_template(
            messages, add_generation_prompt=is_prompt, tokenize=True, return_dict=False
        )
    except Exception as error:  # Jinja templates raise what they like (raise_exception, undefined names)
        raise ValueError(f"the chat template raised an error ({error})") from error
    return list(rendered)


def _check_prefix(start: list[int], whole: list[int], message: str) -> None:
    if whole[: len(start)] != start:
        raise ValueError(message)


def _end_at_stop(
    messages: Sequence[dict[str, str]], place: int, tokens: list[int], start: int, tokenizer: ChatTokenizer,
    stop: Sequence[str],
) -> int:  # fmt: skip
    """Return the index after the stop string that follows answer `place`, whose first token is `start`."""
    text = str(tokenizer.apply_chat_template(list(messages), tokenize=False))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if list(encoded["input_ids"]) != tokens:
        raise ValueError("the rendered text does not tokenize to the rendered tokens")
    offsets = encoded["offset_mapping"]
    answer = messages[place]["content"].strip()
    begin = text.find(answer, offsets[start][0])
    ends = [at + len(one) for one in stop if begin >= 0 and (at := text.find(one, begin + len(answer))) >= 0]
    if not ends:
        raise ValueError(f"the chat template renders none of {', '.join(map(repr, stop))} after message {place + 1}")
    return next((at for at, (first, _) in enumerate(offsets) if first >= min(ends)), len(tokens))


def _end_of_turn(whole: list[int], start: int, tokenizer: ChatTokenizer) -> int:
    """Return the index after the turn's last special token; only white space may follow it."""
    special = special_ids(tokenizer)
    for end in range(len(whole), start, -1):
        if whole[end - 1] in special:
            return end
        if str(tokenizer.decode([whole[end - 1]])).strip():
            break
    raise ValueError("the chat template ends an answer with no special token, so the model would never stop")


def _prompt_texts(example: Example) -> Iterator[str]:
    if isinstance(example, Text):
        yield example.content
    else:
        yield from (message.content for message in example.messages if message.role != "assistant")


def _opening(example: Example) -> str:
    if isinstance(example, Text):
        return _normalized(example.content)
    return next(_normalized(message.content) for message in example.messages if message.role == "user")


def _normalized(text: str) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in text.casefold()).split()
    return " ".join(words) or text
