"""Client of one vLLM server: its base, its adapters by name, answers as events. Keeps no state."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from adapterhub.adapter import StoredBase
from adapterhub.errors import (
    AdapterHubError,
    AdapterLoadFailed,
    AdapterNotFound,
    EngineStopped,
    IncompatibleBase,
    NotAuthorized,
    ServerBusy,
    UsageError,
)
from adapterhub.net import trusts_proxy
from serve.vllm_engine import compat

_CONNECT_S = 5.0
_LOAD_S = 120.0
_KEEP_ALIVE_S = 2.0
"""Idle connections are closed before vLLM does it (after 5 s), which would fail the next request on them."""


class VllmServer:
    """One vLLM server at `url`, without /v1; `key` is sent as a bearer token."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        timeout = httpx.Timeout(_LOAD_S, connect=_CONNECT_S)
        limits = httpx.Limits(max_connections=None, keepalive_expiry=_KEEP_ALIVE_S)
        self._client = httpx.AsyncClient(
            base_url=self.url, headers=headers, timeout=timeout, limits=limits, trust_env=trusts_proxy(self.url)
        )

    async def is_healthy(self, *, timeout_s: float) -> bool:
        try:
            return (await self._client.get("/health", timeout=timeout_s)).status_code == 200
        except httpx.HTTPError:
            return False

    async def version(self) -> str:
        return str((await self._get("/version")).get("version", "unknown")).partition("+")[0]

    async def base_card(self) -> dict[str, Any]:
        """Return the card of the base it serves: the one without a parent."""
        cards = (await self._get("/v1/models")).get("data") or []
        found = next((card for card in cards if not card.get("parent") and card.get("max_model_len")), None)
        if found is None:
            raise UsageError(f"{self.url}/v1/models names no base model: is it a vLLM server?")
        return dict(found)

    async def takes_adapters(self) -> bool:
        """Return whether it loads adapters at run time. The empty request that asks changes nothing."""
        return (await self._post("/v1/load_lora_adapter", {})).status_code != 404

    async def first_token(self, model: str) -> None:
        """Request one token. Raises what `stream` raises, and NotAuthorized."""
        answer = await self._post("/v1/completions", {"model": model, "prompt": [0], "max_tokens": 1, "temperature": 0})
        if answer.status_code != 200:
            raise _refusal(self.url, answer)

    async def load(self, name: str, folder: Path) -> None:
        """Load an adapter from `folder`, replacing one of this name. Raises AdapterLoadFailed with vLLM's reason."""
        body = {"lora_name": name, "lora_path": str(folder)}
        answer = await self._post("/v1/load_lora_adapter", body)
        if "already been loaded" in _reason(answer):  # by an earlier process of ours, from a folder that may be gone
            await self.unload(name)
            answer = await self._post("/v1/load_lora_adapter", body)
        reason = _reason(answer)
        if answer.status_code == 200:
            return
        if answer.status_code == 404:
            raise AdapterLoadFailed(compat.OTHER_DISK.text(url=self.url, folder=folder))
        if "LoRA is not enabled" in reason:
            raise AdapterLoadFailed(compat.LORA_DISABLED.text(url=self.url))
        raise AdapterLoadFailed(f"vLLM at {self.url} refused the adapter ({answer.status_code}): {reason}")

    async def unload(self, name: str) -> None:
        """Unload an adapter, if it is there. Raises EngineStopped."""
        answer = await self._post("/v1/unload_lora_adapter", {"lora_name": name})
        if answer.status_code not in (200, 404):
            raise EngineStopped(f"vLLM at {self.url} did not unload ({answer.status_code}): {_reason(answer)}")

    async def stream(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Stream the events of one completion; closing the stream closes the connection, and vLLM aborts.

        Raises AdapterNotFound for a name it does not know, UsageError for what it refuses, ServerBusy, EngineStopped.
        """
        timeout = httpx.Timeout(None, connect=_CONNECT_S)  # health is watched separately; a long prompt takes its time
        try:
            async with self._client.stream("POST", "/v1/completions", json=body, timeout=timeout) as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    raise _in_service(_refusal(self.url, answer))
                async for line in answer.aiter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        event = json.loads(line.removeprefix("data: "))
                        if "error" in event:
                            raise EngineStopped(
                                f"vLLM at {self.url} failed in the middle of an answer: {event['error']}"
                            )
                        yield event
        except httpx.HTTPError as error:
            raise EngineStopped(
                f"vLLM at {self.url} broke off ({type(error).__name__}): ask again in a moment."
            ) from error

    async def close(self) -> None:
        await self._client.aclose()

    async def _get(self, path: str) -> dict[str, Any]:
        try:
            answer = await self._client.get(path, timeout=30)
        except httpx.HTTPError as error:
            raise EngineStopped(f"no vLLM server answers at {self.url} ({type(error).__name__}): is it up?") from error
        if answer.status_code == 404:
            raise UsageError(f"there is no {self.url}{path}: is it a vLLM server?")
        if answer.status_code != 200:
            raise _refusal(self.url, answer)
        try:
            return dict(answer.json())
        except ValueError:
            raise UsageError(f"{self.url}{path} does not answer with vLLM's JSON: is it a vLLM server?") from None

    async def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        try:
            return await self._client.post(path, json=body)
        except httpx.HTTPError as error:
            raise EngineStopped(f"vLLM at {self.url} does not answer ({type(error).__name__}).") from error


async def warn_of_version(server: VllmServer, report: Callable[[str], None]) -> None:
    """Report a server of a version that was not tested."""
    version = await server.version()
    if version not in compat.TESTED_VERSIONS:
        report(compat.VERSION.text(version=version, url=server.url))


async def validate_server(
    server: VllmServer, base: StoredBase, base_name: str, blank: Path, *, keeps_blank: bool
) -> tuple[str, int]:
    """Check the served base, runtime LoRA loading and one token with and without a no-op adapter, `blank`.

    Return the model name that stands for the base (the blank adapter's with `keeps_blank`), and max_model_len, in
    tokens.
    Raises EngineStopped, NotAuthorized, IncompatibleBase, UsageError, AdapterLoadFailed.
    """
    card = await server.base_card()
    base_id, ref = str(card["id"]), base.ref
    if {card.get("root"), base_id}.isdisjoint({str(base.path), str(base.path.resolve()), ref.id, base_name}):
        raise IncompatibleBase(
            f"vLLM at {server.url} serves {base_id} ({card.get('root')}), not {base_name} ({ref.id}): start it with "
            "this base, or serve the base it has."
        )
    if not await server.takes_adapters():
        raise UsageError(compat.NO_RUNTIME_LOADING.text(url=server.url))
    name, is_kept = f"blank-{secrets.token_hex(4)}", False
    try:
        await server.load(name, blank)
        await server.first_token(base_id)
        await server.first_token(name)
        is_kept = keeps_blank
    except AdapterLoadFailed as error:
        raise AdapterLoadFailed(
            f"{error} (It was tried with an adapter of {base_name} that changes nothing.)"
        ) from None
    finally:
        if not is_kept:
            with suppress(AdapterHubError):
                await server.unload(name)
    return name if keeps_blank else base_id, int(card["max_model_len"])


def _reason(answer: httpx.Response) -> str:
    try:
        reply = answer.json()
    except ValueError:
        return answer.text[:300]
    error = reply.get("error", reply) if isinstance(reply, dict) else reply
    return str(error.get("message", error) if isinstance(error, dict) else error)[:300]


def _refusal(url: str, answer: httpx.Response) -> Exception:
    status, reason = answer.status_code, _reason(answer)
    if status in (401, 403):
        return NotAuthorized(f"vLLM at {url} wants a key: give its own as $ADAPTERHUB_VLLM_API_KEY.")
    if status == 404:
        return AdapterNotFound(f"vLLM at {url} does not know this: {reason}")
    if status == 429:
        return ServerBusy(f"vLLM at {url} is busy: {reason}")
    if status < 500:
        return UsageError(f"vLLM refused the request: {reason}")
    return EngineStopped(f"vLLM at {url} failed ({status}): {reason}")


def _in_service(error: Exception) -> Exception:
    """Replace NotAuthorized: the key between this server and vLLM is not the client's."""
    return EngineStopped(str(error)) if isinstance(error, NotAuthorized) else error
