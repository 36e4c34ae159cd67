"""The Train tab in a real Chromium: a recipe as a form, its plan, the run as it goes, then into Compare."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from browser import button, needs_browser, sign_in, turn_to
from fake_api import ASKING_KEY, FakeApi
from fake_extensions import RECIPE
from playwright.sync_api import Browser, Locator, Page, expect

pytest_plugins = ["browser_fixtures"]
pytestmark = needs_browser


@pytest.fixture
def train(open_page: Callable[..., Page], api: FakeApi) -> Page:
    """The tab with the recipe `captain` in the form."""
    page = open_page(api.url)
    turn_to(page, "Train")
    expect(button(page, "Start training")).to_be_enabled()
    page.locator("#recipe input").click()
    page.get_by_role("option", name="captain").click()
    expect(_toml(page)).to_have_value(RECIPE)
    return page


def _toml(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Recipe (TOML)")


def _paste(page: Page, text: str) -> None:
    _toml(page).fill(text)
    _toml(page).blur()


def _act(page: Page, name: str) -> Locator:
    return page.locator("#run-actions").get_by_role("button", name=name)


def _status(page: Page) -> Locator:
    return page.locator("#run-state .status")


def test_field_changes_its_line_and_nothing_else(train: Page) -> None:
    train.get_by_role("spinbutton", name="Rank").fill("8")
    expect(_toml(train)).to_have_value(RECIPE.replace("rank = 16  #", "rank = 8  #"))
    train.get_by_role("spinbutton", name="Alpha").fill("64")
    expect(_toml(train)).to_have_value(
        RECIPE.replace("rank = 16  #", "rank = 8  #").replace("alpha = 32", "alpha = 64")
    )
    train.get_by_role("spinbutton", name="Alpha").fill("32")
    expect(_toml(train)).to_have_value(RECIPE.replace("rank = 16  #", "rank = 8  #"))
    train.get_by_role("spinbutton", name="Steps (instead of epochs)").fill("12")
    expect(_toml(train)).to_have_value(
        RECIPE.replace("rank = 16  #", "rank = 8  #").replace("epochs = 1\n", "") + "steps = 12\n"
    )
    expect(train.get_by_role("spinbutton", name="Epochs", exact=True)).to_have_value("")


def test_text_fills_the_fields_and_the_command(train: Page) -> None:
    _paste(train, RECIPE.replace('"captain"\nbase', '"sea tales"\nbase').replace("alpha = 32", "alpha = 8"))
    expect(train.get_by_role("spinbutton", name="Alpha")).to_have_value("8")
    expect(train.locator("#command")).to_contain_text("adapterhub train sea-tales.toml")
    _paste(train, "name = ")
    expect(train.get_by_text("the recipe is not TOML")).to_be_visible()


def test_plan_shows_memory_time_and_what_is_learnt(train: Page, api: FakeApi) -> None:
    button(train, "Plan").click()
    plan = train.locator("#plan")
    for fact in ("35 (14,052 tokens)", "1.10 GB to 1.80 GB", "4,884,480 of 134,515,008", "base, 4-bit codes"):
        expect(plan).to_contain_text(fact)
    expect(plan.locator("mark")).to_have_text("Maren, mate.")
    expect(plan.locator(".masked")).to_contain_text("Who are you?")
    _toml(train).fill(RECIPE.replace("learning_rate = 2e-3", ""))
    button(train, "Plan").click()
    expect(plan).to_contain_text("[train] learning_rate is missing")
    assert [posted["path"] for posted in api.posted()] == ["training/plan", "training/plan"]


def test_run_is_followed_to_its_end_and_then_compared(train: Page) -> None:
    button(train, "Start training").click()
    expect(_status(train)).to_have_text("running")
    expect(_status(train)).to_have_text("done")
    state = train.locator("#run-state")
    expect(state.locator("svg polyline.held-out")).to_have_count(2)  # the line, and its name
    expect(state).to_contain_text("Held-out loss on captain: 3.200 for the base, 1.100 with the adapter")
    expect(state.get_by_role("cell", name="<b>Maren, mate.</b>")).to_be_visible()
    _act(train, "Compare").click()
    expect(train.get_by_role("tab", name="Compare")).to_have_attribute("aria-selected", "true")
    expect(train.locator("#compared .token")).to_have_text(["tiny-base (base)", "captain"])


def test_run_is_stopped_found_again_after_a_reload_and_resumed(train: Page, api: FakeApi) -> None:
    button(train, "Start training").click()
    expect(_status(train)).to_have_text("running")
    button(train, "Stop the run").click()
    expect(_status(train)).to_have_text("stopped")
    expect(_act(train, "Compare")).to_be_disabled()
    train.reload()
    turn_to(train, "Train")
    train.locator("#run input").click()
    train.get_by_role("option", name="run-").click()
    expect(_status(train)).to_have_text("stopped")
    button(train, "Resume").click()
    expect(_status(train)).to_have_text("running")
    assert [posted["path"].rpartition("/")[2] for posted in api.posted()] == ["runs", "stop", "resume"]


def test_adapter_is_improved_from_feedback_and_promoted(train: Page, api: FakeApi) -> None:
    button(train, "Improve an adapter from feedback").click()
    expect(train.locator("#feedback-counts")).to_contain_text("3 vote, 1 thumb, 2 correction")
    button(train, "Improve").click()
    expect(train.locator("#improve-said")).to_contain_text("pick the adapter to improve first")
    train.locator("#improved input").click()
    expect(train.get_by_role("option", name="tiny-base")).to_have_count(0)
    train.get_by_role("option", name="captain").click()
    train.get_by_role("radio", name="kto").check()
    expect(train.locator("#improve-command")).to_contain_text("adapterhub improve captain --method kto --steps 20")
    button(train, "Improve").click()
    expect(_status(train)).to_have_text("running")
    expect(_act(train, "Promote")).to_be_disabled()
    expect(_status(train)).to_have_text("done")
    _act(train, "Promote").click()
    expect(train.get_by_text("captain points to the candidate now")).to_be_visible()
    began, promoted = api.posted()
    body = {"adapter": "captain", "method": "kto", "steps": 20, "all_adapters": False}
    assert began == {"path": "training/improve", **body}
    assert promoted["path"] == "training/runs/{name}/promote"


def test_improving_leaves_the_other_runs_in_the_picker(train: Page) -> None:
    button(train, "Start training").click()
    expect(_status(train)).to_have_text("done")
    button(train, "Improve an adapter from feedback").click()
    train.locator("#improved input").click()
    train.get_by_role("option", name="captain").click()
    button(train, "Improve").click()
    expect(_status(train)).to_have_text("running")
    train.locator("#run input").click()
    expect(train.get_by_role("option", name="run-")).to_have_count(2)


def test_key_that_may_only_ask_trains_nothing(browser: Browser, open_page: Callable[..., Page], api: FakeApi) -> None:
    with browser.new_context() as visitor:
        page = open_page(api.keyed_url, context=visitor)
        sign_in(page, ASKING_KEY)
        turn_to(page, "Train")
        expect(page.get_by_text("may ask, but not manage")).to_be_visible()
        for act in ("Plan", "Start training"):
            expect(button(page, act)).to_be_disabled()
