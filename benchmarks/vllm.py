"""Compare our server with vLLM's CPU build, as shipped and with our LoRA plugin, over HTTP.

    scripts/vllm.sh .venv-vllm
    .venv/bin/python benchmarks/vllm.py [--rounds 3] [--tokens 24] [--vllm-python .venv-vllm/bin/python]

SmolLM2-135M-Instruct, NF4 in fp32 arithmetic for us and bfloat16 for vLLM, each computing on one core; 16 random
adapters of rank 16 on all linear layers. Every server answers the same 32-token prompts greedily and streams; they
take turns; those not measured are stopped, since vLLM's workers poll. A rate is all tokens over all seconds,
prefill and HTTP included; memory is what the server's processes hold (PSS).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import decode
import httpx
import torch

from adapterhub.adapter import StoredBase
from adapterhub.files import sha256_of
from adapterhub.package import card
from adapterhub.package.lora_config import read_lora_config
from adapterhub.package.manifest import BaseEntry, Chat, FileEntry, Manifest
from serve.vllm_engine.process import ChildOptions, VllmProcess, find_vllm

NUM_ADAPTERS, RANK, BASE = 16, 16, "smollm2-135m-instruct"


def write_adapters(root: Path, stored: StoredBase) -> list[Path]:
    """Write packages without a probe, saved by PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(stored.path, dtype=torch.bfloat16)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, config)
    folders = []
    for number in range(NUM_ADAPTERS):
        torch.manual_seed(number)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        folder = root / f"a{number:02}"
        model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        (folder / "chat_template.jinja").write_bytes((stored.path / "chat_template.jinja").read_bytes())
        listed = sorted(path for path in folder.iterdir())
        manifest = Manifest(
            name=folder.name,
            base=BaseEntry(id=stored.ref.id, fingerprint=str(stored.ref.fingerprint), revision=stored.ref.revision),
            lora=read_lora_config(folder).described(),
            chat=Chat(template_sha256=sha256_of(folder / "chat_template.jinja"), bos=None, eos=None, pad=None),
            files={path.name: FileEntry(sha256=sha256_of(path), size=path.stat().st_size) for path in listed},
        )
        (folder / "README.md").write_text(card.render(manifest))
        (folder / "adapterhub.json").write_text(manifest.to_json())
        folders.append(folder)
    return folders


@dataclass
class Contender:
    name: str
    url: str
    pid: int
    start_s: float
    base: str
    headers: dict[str, str]


async def start_ours(folders: list[Path], root: Path) -> tuple[Contender, Callable[[], None]]:
    start, port = time.perf_counter(), 8190
    adapters = [part for folder in folders for part in ("-a", f"{folder.name}={folder}")]
    command = [str(Path(sys.executable).with_name("adapterhub")), "serve", "--base", BASE, *adapters]
    with (root / "ours.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--threads", "1", "--no-page"], stdout=log, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient() as client:
        while True:
            assert process.poll() is None, (root / "ours.log").read_text()
            try:
                if (await client.get(f"{url}/ready")).status_code == 200:
                    break
            except httpx.HTTPError:
                await asyncio.sleep(0.2)

    def stop() -> None:
        process.terminate()
        process.wait()

    return Contender("ours", url, process.pid, time.perf_counter() - start, BASE, {}), stop


async def start_vllm(
    name: str, stored: StoredBase, folders: list[Path], root: Path, python: Path, *, has_plugin: bool
) -> tuple[Contender, Callable[[], None]]:
    found = find_vllm(python)
    if not has_plugin:
        found = replace(found, version=f"{found.version} as shipped")  # not the version the plugin was made for
    slots = NUM_ADAPTERS if has_plugin else NUM_ADAPTERS - 1  # without it, one more is started, for the base
    options = ChildOptions(max_loras=slots, max_lora_rank=RANK, max_num_seqs=32, dtype="bfloat16")
    process = VllmProcess(found, stored, BASE, options, root / name.replace(" ", "-"))
    start = time.perf_counter()
    server = await process.start()
    seconds = time.perf_counter() - start
    for folder in folders:
        await server.load(folder.name, folder)
    assert process._child is not None
    headers = dict(server._client.headers)
    return Contender(name, server.url, process._child.pid, seconds, BASE, headers), process.stop


async def ask(contender: Contender, requests: int, num_adapters: int, tokens: int, salt: int) -> tuple[float, float]:
    """Send `requests` at once; return tokens/s and the median seconds to the first token."""
    firsts: list[float] = []
    async with httpx.AsyncClient(timeout=600, headers=contender.headers, limits=httpx.Limits()) as client:

        async def one(row: int, prompt: list[int]) -> None:
            model = f"a{row % num_adapters:02}" if num_adapters else contender.base
            body = {"model": model, "prompt": [1000 + salt, *prompt[1:]], "max_tokens": tokens, "temperature": 0,
                    "ignore_eos": True, "stream": True}  # fmt: skip
            begun, has_first = time.perf_counter(), False
            async with client.stream("POST", f"{contender.url}/v1/completions", json=body) as answer:
                assert answer.status_code == 200, await answer.aread()
                async for line in answer.aiter_lines():
                    if line.startswith("data: {") and not has_first:
                        has_first = True
                        firsts.append(time.perf_counter() - begun)

        start = time.perf_counter()
        await asyncio.gather(*(one(row, prompt) for row, prompt in enumerate(decode.prompts(requests))))
        seconds = time.perf_counter() - start
    return requests * tokens / seconds, statistics.median(firsts)


SCENES = {
    "base, 1 request": (1, 0), "base, 16 requests": (16, 0), "1 adapter, 16 requests": (16, 1),
    "4 adapters, 16 requests": (16, 4), "16 adapters, 16 requests": (16, 16),
}  # fmt: skip


def below(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(one for child in children for one in below(int(child)))]


def tell_all(pid: int, what: signal.Signals) -> None:
    for one in below(pid):
        os.kill(one, what)


def memory_mb(pid: int) -> float:
    """Return the PSS of a process and its descendants, in MiB."""
    rollups = [Path(f"/proc/{one}/smaps_rollup").read_text().split() for one in below(pid)]
    return sum(int(rollup[rollup.index("Pss:") + 1]) for rollup in rollups) / 1024


async def measure(rounds: int, tokens: int, python: Path) -> None:
    stored = decode.stored_base()
    with tempfile.TemporaryDirectory() as text:
        root = Path(text)
        folders = write_adapters(root, stored)
        starts: list[Callable[[], Awaitable[tuple[Contender, Callable[[], None]]]]] = [
            lambda: start_ours(folders, root),
            lambda: start_vllm("vLLM as shipped", stored, folders, root, python, has_plugin=False),
            lambda: start_vllm("vLLM, our plugin", stored, folders, root, python, has_plugin=True),
        ]
        contenders, stops = [], []
        try:
            for start in starts:
                contender, stop = await start()
                contenders.append(contender)
                tell_all(contender.pid, signal.SIGSTOP)
                stops.append(stop)
            rates: dict[tuple[str, str], list[tuple[float, float]]] = {}
            for turn in range(rounds + 1):
                for scene, (requests, adapters) in SCENES.items():
                    for contender in contenders:
                        tell_all(contender.pid, signal.SIGCONT)
                        found = await ask(contender, requests, adapters, tokens if turn else 2, turn)
                        tell_all(contender.pid, signal.SIGSTOP)
                        if turn:
                            rates.setdefault((contender.name, scene), []).append(found)
            report(contenders, rates)
        finally:
            for contender in contenders:
                tell_all(contender.pid, signal.SIGCONT)
            for stop in stops:
                await asyncio.to_thread(stop)


def report(contenders: list[Contender], rates: dict[tuple[str, str], list[tuple[float, float]]]) -> None:
    def medians(name: str, scene: str) -> tuple[float, float]:
        rate, first = zip(*rates[name, scene], strict=True)
        return statistics.median(rate), statistics.median(first)

    names = [contender.name for contender in contenders]
    print(f"\n| tokens/s (median first token, ms) | {' | '.join(names)} | ours / shipped | ours / plugin |")
    print("|---|" + "---|" * (len(names) + 2))
    for scene in SCENES:
        found = [medians(name, scene) for name in names]
        cells = [f"{rate:.0f} ({first * 1e3:.0f})" for rate, first in found]
        ratios = [f"**{found[0][0] / other[0]:.2f}**" for other in found[1:]]
        print(f"| {scene} | {' | '.join(cells + ratios)} |")
    held = [memory_mb(contender.pid) for contender in contenders]
    print(f"| memory held, MiB | {' | '.join(f'{mb:.0f}' for mb in held)} | "
          f"{' | '.join(f'**{held[0] / mb:.2f}**' for mb in held[1:])} |")  # fmt: skip
    print(f"| seconds to ready | {' | '.join(f'{contender.start_s:.0f}' for contender in contenders)} | | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--vllm-python", type=Path, default=Path(".venv-vllm/bin/python"))
    chosen = parser.parse_args()
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    torch.set_num_threads(1)
    asyncio.run(measure(chosen.rounds, chosen.tokens, chosen.vllm_python))


if __name__ == "__main__":
    main()
