"""The local engine: schedule, run, commit, in one worker thread that owns scheduler and model."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future
from typing import Any

from adapterhub.adapter import Adapter
from adapterhub.bases.loading import LoadedBase
from adapterhub.choice import Choice
from adapterhub.compatibility import check_compatible
from adapterhub.errors import (
    AdapterHubError,
    AdapterLoadFailed,
    ConstraintFailed,
    EngineStopped,
    MissingFile,
    RequestFailed,
    RequestTooLong,
    ServerBusy,
    UsageError,
)
from adapterhub.package.layout import read_lora
from serve.adapters.weights import Weights, kept_bytes, read_weights
from serve.config import LocalEngineConfig
from serve.engine import Delta, EngineStatus, GenerationRequest, GuidedDecoding, Precision
from serve.local_engine.computation import start_computation
from serve.local_engine.cpu.kernels import MAX_RANK
from serve.local_engine.guided_decoding import Matcher
from serve.local_engine.running_answer import RunningAnswer
from serve.local_engine.sampling import Sampled, SamplingRow
from serve.local_engine.scheduler import Batch, ScheduledChunk, Scheduler, Sequence

log = logging.getLogger(__name__)


def check_max_rank(config: LocalEngineConfig) -> None:
    """Raise UsageError for a --max-lora-rank beyond what the kernels compute."""
    if config.max_lora_rank > MAX_RANK:
        raise UsageError(f"invalid --max-lora-rank {config.max_lora_rank}: expected 1 to {MAX_RANK}.")


class LocalEngine:
    """The `serve.engine.Engine` that computes on this machine."""

    def __init__(self, base: LoadedBase, config: LocalEngineConfig | None = None) -> None:
        self.config = config or LocalEngineConfig()
        self._base = base
        self.dtype = str(base.quantization.compute_dtype)
        self.precision = Precision(base.quantization.weights, self.dtype)
        check_max_rank(self.config)
        computation = start_computation(base, self.config)
        self._runner = computation.runner
        self.mode = self._runner.mode
        self.max_model_len = computation.room.max_model_len
        self._pool = computation.room.pool()
        self._scheduler = Scheduler(computation.room.limits, self._pool)
        self.choices = computation.choices
        self._answers: dict[str, RunningAnswer] = {}
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
        config, tensors = read_lora(adapter.path)
        check_compatible(adapter.manifest.name, config, tensors, bank.shapes)
        weights = read_weights(adapter, device=bank.device, dtype_of=bank.dtype_of, max_rank=self.config.max_lora_rank)
        return bank.prepare(adapter.manifest.name, weights)

    async def unload(self, digest: str) -> None:
        await self._call(lambda: self._runner.adapters.remove(digest))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        self._check(request)
        matcher: Matcher | None = None
        if request.sampling.guided_decoding is not None:
            matcher = await self._begin(request, request.sampling.guided_decoding)
        loop = asyncio.get_running_loop()
        deltas: asyncio.Queue[Delta | Exception] = asyncio.Queue()

        def emit(delta: Delta | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed: there is no listener
                loop.call_soon_threadsafe(deltas.put_nowait, delta)

        answer = RunningAnswer(request, _backend(self._base.tokenizer), matcher, emit)
        self._commands.put(lambda: self._start(answer))
        try:
            self._raise_if_ended()  # otherwise the worker starts the answer, or ends it when it stops
            while True:
                delta = await deltas.get()
                if isinstance(delta, Exception):
                    raise delta
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self._commands.put(lambda: self._retire(answer))

    def prepare(self) -> None:
        """Do slow one-time work before the first request, so that it does not delay running answers."""
        try:
            self._runner.guided_decoder.prepare()
        except ConstraintFailed as error:
            self.choices += (Choice("guided decoding", "refused", str(error).rstrip(".")),)

    def status(self) -> EngineStatus:
        if self._stopped is not None:
            return EngineStatus(False, self._stopped, has_ended=True)
        used = self._pool.num_blocks - self._pool.num_free
        return EngineStatus(
            True,
            "ready",
            num_running=len(self._scheduler.running),
            num_waiting=self._num_waiting,
            kv_usage=used / self._pool.num_blocks,
            num_preemptions=self._scheduler.num_preemptions,
        )

    async def close(self) -> None:
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)
        self._runner.guided_decoder.close()

    def check(self) -> None:
        """Check the invariants of an idle engine: no open answer, every KV block free."""
        assert not self._answers, "an answer is still open"
        self._scheduler.check()
        assert self._pool.num_free == self._pool.num_blocks, "a KV block is still referenced"

    def _check(self, request: GenerationRequest) -> None:
        self._raise_if_ended()
        length, wanted = len(request.prompt), request.sampling.max_tokens
        if length + wanted > self.max_model_len:
            raise RequestTooLong(
                f"the prompt has {length} tokens and max_tokens is {wanted}, together more than the "
                f"{self.max_model_len} this server holds: shorten the prompt or ask for fewer tokens."
            )
        size = self._base.model.config.get_text_config().vocab_size
        biased = [token for token, _ in request.sampling.logit_bias]
        for where, tokens in (("the prompt", request.prompt), ("logit_bias", biased)):
            unknown = next((token for token in tokens if not 0 <= token < size), None)
            if unknown is not None:
                raise UsageError(f"{where} names token {unknown}, the vocabulary has {size} tokens.")
        if self._num_waiting >= self.config.max_queue:
            raise ServerBusy(f"{self.config.max_queue} requests are waiting already: try again shortly.")

    @property
    def _num_waiting(self) -> int:
        return self._scheduler.num_waiting + self._runner.guided_decoder.num_preparing

    async def _begin(self, request: GenerationRequest, guided: GuidedDecoding) -> Matcher:
        """Make the request's matcher. Every failure is an AdapterHubError: a panic in Rust is not an Exception."""
        try:
            return await asyncio.wrap_future(self._runner.guided_decoder.begin(guided))
        except (AdapterHubError, asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException as error:
            raise _client_error(request, error) from error

    async def _call(self, act: Callable[[], None]) -> None:
        """Run `act` on the worker thread, between two steps, even if the caller is canceled meanwhile."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                self._raise_if_ended()
                act()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self._commands.put(run)
        if not done.done():
            self._raise_if_ended()
        await asyncio.shield(asyncio.wrap_future(done))

    def _raise_if_ended(self) -> None:
        if self._stopped is not None:
            raise self._ended()

    def _ended(self) -> EngineStopped:
        return EngineStopped(f"the engine has stopped ({self._stopped}): restart the server.")

    # From here on: the worker thread.

    def _work(self) -> None:
        batch: Batch | None = None
        try:
            while self._run_commands(is_idle=batch is None):
                batch = self._scheduler.schedule()
                if batch is not None:
                    self._step(batch)
            self._stopped = "it was closed"
        except BaseException as error:  # also what is not an Exception: nobody may wait for a thread that has ended
            self._stopped = f"{type(error).__name__}: {error}"
            log.exception("the engine stopped")
        for answer in list(self._answers.values()):
            self._send_error(answer, self._ended())
        self._answers.clear()
        with contextlib.suppress(queue.Empty):  # commands of the last step: each raises EngineStopped by itself
            while True:
                command = self._commands.get_nowait()
                if command is not None:
                    command()

    def _step(self, batch: Batch) -> None:
        sampled: dict[str, Sampled] = {}
        for name, row in self._rows(batch).items():
            answer = self._answers[name]
            with self._isolated(answer):
                if answer.matcher is None or answer.matcher.is_ready:
                    answer.row = None
                    sampled[name] = self._runner.sampler.sample(row, answer.sequence, answer.matcher)
                else:
                    answer.row = row
                    self._resume_later(answer, answer.matcher)
        self._scheduler.commit(batch, {name: one.token for name, one in sampled.items()})
        for name, one in sampled.items():
            answer = self._answers[name]
            with self._isolated(answer):
                self._deliver(answer, one)

    @contextlib.contextmanager
    def _isolated(self, answer: RunningAnswer) -> Iterator[None]:
        """End this answer, and no other, for whatever the block raises; a panic in Rust is not an Exception."""
        try:
            yield
        except BaseException as error:
            self._fail(answer, error)

    def _fail(self, answer: RunningAnswer, error: BaseException) -> None:
        self._retire(answer)
        self._send_error(answer, _client_error(answer.sequence.request, error))

    def _send_error(self, answer: RunningAnswer, error: AdapterHubError) -> None:
        try:
            answer.emit(error)
        except BaseException:
            log.exception("the error of request %s could not be sent", answer.sequence.request.id)

    def _rows(self, batch: Batch) -> dict[str, SamplingRow]:
        """Run the batch and return the logits to sample from; after a failure, run each sequence alone."""
        try:
            return self._runner.run(batch)
        except BaseException as error:
            log.warning("a step of %d sequences failed: each is computed alone", len(batch.chunks), exc_info=error)
            fault = error.with_traceback(None)  # its frames hold the step's tensors, perhaps all the memory
        return self._rows_one_at_a_time(batch, fault)

    def _rows_one_at_a_time(self, batch: Batch, error: BaseException) -> dict[str, SamplingRow]:
        """Run each chunk alone and end the answers that fail. Raise `error` where the bare base fails, too."""
        rows: dict[str, SamplingRow] = {}
        failed: list[tuple[ScheduledChunk, AdapterHubError]] = []
        for chunk in batch.chunks:
            try:
                rows |= self._runner.run(Batch((chunk,)))
            except BaseException as cause:
                # Logged here, because its frames hold the step's tensors and are not kept.
                failed.append((chunk, _client_error(chunk.sequence.request, cause)))
        if failed and not self._can_compute_alone(failed[0][0].sequence):
            raise error
        for chunk, reason in failed:
            self._fail(self._answers[chunk.sequence.request.id], reason)
        return rows

    def _can_compute_alone(self, ending: Sequence) -> bool:
        """Return whether the bare base can compute rows of every kind.

        It writes to the last block of `ending`, a sequence that ends and whose last block holds no finished prefix.
        """
        request = GenerationRequest("trial", ending.request.prompt[:1])
        trial = Sequence(request, list(request.prompt) * _NUM_TRIAL_TOKENS, blocks=ending.blocks[-1:])
        try:
            for start, num_tokens in _ROW_KINDS:
                if start + num_tokens <= self.config.block_size:
                    self._runner.run(Batch((ScheduledChunk(trial, start, num_tokens, samples=True),)))
        except BaseException:
            return False
        return True

    def _resume_later(self, answer: RunningAnswer, matcher: Matcher) -> None:
        """Leave this sequence out of the batch until its mask is computed; the others continue."""
        matcher.when_ready(lambda: self._commands.put(lambda: self._resume(answer, matcher)))

    def _resume(self, answer: RunningAnswer, matcher: Matcher) -> None:
        row = answer.row
        # It may have ended, or have been preempted and got its token, for which the next mask was begun.
        if row is None or not matcher.is_ready or not self._is_open(answer):
            return
        answer.row = None
        with self._isolated(answer):
            one = self._runner.sampler.sample(row, answer.sequence, matcher)
            answer.sequence.tokens.append(one.token)
            self._deliver(answer, one)

    def _run_commands(self, *, is_idle: bool) -> bool:
        """Run the commands of other threads, waiting for one when idle. Return False to stop."""
        while True:
            try:
                command = self._commands.get(block=is_idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            is_idle = False

    def _start(self, answer: RunningAnswer) -> None:
        request = answer.sequence.request
        if self._stopped is not None:
            answer.emit(self._ended())
            return
        with self._isolated(answer):
            if request.id in self._answers:
                raise UsageError(f"request {request.id} is being answered already: give each request an id of its own.")
            missing = [a.digest for a in request.adapters if not self._runner.adapters.is_resident(a.digest)]
            if missing:
                raise AdapterLoadFailed(f"adapter {missing[0]} is not loaded in the engine: load it first.")
            self._answers[request.id] = answer
            self._scheduler.add(answer.sequence)

    def _is_open(self, answer: RunningAnswer) -> bool:
        return self._answers.get(answer.sequence.request.id) is answer

    def _retire(self, answer: RunningAnswer) -> None:
        """Forget an answer and free its blocks, unless that was done before."""
        if self._is_open(answer):
            request_id = answer.sequence.request.id
            del self._answers[request_id]
            self._scheduler.remove(answer.sequence)
            self._runner.sampler.forget(request_id)

    def _deliver(self, answer: RunningAnswer, sampled: Sampled) -> None:
        delta = answer.delta(sampled, self._eos)
        if delta.finish_reason is not None:
            self._retire(answer)
        answer.emit(delta)


_ROW_KINDS = ((0, 1), (1, 1), (1, 2))
"""Kinds of rows, as (first position, rows): a prompt's beginning, an answer, the rest of a prompt."""
_NUM_TRIAL_TOKENS = 3


def _client_error(request: GenerationRequest, error: BaseException) -> AdapterHubError:
    """Return the error to send to the client; one that was not written for clients is logged and replaced."""
    if isinstance(error, AdapterHubError):
        return error
    log.error("request %s failed", request.id, exc_info=error)
    return RequestFailed(
        f"this request failed in the engine ({type(error).__name__}: {error}); other requests continue. "
        "See the server's log."
    )


def _backend(tokenizer: Any) -> Any:
    """Return the Rust tokenizer that transformers' tokenizer wraps."""
    return tokenizer.backend_tokenizer


def _eos_tokens(base: LoadedBase) -> frozenset[int]:
    """Return the tokens that end an answer: the generation config's and the tokenizer's."""
    configured = base.model.generation_config.eos_token_id
    several = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*several, base.tokenizer.eos_token_id) if token is not None)
