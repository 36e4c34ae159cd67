"""What a visitor thinks of an answer, sent to the API as it was given. Keeps nothing itself."""

from __future__ import annotations

from typing import Any

from adapterhub.errors import AdapterHubError
from serve.ui.client import Messages, PageClient
from serve.ui.model_picker import trouble

CORRECT = "Say what it should have said"
"""the flag beside the thumbs"""


class Feedback:
    """Each method gives one line for the visitor; no failure leaves."""

    def __init__(self, client: PageClient) -> None:
        self._client = client

    async def thumb(self, messages: Messages, answer: dict[str, Any], *, is_up: bool, key: str | None) -> str:
        body = {"messages": messages, "answer": answer, "thumb": "up" if is_up else "down"}
        said = f"✓ thumb {'up' if is_up else 'down'} kept: it can train the next adapter."
        return await self._sent("thumb", body, said, key)

    async def correction(self, messages: Messages, answer: dict[str, Any], text: str, *, key: str | None) -> str:
        if not text.strip():
            return trouble("write what the answer should have said first.")
        if text == answer["text"]:
            return trouble("this is what was answered: change it, then save.")
        body = {"messages": messages, "answer": answer, "text": text}
        return await self._sent("correction", body, "✓ correction kept: it can train the next adapter.", key)

    async def _sent(self, kind: str, body: dict[str, Any], said: str, key: str | None) -> str:
        try:
            await self._client.post("feedback", key, kind=kind, **body)
        except AdapterHubError as error:
            return trouble(str(error))
        return said
