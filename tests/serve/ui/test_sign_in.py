"""The page's gate without a browser: which keys it asks the API about, and what it sends instead of the page."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette

from serve.ui.app import mount_page
from serve.ui.client import PageClient
from serve.ui.sign_in import COOKIE, Gate


def _replies(key: str) -> tuple[httpx.Response, httpx.Response]:
    """To the sign-in form and to the cookie, before an API that is never asked: none listens there."""

    async def whole() -> tuple[httpx.Response, httpx.Response]:
        gate = Gate(Starlette(), path="/ui", client=PageClient("http://127.0.0.1:9"))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://page") as client:
            signed_in = await client.post("/ui/sign-in", data={"key": key})
            return signed_in, await client.get("/ui", headers={"cookie": f"{COOKIE}={key}".encode()})

    return asyncio.run(whole())


@pytest.mark.parametrize("key", ["schlüssel", "鍵", "torn\x7fkey"])
def test_key_that_no_header_can_carry(key: str) -> None:
    signed_in, shown = _replies(key)
    assert (signed_in.status_code, shown.status_code) == (401, 401)
    assert "does not accept this key" in signed_in.text


@pytest.mark.parametrize(("needs_key", "status"), [(False, 200), (True, 401)], ids=["page", "sign-in form"])
def test_page_in_a_frame_of_another_site(needs_key: bool, status: int) -> None:
    async def whole() -> httpx.Response:
        app = FastAPI()
        mount_page(app, "http://127.0.0.1:9", needs_key=needs_key)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://page") as client:
            return await client.get("/ui/")

    shown = asyncio.run(whole())
    assert shown.status_code == status
    assert "frame-ancestors 'self'" in shown.headers["content-security-policy"].split("; ")
