"""Keeps web pages of other sites away from a server that trusts whoever can reach it.

A browser on this machine reaches it too, and does what the pages it shows want: a page may post to any address (it
sends its own Origin then), and may give its own name the address 127.0.0.1 (DNS rebinding: the Host is its name).
"""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from adapterhub.listening import is_loopback

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


class BrowserGuard:
    """Refuses requests that come by a foreign name or from a foreign page; programs send no Origin and pass.

    Without keys (`is_open`) every request is looked at. With keys, one that carries an Authorization header needs no
    more: pages cannot make a browser send that. What is left there are cookies, which a browser adds by itself.
    """

    def __init__(
        self, app: ASGIApp, *, is_open: bool, allowed_hosts: tuple[str, ...] = (), refuse: Callable[[str], ASGIApp]
    ) -> None:
        self._app = app
        self._is_open = is_open
        self._allowed = {_split(name)[0] for name in allowed_hosts}
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fault = self._fault(scope) if scope["type"] in ("http", "websocket") else None
        if fault is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "foreign site"})
        else:
            await self._refuse(fault)(scope, receive, send)

    def _fault(self, scope: Scope) -> str | None:
        headers = Headers(scope=scope)
        if not self._is_open and "authorization" in headers:
            return None
        hosts = headers.getlist("host")
        if self._is_open:
            # None at all: HTTP/1.0, which no browser speaks.
            strange = [host for host in hosts if not self._is_ours(_split(host)[0])]
            if strange or len(hosts) > 1:
                name = (strange or hosts)[0][:100]
                return (
                    f"this server does not answer to the name {name!r}: reach it by 127.0.0.1 or localhost, or start "
                    "it with --allowed-host NAME."
                )
        if scope["type"] == "http" and scope["method"] in _SAFE_METHODS:
            return None
        site, origins = headers.get("sec-fetch-site"), headers.getlist("origin")
        if site in ("same-origin", "none"):  # as the browser itself saw it, whatever a proxy made of the Host
            return None
        strange = [origin for origin in origins if not self._is_same_site(origin, hosts)]
        if strange or (site is not None and not origins):
            return (
                f"a web page of another site ({(strange or [str(site)])[0][:100]!r}) may not do this: use this "
                "server's own page, or allow that site's name with --allowed-host NAME."
            )
        return None

    def _is_ours(self, name: str) -> bool:
        return name in self._allowed or is_loopback(name)

    def _is_same_site(self, origin: str, hosts: list[str]) -> bool:
        try:
            scheme = urlsplit(origin).scheme
        except ValueError:
            return False
        name, port = _split(origin.partition("://")[2])
        default = _DEFAULT_PORTS.get(scheme)
        if default is None or not name:
            return False
        if name in self._allowed:
            return True
        return any((name, port or default) == (there, at or default) for there, at in map(_split, hosts))


def _split(netloc: str) -> tuple[str, str]:
    """Name and port, the port empty where none is given; `[::1]:80`, `localhost.`, `LOCALHOST` included."""
    name, colon, port = netloc.strip().lower().rpartition(":")
    if not colon or not port.isdigit():
        name, port = netloc.strip().lower(), ""
    return name.removeprefix("[").removesuffix("]").removesuffix("."), port
