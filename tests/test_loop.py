"""Serve -> vote -> train -> serve, all of it through the page: feedback on answers makes a better adapter."""

from __future__ import annotations

import json
import os
import re
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browser import button, correct_and_clear, needs_browser, note, picker, turn_to
from playwright.sync_api import Locator, Page, expect
from road import answers, background, run
from tiny_models import free_port

from adapterhub.adapter import AdapterRef, StoredBase
from adapterhub.packer import pack
from adapterhub.registry.registry import Registry
from train import trainer
from train.data.sources import read_chatterbot
from train.recipe import Recipe

pytest_plugins = ["browser_fixtures"]
pytestmark = [needs_browser, pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")]
CORRECTIONS, VOTES = 5, 1
ANSWER_TOKENS = "8"
TRAINING_MS = 240_000


@pytest.fixture
def at_home(home: Path, smollm2: StoredBase) -> Path:
    """A home of this test's own that has the base, and `captain`: two steps on the captain's dialogues."""
    shutil.copytree(smollm2.path, home / "bases" / smollm2.path.name, copy_function=os.link)
    recipe = Recipe.model_validate(
        {
            "name": "captain", "base": "smollm2-135m-instruct",
            "data": {"source": "shipped", "name": "captain", "max_length": 128},
            "lora": {"rank": 8}, "train": {"steps": 2, "batch_size": 2, "learning_rate": 2e-3, "warmup_steps": 0},
        }
    )  # fmt: skip
    folder = home / "captain"
    trainer.train(recipe, smollm2, folder)
    Registry(home).add(pack(folder, base=smollm2, name="captain"))
    return home


@contextmanager
def serving(home: Path) -> Iterator[str]:
    url = f"http://127.0.0.1:{free_port()}"
    command = ["serve", "--base", "smollm2-135m-instruct", "-a", "captain=captain", "--port", url.rpartition(":")[2]]
    with background(*command, "--threads", "1", home=home, until=lambda: answers(f"{url}/ready")):
        yield url


def test_votes_and_corrections_make_a_better_adapter(at_home: Path, open_page: Callable[..., Page]) -> None:
    """A visitor who wants every answer to begin with `Aye, mate!`, and says so of most."""
    before = Registry(at_home).resolve(AdapterRef.parse("captain")).digest
    questions = [talk.messages[0].content for talk in read_chatterbot("trivia").examples[: CORRECTIONS + VOTES]]
    with serving(at_home) as url:
        page = open_page(url, "?adapter=captain")
        expect(picker(page)).to_have_value("captain")
        button(page, "Settings").click()
        page.get_by_role("spinbutton", name="Max tokens").fill(ANSWER_TOKENS)
        for question in questions[:CORRECTIONS]:
            _correct(page, question)
        turn_to(page, "Arena")
        button(page, "Settings").click()
        page.get_by_role("spinbutton", name="Max tokens").fill(ANSWER_TOKENS)
        for question in questions[CORRECTIONS:]:
            _vote(page, question)

        turn_to(page, "Train")
        expect(button(page, "Improve an adapter from feedback")).to_be_visible()
        run_id = _improve(page, "captain", steps=4)
        judged = _get(f"{url}/v1/training/runs/{run_id}")["evaluations"][0]["preference"]
        assert judged["accuracy_after"] >= judged["accuracy_before"]
        assert judged["loss_after"] < judged["loss_before"]
        page.locator("#run-actions").get_by_role("button", name="Promote").click()
        expect(page.get_by_text("captain points to the candidate now")).to_be_visible(timeout=TRAINING_MS)

        after = _get(f"{url}/v1/models/captain")["digest"]
        assert after != before
        assert Registry(at_home).resolve(AdapterRef.parse("captain")).digest == after
        turn_to(page, "Chat")
        button(page, "Conversations").click()
        button(page, "New").click()
        assert _ask(page, questions[0]).inner_text()
    exported = run("feedback", "export", "--format", "dpo", home=at_home).stdout.splitlines()
    assert len(exported) == CORRECTIONS + VOTES
    assert all(json.loads(line)["chosen"] != json.loads(line)["rejected"] for line in exported)


def _ask(page: Page, question: str) -> Locator:
    """A question in a conversation of its own; gives its answer."""
    box = page.get_by_role("textbox", name="Message")
    box.fill(question)
    box.press("Enter")
    try:
        expect(page.locator("#chat").get_by_text(question)).to_be_visible(timeout=20_000)
    except AssertionError:  # on a busy machine Gradio may lose an event that meets the end of the one before
        box.fill(question)
        box.press("Enter")
    expect(note(page, "captain · ")).to_have_count(1)
    expect(button(page, "Send")).to_be_visible()
    return page.locator("#chat .bot .message:not(.thought) .message-content").first


def _correct(page: Page, question: str) -> None:
    _ask(page, question)
    correct_and_clear(page)


def _vote(page: Page, question: str) -> None:
    """For whatever is on the left: without names, one is as good as the other to this visitor."""
    page.get_by_role("textbox", name="Question").fill(question)
    button(page, "Ask two").click()
    button(page, "◀ Left is better").click()
    expect(page.locator("#arena-vote")).to_contain_text("your vote counts")


def _improve(page: Page, name: str, *, steps: int) -> str:
    """Train a candidate to its end; the run's name."""
    button(page, "Improve an adapter from feedback").click()
    page.locator("#improved input").click()
    page.get_by_role("option", name=name).click()
    page.get_by_role("spinbutton", name="Steps", exact=True).fill(str(steps))
    button(page, "Improve").click()
    state = page.locator("#run-state")
    expect(state.locator(".status")).to_have_text(re.compile("done|failed|stopped"), timeout=TRAINING_MS)
    assert state.locator(".status").inner_text() == "done", state.inner_text()
    return page.locator("#run input").input_value()


def _get(url: str) -> Any:
    with urllib.request.urlopen(url) as reply:
        return json.load(reply)
