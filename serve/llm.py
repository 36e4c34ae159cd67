"""Answers from several adapters on one base inside a Python process, without a server: what `adapterhub.LLM` is."""

from __future__ import annotations

import asyncio
import difflib
import queue
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar, Unpack

from pydantic import ValidationError

from adapterhub.adapter import Adapter, AdapterRef, BaseName
from adapterhub.bases.store import stored_base
from adapterhub.errors import AdapterNotFound, EngineStopped, UsageError
from adapterhub.registry.registry import Registry
from serve.api import schemas
from serve.api.completions import PreparedRequest, generate, prepare_chat, prepare_completion
from serve.api.services import Services
from serve.api.validation_errors import described
from serve.config import LocalEngineConfig, ServeConfig, parse_dtype
from serve.engine import FinishReason
from serve.server import Report, build_services

T = TypeVar("T")
Messages = str | Sequence[Mapping[str, str]]
"""One user message, or a conversation: {"role": ..., "content": ...} for each message."""
AdapterOption = str | Mapping[str, float] | None
"""An adapter's name or reference, several with their scales, or None: the bare base."""


class SamplingOptions(TypedDict, total=False):
    """How an answer is sampled: names, defaults and bounds are those of the HTTP API (docs/api.md)."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop: str | list[str]
    stop_token_ids: list[int]
    ignore_eos: bool
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[str, float]
    response_format: dict[str, Any]
    structured_outputs: dict[str, Any]


@dataclass(frozen=True)
class Completion:
    """A finished answer; `str()` of it is its text."""

    text: str
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_tokens: int
    """Tokens of the answer."""
    num_cached_tokens: int
    """Prompt tokens found in the prefix cache."""
    adapters: tuple[str, ...]
    """Digests of the adapters that answered; empty for the bare base."""

    def __str__(self) -> str:
        return self.text


class LLM:
    """A quantized base in memory that answers with any adapter, chosen per request; requests of several threads share
    a batch. A context manager: leaving it closes the engine.
    """

    def __init__(
        self,
        base: str | Path,
        *,
        adapters: Mapping[str, str | Path | AdapterRef | Adapter] | None = None,
        registry: Registry | None = None,
        dtype: str | None = None,
        device: str | None = None,
        max_loras: int = 16,
        replay_probe: bool = True,
        engine: LocalEngineConfig | None = None,
        report: Report = lambda line: None,
    ) -> None:
        """Load `base` (a known name, a Hub id or a folder; fetched unless it is here) and `adapters` by name.

        An adapter that a request names and that was not given here is resolved in `registry` when it is first used.
        `report` is called with a line for each thing that was chosen, and why. Raises InvalidRef, BaseNotFound,
        UsageError, and what `load` raises.
        """
        name = BaseName.parse(base) if isinstance(base, str) else BaseName(folder=base)
        stored_base(base)
        config = ServeConfig(
            base=name,
            max_loras=max_loras,
            replay_probe=replay_probe,
            dtype=parse_dtype(dtype) if dtype else None,
            device=device,
            engine=engine or LocalEngineConfig(),
        )
        self._gate = threading.Lock()
        """Held while work is given to the loop: nothing is given to one that is ending."""
        self._ending: Future[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llm", daemon=True)
        self._thread.start()
        self._services: Services | None = None
        try:
            self._call(self._start(config, registry or Registry(), report))
            for called, ref in (adapters or {}).items():
                self.load(called, ref)
        except BaseException:
            self.close()
            raise

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The adapters that answer here, by name."""
        return {published.name: published.adapter for published in self._open.catalog.list()}

    def load(self, name: str, ref: str | Path | AdapterRef | Adapter | None = None) -> Adapter:
        """Resolve and verify an adapter, replay its probe, and let requests use it as `name`; return it.

        `ref` is a registry name, `owner/name@revision`, a digest, a folder or an opened adapter; by default `name`. A
        name that is in use is moved to the new adapter. Raises AdapterNotFound, PackageError, Incompatible and HubError
        kinds.
        """
        return self._call(self._load(name, _parsed(name if ref is None else ref)))

    def unload(self, name: str) -> None:
        """Forget a name; its adapter is unloaded when the last answer that uses it ends. Raises AdapterNotFound."""
        catalog = self._open.catalog

        async def unload() -> None:
            catalog.unload(name)

        self._call(unload())

    def chat(
        self, messages: Messages, *, adapter: AdapterOption = None, **sampling: Unpack[SamplingOptions]
    ) -> Completion:
        """Answer a conversation through the chat template of the adapter, or of the base.

        Raises AdapterNotFound, UsageError, RequestTooLong, ServerBusy, RequestFailed, EngineStopped, and what loading
        an adapter raises.
        """
        return self._call(self._finished(lambda: self._chat(messages, adapter, sampling)))

    def chat_batch(
        self,
        conversations: Sequence[Messages],
        *,
        adapters: Sequence[AdapterOption],
        **sampling: Unpack[SamplingOptions],
    ) -> list[Completion]:
        """Answer several conversations in one batch, each with its own adapter, in the order given. Raises as `chat`.

        Raises UsageError unless there are as many `adapters` as `conversations`.
        """
        if len(adapters) != len(conversations):
            raise UsageError(
                f"{len(conversations)} conversations and {len(adapters)} adapters: expected one adapter for each "
                "conversation. Write None for the bare base."
            )

        async def together() -> list[Completion]:
            pairs = zip(conversations, adapters, strict=True)
            answers = [
                asyncio.ensure_future(self._finished(partial(self._chat, messages, adapter, sampling)))
                for messages, adapter in pairs
            ]
            try:
                return await asyncio.gather(*answers)
            finally:
                for answer in answers:  # where one fails, the others would run for nobody
                    answer.cancel()

        return self._call(together())

    def generate(
        self, prompt: str, *, adapter: AdapterOption = None, **sampling: Unpack[SamplingOptions]
    ) -> Completion:
        """Continue a plain text, without a chat template; 16 tokens unless `max_tokens` is given. Raises as `chat`."""
        return self._call(self._finished(lambda: self._text(prompt, adapter, sampling)))

    def stream(
        self, messages: Messages, *, adapter: AdapterOption = None, **sampling: Unpack[SamplingOptions]
    ) -> Iterator[str]:
        """Yield an answer's text as it is generated; closing the iterator aborts it. Raises as `chat`."""
        deltas: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()

        async def pump() -> None:
            try:
                prepared = await self._chat(messages, adapter, sampling)
                async with aclosing(generate(self._open, prepared)) as chunks:
                    async for _, chunk in chunks:
                        deltas.put(chunk.text)
            except BaseException as error:
                deltas.put(error)  # a close ends it with CancelledError, which nobody waits for
                raise
            deltas.put(None)

        running = self._submit(pump())
        try:
            while (delta := deltas.get()) is not None:
                if isinstance(delta, asyncio.CancelledError):
                    raise _closed()
                if isinstance(delta, BaseException):
                    raise delta
                if delta:
                    yield delta
        finally:
            running.cancel()

    def close(self) -> None:
        """Abort what runs, unload the base and all adapters. Closing twice is no error."""
        with self._gate:
            if self._ending is None:
                self._ending = asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop)
                # Also when the thread that waits below is interrupted.
                self._ending.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._loop.stop))
        try:
            self._ending.result()
        finally:
            self._thread.join()
            with self._gate:
                self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _open(self) -> Services:
        self._check_open()
        assert self._services is not None, "set by __init__, which closes on any error"
        return self._services

    def _check_open(self) -> None:
        if self._ending is not None:
            raise _closed()

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start `work` on the engine's event loop. Raises EngineStopped after `close`."""
        with self._gate:
            if self._ending is None:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise _closed()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the engine's event loop; a caller that is interrupted cancels it."""
        running = self._submit(work)
        try:
            return running.result()
        except CancelledError as error:  # by `close`, in another thread
            raise _closed() from error
        except BaseException:
            running.cancel()
            raise

    async def _start(self, config: ServeConfig, registry: Registry, report: Report) -> None:
        # Kept here, not by the caller, who may be interrupted meanwhile and closes what was started.
        self._services = await build_services(config, registry, report=report)

    async def _load(self, name: str, ref: AdapterRef) -> Adapter:
        published = await self._open.catalog.load(name, ref, replace=True, may_wait=True)
        return published.adapter

    async def _chat(self, messages: Messages, adapter: AdapterOption, sampling: SamplingOptions) -> PreparedRequest:
        _check_options(sampling)
        conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        fields = {"messages": conversation, **await self._choice(adapter), **sampling}
        return await prepare_chat(self._open, _validated(schemas.ChatRequest, fields))

    async def _text(self, prompt: str, adapter: AdapterOption, sampling: SamplingOptions) -> PreparedRequest:
        _check_options(sampling)
        fields = {"prompt": prompt, **await self._choice(adapter), **sampling}
        return await prepare_completion(self._open, _validated(schemas.CompletionRequest, fields))

    async def _choice(self, adapter: AdapterOption) -> dict[str, Any]:
        """Return the request's fields `model` and `adapter`; load adapters that were never loaded."""
        catalog = self._open.catalog
        scales = _scales(adapter)
        for name in scales:
            try:
                catalog.find(name)
            except AdapterNotFound:
                await self._load(name, AdapterRef.parse(name))
        choices = [{"name": name, "scale": scale} for name, scale in scales.items()]
        return {"model": catalog.base_name, "adapter": choices or None}

    async def _finished(self, prepare: Callable[[], Coroutine[Any, Any, PreparedRequest]]) -> Completion:
        prepared = await prepare()
        text = ""
        async with aclosing(generate(self._open, prepared)) as chunks:
            async for _, chunk in chunks:
                text += chunk.text
                last = chunk
        assert last.finish_reason is not None, "the last chunk has one"
        return Completion(
            text,
            last.finish_reason,
            num_prompt_tokens=len(prepared.prompt),
            num_tokens=last.num_tokens,
            num_cached_tokens=last.num_cached_tokens,
            adapters=tuple(adapter.digest for adapter in prepared.adapters),
        )

    async def _shut_down(self) -> None:
        running = asyncio.all_tasks() - {asyncio.current_task()}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        if (services := self._services) is None:
            return
        for published in services.catalog.list():
            services.catalog.unload(published.name)
            await services.cache.evict(published.adapter.digest)
        await services.engine.close()


def _closed() -> EngineStopped:
    return EngineStopped("this LLM is closed: create another one.")


def _check_options(sampling: SamplingOptions) -> None:
    """Refuse fields of the HTTP API that ask for something else than one answer's text (n, stream, logprobs)."""
    known = SamplingOptions.__annotations__
    for name in sampling:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"nearest: {near[0]}" if near else f"there are {', '.join(known)}"
            raise UsageError(f"{name} is no sampling option of an answer ({hint}). Leave it out.")


def _scales(adapter: AdapterOption) -> dict[str, float]:
    """Return name -> scale of a request's adapters. Raises UsageError for an option of another type."""
    named = {adapter: 1.0} if isinstance(adapter, str) else adapter or {}
    if isinstance(named, Mapping) and all(isinstance(name, str) for name in named):
        return dict(named)
    raise UsageError(
        f"adapter is of type {type(adapter).__name__}: expected a name or reference as text, a mapping of them to "
        "scales, or None. `load(name, ref)` gives a folder or an opened adapter a name."
    )


def _parsed(ref: str | Path | AdapterRef | Adapter) -> AdapterRef:
    if isinstance(ref, Adapter):
        return AdapterRef(folder=ref.path)
    if isinstance(ref, Path):
        return AdapterRef(folder=ref)
    if isinstance(ref, str):
        return AdapterRef.parse(ref)
    if isinstance(ref, AdapterRef):
        return ref
    raise UsageError(
        f"an adapter is of type {type(ref).__name__}: expected a reference, a folder or an opened adapter."
    )


_R = TypeVar("_R", schemas.ChatRequest, schemas.CompletionRequest)


def _validated(kind: type[_R], fields: dict[str, Any]) -> _R:
    """Return the request that `fields` describe. Raises UsageError that names each field that is wrong."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise UsageError(f"{described([_in_body(dict(fault)) for fault in error.errors()])[0]}.") from error


def _in_body(fault: dict[str, Any]) -> dict[str, Any]:
    """Return a fault as FastAPI reports it, with the part of the request before the field."""
    return {**fault, "loc": ("body", *fault["loc"])}
