"""What holds for every tab of the page: for everybody who uses it, on every screen, behind a key, at once."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.resources import files

import httpx
import pytest
from browser import (
    PHONE,
    ask,
    ask_and_wait,
    box,
    button,
    needs_browser,
    note,
    picker,
    sign_in,
    turn_to,
    wait_for_requests,
)
from fake_api import ASKING_KEY, KEY, SLOW_WORDS, TOGETHER, FakeApi
from playwright.sync_api import Browser, Page, expect
from road import COMMAND

pytest_plugins = ["browser_fixtures"]
pytestmark = needs_browser

TABS = ("Chat", "Compare", "Arena", "Adapters", "Train")
AXE = files("axe_playwright_python").joinpath("axe.min.js").read_text()
"""axe-core, as that package carries it"""


def _use(page: Page, tab: str) -> None:
    """Fill the tab with what a visitor would see in it."""
    if tab == "Chat":
        for name in ("Mix two adapters", "Conversations", "Settings"):
            button(page, name).click()
        ask(page, "some `code` and more")
        expect(note(page, "tiny-base · ")).to_be_visible()
        return
    turn_to(page, tab)
    if tab == "Compare":
        expect(page.locator("#compared .token")).to_have_count(2)
        page.get_by_role("textbox", name="Prompt", exact=True).fill("one")
        button(page, "Compare").click()
        expect(button(page, "Save report as HTML")).to_be_visible()
    elif tab == "Arena":
        page.get_by_role("textbox", name="Question").fill("blind one")
        button(page, "Ask two").click()
        button(page, "Tie").click()
        expect(page.locator("#ratings svg")).to_be_visible()
    elif tab == "Adapters":
        expect(button(page, "Upload")).to_be_enabled()
        page.locator("#adapter-ref input").click()
        page.get_by_role("option", name="captain").click()
        expect(page.locator("#adapter-facts table")).to_be_visible()
    else:
        expect(button(page, "Start training")).to_be_enabled()
        button(page, "Improve an adapter from feedback").click()
        page.locator("#recipe input").click()
        page.get_by_role("option", name="captain").click()
        button(page, "Plan").click()
        expect(page.locator("#plan table").first).to_be_visible()
        button(page, "Start training").click()
        expect(page.locator("#run-state .status")).to_have_text("done")


@pytest.mark.parametrize("tab", TABS)
def test_tab_is_accessible_in_light_and_dark_and_on_a_phone(
    tab: str, browser: Browser, open_page: Callable[..., Page], api: FakeApi
) -> None:
    """Axe's rules: names of controls, contrast, roles; then 390 px without scrolling sideways."""
    with browser.new_context(viewport={"width": 1280, "height": 860}) as context:
        page = open_page(api.url, context=context)
        expect(picker(page)).to_have_value("tiny-base (base)")
        _use(page, tab)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            expect(page.locator("body.dark")).to_have_count(int(scheme == "dark"))
            page.wait_for_timeout(300)  # colours change in a transition
            assert _violations(page) == [], scheme
        page.set_viewport_size(PHONE)
        assert page.evaluate("() => document.documentElement.scrollWidth") == PHONE["width"]


def _violations(page: Page) -> list[str]:
    """Return the violations that axe calls serious or critical, with their places."""
    page.evaluate(AXE)
    found = page.evaluate("async () => (await axe.run()).violations")
    assert len(page.evaluate("async () => (await axe.run()).passes")) > 15
    return [
        f"{one['id']}: {[node['html'][:160] for node in one['nodes'][:3]]}"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


def test_keyboard_alone_reaches_every_tab_and_sends(open_page: Callable[..., Page], api: FakeApi) -> None:
    page = open_page(api.url, "?adapter=captain")
    expect(picker(page)).to_have_value("captain")
    page.keyboard.press("Tab")
    reached: list[str] = []
    for _ in range(30):
        reached.append(
            page.evaluate("() => document.activeElement.innerText || document.activeElement.ariaLabel || ''")
        )
        if page.evaluate("() => document.activeElement === document.querySelector('#box textarea')"):
            break
        page.keyboard.press("Tab")
    expect(box(page)).to_be_focused()
    assert "Chat" in reached
    page.keyboard.type("one")
    page.keyboard.press("Tab")
    expect(button(page, "Send")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_text("captain says: one", exact=True)).to_be_visible()


@pytest.mark.parametrize("how", ["Stop", "tab closed"])
def test_engine_is_released_long_before_the_answers_end(how: str, open_page: Callable[..., Page], api: FakeApi) -> None:
    watch, page = open_page(api.url), open_page(api.url, "?adapter=captain")
    expect(picker(page)).to_have_value("captain")
    ask(page, "slow")
    expect(page.locator("#chat .bot").filter(has_text="and 3")).to_be_visible()
    button(page, "Stop").click() if how == "Stop" else page.close()
    wait_for_requests(watch, "requests[0].is_cancelled")
    assert api.requests()[0]["sent"] < SLOW_WORDS


def test_four_at_once_wait_for_nobody(browser: Browser, open_page: Callable[..., Page], api: FakeApi) -> None:
    """The API answers none of them before it has the questions of all."""
    with ExitStack() as contexts:
        pages = [
            open_page(api.url, "?adapter=captain", context=contexts.enter_context(browser.new_context()))
            for _ in range(TOGETHER)
        ]
        for page in pages:
            expect(picker(page)).to_have_value("captain")
            ask(page, "together")
        for page in pages:
            expect(page.get_by_text("captain says: together", exact=True)).to_be_visible()


def test_page_stands_by_itself_before_any_server(open_page: Callable[..., Page], api: FakeApi) -> None:
    with page_before(api.url, "--allowed-host", "tools.example") as url:
        page = open_page(url, "?adapter=captain")
        expect(picker(page)).to_have_value("captain")
        ask_and_wait(page, "one")
        for host, status in (("tools.example", 200), ("evil.example", 403)):
            assert httpx.get(f"{url}/ui/config", headers={"host": host}).status_code == status


def test_open_page_before_an_open_server_is_refused(api: FakeApi) -> None:
    command = [COMMAND, "page", "--url", f"{api.url}/v1", "--host", "0.0.0.0", "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "Start the server with API keys" in ended.stderr


@contextmanager
def page_before(api_url: str, *options: str) -> Iterator[str]:
    """`adapterhub page` until the block ends; gives its address without the path."""
    command = [COMMAND, "page", "--url", f"{api_url}/v1", "--port", "0", *options]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stderr is not None
        ready = next(line for line in child.stderr if line.startswith("ready: "))
        yield ready.split()[1].removesuffix("/ui,")
    finally:
        child.terminate()
        child.wait(30)
        child.stderr.close()


# Behind a key

PATHS = ("/ui", "/ui/", "/ui/config", "/ui/gradio_api/info", "/ui/gradio_api/queue/join", "/ui/gradio_api/upload")


@pytest.mark.parametrize("key", [None, "wrong"])
def test_page_and_api_refuse_without_the_key(key: str | None, api: FakeApi) -> None:
    bearer = {} if key is None else {"authorization": f"Bearer {key}"}
    cookies = {} if key is None else {"adapterhub_key": key}
    with httpx.Client(base_url=api.keyed_url, headers=bearer, cookies=cookies) as client:
        assert client.get("/v1/models").status_code == 401
        assert client.post("/v1/chat/completions", json={}).status_code == 401
        for path in PATHS:
            assert client.get(path).status_code == 401, path
            assert client.post(path, json={}).status_code == 401, path
        assert "gradio" not in client.get("/ui").text


def test_key_opens_the_page_and_goes_along_with_each_request(
    browser: Browser, open_page: Callable[..., Page], api: FakeApi
) -> None:
    with browser.new_context() as visitor:
        page = open_page(api.keyed_url, "?adapter=captain", context=visitor)
        page.get_by_label("API key").fill("wrong")
        button(page, "Sign in").click()
        expect(page.get_by_role("alert")).to_have_text("The server does not accept this key.")
        sign_in(page, ASKING_KEY)
        expect(picker(page)).to_have_value("captain")
        ask_and_wait(page, "one")
        (cookie,) = visitor.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"], cookie["path"]) == (True, "Lax", "/ui")
        assert ASKING_KEY not in page.content()
        page.get_by_role("link", name="Sign out").click()
        expect(page.get_by_label("API key")).to_be_visible()
        page.reload()
        sign_in(page, KEY)


def test_no_request_leaves_for_another_host(browser: Browser, open_page: Callable[..., Page], api: FakeApi) -> None:
    """The fixture looks at every request of every page of every test; here, that each tab is among them."""
    hosts: set[str] = set()
    with browser.new_context() as visitor:
        visitor.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        page = open_page(api.url, context=visitor)
        for tab in TABS:
            turn_to(page, tab)
        expect(button(page, "Start training")).to_be_enabled()
    assert hosts == {api.url.removeprefix("http://")}
