"""What tests of the page do with a real, headless Chromium: find it, and the gestures they share."""

from __future__ import annotations

import re
import shutil
from typing import Any

import pytest
from fake_api import FakeApi
from playwright.sync_api import Locator, Page, expect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMIUM_OPTIONS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)
WAIT_MS = 30_000
"""how long anything may take on a busy machine; what is there sooner is not waited for"""
PHONE: Any = {"width": 390, "height": 844}

COUNT_TEXTS = """() => {
    window.seen = new Set();
    new MutationObserver(() => {
        const answers = document.querySelectorAll("#chat .bot .message:not(.thought) .message-content");
        answers.forEach((answer) => window.seen.add(answer.textContent.trim()));
    }).observe(document.querySelector("#chat"), { subtree: true, childList: true, characterData: true });
}"""
"""a script: keep every text that an answer had on its way in `window.seen`"""
VERDICTS = ("◀ Left is better", "Tie", "Both are bad", "Right is better ▶")
"""the arena's buttons"""

needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="NO BROWSER: chromium is not installed, the page is UNTESTED"
)


def box(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Message")


def picker(page: Page) -> Locator:
    return page.locator("#picker").get_by_role("combobox", name="Adapter")


def note(page: Page, text: str | re.Pattern[str]) -> Locator:
    """A line between the turns: who answered, or what went wrong."""
    return page.locator("#chat .thought-group").filter(has_text=text)


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def turn_to(page: Page, tab: str) -> None:
    page.get_by_role("tab", name=tab).click()


def sign_in(page: Page, key: str) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("tab", name="Chat")).to_be_visible()


def pick(page: Page, name: str) -> None:
    picker(page).click()
    page.get_by_role("option", name=name).click()
    expect(picker(page)).to_have_value(name)


def ask(page: Page, question: str) -> None:
    expect(button(page, "Send")).to_be_visible()
    expect(page.get_by_role("button", name="Retry", disabled=True)).to_have_count(0)
    box(page).fill(question)
    box(page).press("Enter")
    expect(box(page)).to_have_value("")


def ask_and_wait(page: Page, question: str, model: str = "captain") -> None:
    ask(page, question)
    expect(page.locator("#chat .bot").get_by_text(f"{model} says: {question}", exact=True)).to_be_visible()
    expect(button(page, "Retry")).to_be_enabled()


def wait_for_requests(page: Page, condition: str) -> None:
    """Wait until what the fake has seen (`requests`) meets a condition in JavaScript."""
    page.wait_for_function(
        f"async () => {{ const requests = await (await fetch('/fake/requests')).json(); return {condition} }}"
    )


def sent(api: FakeApi) -> list[dict[str, str]]:
    """The messages of the last request."""
    return list(api.requests()[-1]["body"]["messages"])


def ask_two(page: Page, question: str) -> None:
    """Ask both sides of the arena, and wait until they can be voted on."""
    page.get_by_role("textbox", name="Question").fill(question)
    button(page, "Ask two").click()
    expect(button(page, VERDICTS[0])).to_be_visible()


def vote(page: Page, verdict: str) -> None:
    button(page, verdict).click()
    expect(page.locator("#arena-vote")).to_contain_text("your vote counts")
