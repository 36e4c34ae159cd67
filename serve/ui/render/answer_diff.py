"""Where two answers part, token by token, and the report that keeps a comparison. Knows no widget and no server."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from difflib import SequenceMatcher

from serve.client import Answer, Sampling

_WORD = re.compile(r"\s*\S+|\s+")


@dataclass(frozen=True)
class Piece:
    """A token, and whether the other side has it, too."""

    text: str
    is_shared: bool


@dataclass(frozen=True)
class Comparison:
    """One prompt and the answers to it. The first answer is what the others are compared with."""

    messages: list[dict[str, str]]
    sampling: Sampling
    answers: tuple[Answer, ...]
    made: str
    """date and time, for people"""


def pieces(answer: Answer) -> list[str]:
    """The answer in its model's tokens where the server told them, else in words."""
    return answer.tokens if "".join(answer.tokens) == answer.text else _WORD.findall(answer.text)


def differences(answers: tuple[Answer, ...]) -> list[list[Piece]]:
    """For each answer its tokens: shared with the first answer; for the first, shared with any other.

    Quadratic in the length of the answers (seconds at some thousand tokens): not for the event loop.
    """
    first, *others = (pieces(answer) for answer in answers)
    shared_of_first: set[int] = set()
    marked = []
    for other in others:
        matches = SequenceMatcher(None, first, other, autojunk=False).get_matching_blocks()
        shared_of_first |= {match.a + at for match in matches for at in range(match.size)}
        shared = {match.b + at for match in matches for at in range(match.size)}
        marked.append([Piece(text, at in shared) for at, text in enumerate(other)])
    return [[Piece(text, at in shared_of_first) for at, text in enumerate(first)], *marked]


def difference_html(marked: list[Piece]) -> str:
    """The tokens in a row, the ones that only this answer has marked."""
    if not marked:
        return ""
    num_own = sum(not piece.is_shared for piece in marked)
    said = f"{num_own} of {len(marked)} tokens differ" if num_own else "no token differs"
    return f'<p class="counted">{said}</p><p class="tokens">{"".join(map(_piece_html, marked))}</p>'


def _piece_html(piece: Piece) -> str:
    shown = html.escape(piece.text).replace("\n", "↵\n")
    return shown if piece.is_shared else f"<mark>{shown}</mark>"


def report_markdown(comparison: Comparison) -> str:
    rows = [
        f"| {answer.name} | {(answer.digest or '')[:19]} | {' | '.join(_figures(answer))} |"
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
                    f"{row} {_share(marked)} |"
                    for row, marked in zip(rows, differences(comparison.answers), strict=True)
                ),
            ]
        ),
        *(f"## {answer.name}\n\n{answer.text}" for answer in comparison.answers),
    ]
    return "\n\n".join(parts) + "\n"


def report_html(comparison: Comparison) -> str:
    """One file without references, the differences marked."""
    asked = "".join(
        f"<h2>{html.escape(message['role'])}</h2><pre>{html.escape(message['content'])}</pre>"
        for message in comparison.messages
    )
    marked = differences(comparison.answers)
    answers = "".join(
        f"<section><h2>{html.escape(answer.name)}</h2><p>{html.escape((answer.digest or '')[:19])} · "
        f"{html.escape(answer.summary())}</p>{difference_html(own)}</section>"
        for answer, own in zip(comparison.answers, marked, strict=True)
    )
    said = html.escape(f"{comparison.made} · {_settings(comparison.sampling)}")
    return _REPORT.format(said=said, asked=asked, answers=answers)


def _figures(answer: Answer) -> list[str]:
    rate = "" if answer.tokens_per_s is None else f"{answer.tokens_per_s:.1f}"
    first = "" if answer.first_token_s is None else f"{answer.first_token_s * 1000:.0f} ms"
    return [str(answer.num_tokens), rate, first]


def _share(marked: list[Piece]) -> str:
    return f"{sum(not piece.is_shared for piece in marked)} of {len(marked)}"


def _settings(sampling: Sampling) -> str:
    seed = "" if sampling.seed is None else f", seed {sampling.seed}"
    return f"temperature {sampling.temperature:g}, at most {sampling.max_tokens} tokens{seed}"


_REPORT = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Comparison</title><style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.6 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }}
main {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 1.5rem; }}
pre, .tokens {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
mark {{ background: light-dark(#fde68a, #713f12); color: inherit; text-decoration: underline dotted; }}
</style></head><body><h1>Comparison</h1><p>{said}</p>{asked}<main>{answers}</main></body></html>
"""
