"""vLLM as the engine: check adapters here, load them there under their digests, pass answers on.

What vLLM does not check or survives badly (an adapter of another base, a folder that is gone, a failed reload) does not
reach it. There may be several servers, ours or already running; an adapter is loaded when each that answers has it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterhub.adapter import Adapter, StoredBase
from adapterhub.compatibility import module_shapes
from adapterhub.errors import AdapterHubError, AdapterNotFound, EngineStopped
from adapterhub.files import new_folder
from adapterhub.package.lora_config import CONFIG_NAME, WEIGHTS_NAME
from adapterhub.units import format_duration
from serve.adapters.cache import file_size
from serve.engine import Delta, EngineStatus, GenerationRequest, Precision
from serve.vllm_engine import compat
from serve.vllm_engine.blank_adapter import write_blank_adapter
from serve.vllm_engine.client import VllmServer, validate_server, warn_of_version
from serve.vllm_engine.process import VllmProcess
from serve.vllm_engine.wire import body_of, deltas_of

log = logging.getLogger(__name__)

Report = Callable[[str], None]

WATCH_S = 2.0
"""Time between two health checks of a server, in seconds."""
ANSWER_S = 20.0
"""A server that leaves a health check unanswered for this many seconds hangs."""
STALLED_S = 180.0
"""A server with open answers that gives no token for this many seconds hangs, even if it reports health."""
STEADY_S = 60.0
"""A server of ours that is up for this many seconds has started well."""
MAX_STARTS = 5
"""Number of starts in a row that did not last, after which the engine ends."""


@dataclass(eq=False)
class _Replica:
    """One server and its state."""

    server: VllmServer
    base_id: str
    """Model name that stands for the base."""
    process: VllmProcess | None = None
    is_up: bool = True
    down: asyncio.Event = field(default_factory=asyncio.Event)
    up_since: float = field(default_factory=time.monotonic)
    num_open: int = 0
    num_awaited: int = 0
    """Open answers whose next event is awaited; the clients of the others have not taken the last one yet."""
    moved_at: float = 0.0
    """Time of its last event, or since when a first one is awaited."""
    reason: str = "ready"


class VllmEngine:
    """The `serve.engine.Engine` over one or more vLLM servers; `start` returns one that is ready."""

    def __init__(
        self, base: StoredBase, base_name: str, tokenizer: Any, *, folder: Path, max_lora_rank: int,
        precision: Precision, report: Report,
    ) -> None:  # fmt: skip
        self.max_model_len = 0
        self.dtype = precision.dtype
        self.precision = precision
        self._base = base
        self._base_name = base_name
        self._tokenizer = tokenizer
        self._replicas: list[_Replica] = []
        self._folder = folder
        self._max_lora_rank = max_lora_rank
        self._report = report
        self._loaded: dict[str, Path] = {}
        self._shapes = module_shapes(base)
        self._blank = write_blank_adapter(folder / "blank", self._shapes)
        self._ended: str | None = None
        self._watches: list[asyncio.Task[None]] = []

    @classmethod
    async def start(
        cls, base: StoredBase, base_name: str, tokenizer: Any, *, processes: Sequence[VllmProcess] = (),
        endpoints: Sequence[str] = (), key: str | None = None, folder: Path, max_lora_rank: int,
        precision: Precision, report: Report,
    ) -> VllmEngine:  # fmt: skip
        """Wait until every server answers, and validate each. Raises EngineStopped, UsageError, IncompatibleBase."""
        engine = cls(
            base, base_name, tokenizer, folder=folder, max_lora_rank=max_lora_rank, precision=precision, report=report
        )
        try:
            for process in processes:
                report(f"vLLM {process.found.version}: starting (its log: {process.log})")
                engine._replicas.append(_Replica(await process.start(), "", process))
            engine._replicas += [_Replica(VllmServer(url, key), "") for url in endpoints]
            for replica in engine._replicas:
                await warn_of_version(replica.server, report)
            engine.max_model_len = min([await engine._validate(replica) for replica in engine._replicas])
        except BaseException:
            await engine.close()
            for process in processes:
                await asyncio.to_thread(process.stop)
            raise
        engine._watches = [asyncio.create_task(engine._watch(replica)) for replica in engine._replicas]
        return engine

    def size_of(self, adapter: Adapter) -> int:
        return file_size(adapter)

    async def load(self, adapter: Adapter) -> None:
        await asyncio.to_thread(compat.check_adapter, adapter, self._shapes, max_rank=self._max_lora_rank)
        folder = await asyncio.to_thread(self._copy, adapter)
        name = name_of(adapter.digest)
        done: list[_Replica] = []
        try:
            # A server that comes back meanwhile needs it, too; one that goes down gets it when it comes back.
            while missing := [replica for replica in self._up() if replica not in done]:
                for replica in missing:
                    await _unless_down(replica, replica.server.load(name, folder))
                    done.append(replica)
        except BaseException:
            for replica in done:
                with suppress(AdapterHubError):
                    await _unless_down(replica, replica.server.unload(name))
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._loaded[name] = folder

    async def unload(self, digest: str) -> None:
        name = name_of(digest)
        folder = self._loaded.pop(name, None)
        for replica in self._replicas:
            if replica.is_up:
                with suppress(EngineStopped):  # a server that goes down has lost it anyway
                    await _unless_down(replica, replica.server.unload(name))
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        replica = min(self._up(), key=lambda one: one.num_open)
        body = body_of(request, _model(request, replica))
        replica.num_open += 1
        try:
            async with aclosing(self._events(replica, body)) as events:
                async for delta in deltas_of(events, request, self._tokenizer):
                    yield delta
        finally:
            replica.num_open -= 1

    def status(self) -> EngineStatus:
        running = sum(replica.num_open for replica in self._replicas)
        if self._ended is not None:
            return EngineStatus(False, self._ended, num_running=running, has_ended=True)
        down = [f"{replica.server.url}: {replica.reason}" for replica in self._replicas if not replica.is_up]
        is_ready = len(down) < len(self._replicas)
        return EngineStatus(is_ready, "; ".join(down) or "ready", num_running=running)

    async def close(self) -> None:
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        for replica in self._replicas:
            if replica.process is None and replica.is_up:  # it keeps running: leave no adapter whose folder is gone
                with suppress(AdapterHubError, TimeoutError):
                    async with asyncio.timeout(WATCH_S):
                        await asyncio.gather(*(replica.server.unload(name) for name in self._loaded))
            await replica.server.close()
            if replica.process is not None:
                await asyncio.to_thread(replica.process.stop)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _up(self) -> list[_Replica]:
        found = [replica for replica in self._replicas if replica.is_up]
        if not found:
            raise EngineStopped(f"no vLLM server answers ({self.status().reason}): ask again in a moment.")
        return found

    async def _events(self, replica: _Replica, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Stream the events of one answer. A server that lost the adapter in a restart gets it again, once."""
        try:
            async with aclosing(_until_down(replica, replica.server.stream(body))) as events:
                async for event in events:
                    yield event
            return
        except AdapterNotFound:
            if body["model"] not in self._loaded:
                raise
        await self._restore(replica)
        async with aclosing(_until_down(replica, replica.server.stream(body))) as events:
            async for event in events:
                yield event

    async def _validate(self, replica: _Replica) -> int:
        """Validate a server and set its base_id. Return its max_model_len, in tokens."""
        is_hazardous = replica.process is not None and replica.process.is_hazardous
        replica.base_id, max_model_len = await validate_server(
            replica.server, self._base, self._base_name, self._blank, keeps_blank=is_hazardous
        )
        return max_model_len

    async def _restore(self, replica: _Replica) -> None:
        has: set[str] = set()
        while missing := {name: folder for name, folder in self._loaded.items() if name not in has}:
            for name, folder in missing.items():
                await replica.server.load(name, folder)
            has |= missing.keys()

    async def _watch(self, replica: _Replica) -> None:
        """Watch a server's health; restart one of ours that is down or hangs, wait for others."""
        starts = 0
        while True:
            await asyncio.sleep(WATCH_S)
            fault = await self._fault_of(replica)
            if fault is None:
                continue
            if replica.is_up and time.monotonic() - replica.up_since > STEADY_S:
                starts = 0
            _mark_down(replica, fault)
            if replica.process is None:
                continue
            if starts == MAX_STARTS:
                self._ended = f"vLLM was started {starts} times in a row and did not last; the last time: {fault}"
                return
            await asyncio.sleep(min(60.0, 2.0 ** (starts - 1)) if starts else 0.0)
            starts += 1
            self._report(f"vLLM at {replica.server.url}: {fault}; starting it again")
            await asyncio.to_thread(replica.process.kill)
            await replica.server.close()
            try:
                replica.server = await replica.process.start()
            except (AdapterHubError, OSError) as error:
                replica.reason = str(error)

    async def _fault_of(self, replica: _Replica) -> str | None:
        """Return what is wrong with a server, or None; one that was down and is valid again is marked up."""
        if replica.process is not None and not replica.process.is_running:
            return "its process ended" if replica.is_up else replica.reason
        if not await replica.server.is_healthy(timeout_s=ANSWER_S):
            return "it does not answer"
        if replica.is_up:
            is_stalled = replica.num_awaited and time.monotonic() - replica.moved_at > STALLED_S
            return f"it has given no token for {format_duration(STALLED_S)}" if is_stalled else None
        try:
            await self._mark_up(replica)
        except (AdapterHubError, OSError) as error:
            return str(error)
        return None

    async def _mark_up(self, replica: _Replica) -> None:
        """Validate a server, load every adapter, and let it answer again."""
        await self._validate(replica)
        await self._restore(replica)
        replica.is_up, replica.reason, replica.down = True, "ready", asyncio.Event()
        replica.up_since = replica.moved_at = time.monotonic()
        self._report(f"vLLM at {replica.server.url} answers again, with {len(self._loaded)} adapters")

    def _copy(self, adapter: Adapter) -> Path:
        """Copy the adapter: vLLM may read the folder again at any time, and ends when it is gone."""
        target = self._folder / name_of(adapter.digest)
        if not target.exists():
            with new_folder(target) as scratch:
                for name in (CONFIG_NAME, WEIGHTS_NAME):
                    _link_or_copy(adapter.path / name, scratch / name)
        return target


def _model(request: GenerationRequest, replica: _Replica) -> str:
    """Return vLLM's name for the adapter, or the base, that a request asks for. Raises UsageError."""
    compat.check_request(request)
    return name_of(request.adapters[0].digest) if request.adapters else replica.base_id


def name_of(digest: str) -> str:
    """Return vLLM's name for an adapter: its digest, never an alias, which can be moved."""
    return digest.replace(":", "-")


def _mark_down(replica: _Replica, reason: str) -> None:
    if replica.is_up:
        log.warning("vLLM at %s: %s", replica.server.url, reason)
    replica.is_up, replica.reason = False, reason
    replica.down.set()


async def _unless_down(replica: _Replica, work: Coroutine[Any, Any, None]) -> None:
    """Do `work`, or cancel it when the server goes down: it gets its adapters again when it comes back."""
    doing, waiting = asyncio.create_task(work), asyncio.create_task(replica.down.wait())
    try:
        await asyncio.wait({doing, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            await doing
    finally:
        doing.cancel()
        waiting.cancel()
        await asyncio.gather(doing, waiting, return_exceptions=True)


async def _until_down(
    replica: _Replica, stream: AsyncGenerator[dict[str, Any], None]
) -> AsyncGenerator[dict[str, Any], None]:
    """Pass on the stream's events; raise EngineStopped when its server goes down."""
    waiting = asyncio.create_task(replica.down.wait())
    try:
        while True:
            coming = asyncio.ensure_future(anext(stream, None))
            if not replica.num_awaited:
                replica.moved_at = time.monotonic()
            replica.num_awaited += 1
            try:
                await asyncio.wait({coming, waiting}, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    raise EngineStopped(
                        "the vLLM server stopped answering in the middle of an answer: ask again in a moment."
                    )
            finally:
                replica.num_awaited -= 1
                if not coming.done():
                    coming.cancel()
                    await asyncio.gather(coming, return_exceptions=True)
            event = coming.result()
            if event is None:
                return
            replica.moved_at = time.monotonic()
            yield event
    finally:
        waiting.cancel()
        await stream.aclose()


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
