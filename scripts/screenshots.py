"""Take a screenshot of every tab for the documents, with a real server and the demo's adapters.

Each tab is used once, as a visitor would, then pictured wide in light and dark, and on a phone.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).parent.parent
DEMO = ROOT / ".demo"
BASE = "smollm2-135m-instruct"
ADAPTERS = ("captain", "trivia")
QUESTIONS = (
    "What is the capital of France?",
    "How do I tie a bowline?",
    "What should I do on a rainy Sunday?",
    "Who painted the Mona Lisa?",
)
WIDE = {"width": 1280, "height": 860}
PHONE = {"width": 390, "height": 844}
COLOURS = 128
"""Colors of the palette: a picture of text needs no more and takes a third of the bytes."""
WAIT_MS = 180_000
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "screenshots")
    parser.add_argument("--url", help="a server that runs already, instead of one of our own")
    parser.add_argument("--only", nargs="*", help="names of tabs, in lower case")
    given = parser.parse_args()
    if CHROMIUM is None:
        sys.exit("no Chromium here: scripts/browser.sh installs one")
    given.output.mkdir(parents=True, exist_ok=True)
    if given.url:
        take(given.url, given.output, given.only)
        return
    with server() as url:
        vote(url)
        take(url, given.output, given.only)


@contextmanager
def server() -> Iterator[str]:
    """Serve the demo's two adapters from a new home, running the demo first if needed; yield the URL."""
    if not all((DEMO / "adapters" / name / "adapterhub.json").is_file() for name in ADAPTERS):
        _adapterhub("demo", "--exit", home=None)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "bases").mkdir()
        (home / "bases" / BASE).symlink_to(DEMO / "home" / "bases" / BASE)
        for name in ADAPTERS:
            _adapterhub("add", str(DEMO / "adapters" / name), home=home)
        named = [part for name in ADAPTERS for part in ("--adapter", f"{name}={name}")]
        command = [_command(), "serve", "--base", BASE, *named, "--port", "0"]
        child = subprocess.Popen(command, env=_environment(home), stderr=subprocess.PIPE, text=True)
        try:
            assert child.stderr is not None
            for line in child.stderr:
                if line.startswith("ready: "):
                    break
            else:
                sys.exit("the server did not start")
            yield line.split()[1].removesuffix("/v1,")
        finally:
            child.terminate()
            child.wait(60)


def vote(url: str) -> None:
    """Vote in a few arena battles, so that there are ratings to show; the longer answer wins."""
    for at in range(6):
        messages = [{"role": "user", "content": QUESTIONS[at % len(QUESTIONS)]}]
        battle = _post(f"{url}/v1/arena/battles", {})
        sides = {}
        for side in ("a", "b"):
            body = {"model": battle[side], "messages": messages, "max_tokens": 16, "temperature": 0.7}
            text = _post(f"{url}/v1/chat/completions", body)["choices"][0]["message"]["content"]
            sides[side] = {"model": battle[side], "digest": None, "text": text}
        longer = max(sides, key=lambda side: len(sides[side]["text"]))
        given = {"kind": "vote", "battle": battle["battle"], "messages": messages, **sides, "winner": longer}
        _post(f"{url}/v1/feedback", given)


def take(url: str, folder: Path, only: list[str] | None) -> None:
    """Use each tab and take its screenshot."""
    tabs: dict[str, Callable[[Page], None]] = {
        "chat": _chat, "compare": _compare, "arena": _arena, "adapters": _adapters, "train": _train,
    }  # fmt: skip
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        for name, use in tabs.items():
            if only and name not in only:
                continue
            page = browser.new_page(viewport=WIDE, color_scheme="light")
            page.set_default_timeout(WAIT_MS)
            expect.set_options(timeout=WAIT_MS)
            page.goto(f"{url}/ui?adapter=captain")
            expect(page.locator("#picker input")).to_have_value("captain")
            if name != "chat":
                page.get_by_role("tab", name=name.title()).click()
            use(page)
            _picture(page, folder / f"{name}.png")
            page.emulate_media(color_scheme="dark")
            _picture(page, folder / f"{name}-dark.png")
            page.emulate_media(color_scheme="light")
            page.set_viewport_size(PHONE)
            _picture(page, folder / f"{name}-phone.png")
            page.close()
        browser.close()


def _chat(page: Page) -> None:
    _say(page, "Who are you?", 1)
    page.locator("#picker input").click()
    page.get_by_role("option", name="trivia").click()
    _say(page, "What is the largest planet in our solar system?", 2)


def _say(page: Page, question: str, number: int) -> None:
    page.get_by_role("textbox", name="Message").fill(question)
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#chat .thought-group").filter(has_text="tok/s")).to_have_count(number)
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def _compare(page: Page) -> None:
    picked = page.locator("#compared input")
    expect(page.locator("#compared .token")).to_have_count(2)
    for name in ADAPTERS:
        if not page.locator("#compared").get_by_text(name, exact=True).count():
            picked.click()
            page.get_by_role("option", name=name).click()
    picked.press("Escape")
    page.get_by_role("textbox", name="Prompt").fill("What is the largest planet in our solar system?")
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_role("button", name="Save report as Markdown")).to_be_visible()


def _arena(page: Page) -> None:
    page.get_by_role("textbox", name="Question").fill("What is the largest planet in our solar system?")
    page.get_by_role("button", name="Ask two").click()
    page.get_by_role("button", name="Left is better").click()
    expect(page.locator("#arena-vote")).to_contain_text("your vote counts")
    expect(page.locator("#ratings svg")).to_be_visible()


def _adapters(page: Page) -> None:
    expect(page.locator("#adapters table")).to_be_visible()
    page.locator("#adapter-ref input").click()
    page.get_by_role("option", name="captain").click()
    expect(page.locator("#adapter-facts table")).to_be_visible()


def _train(page: Page) -> None:
    page.locator("#recipe input").click()
    page.get_by_role("option", name="demo-captain").click()
    page.get_by_role("spinbutton", name="Steps").fill("8")
    page.get_by_role("button", name="Plan").click()
    expect(page.locator("#plan table").first).to_be_visible()
    page.get_by_role("button", name="Start training").click()
    expect(page.locator("#run-state .status")).to_have_text("done")


def _picture(page: Page, path: Path) -> None:
    page.mouse.move(0, 0)
    page.evaluate("() => { document.activeElement?.blur(); scrollTo(0, 0); }")
    page.wait_for_timeout(400)  # until transitions are over
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def _post(url: str, body: object) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    for attempt in range(2):
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return json.load(reply)
        except urllib.error.URLError:
            if attempt:
                raise
            time.sleep(1)
    raise AssertionError


def _command() -> str:
    return str(Path(sys.executable).with_name("adapterhub"))


def _environment(home: Path | None) -> dict[str, str]:
    return {**os.environ, **({} if home is None else {"ADAPTERHUB_HOME": str(home)})}


def _adapterhub(*arguments: str, home: Path | None) -> None:
    subprocess.run([_command(), *arguments], env=_environment(home), check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
