"""The Arena tab in a real Chromium: blind until the vote, one vote a battle, ratings that the votes explain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from browser import VOTES, ask_two, button, needs_browser, turn_to, vote
from fake_api import FakeApi
from playwright.sync_api import Page, expect

pytest_plugins = ["browser_fixtures"]
pytestmark = needs_browser

KEEP_WHAT_IS_STREAMED = """() => {
    window.streamed = "";
    const ask = window.fetch;
    window.fetch = async (...given) => {
        const reply = await ask(...given);
        const [read, kept] = reply.body.tee();
        (async () => {
            for await (const chunk of kept) window.streamed += new TextDecoder().decode(chunk);
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


@pytest.fixture
def arena(open_page: Callable[..., Page], api: FakeApi) -> Page:
    page = open_page(api.url)
    turn_to(page, "Arena")
    return page


def test_names_are_nowhere_in_the_arena_before_the_vote(arena: Page) -> None:
    """The Chat tab's picker knows them all: what the arena drew must not."""
    ask_two(arena, "blind which one")
    tab = arena.locator("#arena-0, #arena-1, .votes, #arena-vote")
    shown = " ".join(tab.evaluate_all("(parts) => parts.map((part) => part.outerHTML)"))
    assert "captain" not in shown
    assert "trivia" not in shown
    expect(arena.locator("#arena-0 h2")).to_have_text("Left")
    expect(arena.locator("#arena-0").get_by_role("button", name="Good")).to_be_hidden()
    vote(arena, VOTES[0])
    expect(arena.locator("#arena-0 h2")).to_have_text("captain")
    expect(arena.locator("#arena-1 h2")).to_have_text("trivia")


def test_names_are_not_sent_to_the_browser_before_the_vote(arena: Page) -> None:
    """Not in any event of the answers' stream, hidden fields included."""
    arena.evaluate(KEEP_WHAT_IS_STREAMED)
    ask_two(arena, "blind which one")
    streamed = arena.evaluate("() => window.streamed")
    assert "which one" in streamed  # the answers did come this way
    assert "captain" not in streamed
    assert "trivia" not in streamed


def test_no_vote_while_an_answer_grows(arena: Page) -> None:
    arena.get_by_role("textbox", name="Question").fill("long")
    button(arena, "Ask two").click()
    expect(arena.locator("#arena-0")).to_contain_text("and 3")
    expect(button(arena, VOTES[0])).to_be_hidden()
    expect(button(arena, VOTES[0])).to_be_visible()


def test_each_vote_is_sent_once(arena: Page, api: FakeApi) -> None:
    for winner, choice in zip(("a", "tie", "both_bad", "b"), VOTES, strict=True):
        ask_two(arena, "blind one")
        button(arena, choice).dblclick()
        expect(arena.locator("#arena-vote")).to_contain_text("your vote counts")
        expect(button(arena, choice)).to_be_hidden()
        votes = [posted for posted in api.posted() if posted.get("kind") == "vote"]
        assert votes[-1]["winner"] == winner
    assert len(votes) == len({vote["battle"] for vote in votes}) == 4


def test_half_an_answer_is_not_voted_on(arena: Page) -> None:
    arena.get_by_role("textbox", name="Question").fill("drop")
    button(arena, "Ask two").click()
    expect(arena.locator("#arena-vote")).to_contain_text("no vote on this pair")
    expect(button(arena, VOTES[0])).to_be_hidden()
    expect(button(arena, "Ask two")).to_be_enabled()


def test_ratings_are_drawn_after_a_vote(arena: Page) -> None:
    expect(arena.locator("#ratings")).to_contain_text("No votes yet")
    ask_two(arena, "blind one")
    vote(arena, VOTES[0])
    expect(arena.locator("#ratings tbody th")).to_have_text(["captain", "trivia"])
    plot = arena.locator("#ratings svg")
    expect(plot).to_have_attribute("aria-label", "Ratings with 95 % intervals: captain 1100, from 990 to 1210; "
        "trivia 1000, from 900 to 1100")  # fmt: skip
