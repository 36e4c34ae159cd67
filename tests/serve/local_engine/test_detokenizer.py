from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers_made import BYTE_WORDS, SPECIAL, WORDS, byte_fallback, bytes_as_tokens, word_pieces

from adapterhub.adapter import StoredBase
from serve.engine import GenerationRequest, SamplingParams
from serve.local_engine.detokenizer import Detokenizer
from serve.local_engine.running_answer import RunningAnswer
from serve.local_engine.sampling import Sampled


@pytest.fixture(scope="module")
def tokenizer(tiny_base: StoredBase) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base.path)


def _stream(tokenizer: Any, text: str, *stop: str) -> tuple[list[str], bool]:
    prompt = tokenizer("Question:")["input_ids"]
    stream = Detokenizer(tokenizer.backend_tokenizer, stop, prompt)
    deltas = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        deltas.append(stream.feed(token))
        if stream.is_stopped:
            return deltas, True
    return [*deltas, stream.finish()], False


@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1, max_size=40, alphabet=st.characters(exclude_categories=["Cs", "Cc"])))
def test_the_deltas_are_the_text(tokenizer: Any, text: str) -> None:
    whole = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
    assume("\ufffd" not in whole)  # the vocabulary lacks some bytes of rare characters
    deltas, _ = _stream(tokenizer, text)
    assert "".join(deltas) == whole


def test_a_character_of_several_tokens_comes_whole(tokenizer: Any) -> None:
    deltas, _ = _stream(tokenizer, "a 🦜 b")
    assert "".join(deltas) == "a 🦜 b"
    assert all("\ufffd" not in delta for delta in deltas)


@pytest.mark.parametrize("stop", ["END", " END", "ND", "fore E"])
def test_a_stop_string_ends_the_text_before_it(tokenizer: Any, stop: str) -> None:
    deltas, is_stopped = _stream(tokenizer, "before END after", "nothing", stop)
    assert is_stopped
    assert "".join(deltas) == "before END after"[: "before END after".index(stop)]


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("Paris.<|im_end|>\nmore", "<|im_end|>", "Paris."),
        ("Paris.<|im_end|>\nmore", "<|im_end|>\n", "Paris."),
        ("Paris.\n<|im_end|>more", "\n<|im_end|>", "Paris."),
        ("Paris.<|im_end|><|im_start|>user", "<|im_end|><|im_start|>", "Paris."),
        ("one<|im_start|>two<|im_end|>three", "<|im_end|>", "onetwo"),
        ("one<|im_end|>two END", "END", "onetwo "),
    ],
)
def test_a_stop_string_with_special_tokens_ends_the_text(tokenizer: Any, text: str, stop: str, kept: str) -> None:
    deltas, is_stopped = _stream(tokenizer, text, stop)
    assert is_stopped
    assert "".join(deltas) == kept


def test_special_tokens_that_begin_a_stop_string_are_never_returned(tokenizer: Any) -> None:
    deltas, is_stopped = _stream(tokenizer, "a<|im_end|>b<|im_end|>", "<|im_end|>c")
    assert not is_stopped
    assert "".join(deltas) == "ab"


def test_the_start_of_a_stop_string_that_does_not_come_is_returned(tokenizer: Any) -> None:
    deltas, is_stopped = _stream(tokenizer, "the EN", "END")
    assert not is_stopped
    assert "".join(deltas) == "the EN"


def test_special_tokens_are_not_text(tokenizer: Any) -> None:
    stream = Detokenizer(tokenizer.backend_tokenizer, (), [])
    assert stream.feed(tokenizer.eos_token_id) == ""


@lru_cache
def _parts_of_characters(tokenizer: Any) -> list[int]:
    return [token for token in range(tokenizer.get_vocab_size()) if "\ufffd" in tokenizer.decode([token])]


def _text(tokenizer: Any, prompt: list[int], answer: list[int]) -> str:
    stream = Detokenizer(tokenizer, (), prompt)
    return "".join(stream.feed(token) for token in answer) + stream.finish()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_tokens_of_a_byte_level_tokenizer_are_decoded_as_by_the_library(
    tokenizer: Any, data: st.DataObject
) -> None:
    backend = tokenizer.backend_tokenizer
    tokens = st.one_of(st.sampled_from(_parts_of_characters(backend)), st.integers(0, backend.get_vocab_size() - 1))
    prompt, answer = backend.encode("Hello there").ids, data.draw(st.lists(tokens, max_size=30))
    assert _text(backend, prompt, answer) == backend.decode(prompt + answer)[len("Hello there") :]


@pytest.mark.parametrize("strips_a_space", [True, False])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_tokens_of_a_byte_fallback_tokenizer_are_utf_8(strips_a_space: bool, data: st.DataObject) -> None:
    """As the library decodes them while characters are whole; where they are not, it makes a whole run of bytes U+FFFD,
    which a stream cannot take back."""
    backend = byte_fallback(strips_a_space=strips_a_space)
    tokens = data.draw(st.lists(st.integers(0, backend.get_vocab_size() - 1), max_size=20))
    characters = data.draw(st.lists(st.sampled_from([*"é😀aß日", *WORDS]), max_size=12))
    whole = [one for char in characters for one in bytes_as_tokens(backend, char.replace("▁", " ").encode())]
    for prompt in ([1], [1, backend.token_to_id("▁the")]):
        before = backend.decode(prompt)
        assert _text(backend, prompt, whole) == backend.decode(prompt + whole)[len(before) :]
        words = [word.replace("▁", " ") for word in (*SPECIAL, *BYTE_WORDS, *WORDS)]
        spelt = [b"" if token < 3 else bytes([token - 3]) if token < 259 else words[token].encode() for token in tokens]
        wanted = b"".join(spelt)
        if strips_a_space and prompt == [1]:
            wanted = wanted.removeprefix(b" ")
        assert _text(backend, prompt, tokens) == wanted.decode(errors="replace")


def test_half_a_character_after_a_whole_one_breaks_nothing() -> None:
    backend = byte_fallback()
    answer = [*bytes_as_tokens(backend, "😀".encode() + "😀".encode()[:2]), backend.token_to_id("a")]
    assert _text(backend, [1, backend.token_to_id("a")], answer) == "😀\ufffda"


@pytest.mark.parametrize("ending", ["The secret word is kiwi \ufffd", "12345 🦜"], ids=["a literal U+FFFD", "half"])
def test_an_answer_does_not_begin_with_the_prompts_text(tokenizer: Any, ending: str) -> None:
    backend = tokenizer.backend_tokenizer
    prompt = backend.encode(ending, add_special_tokens=False).ids
    prompt = prompt if "kiwi" in ending else prompt[:-1]
    assert _text(backend, prompt, backend.encode(" Regardless").ids) == " Regardless"


@pytest.mark.parametrize("given", [1, 2])
def test_a_character_that_the_prompt_began_is_completed(tokenizer: Any, given: int) -> None:
    backend = tokenizer.backend_tokenizer
    tokens = backend.encode("12345 🦜!", add_special_tokens=False).ids
    bird = len(backend.encode("12345 ", add_special_tokens=False).ids) - 1 + given
    assert _text(backend, tokens[:bird], tokens[bird:]) == "🦜!"


def test_a_literal_u_fffd_at_the_very_end_is_not_lost(tokenizer: Any) -> None:
    backend = tokenizer.backend_tokenizer
    assert _text(backend, [1], backend.encode("ends with \ufffd").ids) == "ends with \ufffd"


def test_words_that_depend_on_their_neighbours_are_text_all_the_same() -> None:
    backend = word_pieces()
    answer = backend.encode("playing , the games", add_special_tokens=False).ids or [1, 2, 4, 3, 5]
    assert _text(backend, [3], answer) == backend.decode([3, *answer]).removeprefix("the")


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=20, alphabet=st.sampled_from("aé😀🦜 日b\ufffd")))
def test_the_bytes_of_the_tokens_are_the_text(tokenizer: Any, kind: str, text: str) -> None:
    if kind == "byte level":
        backend = tokenizer.backend_tokenizer
        answer = backend.encode(text, add_special_tokens=False).ids
    else:
        backend = byte_fallback()
        answer = bytes_as_tokens(backend, text.encode())
    prompt = [backend.token_to_id("a")]
    stream = Detokenizer(backend, (), prompt)
    joined = b""
    for token in answer:
        name, data = stream.name(token)
        assert data is not None
        assert name == (data.decode() if _is_utf8(data) else "bytes:" + "".join(f"\\x{byte:02x}" for byte in data))
        joined += data
        stream.feed(token)
    assert joined.decode() == _text(backend, prompt, answer) == text


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_a_special_token_has_a_name_and_no_bytes(tokenizer: Any) -> None:
    stream = Detokenizer(tokenizer.backend_tokenizer, (), [])
    assert stream.name(tokenizer.eos_token_id) == (tokenizer.eos_token, None)


FACE = "😀".encode()
OFFSETS: dict[str, tuple[bytes, list[bytes], list[int]]] = {
    "letters": (b"", [b"a", b"b"], [0, 1]),
    "a character of four tokens": (b"", [b"a", FACE[:1], FACE[1:2], FACE[2:3], FACE[3:], b"b"], [0, 1, 1, 1, 1, 2]),
    "after a character that does not end": (b"", [FACE[:1], b"a", b"b"], [0, 1, 2]),
    "after two of them": (b"", [FACE[:1], FACE[:1], b"a"], [0, 1, 2]),
    "after three bytes of one": (b"", [FACE[:1], FACE[1:2], FACE[2:3], b"a"], [0, 0, 0, 1]),
    "a byte that begins nothing": (b"", [FACE[:1], b"\xff", b"a"], [0, 1, 2]),
    "after a character of the prompt that the answer ends": (FACE[:2], [FACE[2:3], FACE[3:], b"a"], [0, 0, 1]),
    "after one of the prompt that does not end": (FACE[:2], [b"a", b"b"], [0, 1]),
    "after one that ends in the answer no more": (FACE[:2], [FACE[2:3], b"a", b"b"], [0, 1, 2]),
}
"""name -> (bytes of the prompt, tokens of the answer, offset of each)"""


@pytest.mark.parametrize("name", OFFSETS)
def test_a_token_lies_at_the_character_in_which_it_begins(name: str) -> None:
    prompt, answer, expected = OFFSETS[name]
    tokenizer = byte_fallback(strips_a_space=False)
    tokens = bytes_as_tokens(tokenizer, b"".join(answer))
    sampling = SamplingParams(max_tokens=len(tokens), top_logprobs=0)
    request = GenerationRequest("a", tuple(bytes_as_tokens(tokenizer, b"a" + prompt)), sampling)
    running = RunningAnswer(request, tokenizer, None, lambda delta: None)
    found, text = [], ""
    for token in tokens:
        running.sequence.tokens.append(token)
        delta = running.delta(Sampled(token, -1.0, ()), eos=())
        found += [one.offset for one in delta.logprobs]
        text += delta.text
    assert found == expected
    for data, offset in zip(answer, found, strict=True):
        assert text[offset] in (data.decode(errors="replace"), "😀", "\ufffd")
