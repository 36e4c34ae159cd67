"""Prompts: from messages to token ids, with the adapter's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adapterhub.adapter import Adapter
from adapterhub.chat_template import render_chat
from adapterhub.end_of_turn import end_of_turn, special_ids
from adapterhub.errors import RequestTooLong, UsageError
from adapterhub.package.layout import TEMPLATE_NAME
from serve.api.lanes import Lanes
from serve.api.token_length import TokenBound

_MESSAGE_SIZE = 32
"""Cost of a message in the template beside its text, in characters of text."""


class PromptRenderer:
    """The base's tokenizer and each adapter's chat template, which run in threads."""

    def __init__(self, tokenizer: Any, lanes: Lanes | None = None) -> None:
        self._tokenizer = tokenizer
        self._templates: dict[str, str] = {}  # by adapter digest
        self._end_tokens: dict[str, tuple[int, ...]] = {}  # by adapter digest; "" for the base
        self._special = {str(tokenizer.convert_ids_to_tokens(token)): token for token in special_ids(tokenizer)}
        self._bound = TokenBound.of(tokenizer)
        self.lanes = lanes or Lanes()

    async def chat(
        self, messages: Sequence[dict[str, str]], adapter: Adapter | None, *, max_tokens: int
    ) -> tuple[int, ...]:
        """Return the token ids of the messages, with the generation prompt.

        Raises UsageError for messages that the template refuses, RequestTooLong for more than `max_tokens`.
        """
        size = sum(len(message["content"]) + _MESSAGE_SIZE for message in messages)
        text = await self.lanes.compute(size, self._render, messages, adapter)
        self._check_length(text, max_tokens)
        return await self.lanes.tokenize(len(text), self._tokenize, text, add_special_tokens=False)

    async def text(self, text: str, *, max_tokens: int) -> tuple[int, ...]:
        """Return the token ids of a text. Raises RequestTooLong for more than `max_tokens`."""
        self._check_length(text, max_tokens)
        return await self.lanes.tokenize(len(text), self._tokenize, text, add_special_tokens=True)

    async def end_tokens(self, adapter: Adapter | None) -> tuple[int, ...]:
        """Return the ids of the tokens that end an answer of an adapter, or of the bare base (None).

        They are what its package records; for the base, and for packages of format 1, the token with which the chat
        template ends a turn.
        """
        key = adapter.digest if adapter else ""
        if key not in self._end_tokens:
            chat = adapter.manifest.chat if adapter else None
            recorded = chat.stop_token_ids if chat else []
            if not recorded:
                rendered = await self.lanes.compute(0, end_of_turn, self._tokenizer, self._template(adapter))
                recorded = [] if rendered is None else [rendered]
            eos = self.special_token(chat.eos) if chat and chat.eos else None
            self._end_tokens[key] = tuple(dict.fromkeys([*recorded, *([] if eos is None else [eos])]))
        return self._end_tokens[key]

    def special_token(self, text: str) -> int | None:
        """Return the id of the special token `text`; None where there is none of that name."""
        return self._special.get(text)

    def check_tokens(self, tokens: Sequence[int], *, max_tokens: int) -> tuple[int, ...]:
        """Return a client's token ids. Raises UsageError for one that is not in the vocabulary, RequestTooLong."""
        if len(tokens) > max_tokens:
            raise too_long(f"{len(tokens)} tokens", max_tokens)
        size = len(self._tokenizer)
        unknown = [token for token in tokens if not 0 <= token < size]
        if unknown:
            raise UsageError(
                f"token {unknown[0]} is not in the vocabulary: expected 0 to {size - 1}. Use the base's tokenizer."
            )
        return tuple(tokens)

    def _render(self, messages: Sequence[dict[str, str]], adapter: Adapter | None) -> str:
        try:
            return render_chat(self._tokenizer, messages, template=self._template(adapter), add_generation_prompt=True)
        except Exception as error:  # a template is a program, and may fail in any way
            raise UsageError(
                f"the chat template refuses these messages: {str(error).rstrip('.')}. Send messages that it takes."
            ) from error

    def _tokenize(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        # `__call__` releases the interpreter's lock; `encode` does not.
        return tuple(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def _check_length(self, text: str, max_tokens: int) -> None:
        least = self._bound.least(text) if self._bound else 0
        if least > max_tokens:
            raise too_long(f"at least {least} tokens", max_tokens)

    def _template(self, adapter: Adapter | None) -> str | None:
        if adapter is None:
            return None
        if adapter.digest not in self._templates:
            self._templates[adapter.digest] = (adapter.path / TEMPLATE_NAME).read_text()
        return self._templates[adapter.digest] or None


def too_long(length: str, max_tokens: int) -> RequestTooLong:
    """Return the error for a prompt of this length on a server with `max_tokens` of context."""
    return RequestTooLong(
        f"the prompt has {length}: expected at most {max_tokens} tokens for prompt and answer. Shorten the prompt."
    )
