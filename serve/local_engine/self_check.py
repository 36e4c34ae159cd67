"""Compare what a base computes as it is served with its own forward pass, taken before its layers were replaced.

"It ran" proves nothing: a state that leaks between sequences, or an attention that is not ours, raises no error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from serve.adapters.weights import LowRank
from serve.engine import AdapterScale, GenerationRequest
from serve.local_engine.block_pool import BlockPool, Sequence
from serve.local_engine.lora_layers import linear_layers
from serve.local_engine.model_runner import Runner
from serve.local_engine.scheduler import Batch, ScheduledChunk

TOLERANCE = {"float32": 2e-3, "bfloat16": 0.5, "float16": 0.1}
"""Largest accepted mean difference of a row's log-probabilities, by the dtype of the arithmetic."""
_DIGEST = "sha256:self-check"
_RANK = 2
_STD = 0.2
"""Standard deviation of the random adapter's B: its effect is larger than the tolerance."""
_CHUNKS = (((0, 5), (5, 8), (13, 1)), ((0, 4), (4, 1), (5, 1)))
"""Of each prompt, what a step computes, as (first token, tokens): its beginning, its rest, or an answer's token."""
_NUM_STEPS = len(_CHUNKS[0])


@dataclass(frozen=True)
class Expected:
    """What the model itself computes for the check's prompts, with and without a random adapter."""

    adapter: dict[str, LowRank]
    prompts: list[list[int]]
    logprobs: dict[tuple[int, bool], torch.Tensor]
    """(Prompt, with the adapter) -> log-probabilities fp32 [tokens, vocabulary]."""


@torch.inference_mode()
def expected_of(model: Any) -> Expected:
    """Compute each prompt alone by the model's forward pass, without a cache. The model must be as it was loaded."""
    vocabulary = min(model.config.get_text_config().vocab_size, 1024)  # the first tokens are text in every vocabulary
    drawn = torch.Generator().manual_seed(0)
    lengths = [sum(num_tokens for _, num_tokens in chunks) for chunks in _CHUNKS]
    prompts = [torch.randint(3, vocabulary, (length,), generator=drawn).tolist() for length in lengths]
    adapter = _random_adapter(model)
    logprobs = {}
    for number, prompt in enumerate(prompts):
        logprobs[number, False] = _logprobs(model, prompt)
        with _hooked(model, adapter):
            logprobs[number, True] = _logprobs(model, prompt)
    return Expected(adapter, prompts, logprobs)


def describe_difference(runner: Runner, pool: BlockPool, expected: Expected, dtype: str) -> str:
    """Compute the prompts as they are served and return what differs, or an empty string.

    All of them are in one batch, in chunks beside longer ones and in decoding; each row must be the one that the model
    computes for its sequence alone. The blocks of `pool` are free afterwards.
    """
    try:
        runner.adapters.install(_DIGEST, runner.adapters.prepare("self-check", dict(expected.adapter)))
        try:
            for trials in _batches(pool, expected):
                if found := _difference(runner, pool, trials, expected, TOLERANCE[dtype]):
                    return found
        finally:
            runner.adapters.remove(_DIGEST)
    except Exception as error:
        return f"{type(error).__name__}: {error}".rstrip(".")
    return ""


def holds_all(pool: BlockPool, expected: Expected) -> bool:
    """Return whether the blocks hold all prompts of the check, with and without its adapter, at the same time."""
    return 2 * sum(pool.blocks_for(len(prompt)) for prompt in expected.prompts) <= pool.num_blocks


@dataclass(frozen=True)
class _Trial:
    prompt: int
    has_adapter: bool
    sequence: Sequence

    @classmethod
    def of(cls, prompt: int, tokens: list[int], *, has_adapter: bool) -> _Trial:
        mix = (AdapterScale(_DIGEST),) if has_adapter else ()
        request = GenerationRequest(f"self-check {prompt} {has_adapter}", tuple(tokens), adapters=mix)
        return cls(prompt, has_adapter, Sequence.of(request))

    def __str__(self) -> str:
        return f"a prompt of {len(self.sequence.tokens)} tokens {'with' if self.has_adapter else 'without'} an adapter"


def _batches(pool: BlockPool, expected: Expected) -> list[list[_Trial]]:
    """Return all trials as one batch, and one of them alone; each alone where the blocks do not hold all."""
    capacity = pool.num_blocks * pool.block_size
    trials = [
        _Trial.of(number, prompt[:capacity], has_adapter=has_adapter)
        for has_adapter in (True, False)  # the order of a batch: the bare base last
        for number, prompt in enumerate(expected.prompts)
    ]
    if holds_all(pool, expected):
        return [trials, trials[-1:]]
    return [[trial] for trial in trials]


def _difference(runner: Runner, pool: BlockPool, trials: list[_Trial], expected: Expected, tolerance: float) -> str:
    try:
        for trial in trials:
            pool.grow(trial.sequence, len(trial.sequence.tokens))
        for step in range(_NUM_STEPS):
            chunks = [(_CHUNKS[trial.prompt][step], trial) for trial in trials]
            chunks = [(chunk, trial) for chunk, trial in chunks if sum(chunk) <= len(trial.sequence.tokens)]
            if not chunks:
                continue
            batch = Batch(tuple(ScheduledChunk(trial.sequence, *chunk, samples=True) for chunk, trial in chunks))
            rows = runner.run(batch)
            for (start, num_tokens), trial in chunks:
                right = expected.logprobs[trial.prompt, trial.has_adapter][start + num_tokens - 1]
                found = _distance(rows[trial.sequence.request.id].logits, right)
                if not found <= tolerance:
                    return (
                        f"log-probabilities after tokens {start} to {start + num_tokens} of {trial}"
                        f"{' beside others' if len(trials) > 1 else ''} differ by {found:.3f}, accepted are {tolerance}"
                    )
    finally:
        for trial in trials:
            pool.release(trial.sequence)
    return ""


def _distance(logits: torch.Tensor, right: torch.Tensor) -> float:
    """Return the mean difference of log-probabilities; of tokens that the model itself gives NaN or Inf, none."""
    is_finite = right.isfinite()
    difference = (logits.float().log_softmax(-1) - right)[is_finite].abs()
    return float(difference.mean()) if is_finite.any() else 0.0


def _logprobs(model: Any, prompt: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([prompt], device=model.device), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


def _random_adapter(model: nn.Module) -> dict[str, LowRank]:
    """Return a low-rank update of every linear layer."""
    drawn = torch.Generator().manual_seed(0)
    adapter = {}
    for name, layer in linear_layers(model).items():
        a = torch.randn(_RANK, layer.in_features, generator=drawn) / layer.in_features**0.5
        b = torch.randn(layer.out_features, _RANK, generator=drawn) * _STD
        adapter[name] = LowRank(a.to(layer.weight.device), b.to(layer.weight.device).T, 1.0)
    return adapter


@contextmanager
def _hooked(model: nn.Module, adapter: dict[str, LowRank]) -> Iterator[None]:
    """Add the adapter to the outputs of the model's own layers."""
    hooks = [layer.register_forward_hook(_hook(adapter[name])) for name, layer in linear_layers(model).items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hook(update: LowRank) -> Any:
    def add(_: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + (given[0].float() @ update.a.T @ update.bt).to(output.dtype)

    return add
