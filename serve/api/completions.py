"""Completions: from a parsed request to engine requests, and from their chunks to OpenAI's responses and events."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from adapterhub.adapter import Adapter
from adapterhub.errors import AdapterHubError, UsageError
from serve.adapters.catalog import Published
from serve.api import schemas
from serve.api.prompts import too_long
from serve.api.request_limits import check_stop
from serve.api.services import Services
from serve.engine import AdapterScale, Delta, Engine, FinishReason, GenerationRequest, TokenLogprob

log = logging.getLogger(__name__)

UNEXPECTED = "the server failed unexpectedly: this is a bug. See the server's log."
"""Message for errors that are not AdapterHubError."""

DEFAULT_MAX_TOKENS = 512
"""Maximum answer length where the request has none and the model has room for it, in tokens."""


@dataclass(frozen=True)
class PreparedRequest:
    """A request with its adapters and prompt tokens resolved, and one engine request per choice."""

    id: str
    model: str
    fingerprint: str
    """Base and adapters of the completion: OpenAI's `system_fingerprint`."""
    adapters: tuple[Adapter, ...]
    prompt: tuple[int, ...]
    requests: tuple[GenerationRequest, ...]
    is_chat: bool
    created: int = field(default_factory=lambda: int(time.time()))


async def prepare_chat(services: Services, request: schemas.ChatRequest) -> PreparedRequest:
    """Prepare a chat completion. Raises AdapterNotFound, UsageError, RequestTooLong."""
    chosen, mix = _chosen(services, request)
    template_of = chosen[0].adapter if len(chosen) == 1 else None
    messages = [message.plain() for message in request.messages]
    prompt = await services.prompts.chat(messages, template_of, max_tokens=services.engine.max_model_len)
    ends = [template_of] if len(chosen) == 1 else [None, *(published.adapter for published in chosen)]
    end_tokens = await _end_tokens(services, request, ends)
    return _prepared(services, request, chosen, mix, prompt, end_tokens, request.wanted_logprobs, is_chat=True)


async def prepare_completion(services: Services, request: schemas.CompletionRequest) -> PreparedRequest:
    """Prepare a text completion. Raises AdapterNotFound, UsageError, RequestTooLong."""
    chosen, mix = _chosen(services, request)
    given = request.single_prompt()
    room = services.engine.max_model_len
    if isinstance(given, str):
        prompt = await services.prompts.text(given, max_tokens=room)
    else:
        prompt = services.prompts.check_tokens(given, max_tokens=room)
    end_tokens = await _end_tokens(services, request, [published.adapter for published in chosen])
    return _prepared(services, request, chosen, mix, prompt, end_tokens, request.logprobs, is_chat=False)


def _chosen(
    services: Services, request: schemas.ChatRequest | schemas.CompletionRequest
) -> tuple[list[Published], tuple[AdapterScale, ...]]:
    """Return the adapters of a request, from `model` or from the `adapter` extension."""
    by_model = services.catalog.find(request.model)
    wanted = request.choices() or ([schemas.AdapterChoice(name=by_model.name, scale=1.0)] if by_model else [])
    names = [choice.name for choice in wanted]
    found = [services.catalog.find(name) for name in names]
    twice = sorted(name for name, times in Counter(names).items() if times > 1)
    if twice:
        raise UsageError(f"adapter has {', '.join(twice)} more than once: expected each name once. Give it one scale.")
    if by_model is not None and by_model.name not in names:
        raise UsageError(
            f"model {by_model.name!r} is not in adapter ({', '.join(names)}): expected one of those, or the base. Send "
            f"model {services.catalog.base_name!r}."
        )
    chosen = [published for published in found if published is not None]
    if len(chosen) < len(found):
        raise UsageError(
            "adapter has the name of the base model: expected adapters only. Remove it: the base is always used."
        )
    mix = tuple(AdapterScale(p.adapter.digest, c.scale) for p, c in zip(chosen, wanted, strict=True))
    return chosen, mix


async def _end_tokens(
    services: Services, request: schemas.ChatRequest | schemas.CompletionRequest, adapters: Sequence[Adapter | None]
) -> list[int]:
    """Return the tokens that end an answer of `adapters` (None: the base), and those that are stop strings."""
    named = [services.prompts.special_token(stop) for stop in request.stop_strings]
    ends = [] if request.ignore_eos else [await services.prompts.end_tokens(adapter) for adapter in adapters]
    return [token for token in (*named, *chain.from_iterable(ends)) if token is not None]


def _prepared(
    services: Services,
    request: schemas.ChatRequest | schemas.CompletionRequest,
    chosen: list[Published],
    mix: tuple[AdapterScale, ...],
    prompt: tuple[int, ...],
    end_tokens: list[int],
    top_logprobs: int | None,
    *,
    is_chat: bool,
) -> PreparedRequest:
    if not prompt:
        raise UsageError("the prompt has no tokens: expected at least one. Send some text.")
    room = services.engine.max_model_len - len(prompt)
    if room < 1:
        raise too_long(f"{len(prompt)} tokens", services.engine.max_model_len)
    max_tokens = request.wanted_tokens or min(DEFAULT_MAX_TOKENS, room)
    chats = [published.adapter.manifest.chat for published in chosen]
    extra_stop = [stop for chat in chats for stop in chat.stop]
    name = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
    choices = request.sampling(
        max_tokens=max_tokens,
        extra_stop=extra_stop,
        end_tokens=end_tokens,
        top_logprobs=top_logprobs,
    )
    check_stop(choices[0].stop)
    weight = min((published.weight for published in chosen), default=1.0)
    requests = tuple(
        GenerationRequest(f"{name}-{index}", prompt, sampling, mix, weight=weight)
        for index, sampling in enumerate(choices)
    )
    parts = [str(services.catalog.base.ref.fingerprint)[:16], *(f"{a.digest[:19]}x{a.scale:g}" for a in mix)]
    adapters = tuple(published.adapter for published in chosen)
    return PreparedRequest(name, request.model, "+".join(parts), adapters, prompt, requests, is_chat)


async def generate(services: Services, prepared: PreparedRequest) -> AsyncGenerator[tuple[int, Delta], None]:
    """Yield (index of the choice, chunk). Lease the adapters meanwhile; closing aborts the unfinished choices."""
    async with services.cache.lease(prepared.adapters):
        timers = [services.metrics.request(prepared.model, len(prepared.prompt)) for _ in prepared.requests]
        async with aclosing(_merged(services.engine, prepared.requests)) as chunks:
            async for index, chunk in chunks:
                timers[index].record(chunk)
                yield index, chunk


async def _merged(engine: Engine, requests: tuple[GenerationRequest, ...]) -> AsyncGenerator[tuple[int, Delta], None]:
    if len(requests) == 1:
        async with aclosing(engine.generate(requests[0])) as chunks:
            async for chunk in chunks:
                yield 0, chunk
        return
    queue: asyncio.Queue[tuple[int, Delta] | BaseException] = asyncio.Queue()

    async def pump(index: int, request: GenerationRequest) -> None:
        try:
            async with aclosing(engine.generate(request)) as chunks:
                async for chunk in chunks:
                    queue.put_nowait((index, chunk))
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # of any kind: without it, the other choices would be waited for forever
            queue.put_nowait(error)

    pumps = [asyncio.create_task(pump(index, request)) for index, request in enumerate(requests)]
    try:
        open_choices = len(requests)
        while open_choices:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            open_choices -= item[1].finish_reason is not None
            yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


@dataclass
class _Choice:
    """A choice of a completion while its chunks arrive."""

    text: str = ""
    num_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)


async def completion_response(services: Services, prepared: PreparedRequest) -> dict[str, Any]:
    """Return the whole completion in OpenAI's form."""
    choices = [_Choice() for _ in prepared.requests]
    async with aclosing(generate(services, prepared)) as chunks:
        async for index, chunk in chunks:
            choice = choices[index]
            choice.text += chunk.text
            choice.num_tokens = chunk.num_tokens
            choice.num_cached_tokens = chunk.num_cached_tokens
            choice.finish_reason = chunk.finish_reason
            choice.logprobs += chunk.logprobs
    kind = "chat.completion" if prepared.is_chat else "text_completion"
    return {
        **_head(prepared, kind),
        "choices": [_whole_choice(prepared, index, choice) for index, choice in enumerate(choices)],
        "usage": schemas.usage(
            len(prepared.prompt),
            sum(choice.num_tokens for choice in choices),
            cached_tokens=choices[0].num_cached_tokens,
        ),
    }


async def completion_events(
    services: Services, prepared: PreparedRequest, *, include_usage: bool
) -> AsyncGenerator[str, None]:
    """Yield the completion as server-sent events in OpenAI's form; an error after the first event is an event too."""
    kind = "chat.completion.chunk" if prepared.is_chat else "text_completion"
    head = _head(prepared, kind)
    counts = [0] * len(prepared.requests)
    num_cached_tokens = 0
    try:
        async with aclosing(generate(services, prepared)) as chunks:
            async for index, chunk in chunks:
                is_first = counts[index] == 0
                counts[index] = chunk.num_tokens
                if index == 0:  # the other choices may share what the first computed
                    num_cached_tokens = chunk.num_cached_tokens
                if chunk.text or chunk.logprobs or chunk.finish_reason or is_first:
                    yield _event({**head, "choices": [_delta_chunk(prepared, index, chunk, is_first=is_first)]})
        if include_usage:
            usage = schemas.usage(len(prepared.prompt), sum(counts), cached_tokens=num_cached_tokens)
            yield _event({**head, "choices": [], "usage": usage})
    except AdapterHubError as error:
        if not any(counts):
            raise  # nothing was sent yet: the caller can still respond with a status
        yield _event(schemas.error_body(str(error), code=error.code, kind=schemas.kind_of_error(error.http_status)))
    except Exception:
        if not any(counts):
            raise
        log.exception("the stream of %s failed", prepared.id)
        yield _event(schemas.error_body(UNEXPECTED, code="internal_error", kind="server_error"))
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _head(prepared: PreparedRequest, kind: str) -> dict[str, Any]:
    return {
        "id": prepared.id,
        "object": kind,
        "created": prepared.created,
        "model": prepared.model,
        "system_fingerprint": prepared.fingerprint,
    }


def _whole_choice(prepared: PreparedRequest, index: int, choice: _Choice) -> dict[str, Any]:
    reason = choice.finish_reason.value if choice.finish_reason else None
    logprobs = _logprobs(prepared, choice.logprobs)
    if prepared.is_chat:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}
    return {"index": index, "text": choice.text, "logprobs": logprobs, "finish_reason": reason}


def _delta_chunk(prepared: PreparedRequest, index: int, chunk: Delta, *, is_first: bool) -> dict[str, Any]:
    reason = chunk.finish_reason.value if chunk.finish_reason else None
    logprobs = _logprobs(prepared, list(chunk.logprobs))
    if not prepared.is_chat:
        return {"index": index, "text": chunk.text, "logprobs": logprobs, "finish_reason": reason}
    delta = {"role": "assistant", "content": chunk.text} if is_first else {"content": chunk.text}
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _logprobs(prepared: PreparedRequest, logprobs: list[TokenLogprob]) -> dict[str, Any] | None:
    if not logprobs:
        return None
    return schemas.chat_logprobs(logprobs) if prepared.is_chat else schemas.completion_logprobs(logprobs)
