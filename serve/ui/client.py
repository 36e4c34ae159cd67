"""Client of the API for the page: many visitors at once, each with a key of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

from adapterhub.errors import AdapterHubError, NotAuthorized, ServeError
from adapterhub.net import trusts_proxy
from serve.client import (
    ANSWER_TIMEOUT_S,
    CONNECT_TIMEOUT_S,
    NO_KEY,
    Answer,
    Sampling,
    ServedModel,
    check_complete,
    describe_error,
    request_body,
)

Messages = list[dict[str, str]]
VoteWinner = Literal["a", "b", "tie", "both_bad"]
_READ_BYTES = 1 << 20


class PageClient:
    """The API at `url` (without /v1). Every method raises AdapterHubError with a message for the visitor."""

    def __init__(self, url: str) -> None:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient, Timeout

        self.url = f"{url}/v1"
        self._client = AsyncOpenAI(
            base_url=self.url,
            api_key=NO_KEY,
            max_retries=0,  # the visitor sees the error and has a Retry button
            timeout=Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            http_client=DefaultAsyncHttpxClient(trust_env=trusts_proxy(url)),
        )

    def _for(self, key: str | None) -> Any:
        return self._client.with_options(api_key=(key or "").strip() or NO_KEY)

    # Of every OpenAI-compatible server

    async def models(self, key: str | None) -> list[ServedModel]:
        """Return the base, then the adapters."""
        try:
            page = await self._for(key).models.list()
            return sorted((ServedModel.read(model) for model in page.data), key=lambda model: not model.is_base)
        except Exception as error:
            raise describe_error(error, self.url) from error

    async def lets_in(self, key: str | None) -> bool:
        """Return whether the server accepts this key."""
        try:
            await self.models(key)
        except NotAuthorized:
            return False
        return True

    async def fill(
        self,
        answer: Answer,
        messages: Messages,
        sampling: Sampling,
        *,
        key: str | None,
        wants_tokens: bool = False,
    ) -> None:
        """Request `answer` and fill it until it is complete. Cancelling cancels the request."""
        identity = asyncio.create_task(self._digest(answer, key))
        try:
            body = request_body(answer, messages, sampling, wants_tokens=wants_tokens)
            stream = await self._for(key).chat.completions.create(**body)
            async with stream:
                async for chunk in stream:
                    answer.add(chunk)
            answer.digest = await identity
        except Exception as error:
            raise describe_error(error, self.url, has_begun=bool(answer.text)) from error
        finally:
            identity.cancel()
        check_complete(answer, self.url)

    async def _digest(self, answer: Answer, key: str | None) -> str | None:
        """Return the digest that the name points to while it answers: it may point elsewhere a minute later."""
        try:
            found = {model.name: model.digest for model in await self.models(key)}
        except AdapterHubError:
            return None
        digests = [found.get(name) for name in ([part.name for part in answer.mix] or [answer.model])]
        return "+".join(digest for digest in digests if digest) or None

    # Of adapterhub's own server

    async def get(self, path: str, key: str | None, **query: str | None) -> Any:
        """Return the JSON of GET /v1/`path`."""
        params = {name: value for name, value in query.items() if value}
        return await self._call("get", path, key, options={"params": params})

    async def post(self, path: str, key: str | None, **body: Any) -> Any:
        """Return the JSON of POST /v1/`path`; a plain text as it is."""
        return await self._call("post", path, key, body=body)

    async def send_file(self, path: str, key: str | None, *, file: Path, **query: str | None) -> Any:
        """Send a file as the body of POST /v1/`path`, reading it meanwhile. Return the JSON of the reply."""
        params = {name: value for name, value in query.items() if value}
        options = {"headers": {"Content-Type": "application/octet-stream"}, "params": params}
        return await self._call("post", path, key, content=_blocks(file), options=options)

    async def refusal(self, path: str, key: str | None) -> str | None:
        """Return why this key may not POST to `path`, or None where it may. Sends a body that has no effect."""
        try:
            await self.post(path, key)
        except (NotAuthorized, ServeError) as error:
            return str(error)
        except AdapterHubError:
            return None  # the key may; only the body was invalid
        return None

    async def _call(self, method: str, path: str, key: str | None, **arguments: Any) -> Any:
        import openai

        try:
            # `object`: JSON where the reply is JSON, else its text.
            return await getattr(self._for(key), method)(f"/{path}", cast_to=object, **arguments)
        except Exception as error:
            code = (
                error.body.get("code")
                if isinstance(error, openai.APIStatusError) and isinstance(error.body, dict)
                else None
            )
            if isinstance(error, openai.NotFoundError) and code in (None, "not_found"):
                raise ServeError(
                    f"the server at {self.url} has no /v1/{path}: only adapterhub's own server has. Use its URL."
                ) from error
            raise describe_error(error, self.url) from error


async def _blocks(file: Path) -> AsyncIterator[bytes]:
    with file.open("rb") as content:
        while block := await asyncio.to_thread(content.read, _READ_BYTES):
            yield block
