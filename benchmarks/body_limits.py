"""Measure how much the largest allowed request bodies delay /health and a running stream.

A real server serves the real base. 100 clients send such bodies one after the other from a process of their own, at a
low priority, since in practice they are other machines. The bodies are the most expensive kinds that were found, at the
server's limits.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import httpx

MODEL = "smollm2-135m-instruct"
BODY_BYTES = (8 << 20) - 1000
PROSE = "The quick brown fox jumps over the lazy dog and then it goes home. "
MAX_VALUES = 36_000
"""Largest length that the server accepts with this base's context of 8,192 tokens."""


def chat(**fields: object) -> bytes:
    return json.dumps(
        {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1} | fields
    ).encode()


def prompt(text: str) -> bytes:
    return b'{"model": "%s", "max_tokens": 1, "prompt": %s}' % (MODEL.encode(), text.encode())


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def schema(properties: dict[str, object]) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"schema": {"type": "object", "properties": properties}}}


KINDS: dict[str, Callable[[], bytes]] = {
    "prose, 8 MiB": lambda: chat(messages=user(PROSE * (BODY_BYTES // len(PROSE)))),
    "prose, as long as is tokenized (660 kB)": lambda: chat(messages=user(PROSE * (660_000 // len(PROSE)))),
    "token ids, 8 MiB": lambda: prompt("[" + "0," * (BODY_BYTES // 2) + "0]"),
    "token ids, as many as are parsed": lambda: prompt("[" + "0," * (MAX_VALUES - 1000) + "0]"),
    "lists where token ids belong": lambda: prompt("[" + "[]," * 9_999 + "[]]"),
    "9,900 messages": lambda: chat(messages=user("x") * (9_900)),
    "numbers of 99 digits": lambda: prompt("[" + ("9" * 99 + ",") * 9_000 + "0]"),
    "deep JSON, 8 MiB of brackets": lambda: prompt("[" * BODY_BYTES),
    "unknown fields": lambda: chat(**{f"field{number}": 0 for number in range(9_900)}),
    "schema, 8 MiB": lambda: chat(response_format=schema({f"{number}" + "x" * 1600: {} for number in range(5_000)})),
    "schema, 9,900 properties": lambda: chat(response_format=schema({f"p{number}": {} for number in range(9_900)})),
    "schema, 8 MiB, 16 answers": lambda: chat(n=16, response_format=schema({"x" * BODY_BYTES: {}})),
    "choice of 8 MiB, 16 answers": lambda: chat(n=16, structured_outputs={"choice": ["." * BODY_BYTES]}),
    "logit_bias, 9,900 entries": lambda: chat(logit_bias={str(number): 1 for number in range(9_900)}),
    "stop, 16 strings of 500 kB": lambda: chat(stop=["x" * 500_000 + str(number) for number in range(16)]),
}


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """Start a server of this checkout; yield its URL."""
    command = [
        sys.executable,
        "-c",
        "from adapterhub.cli.main import main; main()",
        "serve",
        "--base",
        MODEL,
        "--port",
        "0",
    ]
    child = subprocess.Popen([*command, "--no-page", "--threads", "1"], stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    try:
        yield next(found[1] for line in child.stderr if (found := re.match(r"ready: (\S+)/v1", line)))
    finally:
        child.terminate()
        child.wait(30)


class Watch:
    """Ping /health and read a stream until closed; keep the seconds between consecutive events."""

    def __init__(self, url: str) -> None:
        self._url, self._ends = url, threading.Event()
        self.health: list[float] = []
        self.gaps: list[float] = []
        self._threads = [threading.Thread(target=work) for work in (self._ping, self._read)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join()

    def clear(self) -> None:
        self.health.clear()
        self.gaps.clear()

    def _ping(self) -> None:
        with httpx.Client(base_url=self._url, timeout=120) as client:
            while not self._ends.wait(0.02):
                begun = time.perf_counter()
                client.get("/health")
                self.health.append(time.perf_counter() - begun)

    def _read(self) -> None:
        body = {"model": MODEL, "messages": user("Count"), "max_tokens": 4000, "ignore_eos": True, "stream": True}
        with httpx.Client(base_url=self._url, timeout=120) as client:
            while not self._ends.is_set():
                with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                    last = time.perf_counter()
                    for line in answer.iter_lines():
                        if self._ends.is_set():
                            return
                        if line:
                            now = time.perf_counter()
                            self.gaps.append(now - last)
                            last = now


async def send_bodies(url: str, kind: str, *, clients: int, seconds: float) -> Counter[str]:
    """Return the status codes of the answers."""
    place, body, found = urlsplit(url), KINDS[kind](), Counter[str]()
    path = "/v1/completions" if b'"prompt"' in body[:80] else "/v1/chat/completions"
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode()
    ends = time.monotonic() + seconds

    async def one() -> None:
        while time.monotonic() < ends:
            reader, writer = await asyncio.open_connection(place.hostname, place.port)
            try:
                writer.write(head)
                for at in range(0, len(body), 1 << 20):
                    writer.write(body[at : at + (1 << 20)])
                    await writer.drain()
                found[(await reader.read(12))[9:].decode() or "closed"] += 1
            except ConnectionError:
                found["reset"] += 1
            finally:
                writer.close()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one()) for _ in range(clients)]
        await asyncio.wait(tasks, timeout=seconds + 5)
        for task in tasks:
            task.cancel()
    return found


def row(label: str, watch: Watch, note: str) -> str:
    figures = []
    for values in (watch.health, watch.gaps):
        ranked = sorted(values) or [float("nan")]
        p99 = ranked[min(len(ranked) - 1, int(0.99 * len(ranked)))]
        figures.append(f"{1000 * statistics.median(ranked):.0f} / {1000 * p99:.0f} / {1000 * ranked[-1]:.0f}")
    return f"| {label} | {' | '.join(figures)} | {note} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0, help="for each kind of body")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--only", help="kinds that contain this")
    parser.add_argument("--send", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.send:
        os.nice(19)
        found = asyncio.run(send_bodies(chosen.url, chosen.send, clients=chosen.clients, seconds=chosen.seconds))
        print(", ".join(f"{count} x {status}" for status, count in sorted(found.items())))
        return
    with contextlib.nullcontext(chosen.url) if chosen.url else serving() as url:
        watch = Watch(url)
        try:
            time.sleep(3)
            watch.clear()
            time.sleep(chosen.seconds)
            print("milliseconds: median / 99th percentile / longest\n")
            print("| bodies | /health | between two tokens of a stream | answers |\n|---|---|---|---|")
            print(row("none", watch, ""), flush=True)
            for kind in KINDS:
                if chosen.only and chosen.only not in kind:
                    continue
                watch.clear()
                command = [sys.executable, __file__, "--send", kind, "--url", url]
                command += ["--seconds", str(chosen.seconds), "--clients", str(chosen.clients)]
                note = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
                print(row(kind, watch, note), flush=True)
                time.sleep(1)
        finally:
            watch.close()


if __name__ == "__main__":
    main()
