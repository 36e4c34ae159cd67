"""HTML of the page: what comes from elsewhere is text in it, never a tag or an attribute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from jinja2 import UndefinedError

from serve.client import Answer, Sampling
from serve.ui.render.adapter_history import adapter_diff_html, history_html
from serve.ui.render.answer_diff import Comparison, DiffToken, report_html, token_diff_html
from serve.ui.render.tables import bullet_list, facts_table, note_html, rows_table
from serve.ui.render.templates import render
from serve.ui.render.training import plan_html, run_html
from serve.ui.sign_in import _form

EVIL = "\"><script>alert('x')</script>&"
MOVE = dict.fromkeys(("at", "act", "revision", "before", "after", "by"), EVIL)
LAYER = {"module": EVIL, "norm_before": 1.0, "norm_after": 2.0, "distance": 1.0}
DIFF = {"config": [{"fact": EVIL, "before": EVIL, "after": EVIL}], "provenance": [], "metrics": [], "layers": [LAYER]}
SAMPLED = [{"step": 0, "answers": [{"prompt": EVIL, "text": EVIL}]}]
RUN = {"status": EVIL, "steps": [], "message": EVIL, "sampled": SAMPLED}
PLAN = {
    **dict.fromkeys(("method", "dtype", "device", "base", "data"), EVIL),
    **dict.fromkeys(("steps", "tokens", "trainable_parameters", "parameters", "adapter_bytes", "disk_free_bytes"), 1),
    "memory_bytes": {"low": 1.0, "high": 1.0},
    "seconds": {"low": 1.0, "high": 1.0},
    "servable": [{"engine": EVIL, "can_serve": True, "how": EVIL}],
    "memory": [{"name": EVIL, "size_bytes": 1}],
    "notes": [EVIL],
    "masks": {
        **dict.fromkeys(("trained_tokens", "tokens", "cut", "ends_trained", "samples"), 1),
        "rows": [[{"text": EVIL, "is_trained": True}, {"text": EVIL, "is_trained": False}]],
    },
}
COMPARISON = Comparison(
    [{"role": EVIL, "content": EVIL}], Sampling(0.0, 1), (Answer(EVIL, text=EVIL), Answer(EVIL, text="x")), EVIL
)
DRAWN: dict[str, Callable[[], str]] = {
    "rows": lambda: rows_table([EVIL], [[EVIL, [EVIL]]], caption=EVIL),
    "facts": lambda: facts_table({EVIL: EVIL, "list": [{"x": EVIL}]}),
    "bullets": lambda: bullet_list([EVIL]),
    "note": lambda: note_html(EVIL),
    "history": lambda: history_html({"data": [MOVE]}),
    "adapter-diff": lambda: adapter_diff_html(DIFF),
    "token-diff": lambda: token_diff_html([DiffToken(EVIL, True), DiffToken(EVIL, False)]),
    "report": lambda: report_html(COMPARISON),
    "plan": lambda: plan_html(PLAN),
    "run": lambda: run_html(RUN),
    "sign-in": lambda: _form(EVIL, EVIL, "/ui"),
}


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_every_value_is_escaped(draw: Callable[[], str]) -> None:
    drawn = str(draw())
    assert "<script" not in drawn
    assert EVIL not in drawn
    assert "&lt;script&gt;" in drawn


def test_a_value_that_is_missing() -> None:
    with pytest.raises(UndefinedError):
        render("rows_table", columns=["name"])


def test_tokens_stand_in_a_row_with_their_own_line_breaks() -> None:
    tokens = [DiffToken("Aye,\n", True), DiffToken(" mate", False)]
    assert '<p class="tokens">Aye,↵\n<mark> mate</mark></p>' in token_diff_html(tokens)


def test_nothing_to_show_is_empty() -> None:
    assert not rows_table(["name"], [], caption="none")
    assert not facts_table({"empty": ""})
    assert not bullet_list([])
    assert not token_diff_html([])
