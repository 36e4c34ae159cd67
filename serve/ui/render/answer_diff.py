"""Token diffs of answers, and the report of a comparison as Markdown or HTML."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher

from markupsafe import Markup

from adapterhub.units import format_duration
from serve.client import Answer, Sampling
from serve.ui.render.adapter_history import short_digest
from serve.ui.render.templates import render

_WORD = re.compile(r"\s*\S+|\s+")


@dataclass(frozen=True)
class DiffToken:
    """A token of an answer, and whether the other answer has it too."""

    text: str
    is_shared: bool

    @property
    def shown(self) -> str:
        """The text with its line breaks made visible."""
        return self.text.replace("\n", "↵\n")


@dataclass(frozen=True)
class Comparison:
    """One prompt and the answers to it. The others are compared with the first answer."""

    messages: list[dict[str, str]]
    sampling: Sampling
    answers: tuple[Answer, ...]
    made: str
    """Date and time, as shown to people."""


def tokens_of(answer: Answer) -> list[str]:
    """Return the tokens of an answer where the server sent them, else its words."""
    return answer.tokens if "".join(answer.tokens) == answer.text else _WORD.findall(answer.text)


def token_diffs(answers: tuple[Answer, ...]) -> list[list[DiffToken]]:
    """Return the tokens of each answer: shared with the first answer; of the first, shared with any other.

    Quadratic in the length of the answers (seconds at some thousand tokens): not for the event loop.
    """
    first, *others = (tokens_of(answer) for answer in answers)
    shared_of_first: set[int] = set()
    diffs = []
    for other in others:
        matches = SequenceMatcher(None, first, other, autojunk=False).get_matching_blocks()
        shared_of_first |= {match.a + at for match in matches for at in range(match.size)}
        shared = {match.b + at for match in matches for at in range(match.size)}
        diffs.append([DiffToken(text, at in shared) for at, text in enumerate(other)])
    return [[DiffToken(text, at in shared_of_first) for at, text in enumerate(first)], *diffs]


def token_diff_html(tokens: list[DiffToken]) -> Markup:
    """Return the tokens of one answer, those that only this answer has marked."""
    if not tokens:
        return Markup()
    num_own = _num_own(tokens)
    count = f"{num_own} of {len(tokens)} tokens differ" if num_own else "no token differs"
    return render("token_diff", count=count, tokens=tokens)


def report_markdown(comparison: Comparison) -> str:
    """Return the report as Markdown."""
    rows = [
        f"| {answer.name} | {short_digest(answer.digest)} | {' | '.join(_figures(answer))} |"
        for answer in comparison.answers
    ]
    parts = [
        "# Comparison",
        f"{comparison.made} · {_settings(comparison.sampling)}",
        *(f"**{message['role']}**\n\n{message['content']}" for message in comparison.messages),
        "\n".join(
            [
                "| answered by | digest | tokens | tokens/s | first token | differs from the first |",
                "|---|---|---|---|---|---|",
                *(
                    f"{row} {_num_own(tokens)} of {len(tokens)} |"
                    for row, tokens in zip(rows, token_diffs(comparison.answers), strict=True)
                ),
            ]
        ),
        *(f"## {answer.name}\n\n{answer.text}" for answer in comparison.answers),
    ]
    return "\n\n".join(parts) + "\n"


def report_html(comparison: Comparison) -> Markup:
    """Return the report as one HTML file that loads nothing, with the differences marked."""
    diffs = map(token_diff_html, token_diffs(comparison.answers))
    return render(
        "comparison",
        made=comparison.made,
        settings=_settings(comparison.sampling),
        messages=comparison.messages,
        answers=list(zip(comparison.answers, diffs, strict=True)),
    )


def _figures(answer: Answer) -> list[str]:
    rate = "" if answer.tokens_per_s is None else f"{answer.tokens_per_s:.1f}"
    first = "" if answer.first_token_s is None else format_duration(answer.first_token_s)
    return [str(answer.num_tokens), rate, first]


def _num_own(tokens: list[DiffToken]) -> int:
    return sum(not token.is_shared for token in tokens)


def _settings(sampling: Sampling) -> str:
    seed = "" if sampling.seed is None else f", seed {sampling.seed}"
    return f"temperature {sampling.temperature:g}, at most {sampling.max_tokens} tokens{seed}"
