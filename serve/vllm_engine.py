"""vLLM as the engine: adapters checked here, loaded there under their digests, answers passed on.

What vLLM does not check or survives badly (an adapter of another base, a folder that is gone, a failed reload) does not
reach it. Any number of servers, ours or running already; an adapter is loaded when every one that answers has it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adapterhub.adapter import Adapter
from adapterhub.base_store import StoredBase
from adapterhub.errors import (
    AdapterHubError,
    AdapterNoEffect,
    AdapterNotFound,
    AdapterUnsupported,
    EngineStopped,
    IncompatibleBase,
    UsageError,
)
from adapterhub.files import new_folder
from adapterhub.lora_config import CONFIG_NAME, WEIGHTS_NAME
from serve.engine import Chunk, EngineStatus, FinishReason, GenerationRequest, Precision, TokenLogprob
from serve.lora_weights import EmbeddingUpdate, FullWeight, Weights, read_weights
from serve.vllm_process import TESTED, VllmProcess
from serve.vllm_server import VllmServer

log = logging.getLogger(__name__)

Report = Callable[[str], None]

WATCH_S = 2.0
"""between looks at a server's health"""
ANSWER_S = 10.0
"""a health request unanswered for this long is a server that hangs"""
MAX_STARTS = 5
"""failed starts in a row after which a server of ours is given up"""


@dataclass(eq=False)
class _Place:
    """One server, and what is known of it."""

    server: VllmServer
    base_id: str
    """what it calls the base"""
    process: VllmProcess | None = None
    is_up: bool = True
    down: asyncio.Event = field(default_factory=asyncio.Event)
    num_open: int = 0
    reason: str = "ready"


class VllmEngine:
    """serve.engine.Engine over one or many vLLM servers; `start` makes one that is ready."""

    def __init__(
        self, base: StoredBase, tokenizer: Any, places: Sequence[_Place], *, folder: Path, max_lora_rank: int,
        precision: Precision, max_model_len: int, report: Report,
    ) -> None:  # fmt: skip
        self.max_model_len = max_model_len
        self.dtype = precision.dtype
        self.precision = precision
        self._base = base
        self._tokenizer = tokenizer
        self._places = list(places)
        self._folder = folder
        self._max_lora_rank = max_lora_rank
        self._report = report
        self._loaded: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, int]] | None = None
        self._ended: str | None = None
        self._watches = [asyncio.create_task(self._watch(place)) for place in self._places]

    @classmethod
    async def start(
        cls, base: StoredBase, base_name: str, tokenizer: Any, *, processes: Sequence[VllmProcess] = (),
        endpoints: Sequence[str] = (), key: str | None = None, folder: Path, max_lora_rank: int,
        precision: Precision, report: Report,
    ) -> VllmEngine:  # fmt: skip
        """Wait until every server answers, and look at each. Raises EngineStopped, UsageError, IncompatibleBase."""
        places: list[_Place] = []
        servers: list[VllmServer] = []
        lengths: list[int] = []
        try:
            for process in (*processes, *(None for _ in endpoints)):
                if process is not None:
                    report(f"vLLM {process.found.version}: starting (its log: {process.log})")
                    servers.append(await process.start())
                else:
                    servers.append(VllmServer(endpoints[len(servers) - len(processes)], key))
                base_id, length = await _look_at(servers[-1], base, base_name, report)
                places.append(_Place(servers[-1], base_id, process))
                lengths.append(length)
        except BaseException:
            for server in servers:
                await server.close()
            for process in processes:
                await asyncio.to_thread(process.stop)
            raise
        return cls(
            base, tokenizer, places, folder=folder, max_lora_rank=max_lora_rank, precision=precision,
            max_model_len=min(lengths), report=report,
        )  # fmt: skip

    async def load(self, adapter: Adapter) -> None:
        await asyncio.to_thread(self._check_fits, adapter)
        folder = await asyncio.to_thread(self._keep, adapter)
        name, done = name_of(adapter.digest), []
        try:
            for place in self._up():
                await place.server.load(name, folder)
                done.append(place)
        except BaseException:
            for place in done:
                with suppress(AdapterHubError):
                    await place.server.unload(name)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._loaded[name] = folder

    async def unload(self, digest: str) -> None:
        name = name_of(digest)
        folder = self._loaded.pop(name, None)
        for place in self._places:
            with suppress(EngineStopped):  # a server that is down has forgotten it
                await place.server.unload(name)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        place = min(self._up(), key=lambda one: one.num_open)
        body = _body(request, _model(request, place))
        place.num_open += 1
        try:
            async with aclosing(self._events(place, body)) as events:
                async for chunk in _chunks(events, request, self._tokenizer):
                    yield chunk
        finally:
            place.num_open -= 1

    def status(self) -> EngineStatus:
        running = sum(place.num_open for place in self._places)
        if self._ended is not None:
            return EngineStatus(False, self._ended, num_running=running, has_ended=True)
        down = [f"{place.server.url}: {place.reason}" for place in self._places if not place.is_up]
        is_ready = len(down) < len(self._places)
        return EngineStatus(is_ready, "; ".join(down) or "ready", num_running=running)

    async def close(self) -> None:
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        for place in self._places:
            await place.server.close()
            if place.process is not None:
                await asyncio.to_thread(place.process.stop)
        for folder in self._loaded.values():
            shutil.rmtree(folder, ignore_errors=True)

    def _up(self) -> list[_Place]:
        found = [place for place in self._places if place.is_up]
        if not found:
            raise EngineStopped(f"no vLLM server answers ({self.status().reason}): ask again in a moment.")
        return found

    async def _events(self, place: _Place, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The events of one answer. A server that has lost the adapter by a restart gets it again, once."""
        try:
            async with aclosing(_until(place.down, place.server.stream(body))) as events:
                async for event in events:
                    yield event
            return
        except AdapterNotFound:
            if body["model"] not in self._loaded:
                raise
        await self._restore(place)
        async with aclosing(_until(place.down, place.server.stream(body))) as events:
            async for event in events:
                yield event

    async def _restore(self, place: _Place) -> None:
        for name, folder in list(self._loaded.items()):
            await place.server.load(name, folder)

    async def _watch(self, place: _Place) -> None:
        """Notice a server that is gone or hangs; start ours again, wait for others."""
        failed_starts = 0
        while True:
            await asyncio.sleep(WATCH_S)
            is_gone = place.process is not None and not place.process.is_running
            if not is_gone and await place.server.is_healthy(timeout_s=ANSWER_S):
                if not place.is_up:
                    await self._take_back(place)
                continue
            self._take_down(place, "its process ended" if is_gone else "it does not answer")
            if place.process is None:
                continue
            try:
                await self._start_again(place, delay_s=min(60.0, 2.0**failed_starts) if failed_starts else 0.0)
                failed_starts = 0
            except EngineStopped as error:
                failed_starts += 1
                place.reason = str(error)
                if failed_starts == MAX_STARTS:
                    self._ended = f"vLLM failed to start {MAX_STARTS} times; the last time: {error}"
                    return

    async def _start_again(self, place: _Place, *, delay_s: float) -> None:
        assert place.process is not None
        await asyncio.sleep(delay_s)
        self._report(f"vLLM at {place.server.url}: {place.reason}; starting it again")
        await asyncio.to_thread(place.process.kill)
        await place.server.close()
        place.server = await place.process.start()
        await self._take_back(place)

    def _take_down(self, place: _Place, reason: str) -> None:
        if place.is_up:
            log.warning("vLLM at %s: %s", place.server.url, reason)
        place.is_up, place.reason = False, reason
        place.down.set()

    async def _take_back(self, place: _Place) -> None:
        """Only with every adapter that is published may it answer again."""
        try:
            await self._restore(place)
        except AdapterHubError as error:
            place.reason = str(error)
            return
        place.is_up, place.reason, place.down = True, "ready", asyncio.Event()
        self._report(f"vLLM at {place.server.url} answers again, with {len(self._loaded)} adapters")

    def _check_fits(self, adapter: Adapter) -> None:
        """Everything vLLM answers with a 500, or takes without a word, said properly before."""
        weights = read_weights(
            adapter, device=torch.device("cpu"), dtype_of=lambda dtype: dtype, max_rank=self._max_lora_rank
        )
        _check_kinds(adapter, weights)
        if self._shapes is None:
            self._shapes = module_shapes(self._base)
        check_shapes(adapter, weights, self._shapes)

    def _keep(self, adapter: Adapter) -> Path:
        """A copy of the adapter's own: vLLM may read the folder again at any time, and dies when it is gone."""
        target = self._folder / name_of(adapter.digest)
        if not target.exists():
            with new_folder(target) as scratch:
                for name in (CONFIG_NAME, WEIGHTS_NAME):
                    _link_or_copy(adapter.path / name, scratch / name)
        return target


def _model(request: GenerationRequest, place: _Place) -> str:
    """The name vLLM knows what is asked for by."""
    if not request.adapters:
        return place.base_id
    if len(request.adapters) > 1 or request.adapters[0].scale != 1:
        raise UsageError(
            "vLLM applies one adapter at its own scale: ask for one, or serve with --engine local, which mixes them."
        )
    return name_of(request.adapters[0].digest)


def name_of(digest: str) -> str:
    """What vLLM calls an adapter: its digest, never a name that could lead elsewhere tomorrow."""
    return digest.replace(":", "-")


def module_shapes(base: StoredBase) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear layer and embedding, from the base's config alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.path))
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            shapes[name] = (module.in_features, module.out_features)
        elif isinstance(module, torch.nn.Embedding):
            shapes[name] = (module.num_embeddings, module.embedding_dim)
    return shapes


def check_shapes(adapter: Adapter, weights: Weights, shapes: dict[str, tuple[int, int]]) -> None:
    """Raises AdapterNoEffect, IncompatibleBase: depth counts, too."""
    strangers = [module for module in weights if module not in shapes]
    name = adapter.manifest.name
    if len(strangers) == len(weights):
        raise AdapterNoEffect(f"no tensor of adapter {name} belongs to a layer of this base (first: {strangers[0]}).")
    if strangers:
        raise IncompatibleBase(
            f"adapter {name} has tensors for {len(strangers)} layers this base does not have (first: {strangers[0]}): "
            "it was made for a deeper or different model."
        )
    for module, change in weights.items():
        assert not isinstance(change, FullWeight)
        first = change.rows.shape[0] if isinstance(change, EmbeddingUpdate) else change.a.shape[1]
        found = (first, change.bt.shape[1])
        if found != shapes[module]:
            raise IncompatibleBase(
                f"adapter {name} expects {module} to be {found[0]} -> {found[1]}, this base has "
                f"{shapes[module][0]} -> {shapes[module][1]}."
            )


def _check_kinds(adapter: Adapter, weights: Weights) -> None:
    name = adapter.manifest.name
    for module, change in weights.items():
        if isinstance(change, FullWeight):
            raise AdapterUnsupported(
                f"adapter {name} brings the whole of {module} (modules_to_save), which vLLM does not serve: use "
                "--engine local, or train it with LoRA."
            )
        if not isinstance(change, EmbeddingUpdate) and change.magnitude is not None:
            raise AdapterUnsupported(f"adapter {name} uses DoRA, which vLLM does not serve: use --engine local.")


async def _look_at(server: VllmServer, base: StoredBase, base_name: str, report: Report) -> tuple[str, int]:
    """What a server must be before anything is sent to it; its name for the base, and its max_model_len, tokens."""
    version = await server.version()
    if version not in TESTED:
        report(f"vLLM {version} at {server.url} is not a version this was tested with ({', '.join(TESTED)}).")
    card = await server.base_card()
    known = {str(base.path), str(base.path.resolve()), base.ref.id, base_name}
    if card.get("root") not in known and card.get("id") not in known:
        raise IncompatibleBase(
            f"vLLM at {server.url} serves {card.get('id')} ({card.get('root')}), not {base_name} ({base.ref.id}): "
            "start it with this base, or serve the base it has."
        )
    if not await server.takes_adapters():
        raise UsageError(
            f"vLLM at {server.url} loads no adapters at run time: start it with --enable-lora and the environment "
            "variable VLLM_ALLOW_RUNTIME_LORA_UPDATING=True."
        )
    return str(card["id"]), int(card["max_model_len"])


def _body(request: GenerationRequest, model: str) -> dict[str, Any]:
    """A request for /v1/completions, in vLLM's words."""
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(request.prompt),
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "seed": sampling.seed,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
    }
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    if sampling.constraint is not None:
        kind = {"json_schema": "json"}.get(sampling.constraint.kind, sampling.constraint.kind)
        body["structured_outputs"] = {kind: sampling.constraint.text}
    if sampling.top_logprobs is not None:
        body |= {"logprobs": sampling.top_logprobs, "return_tokens_as_token_ids": True}
    return body


async def _until(
    down: asyncio.Event, stream: AsyncGenerator[dict[str, Any], None]
) -> AsyncGenerator[dict[str, Any], None]:
    """The stream's events, until its server is found to be gone or hanging."""
    waiting = asyncio.create_task(down.wait())
    try:
        while True:
            coming = asyncio.ensure_future(anext(stream, None))
            try:
                await asyncio.wait({coming, waiting}, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    raise EngineStopped("the vLLM server stopped answering in mid-answer: ask again in a moment.")
            finally:
                if not coming.done():
                    coming.cancel()
                    await asyncio.gather(coming, return_exceptions=True)
            event = coming.result()
            if event is None:
                return
            yield event
    finally:
        waiting.cancel()
        await stream.aclose()


async def _chunks(
    events: AsyncGenerator[dict[str, Any], None], request: GenerationRequest, tokenizer: Any
) -> AsyncGenerator[Chunk, None]:
    """vLLM's events as ours. The last chunk waits for the usage, which comes after it."""
    count, num_shared = 0, 0
    last: Chunk | None = None
    async for event in events:
        details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
        num_shared = int(details.get("cached_tokens") or num_shared)
        for choice in event["choices"]:
            tokens = tuple(choice.get("token_ids") or ())
            count += len(tokens)
            logprobs = _logprobs(choice.get("logprobs"), request.sampling.top_logprobs, tokenizer)
            chunk = Chunk(choice["text"], count, tokens, None, logprobs, num_shared)
            if choice.get("finish_reason") is None:
                yield chunk
            else:
                last = chunk
                reason = FinishReason.LENGTH if choice["finish_reason"] == "length" else FinishReason.STOP
    if last is None:
        raise EngineStopped("vLLM ended an answer without a finish reason: ask again.")
    yield Chunk(last.text, last.num_tokens, last.tokens, reason, last.logprobs, num_shared)


def _logprobs(found: dict[str, Any] | None, num_top: int | None, tokenizer: Any) -> tuple[TokenLogprob, ...]:
    """From lists side by side, tokens written as `token_id:NUMBER`."""
    if found is None or num_top is None:
        return ()

    def number(text: str) -> int:
        return int(text.removeprefix("token_id:"))

    def word(token: int) -> str:
        return str(tokenizer.decode([token]))

    result = []
    for text, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        strongest = sorted(((number(t), p) for t, p in (top or {}).items()), key=lambda one: -one[1])[:num_top]
        token = number(text)
        result.append(TokenLogprob(token, word(token), logprob, tuple((t, word(t), p) for t, p in strongest)))
    return tuple(result)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
