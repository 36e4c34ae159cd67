"""vLLM as the engine: adapters checked here, loaded there under their digests, answers passed on.

What vLLM does not check or survives badly (an adapter of another base, a folder that is gone, a failed reload) does not
reach it. Any number of servers, ours or running already; an adapter is loaded when every one that answers has it.
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
from serve.adapters.cache import file_size
from serve.engine import Chunk, EngineStatus, GenerationRequest, Precision
from serve.vllm_engine import compat
from serve.vllm_engine.blank_adapter import write_blank_adapter
from serve.vllm_engine.client import VllmServer, validate_server, warn_of_version
from serve.vllm_engine.process import VllmProcess
from serve.vllm_engine.wire import body_of, chunks_of

log = logging.getLogger(__name__)

Report = Callable[[str], None]

WATCH_S = 2.0
"""between looks at a server's health"""
ANSWER_S = 20.0
"""a health request unanswered for this long is a server that hangs"""
STALLED_S = 180.0
"""so is one that is waited for and gives no token of any answer for this long, healthy as it may say it is"""
STEADY_S = 60.0
"""up for this long, a server of ours counts as started well"""
MAX_STARTS = 5
"""starts in a row that did not last, after which a server of ours is given up"""


@dataclass(eq=False)
class _Place:
    """One server, and what is known of it."""

    server: VllmServer
    base_id: str
    """what it is asked for when the base is"""
    process: VllmProcess | None = None
    is_up: bool = True
    down: asyncio.Event = field(default_factory=asyncio.Event)
    up_since: float = field(default_factory=time.monotonic)
    num_open: int = 0
    num_awaited: int = 0
    """open answers whose next event is waited for; the others' clients have still to take the last one"""
    moved_at: float = 0.0
    """when it last went on with an answer, or the first was waited for"""
    reason: str = "ready"


class VllmEngine:
    """serve.engine.Engine over one or many vLLM servers; `start` makes one that is ready."""

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
        self._places: list[_Place] = []
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
        """Wait until every server answers, and look at each. Raises EngineStopped, UsageError, IncompatibleBase."""
        engine = cls(
            base, base_name, tokenizer, folder=folder, max_lora_rank=max_lora_rank, precision=precision, report=report
        )
        try:
            for process in processes:
                report(f"vLLM {process.found.version}: starting (its log: {process.log})")
                engine._places.append(_Place(await process.start(), "", process))
            engine._places += [_Place(VllmServer(url, key), "") for url in endpoints]
            for place in engine._places:
                await warn_of_version(place.server, report)
            engine.max_model_len = min([await engine._look_at(place) for place in engine._places])
        except BaseException:
            await engine.close()
            for process in processes:
                await asyncio.to_thread(process.stop)
            raise
        engine._watches = [asyncio.create_task(engine._watch(place)) for place in engine._places]
        return engine

    def size_of(self, adapter: Adapter) -> int:
        return file_size(adapter)

    async def load(self, adapter: Adapter) -> None:
        await asyncio.to_thread(compat.check_adapter, adapter, self._shapes, max_rank=self._max_lora_rank)
        folder = await asyncio.to_thread(self._keep, adapter)
        name = name_of(adapter.digest)
        done: list[_Place] = []
        try:
            # One that comes back meanwhile must have it, too; one that goes gets it when it comes back.
            while missing := [place for place in self._up() if place not in done]:
                for place in missing:
                    await _unless_down(place, place.server.load(name, folder))
                    done.append(place)
        except BaseException:
            for place in done:
                with suppress(AdapterHubError):
                    await _unless_down(place, place.server.unload(name))
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._loaded[name] = folder

    async def unload(self, digest: str) -> None:
        name = name_of(digest)
        folder = self._loaded.pop(name, None)
        for place in self._places:
            if place.is_up:
                with suppress(EngineStopped):  # a server that goes down has forgotten it
                    await _unless_down(place, place.server.unload(name))
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        place = min(self._up(), key=lambda one: one.num_open)
        body = body_of(request, _model(request, place))
        place.num_open += 1
        try:
            async with aclosing(self._events(place, body)) as events:
                async for chunk in chunks_of(events, request, self._tokenizer):
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
            if place.process is None and place.is_up:  # it goes on: leave it no name whose folder is gone
                with suppress(AdapterHubError, TimeoutError):
                    async with asyncio.timeout(WATCH_S):
                        await asyncio.gather(*(place.server.unload(name) for name in self._loaded))
            await place.server.close()
            if place.process is not None:
                await asyncio.to_thread(place.process.stop)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _up(self) -> list[_Place]:
        found = [place for place in self._places if place.is_up]
        if not found:
            raise EngineStopped(f"no vLLM server answers ({self.status().reason}): ask again in a moment.")
        return found

    async def _events(self, place: _Place, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The events of one answer. A server that has lost the adapter by a restart gets it again, once."""
        try:
            async with aclosing(_until_down(place, place.server.stream(body))) as events:
                async for event in events:
                    yield event
            return
        except AdapterNotFound:
            if body["model"] not in self._loaded:
                raise
        await self._restore(place)
        async with aclosing(_until_down(place, place.server.stream(body))) as events:
            async for event in events:
                yield event

    async def _look_at(self, place: _Place) -> int:
        """Is it what it must be, and does it answer? Its max_model_len, tokens."""
        is_hazardous = place.process is not None and place.process.is_hazardous
        place.base_id, max_model_len = await validate_server(
            place.server, self._base, self._base_name, self._blank, keeps_blank=is_hazardous
        )
        return max_model_len

    async def _restore(self, place: _Place) -> None:
        has: set[str] = set()
        while missing := {name: folder for name, folder in self._loaded.items() if name not in has}:
            for name, folder in missing.items():
                await place.server.load(name, folder)
            has |= missing.keys()

    async def _watch(self, place: _Place) -> None:
        """Notice a server that is gone or hangs; start ours again, wait for others."""
        starts = 0
        while True:
            await asyncio.sleep(WATCH_S)
            fault = await self._fault_of(place)
            if fault is None:
                continue
            if place.is_up and time.monotonic() - place.up_since > STEADY_S:
                starts = 0
            _take_down(place, fault)
            if place.process is None:
                continue
            if starts == MAX_STARTS:
                self._ended = f"vLLM was started {starts} times in a row and did not last; the last time: {fault}"
                return
            await asyncio.sleep(min(60.0, 2.0 ** (starts - 1)) if starts else 0.0)
            starts += 1
            self._report(f"vLLM at {place.server.url}: {fault}; starting it again")
            await asyncio.to_thread(place.process.kill)
            await place.server.close()
            try:
                place.server = await place.process.start()
            except (AdapterHubError, OSError) as error:
                place.reason = str(error)

    async def _fault_of(self, place: _Place) -> str | None:
        """None for a server that may be asked; one that was down is taken back, if it is as it should be."""
        if place.process is not None and not place.process.is_running:
            return "its process ended" if place.is_up else place.reason
        if not await place.server.is_healthy(timeout_s=ANSWER_S):
            return "it does not answer"
        if place.is_up:
            is_stalled = place.num_awaited and time.monotonic() - place.moved_at > STALLED_S
            return f"it has given no token for {STALLED_S:.0f} s" if is_stalled else None
        try:
            await self._take_back(place)
        except (AdapterHubError, OSError) as error:
            return str(error)
        return None

    async def _take_back(self, place: _Place) -> None:
        """Only as what it was, and with every adapter that is published, may it answer again."""
        await self._look_at(place)
        await self._restore(place)
        place.is_up, place.reason, place.down = True, "ready", asyncio.Event()
        place.up_since = place.moved_at = time.monotonic()
        self._report(f"vLLM at {place.server.url} answers again, with {len(self._loaded)} adapters")

    def _keep(self, adapter: Adapter) -> Path:
        """A copy of the adapter's own: vLLM may read the folder again at any time, and dies when it is gone."""
        target = self._folder / name_of(adapter.digest)
        if not target.exists():
            with new_folder(target) as scratch:
                for name in (CONFIG_NAME, WEIGHTS_NAME):
                    _link_or_copy(adapter.path / name, scratch / name)
        return target


def _model(request: GenerationRequest, place: _Place) -> str:
    """Return vLLM's name for the adapter, or the base, that a request asks for. Raises UsageError."""
    compat.check_request(request)
    return name_of(request.adapters[0].digest) if request.adapters else place.base_id


def name_of(digest: str) -> str:
    """What vLLM calls an adapter: its digest, never a name that could lead elsewhere tomorrow."""
    return digest.replace(":", "-")


def _take_down(place: _Place, reason: str) -> None:
    if place.is_up:
        log.warning("vLLM at %s: %s", place.server.url, reason)
    place.is_up, place.reason = False, reason
    place.down.set()


async def _unless_down(place: _Place, work: Coroutine[Any, Any, None]) -> None:
    """Do it, or leave it when the server is found to be gone or hanging: it will be brought up to date."""
    doing, waiting = asyncio.create_task(work), asyncio.create_task(place.down.wait())
    try:
        await asyncio.wait({doing, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            await doing
    finally:
        doing.cancel()
        waiting.cancel()
        await asyncio.gather(doing, waiting, return_exceptions=True)


async def _until_down(
    place: _Place, stream: AsyncGenerator[dict[str, Any], None]
) -> AsyncGenerator[dict[str, Any], None]:
    """The stream's events, until its server is found to be gone or hanging."""
    waiting = asyncio.create_task(place.down.wait())
    try:
        while True:
            coming = asyncio.ensure_future(anext(stream, None))
            if not place.num_awaited:
                place.moved_at = time.monotonic()
            place.num_awaited += 1
            try:
                await asyncio.wait({coming, waiting}, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    raise EngineStopped("the vLLM server stopped answering in mid-answer: ask again in a moment.")
            finally:
                place.num_awaited -= 1
                if not coming.done():
                    coming.cancel()
                    await asyncio.gather(coming, return_exceptions=True)
            event = coming.result()
            if event is None:
                return
            place.moved_at = time.monotonic()
            yield event
    finally:
        waiting.cancel()
        await stream.aclose()


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
