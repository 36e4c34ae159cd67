"""The API as the terminal uses it: for one person, whose key is in the environment."""

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


class ChatApi:
    """The API at `url` for one person, whose key is in the environment."""

    def __init__(self, url: str) -> None:
        from openai import DefaultHttpxClient, OpenAI, Timeout

        self.url = url.rstrip("/")
        key = next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), NO_KEY)
        self._client: OpenAI = OpenAI(
            base_url=self.url,
            api_key=key,
            max_retries=0,  # a person sees the refusal and may /retry
            timeout=Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            http_client=DefaultHttpxClient(trust_env=trusts_proxy(self.url)),
        )

    def close(self) -> None:
        self._client.close()

    def models(self) -> list[ServedModel]:
        """The base first, as the server lists them. Raises AdapterHubError."""
        with self._failures_said():
            return [ServedModel.read(model) for model in self._client.models.list().data]

    def check(self, name: str) -> None:
        """Raises AdapterNotFound with the server's nearest names."""
        with self._failures_said():
            self._client.models.retrieve(name)

    def ask(self, answer: Answer, messages: list[dict[str, str]], sampling: Sampling) -> Generator[str, None, None]:
        """The pieces of the answer as they come, counted in `answer`. Raises AdapterHubError."""
        with self._failures_said(answer):
            stream = self._client.chat.completions.create(**request_body(answer, messages, sampling))
            with stream:
                for chunk in stream:
                    already = len(answer.text)
                    answer.saw(chunk)
                    yield answer.text[already:]
        check_complete(answer, self.url)

    def send_feedback(self, kind: str, answer: Answer, messages: list[dict[str, str]], **said: str) -> None:
        """What the reader thinks of an answer. Raises AdapterHubError."""
        with self._failures_said():
            if answer.digest is None:
                answer.digest = next((model.digest for model in self.models() if model.name == answer.model), None)
            body: dict[str, Any] = {"kind": kind, "messages": messages, "answer": answer.wire(), **said}
            self._client.post("/feedback", cast_to=object, body=body)

    @contextlib.contextmanager
    def _failures_said(self, answer: Answer | None = None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            said = describe_error(error, self.url, has_begun=answer is not None and bool(answer.text))
            if isinstance(said, NotAuthorized):
                said = NotAuthorized(f"{said} The key is read from {' or '.join(KEY_VARIABLES)}.")
            raise said from error
