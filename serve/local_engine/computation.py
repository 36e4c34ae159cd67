"""Choose how a base is computed, batched or one sequence at a time, and start that once it is proven right."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from adapterhub.bases import self_check_cache
from adapterhub.bases.capabilities import capability_of
from adapterhub.bases.loading import LoadedBase
from adapterhub.bases.positions import why_too_long
from adapterhub.choice import Choice
from adapterhub.errors import AdapterHubError, BaseUnsupported, UsageError
from adapterhub.units import format_bytes, format_duration
from serve.config import LocalEngineConfig, SchedulerLimits
from serve.local_engine.block_pool import BlockPool
from serve.local_engine.model_runner import ModelRunner, Runner, adapted, kernels_for, paged_shape
from serve.local_engine.rotary import fix_rotary
from serve.local_engine.self_check import Expected, describe_difference, expected_of, holds_all
from serve.local_engine.single_runner import CacheSize, SingleRunner, measure_cache

_TOKEN_BYTES = 64
"""Bytes that a token takes outside of a model's cache: its number, and its share of a block in Python's lists."""


@dataclass(frozen=True)
class Room:
    """How many tokens, and of how many sequences, the memory for caches holds."""

    num_blocks: int
    block_size: int
    max_model_len: int
    limits: SchedulerLimits

    @classmethod
    def of(cls, base: LoadedBase, config: LocalEngineConfig, size: CacheSize, *, is_batched: bool) -> Room:
        """Divide the config's memory among sequences of such a size.

        Unless the config asks for more, sequences stay within the length to which transformers' rotary frequencies are
        those of every sequence. Raises UsageError where the memory holds no token.
        """
        limits, memory, block_size = config.limits, config.kv_cache_bytes, config.block_size
        if size.per_sequence:  # at most half of the memory for states, if it holds any token besides
            num_seqs = max(1, min(limits.max_num_seqs, memory // 2 // size.per_sequence))
            limits = replace(limits, max_num_seqs=num_seqs)
            memory -= num_seqs * size.per_sequence
        longest = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
        length = config.max_model_len or capability_of(base.model.config).train.longest or longest
        num_blocks = max(memory, 0) // (max(size.per_token, _TOKEN_BYTES) * block_size)
        if not is_batched:
            limits = replace(limits, cuts_prompts=False)
            if length is not None:  # nothing is kept beyond what runs
                num_blocks = min(num_blocks, limits.max_running * -(-(length + 1) // block_size))
        capacity = num_blocks * block_size
        max_model_len = min(length or capacity, capacity - 1)
        if max_model_len < 1:
            raise UsageError(
                f"a KV cache of {format_bytes(config.kv_cache_bytes)} holds no token of this model "
                f"({format_bytes(size.per_token + size.per_sequence)} each): give it more memory."
            )
        return cls(num_blocks, block_size, max_model_len, limits)

    def pool(self) -> BlockPool:
        return BlockPool(self.num_blocks, self.block_size, caches_prefixes=self.limits.cuts_prompts)


@dataclass(frozen=True)
class Computation:
    """A base that is ready to compute requests."""

    runner: Runner
    room: Room
    choices: tuple[Choice, ...]


def start_computation(base: LoadedBase, config: LocalEngineConfig) -> Computation:
    """Prepare the base's model, which changes it, and compare what it computes with what it computed before.

    A base that is wrong in a batch is computed one sequence at a time, if that is right. What passed is remembered by
    the base's fingerprint. Raises BaseUnsupported for a base that is wrong either way, and UsageError for a cache that
    holds no token and for a length that the base has no positions for.
    """
    support = capability_of(base.model.config).serve
    if support.mode == "refused":
        raise _refused(base, support.reason)
    is_batched = support.mode == "batched"
    room = _paged_room(base, config) if is_batched else _single_room(base, config)
    if reason := why_too_long(base.model, room.max_model_len):  # on a GPU, a request beyond would end the process
        raise UsageError(f"invalid --max-model-len {room.max_model_len}: {reason}. Ask for no more than that.")
    rotary = fix_rotary(base.model, room.max_model_len)
    started = time.perf_counter()
    expected = None if _is_proven(base, support.mode) else _expected_of(base)
    if is_batched:
        with _no_traceback(base):
            batched = ModelRunner(base, num_blocks=room.num_blocks, block_size=room.block_size)
        problem = _problem(base, batched, room, expected)
        if not problem:
            how = Choice("sequences", "batched", _how_proven(expected, started))
            return Computation(batched, room, (*batched.choices, *rotary, how))
        batched.undo()
        reason = f"in a batch, {problem}"
        room = _single_room(base, config, at_most=room.max_model_len)
        adapters, choices = batched.adapters, batched.choices[:1]
    else:
        reason = support.reason
        with _no_traceback(base):
            adapters, _, choices = adapted(base.model)
    single = SingleRunner(base, adapters)
    problem = _problem(base, single, room, expected)
    if problem:
        raise _refused(base, f"{reason}; one sequence at a time, {problem}")
    how = Choice("sequences", "one at a time", f"{reason}; {_how_proven(expected, started)}")
    return Computation(single, room, (*choices, *rotary, how))


def _paged_room(base: LoadedBase, config: LocalEngineConfig) -> Room:
    return Room.of(base, config, CacheSize(0, paged_shape(base).bytes_per_token), is_batched=True)


def _single_room(base: LoadedBase, config: LocalEngineConfig, *, at_most: int | None = None) -> Room:
    try:
        size = measure_cache(base.model)
    except Exception as error:
        raise _refused(base, f"its own forward pass with a cache fails ({type(error).__name__}: {error})") from error
    room = Room.of(base, config, size, is_batched=False)
    return room if at_most is None else replace(room, max_model_len=min(room.max_model_len, at_most))


def _expected_of(base: LoadedBase) -> Expected:
    try:
        return expected_of(base.model)
    except Exception as error:
        raise _refused(base, f"its own forward pass fails ({type(error).__name__}: {error})") from error


def _problem(base: LoadedBase, runner: Runner, room: Room, expected: Expected | None) -> str:
    """Return what the runner computes wrong, or an empty string, which is remembered."""
    if expected is None:
        return ""
    problem = describe_difference(runner, room.pool(), expected, base.quantization.compute_dtype)
    if not problem and holds_all(room.pool(), expected):  # otherwise they were not computed beside each other
        self_check_cache.remember("serve", base.ref.fingerprint, **_facts(base, runner.mode))
    return problem


def _is_proven(base: LoadedBase, mode: str) -> bool:
    return self_check_cache.is_proven("serve", base.ref.fingerprint, **_facts(base, mode))


def _facts(base: LoadedBase, mode: str) -> dict[str, str]:
    """Return what the outcome depends on, beside the base and the versions of libraries."""
    device = base.model.device
    return {
        "mode": mode,
        "weights": base.quantization.weights,
        "dtype": base.quantization.compute_dtype,
        "device": self_check_cache.machine_of(device),
        "kernels": ", ".join(map(str, kernels_for(device)[1])),
        "loaded": ", ".join(map(str, base.choices)),
    }


def _how_proven(expected: Expected | None, started: float) -> str:
    if expected is None:
        return "compared with the model's own forward pass at an earlier start"
    return f"compared with the model's own forward pass in {format_duration(time.perf_counter() - started)}"


@contextmanager
def _no_traceback(base: LoadedBase) -> Iterator[None]:
    try:
        yield
    except (AdapterHubError, MemoryError):
        raise
    except Exception as error:
        raise _refused(base, f"its layers cannot be replaced ({type(error).__name__}: {error})") from error


def _refused(base: LoadedBase, reason: str) -> BaseUnsupported:
    model_type = base.model.config.get_text_config().model_type
    return BaseUnsupported(
        f"the base {base.ref.id} ({model_type}) is not served: {reason}. Serve another base; what is a causal language "
        "model can be served with --engine vllm."
    )
