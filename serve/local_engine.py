"""The local engine: schedule -> run -> commit, in one worker thread that owns scheduler and model."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from adapterhub.adapter import Adapter
from adapterhub.base_model import LoadedBase
from adapterhub.errors import AdapterLoadFailed, EngineStopped, MissingFile, RequestTooLong, ServerBusy, UsageError
from serve.attention import KvShape
from serve.cpu_kernels import MAX_RANK
from serve.engine import Chunk, EngineStatus, FinishReason, GenerationRequest, Precision, TokenLogprob
from serve.lora_weights import Weights, kept_bytes, read_weights
from serve.model_runner import ModelRunner, kv_dtype
from serve.sampling import Sampled
from serve.scheduler import BlockPool, Scheduler, SchedulerLimits, Sequence
from serve.text_stream import TextStream

log = logging.getLogger(__name__)

Emit = Callable[[Chunk | Exception], None]


@dataclass(frozen=True)
class LocalEngineConfig:
    kv_cache_bytes: int = 512 << 20
    block_size: int = 16
    """tokens per KV block"""
    max_model_len: int | None = None
    """None: what the model was made for, as far as the cache holds it"""
    max_lora_rank: int = 64
    max_queue: int = 1024
    """waiting requests before new ones are refused"""
    limits: SchedulerLimits = field(default_factory=SchedulerLimits)


@dataclass(eq=False)
class _Running:
    """An answer on its way out."""

    sequence: Sequence
    text: TextStream
    emit: Emit


class LocalEngine:
    """serve.engine.Engine on this machine."""

    def __init__(self, base: LoadedBase, config: LocalEngineConfig | None = None) -> None:
        self.config = config or LocalEngineConfig()
        self._base = base
        self.dtype = str(base.quantization.compute_dtype)
        self.precision = Precision(base.quantization.weights, self.dtype)
        model_config = base.model.config.get_text_config()
        shape = KvShape.of(model_config, kv_dtype(base))
        num_blocks = self.config.kv_cache_bytes // (shape.bytes_per_token * self.config.block_size)
        capacity = num_blocks * self.config.block_size
        if self.config.max_lora_rank > MAX_RANK:
            raise UsageError(
                f"--max-lora-rank {self.config.max_lora_rank} is more than the {MAX_RANK} this engine takes."
            )
        self.max_model_len = min(self.config.max_model_len or model_config.max_position_embeddings, capacity - 1)
        if self.max_model_len < 1:
            raise UsageError(
                f"a KV cache of {self.config.kv_cache_bytes:,} bytes holds no token of this model "
                f"({shape.bytes_per_token:,} bytes each): give it more memory."
            )
        self._pool = BlockPool(num_blocks, self.config.block_size)
        self._scheduler = Scheduler(self.config.limits, self._pool)
        self._runner = ModelRunner(base, num_blocks=num_blocks, block_size=self.config.block_size)
        self.choices = self._runner.choices
        self._answers: dict[str, _Running] = {}
        self._eos = _eos_tokens(base)
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._stopped: str | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def size_of(self, adapter: Adapter) -> int:
        return kept_bytes(adapter, dtype_of=self._runner.adapters.dtype_of)

    async def load(self, adapter: Adapter) -> None:
        try:
            weights = await asyncio.to_thread(self._read, adapter)
        except (OSError, MissingFile) as error:
            raise AdapterLoadFailed(
                f"adapter {adapter.manifest.name} cannot be read from {adapter.path} ({error}): pull it again."
            ) from error

        await self._call(lambda: self._runner.adapters.install(adapter.digest, weights))

    def _read(self, adapter: Adapter) -> Weights:
        bank = self._runner.adapters
        weights = read_weights(adapter, device=bank.device, dtype_of=bank.dtype_of, max_rank=self.config.max_lora_rank)
        return bank.prepare(adapter.manifest.name, weights)

    async def unload(self, digest: str) -> None:
        await self._call(lambda: self._runner.adapters.remove(digest))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        self._check(request)
        if request.sampling.constraint is not None:
            await asyncio.to_thread(self._runner.constraints.check, request.sampling.constraint)
        loop = asyncio.get_running_loop()
        chunks: asyncio.Queue[Chunk | Exception] = asyncio.Queue()

        def emit(chunk: Chunk | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop closed: nobody is listening
                loop.call_soon_threadsafe(chunks.put_nowait, chunk)

        self._commands.put(lambda: self._start(request, emit))
        try:
            self._refuse_if_ended()  # else the worker still obeys, or refuses it when it ends
            while True:
                chunk = await chunks.get()
                if isinstance(chunk, Exception):
                    raise chunk
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            self._commands.put(lambda: self._abort(request.id, emit))

    def status(self) -> EngineStatus:
        if self._stopped is not None:
            return EngineStatus(False, self._stopped, has_ended=True)
        used = self._pool.num_blocks - self._pool.num_free
        return EngineStatus(
            True,
            "ready",
            num_running=len(self._scheduler.running),
            num_waiting=self._scheduler.num_waiting,
            kv_usage=used / self._pool.num_blocks,
            num_preemptions=self._scheduler.num_preemptions,
        )

    async def close(self) -> None:
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    def check(self) -> None:
        """The books of an idle engine: no answer open, every block free."""
        assert not self._answers, "an answer is still open"
        self._scheduler.check()
        assert self._pool.num_free == self._pool.num_blocks, "a KV block is still held"

    def _check(self, request: GenerationRequest) -> None:
        self._refuse_if_ended()
        length, wanted = len(request.prompt), request.sampling.max_tokens
        if length + wanted > self.max_model_len:
            raise RequestTooLong(
                f"the prompt has {length} tokens and max_tokens is {wanted}, together more than the "
                f"{self.max_model_len} this server holds: shorten the prompt or ask for fewer tokens."
            )
        size = self._base.model.config.get_text_config().vocab_size
        biased = [token for token, _ in request.sampling.logit_bias]
        for where, tokens in (("the prompt", request.prompt), ("logit_bias", biased)):
            strange = next((token for token in tokens if not 0 <= token < size), None)
            if strange is not None:
                raise UsageError(f"{where} names token {strange}, the vocabulary has {size} tokens.")
        if self._scheduler.num_waiting >= self.config.max_queue:
            raise ServerBusy(f"{self.config.max_queue} requests are waiting already: try again shortly.")

    async def _call(self, act: Callable[[], None]) -> None:
        """Run `act` on the worker thread, between two steps; a caller that gives up does not take it back."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                self._refuse_if_ended()
                act()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self._commands.put(run)
        if not done.done():
            self._refuse_if_ended()
        await asyncio.shield(asyncio.wrap_future(done))

    def _refuse_if_ended(self) -> None:
        if self._stopped is not None:
            raise self._ended()

    def _ended(self) -> EngineStopped:
        return EngineStopped(f"the engine has stopped ({self._stopped}): restart the server.")

    # From here on: the worker thread.

    def _work(self) -> None:
        reason = "it was closed"
        try:
            while self._obey_commands():
                batch = self._scheduler.schedule()
                if batch is not None:
                    sampled = self._runner.run(batch)
                    self._scheduler.commit(batch, {name: one.token for name, one in sampled.items()})
                    self._deliver(sampled)
        except Exception as error:
            log.exception("the engine stopped")
            reason = f"{type(error).__name__}: {error}"
        self._stopped = reason
        for answer in list(self._answers.values()):
            answer.emit(self._ended())
        self._answers.clear()
        with contextlib.suppress(queue.Empty):  # what came while the last step ran: each refuses by itself
            while True:
                command = self._commands.get_nowait()
                if command is not None:
                    command()

    def _obey_commands(self) -> bool:
        """Carry out what other threads asked for; waits when there is nothing to compute. False: stop."""
        is_idle = not (self._scheduler.running or self._scheduler.num_waiting)
        while True:
            try:
                command = self._commands.get(block=is_idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            is_idle = False

    def _start(self, request: GenerationRequest, emit: Emit) -> None:
        if self._stopped is not None:
            emit(self._ended())
            return
        if request.id in self._answers:
            emit(UsageError(f"request {request.id} is being answered already: give each request an id of its own."))
            return
        missing = [a.digest for a in request.adapters if not self._runner.adapters.is_resident(a.digest)]
        if missing:
            emit(AdapterLoadFailed(f"adapter {missing[0]} is not loaded in the engine: load it first."))
            return
        sequence = Sequence.of(request)
        text = TextStream(_backend(self._base.tokenizer), request.sampling.stop, request.prompt)
        self._answers[request.id] = _Running(sequence, text, emit)
        self._scheduler.add(sequence)

    def _abort(self, request_id: str, emit: Emit) -> None:
        answer = self._answers.get(request_id)
        if answer is not None and answer.emit is emit:
            del self._answers[request_id]
            self._retire(answer)

    def _retire(self, answer: _Running) -> None:
        self._scheduler.remove(answer.sequence)
        self._runner.forget(answer.sequence)

    def _deliver(self, sampled: dict[str, Sampled]) -> None:
        for request_id, one in sampled.items():
            answer = self._answers[request_id]
            chunk = self._chunk(answer, one)
            if chunk.finish_reason is not None:
                del self._answers[request_id]
                self._retire(answer)
            answer.emit(chunk)

    def _chunk(self, answer: _Running, sampled: Sampled) -> Chunk:
        params = answer.sequence.request.sampling
        num_tokens = len(answer.sequence.answer)
        is_eos = sampled.token in params.stop_token_ids or (sampled.token in self._eos and not params.ignore_eos)
        text = "" if is_eos else answer.text.feed(sampled.token)
        reason = None
        if is_eos or answer.text.is_stopped:
            reason = FinishReason.STOP
        elif num_tokens >= params.max_tokens:
            reason = FinishReason.LENGTH
        if reason is not None:
            text += answer.text.finish()
        shared = answer.sequence.num_shared
        return Chunk(text, num_tokens, (sampled.token,), reason, self._logprobs(sampled), shared)

    def _logprobs(self, sampled: Sampled) -> tuple[TokenLogprob, ...]:
        if sampled.logprob is None:
            return ()
        decode = self._base.tokenizer.decode
        top = tuple((token, decode([token]), logprob) for token, logprob in sampled.top)
        return (TokenLogprob(sampled.token, decode([sampled.token]), sampled.logprob, top),)


def _backend(tokenizer: Any) -> Any:
    """The Rust tokenizer under transformers' one."""
    return tokenizer.backend_tokenizer


def _eos_tokens(base: LoadedBase) -> frozenset[int]:
    """Tokens that end an answer: the generation config's and the tokenizer's."""
    configured = base.model.generation_config.eos_token_id
    several = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*several, base.tokenizer.eos_token_id) if token is not None)
