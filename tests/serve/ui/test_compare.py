"""The Compare tab in a real Chromium: several adapters side by side, their diffs, and the report."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from browser import button, needs_browser, turn_to, wait_for_requests
from fake_api import MODELS, FakeApi
from playwright.sync_api import Locator, Page, expect

pytest_plugins = ["browser_fixtures"]
pytestmark = needs_browser


@pytest.fixture
def compare(open_page: Callable[..., Page], api: FakeApi) -> Page:
    """Open the tab, with the base and `captain` picked by itself."""
    page = open_page(api.url)
    turn_to(page, "Compare")
    expect(page.locator("#compared .token")).to_have_count(2)
    return page


def _ask(page: Page, prompt: str) -> None:
    page.get_by_role("textbox", name="Prompt", exact=True).fill(prompt)
    button(page, "Compare").click()


def _panel(page: Page, index: int) -> Locator:
    return page.locator(f"#compare-{index}")


def _pick(page: Page, name: str) -> None:
    page.locator("#compared input").click()
    page.get_by_role("option", name=name).click()
    page.locator("#compared input").press("Escape")


def test_answers_stand_side_by_side_with_who_gave_them(compare: Page, api: FakeApi) -> None:
    _pick(compare, "trivia")
    _ask(compare, "one")
    for index, name in enumerate(("tiny-base", "captain", "trivia")):
        expect(_panel(compare, index).locator("h2")).to_have_text(name)
        expect(_panel(compare, index)).to_contain_text(f"{name} says: one")
        expect(_panel(compare, index)).to_contain_text(re.compile(r"\d tok/s · \d+ ms to first token"))
    expect(_panel(compare, 3)).to_be_hidden()
    bodies = [request["body"] for request in api.requests()]
    assert {body["model"] for body in bodies} == {"tiny-base", "captain", "trivia"}
    assert all(body["temperature"] == 0 and body["messages"] == bodies[0]["messages"] for body in bodies)


def test_answers_grow_together(compare: Page) -> None:
    """One batch: neither waits for the other."""
    _ask(compare, "slow")
    expect(_panel(compare, 0)).to_contain_text("and 3")
    expect(_panel(compare, 1)).to_contain_text("and 3")
    expect(button(compare, "Stop")).to_be_visible()
    button(compare, "Stop").click()
    wait_for_requests(compare, "requests.length == 2 && requests.every((request) => request.is_cancelled)")
    expect(_panel(compare, 1)).to_contain_text("stopped")
    expect(button(compare, "Compare")).to_be_visible()


def test_tokens_that_differ_are_marked_and_counted(compare: Page) -> None:
    _ask(compare, "one <b>two</b>")
    expect(_panel(compare, 1).locator("mark")).to_have_text(["captain"])
    expect(_panel(compare, 0).locator("mark")).to_have_text(["tiny-base"])
    expect(_panel(compare, 1)).to_contain_text("1 of 4 tokens differ")
    expect(_panel(compare, 1).locator(".tokens")).to_contain_text("<b>two</b>")


def test_one_that_fails_says_so_beside_the_other(compare: Page) -> None:
    _ask(compare, "404")
    expect(_panel(compare, 0)).to_contain_text("⚠ the model 'tiny-base' does not exist here")
    expect(_panel(compare, 1)).to_contain_text("⚠ the model 'captain' does not exist here")
    expect(button(compare, "Compare")).to_be_enabled()
    _ask(compare, "one")
    expect(_panel(compare, 1)).to_contain_text("captain says: one")


def test_one_alone_and_no_prompt_are_refused(compare: Page, api: FakeApi) -> None:
    _ask(compare, " ")
    expect(compare.get_by_text("write a prompt, and pick at least two to compare")).to_be_visible()
    compare.locator("#compared .token").last.get_by_title("Remove").click()
    _ask(compare, "one")
    expect(compare.get_by_text("write a prompt, and pick at least two to compare")).to_be_visible()
    assert api.requests() == []


def test_comparison_is_saved_as_a_report(compare: Page) -> None:
    _ask(compare, "say <script>alert(1)</script>")
    with compare.expect_download() as saved:
        button(compare, "Save report as Markdown").click()
    text = saved.value.path().read_text()
    assert saved.value.suggested_filename == "comparison.md"
    assert f"| captain | {MODELS[1]['digest'][:19]} | 4 |" in text
    assert "| 1 of 4 |" in text
    with compare.expect_download() as saved:
        button(compare, "Save report as HTML").click()
    text = saved.value.path().read_text()
    assert "<mark>captain</mark> says:" in text
    assert "<script" not in text


def test_feedback_on_a_column_names_its_answer(compare: Page, api: FakeApi) -> None:
    _ask(compare, "one")
    _panel(compare, 1).get_by_role("button", name="Good").click()
    expect(compare.locator("#compare-said")).to_contain_text("thumb up stored")
    _panel(compare, 0).get_by_role("button", name="Correct").click()
    wording = compare.get_by_role("textbox", name="What it should have said").locator("visible=true")
    expect(wording).to_have_value("tiny-base says: one")
    wording.fill("Aye.")
    button(compare, "Save correction").click()
    expect(compare.locator("#compare-said")).to_contain_text("correction stored")
    thumb, correction = api.posted()
    assert (thumb["thumb"], thumb["answer"]["model"], thumb["answer"]["digest"]) == (
        "up",
        "captain",
        MODELS[1]["digest"],
    )
    assert (correction["answer"]["model"], correction["text"]) == ("tiny-base", "Aye.")
