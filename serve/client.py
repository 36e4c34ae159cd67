"""What the page and the terminal chat share as clients of the API: models, streamed answers, error messages."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adapterhub.errors import (
    AdapterHubError,
    AdapterNotFound,
    Conflict,
    NotAuthorized,
    RequestTooLong,
    ServeError,
    ServerBusy,
    UsageError,
)
from adapterhub.units import format_duration

if TYPE_CHECKING:
    from openai.types import Model
    from openai.types.chat import ChatCompletionChunk

log = logging.getLogger(__name__)

NO_KEY = "none"
"""Key for servers without keys: OpenAI's client requires one."""
CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 600.0
"""Time between two events of an answer, in seconds: a busy server may take long before the first."""

_NO_API = "the server at {url} has no API there: expected an address that ends in /v1. Check the URL."


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: str
    text: str

    def wire(self) -> dict[str, str]:
        """Return the message as the API takes it."""
        return {"role": self.role, "content": self.text}


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. A `seed` of None leaves it to the server; a temperature of 0 is greedy."""

    temperature: float
    max_tokens: int
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Scaled:
    """An adapter of a mix, and the scale of its update."""

    name: str
    scale: float

    def wire(self) -> dict[str, Any]:
        """Return the adapter as the API takes it."""
        return {"name": self.name, "scale": self.scale}


@dataclass(frozen=True)
class Loss:
    """Mean held-out loss, in nats per token."""

    data: str
    base: float
    adapter: float


@dataclass(frozen=True)
class ServedModel:
    """One entry of /v1/models: the base, or an adapter with its package's metadata."""

    name: str
    parent: str | None = None
    """Name of the base; None for the base itself."""
    root: str | None = None
    fingerprint: str | None = None
    digest: str | None = None
    method: str | None = None
    rank: int | None = None
    license: str | None = None
    losses: tuple[Loss, ...] = ()

    @property
    def is_base(self) -> bool:
        """Return whether this is the base, not an adapter."""
        return self.parent is None

    @classmethod
    def read(cls, model: Model) -> ServedModel:
        """Read the API's JSON. Fields that other OpenAI-compatible servers lack stay None."""
        extra = model.model_extra or {}
        lora = extra.get("lora") or {}
        losses = (Loss(e["data"], e["base_loss"], e["adapter_loss"]) for e in extra.get("evaluations") or ())
        facts = {key: extra.get(key) for key in ("parent", "root", "fingerprint", "digest", "license")}
        facts["license"] = facts["license"] or extra.get("licence")  # the name that older servers send
        return cls(model.id, **facts, method=lora.get("method"), rank=lora.get("rank"), losses=tuple(losses))


@dataclass
class Answer:
    """One answer while it arrives, with its figures. Times are in seconds since the request was sent."""

    model: str
    mix: tuple[Scaled, ...] = ()
    """Adapters of a mix; `model` is then the base."""
    text: str = ""
    tokens: list[str] = field(default_factory=list)
    """Tokens of the text, where they were requested."""
    digest: str | None = None
    """Digest of the adapter, where the server sends it."""
    num_tokens: int = 0
    prompt_tokens: int | None = None
    finish_reason: str | None = None
    first_token_s: float | None = None
    last_token_s: float = 0.0
    _sent: float = field(default_factory=time.monotonic)

    def add(self, chunk: ChatCompletionChunk) -> None:
        """Add a chunk that has arrived now."""
        for choice in chunk.choices:
            self.finish_reason = choice.finish_reason or self.finish_reason
            if choice.logprobs is not None:
                self.tokens += [token.token for token in choice.logprobs.content or ()]
            if choice.delta.content:
                self.last_token_s = time.monotonic() - self._sent
                self.first_token_s = self.first_token_s or self.last_token_s
                self.num_tokens += 1
                self.text += choice.delta.content
        if chunk.usage is not None:
            self.num_tokens, self.prompt_tokens = chunk.usage.completion_tokens, chunk.usage.prompt_tokens

    @property
    def name(self) -> str:
        """Name to show: the model, or the adapters of a mix with their scales."""
        return " + ".join(f"{part.name} × {part.scale:g}" for part in self.mix) or self.model

    def wire(self) -> dict[str, str | None]:
        """Return the answer as feedback has it."""
        return {"model": self.name, "digest": self.digest, "text": self.text}

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second after the first token; None for fewer than two tokens."""
        if self.first_token_s is None or self.num_tokens < 2 or self.last_token_s <= self.first_token_s:
            return None
        return (self.num_tokens - 1) / (self.last_token_s - self.first_token_s)

    def figures(self) -> str:
        """Return the speed, and whether the token limit cut the answer."""
        parts = []
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:.1f} tok/s")
        if self.first_token_s is not None:
            parts.append(f"{format_duration(self.first_token_s)} to first token")
        if self.finish_reason == "length":
            parts.append(f"cut at {self.num_tokens} tokens")
        return " · ".join(parts)

    def summary(self) -> str:
        """Return the name and the figures in one line."""
        return " · ".join(part for part in (self.name, self.figures()) if part)


def to_send(system: str | None, turns: list[Turn]) -> list[dict[str, str]]:
    """Return the messages of a request, without unanswered questions: chat templates require alternating turns."""
    answered = [
        turn
        for turn, following in zip(turns, [*turns[1:], None], strict=True)
        if not (turn.role == "user" and following is not None and following.role == "user")
    ]
    instructions = [Turn("system", system.strip())] if system and system.strip() else []
    return [turn.wire() for turn in (*instructions, *answered)]


def request_body(
    answer: Answer, messages: list[dict[str, str]], sampling: Sampling, *, wants_tokens: bool = False
) -> dict[str, Any]:
    """Return the arguments of the OpenAI client's `chat.completions.create`, for a stream with usage."""
    body: dict[str, Any] = {
        "model": answer.model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if wants_tokens:
        body["logprobs"] = True
    if answer.mix:
        body["extra_body"] = {"adapter": [part.wire() for part in answer.mix]}
    return body


def check_complete(answer: Answer, url: str) -> None:
    """Check that a stream has ended with a finish reason. Raises ServeError."""
    if answer.finish_reason is None:
        raise _broken(url)


def _broken(url: str) -> ServeError:
    return ServeError(
        f"the connection to {url} broke before the answer was complete: expected a finish reason. Ask again."
    )


def describe_error(error: Exception, url: str, *, has_begun: bool = False) -> AdapterHubError:
    """Return an error with a message for the user. `has_begun`: part of the answer has arrived."""
    import openai

    if isinstance(error, AdapterHubError):
        return error
    if isinstance(error, openai.APITimeoutError):
        return ServeError(f"the server at {url} did not respond in time: it may be busy. Ask again.")
    if isinstance(error, openai.APIConnectionError):
        return (
            _broken(url)
            if has_begun
            else ServeError(
                f"cannot connect to {url}: no server is listening there. Start one with 'adapterhub serve'."
            )
        )
    if isinstance(error, openai.APIStatusError):
        return _refusal(error.status_code, error.body, url)
    if isinstance(error, openai.APIError):
        return ServeError(_message(error.body) or str(error))
    log.warning("unexpected error while asking %s", url, exc_info=error)
    return ServeError(
        f"cannot read the response of {url} ({type(error).__name__}): expected an OpenAI-compatible API. Check the URL."
    )


def _refusal(status: int, body: object, url: str) -> AdapterHubError:
    message = _message(body) or f"the server at {url} refused the request (HTTP status {status}). See its log."
    code = body.get("code") if isinstance(body, dict) else None
    if code == "context_length_exceeded":
        return RequestTooLong(message)
    # A 404 without a code of ours means a wrong address, not a missing model.
    if status == 404:
        return UsageError(_NO_API.format(url=url)) if code in (None, "not_found") else AdapterNotFound(message)
    kinds: dict[int, type[AdapterHubError]] = {401: NotAuthorized, 403: NotAuthorized, 409: Conflict, 429: ServerBusy}
    return kinds.get(status, UsageError if status < 500 else ServeError)(message)


def _message(body: object) -> str | None:
    message = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(message).split()) if message else None
