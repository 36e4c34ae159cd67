from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from adapterhub.base_store import StoredBase
from serve.text_stream import TextStream


@pytest.fixture(scope="module")
def tokenizer(tiny_base: StoredBase) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base.path)


def _stream(tokenizer: Any, text: str, *stop: str) -> tuple[list[str], bool]:
    prompt = tokenizer("Question:")["input_ids"]
    stream = TextStream(tokenizer.backend_tokenizer, stop, prompt)
    pieces = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        pieces.append(stream.feed(token))
        if stream.is_stopped:
            return pieces, True
    return [*pieces, stream.finish()], False


@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1, max_size=40, alphabet=st.characters(exclude_categories=["Cs", "Cc"])))
def test_the_pieces_are_the_text(tokenizer: Any, text: str) -> None:
    whole = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
    assume("\ufffd" not in whole)  # the vocabulary lacks some bytes of rare characters
    pieces, _ = _stream(tokenizer, text)
    assert "".join(pieces) == whole


def test_a_character_of_several_tokens_comes_whole(tokenizer: Any) -> None:
    pieces, _ = _stream(tokenizer, "a 🦜 b")
    assert "".join(pieces) == "a 🦜 b"
    assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize("stop", ["END", " END", "ND", "fore E"])
def test_a_stop_string_ends_the_text_before_it(tokenizer: Any, stop: str) -> None:
    pieces, is_stopped = _stream(tokenizer, "before END after", "nothing", stop)
    assert is_stopped
    assert "".join(pieces) == "before END after"[: "before END after".index(stop)]


def test_the_start_of_a_stop_string_that_does_not_come_is_given_back(tokenizer: Any) -> None:
    pieces, is_stopped = _stream(tokenizer, "the EN", "END")
    assert not is_stopped
    assert "".join(pieces) == "the EN"


def test_special_tokens_are_not_text(tokenizer: Any) -> None:
    stream = TextStream(tokenizer.backend_tokenizer, (), [])
    assert stream.feed(tokenizer.eos_token_id) == ""
