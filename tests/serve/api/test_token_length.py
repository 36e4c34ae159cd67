"""The least number of tokens that a text can give, against what real tokenizers make of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordPiece
from transformers import AutoTokenizer

from adapterhub.adapter import StoredBase
from serve.api.token_length import TokenBound


def _byte_level(normalizer: object = None, extra: list[str] | None = None) -> Tokenizer:
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("a", "b"), ("ab", "ab"), ("abab", "abab")]
    vocabulary = letters | {"".join(pair): len(letters) + number for number, pair in enumerate(merges)}
    tokenizer = Tokenizer(BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(extra or [])
    return tokenizer


def _byte_fallback() -> Tokenizer:
    """As Llama-2's: letters, and bytes for what is no letter of it."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "a": 257, "▁a": 258}
    tokenizer = Tokenizer(BPE(vocabulary, [("▁", "a")], byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.ByteFallback()
    return tokenizer


def _with_swallowing_token() -> Tokenizer:
    tokenizer = _byte_level()
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return tokenizer


def _without_whitespace() -> Tokenizer:
    tokenizer = _byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def _bound(tokenizer: Tokenizer) -> TokenBound | None:
    return TokenBound.of(SimpleNamespace(backend_tokenizer=tokenizer))


@pytest.mark.parametrize(
    ("make", "max_length"),
    [
        (_byte_level, 8),
        (lambda: _byte_level(normalizers.NFC()), 32),
        (lambda: _byte_level(extra=["<|a long token|>"]), 16),
        (_byte_fallback, 6),
    ],
    ids=["byte level", "composing", "added token", "byte fallback"],
)
def test_no_token_stands_for_more_text_than_the_bound_says(make: Callable[[], Tokenizer], max_length: int) -> None:
    tokenizer, draw = make(), random.Random(0)
    bound = _bound(tokenizer)
    assert bound is not None
    assert bound.max_length == max_length
    for letters in (
        "ab",
        " \t\n",
        "aé\u0301",
        "\u03b1\u0313\u0300\u0345",
        "日本🫠",
        "\x00\x13\x7f",
        "<|a long token|>",
    ):
        for _ in range(20):
            text = "".join(draw.choices(letters, k=draw.randrange(400)))
            assert bound.least(text) <= len(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize(
    "tokenizer",
    [
        Tokenizer(WordPiece({"[UNK]": 0}, unk_token="[UNK]")),  # a word of any length is one unknown token
        Tokenizer(Unigram([("a", 0.0)], unk_id=0)),
        Tokenizer(BPE({"a": 0, "?": 1}, [], unk_token="?", fuse_unk=True)),
        _with_swallowing_token(),
        _without_whitespace(),
        _byte_level(normalizers.Strip()),
        _byte_level(normalizers.Replace("ab", "")),
    ],
    ids=["wordpiece", "unigram", "unknown tokens", "token that strips", "no whitespace", "strip", "deleting"],
)
def test_a_tokenizer_that_swallows_text_sets_no_bound(tokenizer: Tokenizer) -> None:
    assert _bound(tokenizer) is None


def test_smollm2_drops_control_characters_that_then_count_for_nothing(smollm2: StoredBase) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2.path)
    bound = TokenBound.of(tokenizer)
    assert bound is not None
    assert bound.max_length == 81
    for character in map(chr, range(0x250)):
        assert bound.least(character * 500) <= len(tokenizer(character * 500)["input_ids"])
    assert bound.least("\x13" * 500) == 0
    assert bound.least("a" * 82) == 2
