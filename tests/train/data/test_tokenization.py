"""From conversations to samples: no leak between the splits, and the right tokens trained under any template."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from adapterhub.adapter import StoredBase
from adapterhub.errors import DatasetError
from train.data.conversation import Conversation, Message, Source
from train.data.tokenization import Sample, TokenData, drop_duplicates, prepare, split, tokenize, weighted

NO_PREFIX = "{% for m in messages %}{{ loop.length }}{{ m['content'] }}<|im_end|>{% endfor %}"
NO_STOP = "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}### assistant:{% endif %}"  # noqa: E501
FORGETS = "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"  # noqa: E501
TWICE_BOS = "<|im_start|><|im_start|>{% for m in messages %}{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"  # noqa: E501
REFUSES = "{{ raise_exception('no system role') }}"


@pytest.fixture(scope="module")
def chatml(smollm2: StoredBase) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2.path)


@pytest.fixture
def tokenizer(chatml: Any) -> Any:
    """Return a tokenizer whose template a test may change."""
    template = chatml.chat_template
    yield chatml
    chatml.chat_template = template


def talk(*texts: str, where: str = "x:1") -> Conversation:
    roles = ["user", "assistant"] * len(texts)
    return Conversation(tuple(Message(role, text) for role, text in zip(roles, texts, strict=False)), where)  # type: ignore[arg-type]


def questions(number: int) -> list[Conversation]:
    return [talk(f"Question {place}?", f"Answer {place}.", where=f"x:{place}") for place in range(number)]


def prepared(conversations: list[Conversation], tokenizer: Any, **changed: Any) -> TokenData:
    options: dict[str, Any] = {"held_out": 0.25, "max_length": 64, "loss_on": "assistant", "seed": 0} | changed
    return prepare(Source("test", tuple(conversations)), tokenizer, **options)


def trained_text(sample: Sample, tokenizer: Any) -> str:
    return str(tokenizer.decode([token for token, mark in zip(sample.tokens, sample.trained, strict=True) if mark]))


@pytest.mark.parametrize("length", [16, 40, 64, 100, 300])
def test_of_a_long_conversation_only_what_is_kept_is_tokenized_answer_by_answer(tokenizer: Any, length: int) -> None:
    long = talk(*(text for place in range(20) for text in (f"Question {place}?", f"Answer {place}.")))
    encoded: list[int] = []

    class Counted:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, text: str, **options: Any) -> Any:
            found = tokenizer(text, **options)
            encoded.append(len(found["input_ids"]))
            return found

    sample = tokenize(long, Counted(), loss_on="assistant", length=length)
    assert sample.cut(length) == tokenize(long, tokenizer, loss_on="assistant").cut(length)
    assert len([size for size in encoded if size > length]) <= 3  # the whole, and the answer where the cut is


def test_thoughts_that_the_answer_repeats_are_missed_too(tokenizer: Any) -> None:
    answer = Message("assistant", "It is four.", reasoning="four")
    with pytest.raises(ValueError, match="leaves the thoughts of message 2 out"):
        tokenize(replace(talk("2 + 2?"), messages=(Message("user", "2 + 2?"), answer)), tokenizer, loss_on="last")


def test_only_the_last_answer_is_trained(tokenizer: Any) -> None:
    sample = tokenize(talk("Hi?", "Ho.", "And?", "Hum."), tokenizer, loss_on="last")
    assert trained_text(sample, tokenizer) == "Hum.<|im_end|>"


def test_the_answer_and_its_end_are_trained(tokenizer: Any) -> None:
    sample = tokenize(talk("Hi?", "Ho."), tokenizer, loss_on="assistant")
    assert trained_text(sample, tokenizer) == "Ho.<|im_end|>"
    assert tokenizer.decode(sample.tokens).endswith("assistant\nHo.<|im_end|>\n")


def test_every_answer_of_a_dialogue_is_trained(tokenizer: Any) -> None:
    sample = tokenize(talk("One?", "1", "Two?", "2"), tokenizer, loss_on="assistant")
    assert trained_text(sample, tokenizer) == "1<|im_end|>2<|im_end|>"


def test_the_tokens_are_those_of_the_template(tokenizer: Any) -> None:
    conversation = talk("One?", "1", "Two?", "2")
    messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
    rendered = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert list(tokenize(conversation, tokenizer, loss_on="assistant").tokens) == rendered


def test_loss_on_all_trains_everything_but_the_first_token(tokenizer: Any) -> None:
    sample = tokenize(talk("Hi?", "Ho."), tokenizer, loss_on="all")
    assert sample.trained == (False, *[True] * (len(sample.tokens) - 1))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (NO_PREFIX, "the prompt for message 2 is not the start of prompt and answer"),
        (NO_STOP, "ends an answer with no special token"),
        (TWICE_BOS, "the chat template renders BOS twice"),
        (REFUSES, "the chat template raised an error (no system role)"),
    ],
)
def test_a_template_that_cannot_be_marked(tokenizer: Any, template: str, words: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(DatasetError) as caught:
        prepared(questions(4), tokenizer)
    assert "4 faults: x:" in str(caught.value)
    assert words in str(caught.value)


def test_a_template_that_drops_earlier_answers(tokenizer: Any) -> None:
    tokenizer.chat_template = FORGETS
    with pytest.raises(DatasetError) as caught:
        prepared([talk("One?", "1", "Two?", "2")], tokenizer, held_out=0)
    assert "the chat template leaves out the text of message 2 (assistant)" in str(caught.value)


def test_a_base_without_a_template(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DatasetError, match="no chat template"):
        prepared(questions(4), tokenizer)


def test_a_cut_sample_is_counted(tokenizer: Any) -> None:
    data = prepared([*questions(3), talk("Long?", "word " * 100, where="x:9")], tokenizer, held_out=0)
    assert max(len(sample.tokens) for sample in data.train) == 64
    assert data.notes == ("cut 1 sample at max_length = 64 tokens",)


def test_a_sample_without_its_answer_is_left_out_and_counted(tokenizer: Any) -> None:
    data = prepared([*questions(3), talk("word " * 100, "Yes.", where="x:9")], tokenizer, held_out=0)
    assert len(data.train) == 3
    assert "left out 1 sample without a trained token" in data.notes


def test_no_sample_left(tokenizer: Any) -> None:
    with pytest.raises(DatasetError) as caught:
        prepared(questions(4), tokenizer, max_length=8)
    assert "no sample of test has a trained token at max_length = 8" in str(caught.value)


@pytest.mark.parametrize(
    ("first", "second", "is_duplicate"),
    [
        (("Who are you?", "Me."), ("Who are you?", "Me."), True),
        (("Caf\u00e9?", "Yes."), ("Cafe\u0301?", "Yes."), True),  # one text in two forms of Unicode
        (("Who are you?", "Me."), ("Who are YOU?", "Me."), False),
        (("8 + 2", "Sum."), ("8 - 2", "Sum."), False),
        (("-8 - 2", "Sum."), ("8 - 2", "Sum."), False),
        (("\u0915\u093f", "Yes."), ("\u0915\u0940", "Yes."), False),  # vowel signs are combining marks
        (("Write a limerick.", "One."), ("Write a limerick.", "Two."), False),
        (("Hi?", "Ho.", "And?", "So."), ("Hi?", "Ho."), False),
    ],
)
def test_duplicates_are_equal_texts(first: tuple[str, ...], second: tuple[str, ...], is_duplicate: bool) -> None:
    examples = [talk(*first, where="x:1"), talk(*second, where="x:2")]
    kept, copies = drop_duplicates(examples)
    assert kept == examples[: 1 if is_duplicate else 2]
    assert copies == ([(examples[1], examples[0])] if is_duplicate else [])


def test_the_same_text_with_another_weight_is_no_duplicate() -> None:
    context = replace(
        talk("Hi?", "Ho."), messages=(Message("user", "Hi?"), Message("assistant", "Ho.", is_trained=False))
    )
    assert len(drop_duplicates([talk("Hi?", "Ho."), context])[0]) == 2


def test_dropped_duplicates_are_shown_and_can_be_kept(tokenizer: Any) -> None:
    copies = [talk("Question 1?", "Answer 1.", where=f"x:{n}") for n in (7, 8, 9, 10)]
    data = prepared([*questions(4), *copies], tokenizer)
    assert data.notes == (
        'left out 4 duplicates: x:7 (as x:1), x:8 (as x:1), x:9 (as x:1), ...; duplicates = "keep" in [data] trains '
        "them too",
    )
    kept = prepared([*questions(4), *copies], tokenizer, duplicates="keep")
    assert (kept.notes, len(kept.train) + len(kept.held_out)) == ((), 8)


def mix(*weights: float) -> Source:
    parts = tuple(
        Source(f"part {place}", tuple(replace(talk(f"{place} {n}?", "Yes."), where=f"{place}:{n}") for n in range(20)))
        for place in range(len(weights))
    )
    parts = tuple(replace(part, weight=weight) for part, weight in zip(parts, weights, strict=True))
    return Source("mix", tuple(example for part in parts for example in part.examples), parts=parts)


def test_a_weight_is_the_number_of_passes_over_a_source_in_an_epoch() -> None:
    source = mix(2, 0.25, 1.5)
    found, note = weighted(source.examples, source.parts, seed=0)
    assert note == "an epoch has 40 of part 0 (20 x 2), 5 of part 1 (20 x 0.25), 30 of part 2 (20 x 1.5)"
    times = Counter(example.where for example in found)
    assert {times[f"0:{n}"] for n in range(20)} == {2}
    assert sorted(times[f"1:{n}"] for n in range(20)) == [0] * 15 + [1] * 5
    assert sorted(times[f"2:{n}"] for n in range(20)) == [1] * 10 + [2] * 10


def test_the_part_of_a_source_depends_on_the_seed_and_not_on_its_order() -> None:
    source = mix(0.25)

    def taken(seed: int, *, reverse: bool = False) -> set[str]:
        examples = source.examples[::-1] if reverse else source.examples
        return {example.where for example in weighted(examples, source.parts, seed=seed)[0]}

    assert taken(0) == taken(0, reverse=True) != taken(1)


def test_a_mix_repeats_training_samples_only(tokenizer: Any) -> None:
    options: dict[str, Any] = {"held_out": 10, "max_length": 64, "loss_on": "assistant", "seed": 0}
    data = prepare(mix(2, 2), tokenizer, **options)
    assert (len(data.train), len(set(data.train)), len(data.held_out)) == (60, 30, 10)


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_the_file() -> None:
    items = questions(20)
    _, measured = split(items, held_out=5, seed=1)
    _, from_reversed = split(items[::-1], held_out=5, seed=1)
    _, other_seed = split(items, held_out=5, seed=2)
    assert {items[place] for place in measured} == {items[::-1][place] for place in from_reversed}
    assert set(measured) != set(other_seed)


def test_a_fraction_and_a_count_hold_out_the_same_number() -> None:
    assert [len(split(questions(20), held_out=part, seed=0)[1]) for part in (0.25, 5)] == [5, 5]


def test_dialogues_that_open_alike_stay_on_one_side() -> None:
    alike = [talk("Hello!", "Hi.", f"Question {place}?", "Answer.", where=f"x:{place}") for place in range(6)]
    train, measured = split(
        [*alike, *[replace(item, where=item.where + "b") for item in questions(1)]], held_out=1, seed=0
    )
    assert {len(train), len(measured)} == {6, 1}


def test_holding_out_everything(tokenizer: Any) -> None:
    with pytest.raises(DatasetError) as caught:
        prepared(questions(4), tokenizer, held_out=4)
    assert "expected fewer than the 4 distinct questions of the data" in str(caught.value)


def test_the_digest_is_of_tokens_marks_and_split(tokenizer: Any) -> None:
    data = prepared(questions(8), tokenizer)
    assert data.digest == prepared(questions(8), tokenizer).digest
    assert data.digest != prepared(questions(8), tokenizer, loss_on="all").digest
    assert data.digest != replace(data, held_out=()).digest
