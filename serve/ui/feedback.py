"""Feedback of a visitor on an answer, sent to the API."""

from __future__ import annotations

from typing import Any

from adapterhub.errors import AdapterHubError
from serve.ui.client import Messages, PageClient
from serve.ui.model_picker import trouble

CORRECT = "Say what it should have said"
"""Label of the flag beside the thumbs."""


class FeedbackSender:
    """Sends feedback. Each method returns one line for the visitor, also when it fails."""

    def __init__(self, client: PageClient) -> None:
        self._client = client

    async def thumb(self, messages: Messages, answer: dict[str, Any], *, is_up: bool, key: str | None) -> str:
        """Send thumbs up or down for an answer."""
        body = {"messages": messages, "answer": answer, "thumb": "up" if is_up else "down"}
        message = f"✓ thumb {'up' if is_up else 'down'} stored: it can train the next adapter."
        return await self._sent("thumb", body, message, key)

    async def correction(self, messages: Messages, answer: dict[str, Any], text: str, *, key: str | None) -> str:
        """Send what an answer should have said."""
        if not text.strip():
            return trouble("the correction is empty: write what the answer should have said first.")
        if text == answer["text"]:
            return trouble("the correction is the same as the answer: change it, then save.")
        body = {"messages": messages, "answer": answer, "text": text}
        return await self._sent("correction", body, "✓ correction stored: it can train the next adapter.", key)

    async def _sent(self, kind: str, body: dict[str, Any], message: str, key: str | None) -> str:
        try:
            await self._client.post("feedback", key, kind=kind, **body)
        except AdapterHubError as error:
            return trouble(str(error))
        return message
