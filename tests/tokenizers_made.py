"""Small tokenizers of the kinds in use, made with the tokenizers library."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<unk>", "<s>", "</s>")
BYTE_WORDS = tuple(f"<0x{byte:02X}>" for byte in range(256))
WORDS = ("▁", "a", "b", "▁the", "▁a", "😀", "\ufffd", "é", "▁▁")


def byte_fallback(*, strips_a_space: bool = True) -> Any:
    """As Llama 2's and Mistral's; as Gemma's where it strips no space at the beginning of a text."""
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *BYTE_WORDS, *WORDS))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strips_a_space:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    return tokenizer


def bytes_as_tokens(tokenizer: Any, data: bytes) -> list[int]:
    """Of a byte-fallback tokenizer, a token a byte."""
    return [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in data]


def word_pieces() -> Any:
    """As BERT's: what a token adds to a text depends on its neighbours."""
    vocabulary = {word: number for number, word in enumerate(("[UNK]", "play", "##ing", "the", ",", "games", "##s"))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def unigrams() -> Any:
    """As T5's and XLM-R's."""
    words = [("<unk>", 0.0), ("</s>", 0.0), *((word, -1.0) for word in ("▁", "a", "b", "▁a"))]
    tokenizer = Tokenizer(models.Unigram(words, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def whole_words() -> Any:
    """Of words alone, without a decoder."""
    vocabulary = {word: number for number, word in enumerate(("<unk>", "</s>", "a", "b"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer
