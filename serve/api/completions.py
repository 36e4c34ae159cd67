"""From a parsed request to its answer: prompt, leases, one engine request per choice, OpenAI's bodies and events."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
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

DEFAULT_MAX_TOKENS = 512
"""tokens of a chat answer when the client does not say, if the model has room for them"""


@dataclass(frozen=True)
class PreparedRequest:
    """A request made concrete: which adapters, which tokens, one engine request per choice."""

    id: str
    model: str
    fingerprint: str
    """base and adapters that answer: OpenAI's `system_fingerprint`"""
    adapters: tuple[Adapter, ...]
    prompt: tuple[int, ...]
    requests: tuple[GenerationRequest, ...]
    is_chat: bool
    created: int = field(default_factory=lambda: int(time.time()))


async def prepare_chat(services: Services, request: schemas.ChatRequest) -> PreparedRequest:
    """Raises AdapterNotFound, UsageError, RequestTooLong."""
    chosen, mix = _chosen(services, request)
    template_of = chosen[0].adapter if len(chosen) == 1 else None
    messages = [message.plain() for message in request.messages]
    prompt = await services.prompts.chat(messages, template_of, max_tokens=services.engine.max_model_len)
    return _question(services, request, chosen, mix, prompt, request.wanted_logprobs, is_chat=True)


async def prepare_completion(services: Services, request: schemas.CompletionRequest) -> PreparedRequest:
    """Raises AdapterNotFound, UsageError, RequestTooLong."""
    chosen, mix = _chosen(services, request)
    given = request.single_prompt()
    room = services.engine.max_model_len
    if isinstance(given, str):
        prompt = await services.prompts.text(given, max_tokens=room)
    else:
        prompt = services.prompts.check_tokens(given, max_tokens=room)
    return _question(services, request, chosen, mix, prompt, request.logprobs, is_chat=False)


def _chosen(
    services: Services, request: schemas.ChatRequest | schemas.CompletionRequest
) -> tuple[list[Published], tuple[AdapterScale, ...]]:
    """The adapters a request means, by `model` or by the `adapter` extension."""
    by_model = services.catalog.find(request.model)
    wanted = request.choices() or ([schemas.AdapterChoice(name=by_model.name, scale=1.0)] if by_model else [])
    names = [choice.name for choice in wanted]
    found = [services.catalog.find(name) for name in names]
    twice = sorted(name for name, times in Counter(names).items() if times > 1)
    if twice:
        raise UsageError(f"adapter names {', '.join(twice)} more than once: name each once, with its scale.")
    if by_model is not None and by_model.name not in names:
        raise UsageError(
            f"model is {by_model.name!r} and adapter names {', '.join(names)}: they must agree, or model be "
            f"{services.catalog.base_name!r}."
        )
    chosen = [published for published in found if published is not None]
    if len(chosen) < len(found):
        raise UsageError("adapter names the base model, which is always there: name adapters only.")
    mix = tuple(AdapterScale(p.adapter.digest, c.scale) for p, c in zip(chosen, wanted, strict=True))
    return chosen, mix


def _question(
    services: Services,
    request: schemas.ChatRequest | schemas.CompletionRequest,
    chosen: list[Published],
    mix: tuple[AdapterScale, ...],
    prompt: tuple[int, ...],
    top_logprobs: int | None,
    *,
    is_chat: bool,
) -> PreparedRequest:
    if not prompt:
        raise UsageError("the prompt has no tokens: send some text.")
    room = services.engine.max_model_len - len(prompt)
    if room < 1:
        raise too_long(f"{len(prompt)} tokens", services.engine.max_model_len)
    max_tokens = request.wanted_tokens or min(DEFAULT_MAX_TOKENS, room)
    chats = [published.adapter.manifest.chat for published in chosen]
    extra_stop = [stop for chat in chats for stop in chat.stop]
    end_tokens = [] if request.ignore_eos else [services.prompts.end_token(chat.eos) for chat in chats]
    name = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
    choices = request.sampling(
        max_tokens=max_tokens,
        extra_stop=extra_stop,
        end_tokens=[token for token in end_tokens if token is not None],
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


async def answer(services: Services, question: PreparedRequest) -> AsyncGenerator[tuple[int, Delta], None]:
    """(choice, chunk) as they come; leases the adapters for as long as it runs, aborts what is left when closed."""
    async with services.cache.lease(question.adapters):
        timers = [services.metrics.request(question.model, len(question.prompt)) for _ in question.requests]
        async with aclosing(_merged(services.engine, question.requests)) as chunks:
            async for index, chunk in chunks:
                timers[index].saw(chunk)
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
        except BaseException as error:  # whatever it is: the others would be waited for without end
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
    text: str = ""
    num_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)


async def completion_response(services: Services, question: PreparedRequest) -> dict[str, Any]:
    """The answer in one piece."""
    choices = [_Choice() for _ in question.requests]
    async with aclosing(answer(services, question)) as chunks:
        async for index, chunk in chunks:
            choice = choices[index]
            choice.text += chunk.text
            choice.num_tokens = chunk.num_tokens
            choice.num_cached_tokens = chunk.num_cached_tokens
            choice.finish_reason = chunk.finish_reason
            choice.logprobs += chunk.logprobs
    kind = "chat.completion" if question.is_chat else "text_completion"
    return {
        **_head(question, kind),
        "choices": [_whole_choice(question, index, choice) for index, choice in enumerate(choices)],
        "usage": schemas.usage(
            len(question.prompt),
            sum(choice.num_tokens for choice in choices),
            cached_tokens=choices[0].num_cached_tokens,
        ),
    }


async def event_stream(
    services: Services, question: PreparedRequest, *, include_usage: bool
) -> AsyncGenerator[str, None]:
    """Server-sent events in OpenAI's form; an error in mid-stream is an event, too."""
    kind = "chat.completion.chunk" if question.is_chat else "text_completion"
    head = _head(question, kind)
    counts = [0] * len(question.requests)
    shared = 0
    try:
        async with aclosing(answer(services, question)) as chunks:
            async for index, chunk in chunks:
                is_first = counts[index] == 0
                counts[index] = chunk.num_tokens
                shared = (
                    chunk.num_cached_tokens if index == 0 else shared
                )  # the others may share what the first computed
                if chunk.text or chunk.logprobs or chunk.finish_reason or is_first:
                    yield _event({**head, "choices": [_delta_chunk(question, index, chunk, is_first=is_first)]})
        if include_usage:
            yield _event(
                {**head, "choices": [], "usage": schemas.usage(len(question.prompt), sum(counts), cached_tokens=shared)}
            )
    except AdapterHubError as error:
        if not any(counts):
            raise  # nothing was sent yet: the caller can still answer with a status
        yield _event(schemas.error_body(str(error), code=error.code, kind=schemas.kind_of_error(error.http_status)))
    except Exception:
        if not any(counts):
            raise
        log.exception("the stream of %s failed", question.id)
        said = "the server failed unexpectedly; its log says more."
        yield _event(schemas.error_body(said, code="internal_error", kind="server_error"))
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _head(question: PreparedRequest, kind: str) -> dict[str, Any]:
    return {
        "id": question.id,
        "object": kind,
        "created": question.created,
        "model": question.model,
        "system_fingerprint": question.fingerprint,
    }


def _whole_choice(question: PreparedRequest, index: int, choice: _Choice) -> dict[str, Any]:
    reason = choice.finish_reason.value if choice.finish_reason else None
    logprobs = _logprobs(question, choice.logprobs)
    if question.is_chat:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}
    return {"index": index, "text": choice.text, "logprobs": logprobs, "finish_reason": reason}


def _delta_chunk(question: PreparedRequest, index: int, chunk: Delta, *, is_first: bool) -> dict[str, Any]:
    reason = chunk.finish_reason.value if chunk.finish_reason else None
    logprobs = _logprobs(question, list(chunk.logprobs))
    if not question.is_chat:
        return {"index": index, "text": chunk.text, "logprobs": logprobs, "finish_reason": reason}
    delta = {"role": "assistant", "content": chunk.text} if is_first else {"content": chunk.text}
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _logprobs(question: PreparedRequest, logprobs: list[TokenLogprob]) -> dict[str, Any] | None:
    if not logprobs:
        return None
    return schemas.chat_logprobs(logprobs) if question.is_chat else schemas.completion_logprobs(logprobs)
