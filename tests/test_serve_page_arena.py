"""The Arena tab in a real Chromium: blind until the vote, one vote a battle, ratings that the votes explain."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from browser import button, needs_browser, turn_to
from fake_api import FakeApi
from playwright.sync_api import Page, expect
from pydantic import BaseModel, ConfigDict, TypeAdapter
from road import NAMES, ServedRoad, run

pytest_plugins = ["browser_fixtures"]
pytestmark = needs_browser

KEEP_WHAT_IS_STREAMED = """() => {
    window.streamed = "";
    const ask = window.fetch;
    window.fetch = async (...given) => {
        const reply = await ask(...given);
        const [read, kept] = reply.body.tee();
        (async () => {
            for await (const piece of kept) window.streamed += new TextDecoder().decode(piece);
        })().catch(() => {});  // a stream that the page gave up
        return new Response(read, reply);
    };
    window.EventSource = class extends EventSource {
        constructor(...given) {
            super(...given);
            this.addEventListener("message", (event) => { window.streamed += event.data; });
        }
    };
}"""
VERDICTS = ("◀ Left is better", "Tie", "Both are bad", "Right is better ▶")


@pytest.fixture
def arena(open_page: Callable[..., Page], api: FakeApi) -> Page:
    page = open_page(api.url)
    turn_to(page, "Arena")
    return page


def _ask(page: Page, question: str) -> None:
    page.get_by_role("textbox", name="Question").fill(question)
    button(page, "Ask two").click()
    expect(button(page, VERDICTS[0])).to_be_visible()


def _vote(page: Page, verdict: str) -> None:
    button(page, verdict).click()
    expect(page.locator("#arena-vote")).to_contain_text("your vote counts")


def test_names_are_nowhere_in_the_arena_before_the_vote(arena: Page) -> None:
    """The Chat tab's picker knows them all: what the arena drew must not."""
    _ask(arena, "blind which one")
    tab = arena.locator("#arena-0, #arena-1, .votes, #arena-vote")
    shown = " ".join(tab.evaluate_all("(parts) => parts.map((part) => part.outerHTML)"))
    assert "captain" not in shown
    assert "trivia" not in shown
    expect(arena.locator("#arena-0 h2")).to_have_text("Left")
    expect(arena.locator("#arena-0").get_by_role("button", name="Good")).to_be_hidden()
    _vote(arena, VERDICTS[0])
    expect(arena.locator("#arena-0 h2")).to_have_text("captain")
    expect(arena.locator("#arena-1 h2")).to_have_text("trivia")


def test_names_are_not_sent_to_the_browser_before_the_vote(arena: Page) -> None:
    """Not in any event of the answers' stream, hidden fields included."""
    arena.evaluate(KEEP_WHAT_IS_STREAMED)
    _ask(arena, "blind which one")
    streamed = arena.evaluate("() => window.streamed")
    assert "which one" in streamed  # the answers did come this way
    assert "captain" not in streamed
    assert "trivia" not in streamed


def test_no_vote_while_an_answer_grows(arena: Page) -> None:
    arena.get_by_role("textbox", name="Question").fill("long")
    button(arena, "Ask two").click()
    expect(arena.locator("#arena-0")).to_contain_text("and 3")
    expect(button(arena, VERDICTS[0])).to_be_hidden()
    expect(button(arena, VERDICTS[0])).to_be_visible()


def test_each_vote_is_sent_once(arena: Page, api: FakeApi) -> None:
    for winner, verdict in zip(("a", "tie", "both_bad", "b"), VERDICTS, strict=True):
        _ask(arena, "blind one")
        button(arena, verdict).dblclick()
        expect(arena.locator("#arena-vote")).to_contain_text("your vote counts")
        expect(button(arena, verdict)).to_be_hidden()
        votes = [posted for posted in api.posted() if posted.get("kind") == "vote"]
        assert votes[-1]["winner"] == winner
    assert len(votes) == len({vote["battle"] for vote in votes}) == 4


def test_half_an_answer_is_not_voted_on(arena: Page) -> None:
    arena.get_by_role("textbox", name="Question").fill("drop")
    button(arena, "Ask two").click()
    expect(arena.locator("#arena-vote")).to_contain_text("no vote on this pair")
    expect(button(arena, VERDICTS[0])).to_be_hidden()
    expect(button(arena, "Ask two")).to_be_enabled()


def test_ratings_are_drawn_after_a_vote(arena: Page) -> None:
    expect(arena.locator("#ratings")).to_contain_text("No votes yet")
    _ask(arena, "blind one")
    _vote(arena, VERDICTS[0])
    expect(arena.locator("#ratings tbody th")).to_have_text(["captain", "trivia"])
    plot = arena.locator("#ratings svg")
    expect(plot).to_have_attribute("aria-label", "Ratings with 95 % intervals: captain 1100, from 990 to 1210; "
        "trivia 1000, from 900 to 1100")  # fmt: skip


# Before the real server: what the votes leave in its store.


class _Turn(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: str


class _Preference(BaseModel):
    """TRL's conversational preference format with an explicit prompt."""

    model_config = ConfigDict(extra="forbid")
    prompt: list[_Turn]
    chosen: list[_Turn]
    rejected: list[_Turn]


class _Unpaired(BaseModel):
    """TRL's conversational unpaired preference format."""

    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: list[_Turn]
    completion: list[_Turn]
    label: bool


def _exported(served: ServedRoad, form: str, tmp_path: Path) -> list[dict[str, Any]]:
    path = tmp_path / f"{form}.jsonl"
    run("feedback", "export", "--format", form, "-o", str(path), home=served.home)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_votes_are_lines_that_ratings_and_trainers_read(
    served: ServedRoad, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    page = open_page(served.url)
    turn_to(page, "Arena")
    button(page, "Settings").click()
    page.get_by_role("spinbutton", name="Max tokens").fill("24")
    for name in NAMES:
        page.locator("#arena-among input").click()
        page.get_by_role("option", name=name).click()
    page.locator("#arena-among input").press("Escape")
    for number, verdict in enumerate(VERDICTS):
        _ask(page, f"Who are you, number {number}?")
        _vote(page, verdict)
        expect(page.locator("#ratings tbody tr")).to_have_count(2)
    verdicts = _exported(served, "verdicts", tmp_path)
    assert len(verdicts) == len({line["id"] for line in verdicts}) == 4
    assert [line["winner"] for line in verdicts] == ["a", "tie", "tie", "b"]
    assert all({line["model_a"], line["model_b"]} == set(NAMES) for line in verdicts)
    rated = json.loads(run("ratings", str(tmp_path / "verdicts.jsonl"), "--json", home=served.home).stdout)
    shown = page.locator("#ratings tbody tr").all_inner_texts()
    assert [line.split("\t")[:2] for line in shown] == [
        [one["model"], f"{one['rating']:.0f}"] for one in rated["ratings"]
    ]
    pairs = TypeAdapter(list[_Preference]).validate_python(_exported(served, "dpo", tmp_path))
    assert [pair.prompt[-1].content for pair in pairs] == ["Who are you, number 0?", "Who are you, number 3?"]
    assert all(pair.chosen != pair.rejected and pair.chosen[0].role == "assistant" for pair in pairs)
    labelled = TypeAdapter(list[_Unpaired]).validate_python(_exported(served, "kto", tmp_path))
    assert [line.label for line in labelled] == [True, False, False, False, True, False]
