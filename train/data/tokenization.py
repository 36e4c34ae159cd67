"""Turn conversations into token samples: remove duplicates, split, render, mark the trained tokens."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from adapterhub.chat_template import render_chat
from adapterhub.end_of_turn import special_ids
from adapterhub.errors import DatasetError
from train.data.conversation import Conversation, Example, Source, Text, counted, listed
from train.data.formats import OnFault
from train.recipe import LossOn

THINK = "<think>"
"""Opening of an answer's thoughts."""
_CUT, _UNTRAINED = "cut", "untrained"
_NUM_COPIES_SHOWN = 3


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


_ANOTHER = "Use another template ([data] template)."
_ONE_ANSWER = 'Set loss_on = "last" in [train], or keep one answer per conversation.'


def _fault(what: str, advice: str) -> ValueError:
    """Return the error for a conversation that the chat template cannot render for training."""
    return ValueError(f"{what}. {advice}")


def prepare(
    source: Source,
    tokenizer: ChatTokenizer,
    *,
    held_out: float,
    max_length: int,
    loss_on: LossOn,
    seed: int,
    stop: Sequence[str] = (),
    duplicates: Literal["remove", "keep"] = "remove",
    on_fault: OnFault = "stop",
) -> TokenData:
    """Remove duplicates, split by question, tokenize, and repeat the samples of a mix by the weights of its sources.

    `held_out` is a fraction of the questions when below 1, else their number. `stop` are strings that end an answer
    under the chat template. Raises DatasetError for a split that leaves nothing to train on, for data without a trained
    token, and for conversations that the chat template cannot render turn by turn; with `on_fault` skip, these are left
    out and counted in the notes.
    """
    if loss_on != "all" and any(isinstance(example, Text) for example in source.examples):
        raise DatasetError(
            f'{source.name} is plain text: loss_on = "{loss_on}" needs answers. Set loss_on = "all" in [train].'
        )
    notes = [*source.notes]
    examples: Sequence[Example] = source.examples
    if duplicates == "remove":
        examples, copies = drop_duplicates(examples)
        notes += _duplicates_note(copies)
    splits = [[examples[place] for place in places] for places in split(examples, held_out=held_out, seed=seed)]
    if source.parts:
        splits[0], mixed = weighted(splits[0], source.parts, seed=seed)
        notes.append(mixed)
    counts = Counter[str]()
    faults: list[str] = []
    train, test = (_tokenize_all(part, tokenizer, loss_on, max_length, stop, counts, faults) for part in splits)
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


def drop_duplicates(examples: Iterable[Example]) -> tuple[list[Example], list[tuple[Example, Example]]]:
    """Keep the first of equal examples; return those kept, and pairs (left out, the one it is equal to).

    Examples are equal when every text, role and tool is, after Unicode normalization (NFC).
    """
    first: dict[Example, Example] = {}
    copies: list[tuple[Example, Example]] = []
    for example in examples:
        kept = first.setdefault(_normal_form(example), example)
        if kept is not example:
            copies.append((example, kept))
    return list(first.values()), copies


def _normal_form(example: Example) -> Example:
    if isinstance(example, Text):
        return Text(_nfc(example.content), "")
    messages = (replace(message, content=_nfc(message.content)) for message in example.messages)
    return replace(example, messages=tuple(messages), where="")


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _duplicates_note(copies: Sequence[tuple[Example, Example]]) -> list[str]:
    if not copies:
        return []
    shown = ", ".join(f"{copy.where} (as {kept.where})" for copy, kept in copies[:_NUM_COPIES_SHOWN])
    more = ", ..." if len(copies) > _NUM_COPIES_SHOWN else ""
    return [
        f'left out {counted(len(copies), "duplicate")}: {shown}{more}; duplicates = "keep" in [data] trains them too'
    ]


def weighted(examples: Sequence[Example], parts: Sequence[Source], *, seed: int) -> tuple[list[Example], str]:
    """Repeat the examples of each part by its weight; return them, and one line about their numbers.

    Of a fraction, those with the lowest sha256(seed, text) are taken, so the order of the files does not matter.
    """
    found: list[Example] = []
    numbers: list[str] = []
    owners = {id(example): place for place, part in enumerate(parts) for example in part.examples}
    for place, part in enumerate(parts):
        own = [example for example in examples if owners[id(example)] == place]
        whole = int(part.weight)
        by_hash = sorted(own, key=lambda example: hashlib.sha256(f"{seed}\n{_normal_form(example)}".encode()).digest())
        chosen = {id(example) for example in by_hash[: round((part.weight - whole) * len(own))]}
        taken = [*own * whole, *(example for example in own if id(example) in chosen)]
        numbers.append(f"{len(taken)} of {part.name} ({len(own)} x {part.weight:g})")
        found += taken
    return found, f"an epoch has {', '.join(numbers)}"


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
    conversation: Conversation, tokenizer: ChatTokenizer, *, loss_on: LossOn, stop: Sequence[str] = (),
    length: int | None = None,
) -> Sample:  # fmt: skip
    """Render with the chat template and mark the trained tokens.

    Answers that begin after the first `length` tokens may stay unmarked: the caller cuts them off.

    The prompt of an answer (all before it, and the generation prompt) must be a prefix of the whole, token for token.
    What follows it, up to and including the end of the answer, is trained. So no knowledge of the template is needed.
    The end is a special token, or the stop string after the answer, under a template that ends only the last answer
    with a special token. Where the prompt opens `<think>` and the template leaves the thoughts out, they are put back
    into the last answer. Raises ValueError for templates that do not render this way, or that leave out a part of the
    conversation.
    """
    chat = _Chat(conversation, tokenizer)
    whole = chat.text
    _check_complete(chat)
    tokens = chat.encode(whole)
    if tokens[:2] == [tokenizer.bos_token_id] * 2:
        raise _fault("the chat template renders BOS twice", _ANOTHER)
    if loss_on == "all":
        for place, message in enumerate(conversation.messages, start=1):
            if not message.is_trained:
                raise _fault(
                    f"message {place} ({message.role}), with weight 0 or of a prompt before its completion, cannot be "
                    'left out of loss_on = "all"',
                    'Set loss_on = "assistant" in [train].',
                )
        _end_of_turn(tokens, 1, tokenizer)
        return Sample(tuple(tokens), (False, *[True] * (len(tokens) - 1)))
    trained = [False] * len(tokens)
    for place, message in enumerate(conversation.messages):
        is_last = place == len(conversation.messages) - 1
        if message.role != "assistant" or not message.is_trained or (loss_on == "last" and not is_last):
            continue
        prompt_text = chat.render(place, is_prompt=True)
        prompt = chat.encode(prompt_text)
        if length is not None and len(prompt) >= length and prompt[:length] == tokens[:length]:
            break  # each answer costs two passes over all text before it, hours in long conversations
        try:
            so_far = tokens if is_last else chat.encode(chat.render(place + 1))
            advice = _ANOTHER if is_last else _ONE_ANSWER
            _check_prefix(
                so_far, tokens, f"the text up to message {place + 1} is not the start of what follows it", advice
            )
            _check_prefix(
                prompt, so_far, f"the prompt for message {place + 1} is not the start of prompt and answer", advice
            )
            end = _end_of_turn(so_far, len(prompt), tokenizer)
        except ValueError:
            if is_last or not stop or tokens[: len(prompt)] != prompt:
                raise
            end = _end_at_stop(chat, place, tokens, len(prompt), stop)
        if message.thoughts not in whole[len(prompt_text) :] or chat.ignores_reasoning(place):
            raise _fault(
                f"the chat template leaves the thoughts of message {place + 1} out",
                "Use a template that renders thoughts ([data] template), or leave them out of the rows.",
            )
        trained[len(prompt) : end] = [True] * (end - len(prompt))
    return Sample(tuple(tokens), (False, *trained[1:]))


class _Chat:
    """A conversation under the tokenizer's chat template."""

    def __init__(self, conversation: Conversation, tokenizer: ChatTokenizer) -> None:
        self.conversation = conversation
        self.tokenizer = tokenizer
        self._messages = [message.for_template() for message in conversation.messages]
        self._tools = json.loads(conversation.tools) if conversation.tools else None
        self._texts: dict[tuple[int, bool], str] = {}
        self.text = self._with_thoughts(self.render(len(self._messages)))

    def render(self, count: int, *, is_prompt: bool = False) -> str:
        """Return the text of the first `count` messages. Raises ValueError."""
        if (count, is_prompt) in self._texts:
            return self._texts[count, is_prompt]
        messages = self._messages[:count]
        try:
            return self._texts.setdefault((count, is_prompt), self._render(messages, self._tools, is_prompt=is_prompt))
        except Exception as error:  # Jinja templates raise what they like (raise_exception, undefined names)
            raise _fault(
                f"the chat template raised an error ({error})", self._advice_without(messages, is_prompt=is_prompt)
            ) from error

    def renders_alike(self, changed: list[dict[str, Any]], *, tools: bool = True) -> bool:
        """Return whether other messages, or no tools, give the same text."""
        try:
            return self._render(changed, self._tools if tools else None) == self.render(len(self._messages))
        except Exception:  # a template that fails without a key uses it
            return False

    def ignores_reasoning(self, place: int) -> bool:
        """Return whether the template leaves out an answer's `reasoning_content`, whose text the answer may repeat."""
        has_own = self.text == self.render(len(self._messages))  # and not thoughts that were put back
        return (
            bool(self.conversation.messages[place].reasoning)
            and has_own
            and self.renders_alike(self.changed(place, reasoning_content=None))
        )

    def changed(self, place: int, **keys: Any) -> list[dict[str, Any]]:
        """Return the messages with other values in one of them; None removes a key."""
        message = {key: value for key, value in (self._messages[place] | keys).items() if value is not None}
        return [*self._messages[:place], message, *self._messages[place + 1 :]]

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, messages: list[dict[str, Any]], tools: Any, *, is_prompt: bool = False) -> str:
        return render_chat(self.tokenizer, messages, tools=tools, add_generation_prompt=is_prompt)

    def _advice_without(self, messages: list[dict[str, Any]], *, is_prompt: bool) -> str:
        """Return what to do about messages that the template refuses."""
        if messages[0]["role"] != "system":
            return _ANOTHER
        try:
            self._render(messages[1:], self._tools, is_prompt=is_prompt)
        except Exception:
            return _ANOTHER
        return (
            "The template takes no system messages: put their text into the first question, or use another template "
            "([data] template)."
        )

    def _with_thoughts(self, whole: str) -> str:
        """Put the thoughts of the last answer after a prompt that opens them, where the template leaves them out."""
        last = self.conversation.messages[-1]
        prompt = self.render(len(self._messages) - 1, is_prompt=True)
        before, opened, rest = prompt.rpartition(THINK)
        if (
            not opened
            or rest.strip()
            or not last.is_trained
            or whole.startswith(prompt)
            or not whole.startswith(before)
        ):
            return whole
        if not last.thoughts:
            raise _fault(
                f"the prompt for message {len(self._messages)} opens {THINK}, and the answer has no thoughts",
                f"Add thoughts to the answers (reasoning_content), or use a template that does not open {THINK} "
                "([data] template).",
            )
        return f"{prompt}{last.thoughts}\n</think>\n\n{whole[len(before) :]}"


def _check_complete(chat: _Chat) -> None:
    """Check that the template renders every part of the conversation. Raises ValueError."""
    if chat.conversation.tools and chat.renders_alike(chat.changed(0), tools=False):
        raise _ignored("the tools", "tools")
    for place, message in enumerate(chat.conversation.messages):
        name = f"message {place + 1} ({message.role})"
        if message.tool_calls and chat.renders_alike(chat.changed(place, tool_calls=None)):
            raise _ignored(f"the tool_calls of {name}", "tool_calls")
        # The call names the function that a tool's message answers.
        if message.name and message.role != "tool" and chat.renders_alike(chat.changed(place, name=None)):
            raise _ignored(f"the name of {name}", "name")
        # A short text may be found in another message: those that templates tend to leave out are always tried.
        is_found = message.content.strip() in chat.text and message.role in ("user", "assistant")
        if (
            (message.tool_calls or not is_found)
            and message.content
            and chat.renders_alike(chat.changed(place, content=f"{message.content}."))
        ):
            raise _fault(f"the chat template leaves out the text of {name}", _ANOTHER)


def _ignored(what: str, key: str) -> ValueError:
    return _fault(
        f"the chat template ignores {what}",
        f'Use a template that renders them ([data] template), or leave them out with ignore = ["{key}"] in [data].',
    )


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
            sample = tokenize(example, tokenizer, loss_on=loss_on, stop=stop, length=max_length)
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
    """Raise DatasetError when the chat template could not render some conversations; with skip, return a note.

    Each fault has a place and what to do.
    """
    if faults and on_fault == "stop":
        raise DatasetError(f"the chat template cannot render this data turn by turn: {listed(faults)}")
    return [f"left out what the chat template cannot render: {listed(faults)}"] if faults else []


def _check_prefix(start: list[int], whole: list[int], message: str, advice: str) -> None:
    if whole[: len(start)] != start:
        raise _fault(message, advice)


def _end_at_stop(chat: _Chat, place: int, tokens: list[int], start: int, stop: Sequence[str]) -> int:
    """Return the index after the stop string that follows answer `place`, whose first token is `start`."""
    text = chat.text
    encoded = chat.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if list(encoded["input_ids"]) != tokens:
        raise _fault("the rendered text does not tokenize to the rendered tokens", _ANOTHER)
    offsets = encoded["offset_mapping"]
    answer = chat.conversation.messages[place].content.strip()
    begin = text.find(answer, offsets[start][0])
    ends = [at + len(one) for one in stop if begin >= 0 and (at := text.find(one, begin + len(answer))) >= 0]
    if not ends:
        raise _fault(
            f"the chat template renders none of {', '.join(map(repr, stop))} after message {place + 1}",
            "Correct stop in [data].",
        )
    return next((at for at, (first, _) in enumerate(offsets) if first >= min(ends)), len(tokens))


def _end_of_turn(whole: list[int], start: int, tokenizer: ChatTokenizer) -> int:
    """Return the index after the turn's last special token; only white space may follow it."""
    special = special_ids(tokenizer)
    for end in range(len(whole), start, -1):
        if whole[end - 1] in special:
            return end
        if str(tokenizer.decode([whole[end - 1]])).strip():
            break
    raise _fault(
        "the chat template ends an answer with no special token, so the model would never stop",
        "Use a template that ends answers with a special token ([data] template), or set stop in [data].",
    )


def _opening(example: Example) -> str:
    if isinstance(example, Text):
        return _normalized(example.content)
    return next(_normalized(message.content) for message in example.messages if message.role == "user")


def _normalized(text: str) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in text.casefold()).split()
    return " ".join(words) or text
