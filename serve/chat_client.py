"""What both chats know of the API: its models, an answer as it comes, a failure in one line. Knows no screen."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from adapterhub.errors import (
    AdapterHubError,
    AdapterNotFound,
    NotAuthorized,
    RequestTooLong,
    ServeError,
    ServerBusy,
    UsageError,
)

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types import Model
    from openai.types.chat import ChatCompletionChunk

log = logging.getLogger(__name__)

NO_KEY = "none"
"""what is sent where the server wants no key; OpenAI's client insists on one"""
CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 600.0
"""between two events of an answer; a busy server may take its time before the first"""

_NO_API = "there is a server at {url}, but no API: its address ends in /v1."
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Turn:
    """One message that a model has read or written."""

    role: str
    text: str

    def wire(self) -> dict[str, str]:
        return {"role": self.role, "content": self.text}


@dataclass(frozen=True)
class Sampling:
    temperature: float
    max_tokens: int
    top_p: float = 1.0


@dataclass(frozen=True)
class Loss:
    """Mean loss (nats a token) on questions training never saw."""

    data: str
    base: float
    adapter: float


@dataclass(frozen=True)
class ServedModel:
    """One entry of /v1/models: the base, or an adapter with what its package says of it."""

    name: str
    parent: str | None = None
    """the base's name; None for the base itself"""
    root: str | None = None
    fingerprint: str | None = None
    digest: str | None = None
    method: str | None = None
    rank: int | None = None
    licence: str | None = None
    losses: tuple[Loss, ...] = ()

    @property
    def is_base(self) -> bool:
        return self.parent is None

    @classmethod
    def read(cls, model: Model) -> ServedModel:
        """Other OpenAI-compatible servers say less: whatever is missing stays None."""
        said = model.model_extra or {}
        lora = said.get("lora") or {}
        losses = (Loss(e["data"], e["base_loss"], e["adapter_loss"]) for e in said.get("evaluations") or ())
        facts = {key: said.get(key) for key in ("parent", "root", "fingerprint", "digest", "licence")}
        return cls(model.id, **facts, method=lora.get("method"), rank=lora.get("rank"), losses=tuple(losses))


@dataclass
class Answer:
    """One answer while it arrives, and the figures about it. Times are seconds since the request was sent."""

    model: str
    text: str = ""
    num_tokens: int = 0
    prompt_tokens: int | None = None
    finish_reason: str | None = None
    first_token_s: float | None = None
    last_token_s: float = 0.0
    _sent: float = field(default_factory=time.monotonic)

    def saw(self, chunk: ChatCompletionChunk) -> None:
        for choice in chunk.choices:
            self.finish_reason = choice.finish_reason or self.finish_reason
            if choice.delta.content:
                self.last_token_s = time.monotonic() - self._sent
                self.first_token_s = self.first_token_s or self.last_token_s
                self.num_tokens += 1
                self.text += choice.delta.content
        if chunk.usage is not None:
            self.num_tokens, self.prompt_tokens = chunk.usage.completion_tokens, chunk.usage.prompt_tokens

    @property
    def tokens_per_s(self) -> float | None:
        """Rate after the first token, whose wait is told apart; None where there is nothing to divide."""
        if self.first_token_s is None or self.num_tokens < 2 or self.last_token_s <= self.first_token_s:
            return None
        return (self.num_tokens - 1) / (self.last_token_s - self.first_token_s)

    def summary(self) -> str:
        """One line: who answered, how fast, and what cut it short."""
        parts = [self.model]
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:.1f} tok/s")
        if self.first_token_s is not None:
            parts.append(f"{_duration(self.first_token_s)} to first token")
        if self.finish_reason == "length":
            parts.append(f"cut at {self.num_tokens} tokens")
        return " · ".join(parts)


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 0.9995 else f"{seconds:.1f} s"


def to_send(system: str | None, turns: list[Turn]) -> list[dict[str, str]]:
    """The messages of a request. A question that got no answer is left out: chat templates want turns to alternate."""
    answered = [
        turn
        for turn, following in zip(turns, [*turns[1:], None], strict=True)
        if not (turn.role == "user" and following is not None and following.role == "user")
    ]
    instructions = [Turn("system", system.strip())] if system and system.strip() else []
    return [turn.wire() for turn in (*instructions, *answered)]


def request_body(model: str, messages: list[dict[str, str]], sampling: Sampling) -> dict[str, Any]:
    """Arguments of the OpenAI client's `chat.completions.create`, streaming and counted."""
    return {
        "model": model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
    }


def trusts_proxy(url: str) -> bool:
    """Whether the environment's proxy settings apply: never to this machine's own server."""
    return urlsplit(url).hostname not in _LOOPBACK


class PageClient:
    """The API at `url` (without /v1) for many visitors of one page, each with a key of their own."""

    def __init__(self, url: str) -> None:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient, Timeout

        self.url = f"{url}/v1"
        self._client = AsyncOpenAI(
            base_url=self.url,
            api_key=NO_KEY,
            max_retries=0,  # a person sees the refusal and has a Retry button
            timeout=Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            http_client=DefaultAsyncHttpxClient(trust_env=trusts_proxy(url)),
        )

    def _for(self, key: str | None) -> AsyncOpenAI:
        return self._client.with_options(api_key=(key or "").strip() or NO_KEY)

    async def models(self, key: str | None) -> list[ServedModel]:
        """The base first, then the adapters. Raises AdapterHubError."""
        try:
            page = await self._for(key).models.list()
            return sorted((ServedModel.read(model) for model in page.data), key=lambda model: not model.is_base)
        except Exception as error:
            raise said_in_one_line(error, self.url) from error

    async def fill(
        self, answer: Answer, messages: list[dict[str, str]], sampling: Sampling, *, key: str | None
    ) -> None:
        """Ask, and let `answer` grow until it is complete. Cancelling cancels the request. Raises AdapterHubError."""
        try:
            stream = await self._for(key).chat.completions.create(**request_body(answer.model, messages, sampling))
            async with stream:
                async for chunk in stream:
                    answer.saw(chunk)
        except Exception as error:
            raise said_in_one_line(error, self.url, has_begun=bool(answer.text)) from error
        check_complete(answer, self.url)


def check_complete(answer: Answer, url: str) -> None:
    """Raises ServeError for a stream that ended without saying why the answer ends."""
    if answer.finish_reason is None:
        raise _broken(url)


def _broken(url: str) -> ServeError:
    return ServeError(f"the connection to {url} broke before the answer was complete: ask again.")


def said_in_one_line(error: Exception, url: str, *, has_begun: bool = False) -> AdapterHubError:
    """The error of ours that says what the OpenAI client met. `has_begun`: part of an answer had come."""
    import openai

    if isinstance(error, AdapterHubError):
        return error
    if isinstance(error, openai.APITimeoutError):
        return ServeError(f"the server at {url} did not answer in time: it may be busy; ask again.")
    if isinstance(error, openai.APIConnectionError):
        return _broken(url) if has_begun else ServeError(f"no server at {url}: start one with `adapterhub serve`.")
    if isinstance(error, openai.APIStatusError):
        return _refusal(error.status_code, error.body, url)
    if isinstance(error, openai.APIError):
        return ServeError(_message(error.body) or str(error))
    log.warning("unexpected error while asking %s", url, exc_info=error)
    return ServeError(f"the answer of {url} could not be read ({type(error).__name__}): is it an OpenAI-style API?")


def _refusal(status: int, body: object, url: str) -> AdapterHubError:
    message = _message(body) or f"the server at {url} refused with status {status}."
    code = body.get("code") if isinstance(body, dict) else None
    if code == "context_length_exceeded":
        return RequestTooLong(message)
    # A 404 without this code is an address that is no API, not a missing model.
    if status == 404:
        return AdapterNotFound(message) if code == "model_not_found" else UsageError(_NO_API.format(url=url))
    kinds: dict[int, type[AdapterHubError]] = {401: NotAuthorized, 403: NotAuthorized, 429: ServerBusy}
    return kinds.get(status, UsageError if status < 500 else ServeError)(message)


def _message(body: object) -> str | None:
    message = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(message).split()) if message else None
