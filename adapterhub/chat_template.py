"""Render messages with a chat template: the one Jinja environment of training, packing and serving.

It is that of transformers, with `{% generation %}`, loop controls and `strftime_now`, which this module can set to a
given date.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import date, datetime, time
from typing import Any

_DATE: ContextVar[date | None] = ContextVar("chat_date", default=None)


@contextmanager
def chat_date(day: date | None) -> Iterator[None]:
    """Let templates that read the clock render this date, at midnight; None: the time of rendering."""
    token = _DATE.set(day)
    try:
        yield
    finally:
        _DATE.reset(token)


def render_chat(
    tokenizer: Any, messages: Sequence[dict[str, Any]], *, template: str | None = None,
    tools: list[dict[str, Any]] | None = None, add_generation_prompt: bool = False,
) -> str:  # fmt: skip
    """Return the text of the messages under `template`, by default the tokenizer's own.

    The date is that of `chat_date`. Raises what the template raises: a template is a program, and may fail in any way.
    """
    if _DATE.get() is not None:
        _compiled(tokenizer.get_chat_template(template, tools)).environment.globals["strftime_now"] = _strftime_now
    return str(
        tokenizer.apply_chat_template(
            list(messages),
            chat_template=template,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    )


def encode_chat(
    tokenizer: Any, messages: Sequence[dict[str, Any]], *, template: str | None = None,
    tools: list[dict[str, Any]] | None = None, add_generation_prompt: bool = False,
) -> list[int]:  # fmt: skip
    """Return the token ids of `render_chat`; special tokens are those that the template writes."""
    text = render_chat(tokenizer, messages, template=template, tools=tools, add_generation_prompt=add_generation_prompt)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def check_template(template: str) -> None:
    """Check the syntax of a template. Raises jinja2.TemplateSyntaxError, RecursionError."""
    _compiled(template)


def reads_clock(template: str) -> bool:
    """Return whether the template renders the current date or time."""
    from jinja2 import nodes

    tree = _compiled(template).environment.parse(template)
    return any(node.name == "strftime_now" for node in tree.find_all(nodes.Name))


def _compiled(template: str) -> Any:
    # Cached there by text: apply_chat_template renders this same object.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(template)


def _strftime_now(format: str) -> str:
    day = _DATE.get()
    return (datetime.now() if day is None else datetime.combine(day, time())).strftime(format)
