"""Measure the browser page: how soon it can be used, and how it streams answers to twenty users at once.

The page's server runs alone, as `adapterhub page`, in front of an API that streams words at a fixed pace without a
model, so that the figures are the page's own. A real Chromium on the same machine opens it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "fixtures"))
from browser import CHROMIUM_OPTIONS
from fake_api import TOKEN_S, start_fake_api

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT_MS = 120_000
WORDS = 123
"""Words of the answer to `long`: model, "says:", the question, and sixty times "and" and a number."""
TOKENS = 63
WATCH = """() => {
    window.texts = []; window.times = []; window.updates = 0;
    // An update is a difference to the one before: one that was lost would leave the answer wrong.
    const count = (text) => { window.updates += text.split('"process_generating"').length - 1; };
    const ask = window.fetch;
    window.fetch = async (...given) => {
        const reply = await ask(...given);
        const [read, kept] = reply.body.tee();
        (async () => { for await (const piece of kept) count(new TextDecoder().decode(piece)); })().catch(() => {});
        return new Response(read, reply);
    };
    window.EventSource = class extends EventSource {
        constructor(...given) { super(...given); this.addEventListener("message", (event) => count(event.data)); }
    };
    new MutationObserver(() => {
        const answer = document.querySelector("#chat .bot .message:not(.thought) .message-content");
        const text = answer?.textContent.trim() ?? "";
        if (text && text !== window.texts.at(-1)) { window.texts.push(text); window.times.push(performance.now()); }
    }).observe(document.querySelector("#chat"), { subtree: true, childList: true, characterData: true });
}"""


@contextlib.contextmanager
def page_server(api_url: str) -> Iterator[tuple[str, int]]:
    """Start `adapterhub page`; yield its URL and process id."""
    command = [str(Path(sys.executable).with_name("adapterhub")), "page", "--url", f"{api_url}/v1", "--port", "0"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stderr is not None
        line = next(line for line in child.stderr if line.startswith("ready: "))
        yield line.split()[1].rstrip(","), child.pid
    finally:
        child.terminate()
        child.wait(30)


def opened(context: BrowserContext, url: str) -> tuple[Page, float]:
    """Open the page; return it and the seconds until it can be used."""
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    began = time.perf_counter()
    page.goto(f"{url}?adapter=captain")
    expect(page.locator("#picker input")).to_have_value("captain")
    expect(page.locator("#send")).to_be_visible()
    return page, time.perf_counter() - began


def seconds_to_open(context: BrowserContext, url: str) -> float:
    """Open a page and close it again: a browser has six connections per host, and each open page keeps one."""
    page, seconds = opened(context, url)
    page.close()
    return seconds


def resident_bytes(pid: int) -> int:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def read_at_once(browser: Browser, url: str, users: int) -> list[dict[str, float]]:
    """Return per user: updates received, texts drawn, whether the answer is complete, and the longest pause."""
    with contextlib.ExitStack() as stack:
        contexts = [stack.enter_context(browser.new_context()) for _ in range(users)]
        pages = [opened(context, url)[0] for context in contexts]
        for page in pages:
            page.evaluate(WATCH)
            page.get_by_role("textbox", name="Message").fill("long")
        for page in pages:
            page.evaluate("() => setTimeout(() => document.querySelector('#send').click(), 0)")
        for page in pages:
            expect(page.locator("#chat .thought-group").filter(has_text="tok/s")).to_have_count(1)
        return [_seen(page) for page in pages]


def _seen(page: Page) -> dict[str, float]:
    texts, times, updates = page.evaluate("() => [window.texts, window.times, window.updates]")
    pauses = [after - before for before, after in itertools.pairwise(times)]
    grows = all(after.startswith(before) for before, after in itertools.pairwise(texts))
    return {
        "texts": len(texts),
        "is_whole": len(texts[-1].split()) == WORDS and grows,
        "updates": updates,
        "longest_pause_ms": max(pauses, default=0.0),
        "took_s": (times[-1] - times[0]) / 1000,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--loads", type=int, default=5, help="warm loads, of which the median counts")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    expect.set_options(timeout=WAIT_MS)
    with start_fake_api(page=False) as api, page_server(api.url) as (url, pid), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS.split())
        at_start = resident_bytes(pid)
        with browser.new_context() as context:
            cold, *warm = [seconds_to_open(context, url) for _ in range(1 + given.loads)]
        (alone,) = read_at_once(browser, url, 1)
        crowd = read_at_once(browser, url, given.users)
        figures = {
            "usable_cold_s": round(cold, 2),
            "usable_warm_s": round(statistics.median(warm), 2),
            "usable_warm_slowest_s": round(max(warm), 2),
            "users": given.users,
            "whole_answers": sum(bool(one["is_whole"]) for one in crowd),
            "answer_s": TOKENS * TOKEN_S,
            "one_user_s": round(alone["took_s"], 2),
            "slowest_user_s": round(max(one["took_s"] for one in crowd), 2),
            "fewest_updates": min(one["updates"] for one in crowd),
            "fewest_texts_drawn": min(one["texts"] for one in crowd),
            "longest_pause_ms": round(max(one["longest_pause_ms"] for one in crowd)),
            "server_mb_at_start": round(at_start / 1e6),
            "server_mb_after": round(resident_bytes(pid) / 1e6),
        }
        browser.close()
    if given.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):<24} {value}")


if __name__ == "__main__":
    main()
