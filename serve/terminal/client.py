"""Client of the API for the terminal chat: one user, whose key is in the environment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

from adapterhub.errors import NotAuthorized
from adapterhub.net import trusts_proxy
from serve.client import (
    ANSWER_TIMEOUT_S,
    CONNECT_TIMEOUT_S,
    NO_KEY,
    Answer,
    Sampling,
    ServedModel,
    check_complete,
    describe_error,
    request_body,
)

if TYPE_CHECKING:
    from openai import OpenAI

KEY_VARIABLES = ("ADAPTERHUB_API_KEY", "OPENAI_API_KEY")
"""Environment variables with the API key; the first that is set is used."""


class ChatApi:
    """The API at `url`, for one user."""

    def __init__(self, url: str) -> None:
        from openai import DefaultHttpxClient, OpenAI, Timeout

        self.url = url.rstrip("/")
        key = next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), NO_KEY)
        self._client: OpenAI = OpenAI(
            base_url=self.url,
            api_key=key,
            max_retries=0,  # the user sees the error and may /retry
            timeout=Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            http_client=DefaultHttpxClient(trust_env=trusts_proxy(self.url)),
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def models(self) -> list[ServedModel]:
        """List the models, the base first. Raises AdapterHubError."""
        with self._errors_described():
            return [ServedModel.read(model) for model in self._client.models.list().data]

    def check(self, name: str) -> None:
        """Check that a model is served. Raises AdapterNotFound with the nearest names."""
        with self._errors_described():
            self._client.models.retrieve(name)

    def stream(self, answer: Answer, messages: list[dict[str, str]], sampling: Sampling) -> Generator[str, None, None]:
        """Request `answer` and fill it. Yield the deltas of its text. Raises AdapterHubError."""
        with self._errors_described(answer):
            stream = self._client.chat.completions.create(**request_body(answer, messages, sampling))
            with stream:
                for chunk in stream:
                    already = len(answer.text)
                    answer.add(chunk)
                    yield answer.text[already:]
        check_complete(answer, self.url)

    def send_feedback(self, kind: str, answer: Answer, messages: list[dict[str, str]], **fields: str) -> None:
        """Send feedback on an answer. Raises AdapterHubError."""
        with self._errors_described():
            if answer.digest is None:
                answer.digest = next((model.digest for model in self.models() if model.name == answer.model), None)
            body: dict[str, Any] = {"kind": kind, "messages": messages, "answer": answer.wire(), **fields}
            self._client.post("/feedback", cast_to=object, body=body)

    @contextlib.contextmanager
    def _errors_described(self, answer: Answer | None = None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            described = describe_error(error, self.url, has_begun=answer is not None and bool(answer.text))
            if isinstance(described, NotAuthorized):
                described = NotAuthorized(f"{described} The key is read from {' or '.join(KEY_VARIABLES)}.")
            raise described from error
