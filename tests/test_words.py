"""One word per idea, in source, tests, documents and help (docs/cli.md): old words and names do not come back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("adapterhub", "serve", "train", "docs", "examples", "tests")
SUFFIXES = {".py", ".md", ".html", ".js", ".css", ".toml", ".jinja2", ".c", ".h"}
DATA = ROOT / "train" / "datasets"

WORDS = {
    # aliases and the registry
    "an alias points to a digest and is moved": "leads to, lead to, led to",
    "probe: record, replay, passed, failed": "proof, proofs, replays proof",
    "gc, --dry-run, garbage-collect": "is trial, sweep, sweeps, swept",
    "compatible, check_compatible": "fits the base, fit the base, fits its base, fits this base, check fit, vllm fit",
    "unexpected (file, key, module); another user; an untrusted key": "stranger, strangers",
    "license": "licence",
    # the engine and its server
    "chunk (of a step), delta (of a stream), part (of an upload), span (of a text)": "piece, pieces",
    "slot, resident, lease": "seat, seats, seated",
    "release, trim_heap": "give back, gives back, given back, gave back",
    "guided decoding: schema, regex, choice, grammar": "constraint, constraints, constrained",
    "detokenizer, cached tokens, admit, remove stale": "text stream, num shared, seat overdue, forget the dead",
    "completion_response, prepare_chat, validate_server": "whole body, ask chat, look at",
    # training
    "resume (a run), continue": "go on, goes on, going on, gone on, went on",
    "quantization, load_kwargs": "held as",
    "NaN, Inf, non-finite": "no number, no numbers",
    "barrier, connect; no votes between them": "all meet, that meet, never met",
    "set_reference, attach, adapter_disabled": "refer to, put on, without change, with masters",
    # feedback and the page
    "candidate, CandidatePipeline": "workshop, workshops",
    "vote, winner": "verdict, verdicts",
    "AnswerStreams, adapter_history, describe_error": "page moves, page lines, said in one line",
    # sentences
    "is reported, is shown, is printed": "is said, are said, was said, is told, are told, told apart, full is said",
    "name the thing: history, state, candidate": "what becomes of, what became of",
    "the only module that imports it": "only door",
}
"""What to say -> old words and names, separated by commas; `_` in an identifier counts as a space."""

NAMES = r"class (?:Measured|Course|Question|Workshop|Piece|Given|Ending|Runs|Line)\b"
"""Classes of earlier versions."""

CONTRACTS = (
    '"licence"', "`licence`", "--licence", "licence: Annotated", "license or licence", "(license, licence)",
    'match="licence"',
    "has_proof", "proof_passed_here", '"proofs"', "--verdicts", '"verdicts"', "`verdicts`", "constraint_failed",
    "constraints.txt",
)  # fmt: skip
"""Names of earlier versions that contracts keep for one version, an error code, and a file of pip."""

ALLOWED = {
    # the old option is a parameter; another tool's field name is an example
    "adapterhub/cli/serving/ratings.py": {"verdict", "verdicts"},
    "docs/cli.md": {"verdict"},
    "docs/ratings.md": {"verdict"},
    "tests/adapterhub/feedback/test_ratings.py": {"verdict"},
    # a field of a published data set
    "tests/train/data/test_formats.py": {"constraints"},
    # WordPiece tokenizers
    "tests/fixtures/tokenizers_made.py": {"pieces"},
    "tests/serve/local_engine/test_detokenizer.py": {"pieces"},
    "tests/serve/local_engine/test_guided_decoding.py": {"pieces"},
    # a field of Ernie's config
    "tests/fixtures/architectures.py": {"num shared"},
    # a message that a test types
    "tests/serve/terminal/test_chat.py": {"go on"},
}
"""File -> the old words that it may contain."""

LOWER_CASE = ("vLLM", "x W^T", "left [out")
"""How a docstring of the packages may begin in lower case: a name, a formula."""


def _files() -> Iterator[Path]:
    yield from ROOT.glob("*.md")
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES and DATA not in path.parents and path != Path(__file__):
                yield path


TEXTS = {
    path.relative_to(ROOT).as_posix(): re.sub("|".join(map(re.escape, CONTRACTS)), "", path.read_text(encoding="utf-8"))
    for path in _files()
    if path.name != "CHANGELOG.md"
}
WORDS_OF = {name: " ".join(["", *re.findall(r"[a-z]+|[^a-z_\s]", text.lower()), ""]) for name, text in TEXTS.items()}
"""File -> its words in lower case, one space between them, so that a phrase is a plain substring."""


@pytest.mark.parametrize(("say", "words"), WORDS.items(), ids=WORDS.values())
def test_an_old_word_does_not_come_back(say: str, words: str) -> None:
    found = []
    for name, text in WORDS_OF.items():
        for word in set(words.split(", ")) - ALLOWED.get(name, set()):
            place = text.find(f" {word} ") if word in text else -1  # the first search is much faster
            if place >= 0:
                found.append(f"{name}: ...{text[max(0, place - 40) : place + 40]}...")
    assert not found, f"say instead: {say}"


def test_a_class_of_an_earlier_version_does_not_come_back() -> None:
    assert not [(name, match) for name, text in TEXTS.items() for match in re.findall(NAMES, text)]


def test_every_exception_is_needed() -> None:
    for name, words in ALLOWED.items():
        assert all(f" {word} " in WORDS_OF[name] for word in words), name


def test_docstrings_begin_with_a_capital_and_end_with_a_full_stop() -> None:
    """Ruff's D400 and D403 do this for modules, classes and functions; here attributes are included."""
    for name, text in TEXTS.items():
        if name.endswith(".py") and name.partition("/")[0] in ("adapterhub", "serve", "train"):
            begins = [found for found in re.findall(r'^ *"""([a-z].*)', text, re.M) if not found.startswith(LOWER_CASE)]
            ends = re.findall(r'^ *"""([^"\n]*[^".\n])"""$', text, re.M)
            assert not begins + ends, name
