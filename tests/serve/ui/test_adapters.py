"""The Adapters tab in a real Chromium: what is here, and the acts on it that a key may do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from browser import button, needs_browser, sign_in, turn_to
from fake_api import ASKING_KEY, MODELS, FakeApi
from playwright.sync_api import Browser, Page, expect

pytest_plugins = ["browser_fixtures"]
pytestmark = needs_browser

ACTS = ("Verify", "Load", "Unload", "Promote", "Roll back", "Pull", "Upload")
SAID = "#adapters-said"


@pytest.fixture
def adapters(open_page: Callable[..., Page], api: FakeApi) -> Page:
    page = open_page(api.url)
    turn_to(page, "Adapters")
    expect(button(page, "Upload")).to_be_enabled()
    return page


def _pick(page: Page, name: str) -> None:
    page.locator("#adapter-ref input").click()
    page.get_by_role("option", name=name).click()
    expect(page.get_by_role("textbox", name="Served as")).to_have_value(name)


def test_list_is_searched_by_name(adapters: Page) -> None:
    names = adapters.locator("#adapters tbody th")
    expect(names).to_have_text(["captain", "trivia"])
    expect(adapters.locator("#adapters tbody tr").last).to_contain_text("![](http://evil.test/x.png)")
    adapters.get_by_role("textbox", name="Search").fill("triv")
    expect(names).to_have_text(["trivia"])
    adapters.get_by_role("textbox", name="Search").fill("none")
    expect(adapters.locator("#adapters")).to_contain_text("No adapter matches")


def test_picked_adapter_is_inspected(adapters: Page) -> None:
    _pick(adapters, "captain")
    expect(adapters.locator("#adapter-facts")).to_contain_text(MODELS[1]["digest"])
    expect(adapters.locator("#adapter-facts")).to_contain_text("lora.rank")


def test_each_button_asks_the_api_for_what_it_says(adapters: Page, api: FakeApi) -> None:
    _pick(adapters, "captain")
    for act, said, body in (
        ("Verify", "complete and unchanged", {"path": "adapters/verify", "ref": "captain"}),
        ("Unload", "is unloaded", {"path": "unload_lora_adapter", "lora_name": "captain"}),
        ("Load", "is loaded", {"path": "load_lora_adapter", "lora_name": "captain", "lora_path": "captain"}),
    ):
        button(adapters, act).click()
        expect(adapters.locator(SAID)).to_contain_text(said)
        assert api.posted()[-1] == body
    for act, said, body in (
        ("Promote", "captain@stable points to captain now", {"ref": "captain", "alias": "stable"}),
        ("Roll back", "captain@stable points to what it pointed to before", {"name": "captain", "alias": "stable"}),
    ):
        button(adapters, act).click()
        expect(adapters.locator(SAID)).to_contain_text(said)
        assert api.posted()[-1] == {"path": f"adapters/{act.lower().replace(' ', '')}", **body}
    adapters.get_by_role("textbox", name="From the Hub").fill("me/far@main")
    button(adapters, "Pull").click()
    expect(adapters.locator(SAID)).to_contain_text("is pulled")
    assert api.posted()[-1] == {"path": "adapters/pull", "ref": "me/far@main"}


def test_history_and_difference_are_shown(adapters: Page) -> None:
    _pick(adapters, "captain")
    button(adapters, "History").click()
    expect(adapters.locator("#adapter-facts tbody th")).to_have_text(["2026-11-01 10:00:00"] * 2)
    expect(adapters.locator("#adapter-facts tbody tr").first).to_contain_text("promote")
    for box, name in (("#diff-a", "captain"), ("#diff-b", "trivia")):
        adapters.locator(f"{box} input").click()
        adapters.locator(f"{box} input").fill(name)
        adapters.locator(f"{box} input").press("Enter")
    button(adapters, "Show").click()
    shown = adapters.locator("#adapter-diff")
    expect(shown).to_contain_text("1 of 2 layers differ")
    expect(shown.locator("tbody th")).to_have_text(["rank", "loss on sea_tales", "layers.0.q_proj"])


def test_button_without_an_adapter_says_what_it_needs(adapters: Page, api: FakeApi) -> None:
    button(adapters, "Verify").click()
    expect(adapters.locator(SAID)).to_contain_text("pick an adapter")
    button(adapters, "Upload").click()
    expect(adapters.locator(SAID)).to_contain_text("choose a .zip first")
    assert [posted for posted in api.posted() if len(posted) > 1] == []


def test_zip_is_uploaded_as_it_is_and_a_refusal_is_shown(adapters: Page, api: FakeApi, tmp_path: Path) -> None:
    path = tmp_path / "captain.zip"
    path.write_bytes(b"PK" + b"\0" * 3_000_000)
    adapters.locator("input[type=file]").set_input_files(path)
    adapters.get_by_role("textbox", name="Name").fill("mine")
    expect(adapters.get_by_role("cell", name="captain.zip")).to_be_visible()
    button(adapters, "Upload").click()
    expect(adapters.locator(SAID)).to_contain_text("verified and stored as mine")
    assert api.posted()[-1] == {"path": "adapters/upload", "name": "mine", "size": 3_000_002}
    button(adapters, "Clear").click()
    path.write_bytes(b"torn")
    adapters.locator("input[type=file]").set_input_files(path)
    expect(adapters.get_by_role("cell", name="captain.zip")).to_be_visible()
    button(adapters, "Upload").click()
    expect(adapters.locator(SAID)).to_contain_text("adapter_model.safetensors is not what was packed")


def test_key_that_may_only_ask_sees_disabled_buttons_and_why(
    browser: Browser, open_page: Callable[..., Page], api: FakeApi
) -> None:
    with browser.new_context() as visitor:
        page = open_page(api.keyed_url, context=visitor)
        sign_in(page, ASKING_KEY)
        turn_to(page, "Adapters")
        expect(page.locator("#adapters-why")).to_contain_text("may ask, but not manage")
        for act in ACTS:
            expect(button(page, act)).to_be_disabled()
        expect(page.locator("#adapters tbody th")).to_have_text(["captain", "trivia"])
