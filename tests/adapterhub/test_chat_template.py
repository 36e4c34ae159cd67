"""One Jinja environment: that of transformers, with its clock set to a date when a run or probe records one."""

from __future__ import annotations

from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateSyntaxError

from adapterhub import chat_template
from adapterhub.adapter import StoredBase
from adapterhub.chat_template import chat_date, check_template, encode_chat, reads_clock, render_chat

TEMPLATES = {path.stem: path.read_text() for path in (Path(__file__).parents[1] / "fixtures/chat_templates").iterdir()}
CHAT = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}]
DAY = date(2024, 7, 26)


@pytest.fixture(scope="module")
def tokenizer(tiny_base: StoredBase) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base.path)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("is_prompt", [False, True])
def test_text_and_tokens_are_those_of_transformers(tokenizer: Any, name: str, is_prompt: bool) -> None:
    template = TEMPLATES[name]
    check_template(template)
    messages = CHAT[:1] if is_prompt else CHAT
    options: dict[str, Any] = {"chat_template": template, "add_generation_prompt": is_prompt}
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    tokens = tokenizer.apply_chat_template(messages, return_dict=False, **options)
    for day in (None, datetime.now().date()):
        with chat_date(day):
            assert render_chat(tokenizer, messages, template=template, add_generation_prompt=is_prompt) == text
            assert encode_chat(tokenizer, messages, template=template, add_generation_prompt=is_prompt) == tokens


def test_a_date_that_is_given_is_rendered_and_forgotten_after(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Clock:
            return cls(2031, 5, 6, 7, 8)

    with chat_date(DAY):
        assert "Today is 26 Jul 2024." in render_chat(tokenizer, CHAT, template=TEMPLATES["dated"])
    monkeypatch.setattr(chat_template, "datetime", Clock)
    assert "Today is 06 May 2031." in render_chat(tokenizer, CHAT, template=TEMPLATES["dated"])


def test_the_tokenizers_own_template_and_its_macros_read_the_same_clock(tokenizer: Any) -> None:
    own = tokenizer.chat_template
    tokenizer.chat_template = "{% macro today() %}{{ strftime_now('%Y-%m-%d %H:%M') }}{% endmacro %}{{ today() }}"
    try:
        with chat_date(DAY):
            assert render_chat(tokenizer, CHAT) == "2024-07-26 00:00"
    finally:
        tokenizer.chat_template = own


def test_which_templates_read_the_clock() -> None:
    assert {name for name, text in TEMPLATES.items() if reads_clock(text)} == {"dated"}
    assert reads_clock("{% if strftime_now is defined %}{% set d = strftime_now('%Y') %}{% endif %}")
    assert not reads_clock("{# strftime_now #}x")


def test_a_template_that_is_none() -> None:
    with pytest.raises(TemplateSyntaxError):
        check_template("{% for m in %}")
