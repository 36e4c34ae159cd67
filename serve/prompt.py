"""From messages to token ids, with the chat template that travels with the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from adapterhub.adapter import Adapter
from adapterhub.errors import UsageError
from adapterhub.package import TEMPLATE_NAME


class PromptRenderer:
    """The base's tokenizer, and each adapter's own template."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._templates: dict[str, str] = {}  # by adapter digest

    def chat(self, messages: Sequence[dict[str, str]], adapter: Adapter | None) -> tuple[int, ...]:
        """Token ids up to where the assistant speaks. Raises UsageError for messages the template refuses."""
        try:
            encoded = self._tokenizer.apply_chat_template(
                list(messages), chat_template=self._template(adapter), add_generation_prompt=True, return_dict=True
            )
        except (TemplateError, ValueError) as error:
            raise UsageError(f"these messages do not fit the chat template: {error}.") from error
        return tuple(encoded["input_ids"])

    def text(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text)["input_ids"])

    def end_token(self, text: str | None) -> int | None:
        """An adapter's own end token, spelt `text`; None when it is the base's, or no token of this vocabulary."""
        if text is None or text == self._tokenizer.eos_token:
            return None
        found = self._tokenizer.convert_tokens_to_ids(text)
        return int(found) if found is not None and self._tokenizer.convert_ids_to_tokens(found) == text else None

    def check_tokens(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Token ids as given by a client. Raises UsageError for one the vocabulary does not have."""
        size = len(self._tokenizer)
        strange = [token for token in tokens if not 0 <= token < size]
        if strange:
            raise UsageError(f"token {strange[0]} is not in the vocabulary of {size} tokens.")
        return tuple(tokens)

    def _template(self, adapter: Adapter | None) -> str | None:
        if adapter is None:
            return None
        if adapter.digest not in self._templates:
            self._templates[adapter.digest] = (adapter.path / TEMPLATE_NAME).read_text()
        return self._templates[adapter.digest] or None
