"""The fixtures of all tests of the page: Chromium, and the fake API with the page before it.

A test module takes them with `pytest_plugins = ["browser_fixtures"]`.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest
from browser import CHROMIUM, CHROMIUM_OPTIONS, WAIT_MS, picker
from fake_api import FakeApi, start_fake_api
from playwright.sync_api import Browser, BrowserContext, Page, Request, expect, sync_playwright


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Not for the whole session: Playwright's event loop would be in the way of other tests'."""
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=shlex.split(CHROMIUM_OPTIONS))


@pytest.fixture(scope="module")
def profile(browser: Browser) -> Iterator[BrowserContext]:
    """One profile for all tests: its cache spares each of them a second of loading."""
    with browser.new_context(viewport={"width": 1280, "height": 860}) as context:
        context.set_default_timeout(WAIT_MS)
        yield context


@pytest.fixture(scope="session")
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
