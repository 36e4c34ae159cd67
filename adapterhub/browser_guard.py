"""Middleware that refuses requests of other sites' web pages to a server that asks for no key.

A browser on this machine can reach such a server. A page may post to any address (the request then has the page's
Origin), and may resolve its own name to 127.0.0.1 (DNS rebinding; the request then has the page's name as Host).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from adapterhub.errors import UsageError
from adapterhub.net import is_loopback

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?(:[0-9]{1,5})?")
_WEB = ("http://", "https://")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


def host_names(given: Iterable[str]) -> tuple[str, ...]:
    """Parse the values of --allowed-host: names and addresses as in a Host header. Raises UsageError."""
    return tuple(map(_host_name, given))


def _host_name(text: str) -> str:
    with suppress(ValueError):
        return f"[{ipaddress.IPv6Address(text[1:-1] if text.startswith('[') and text.endswith(']') else text)}]"
    if _NAME.fullmatch(text) is None:
        raise UsageError(
            f"invalid --allowed-host {text!r}: expected a host name without https:// and *, such as tools.example or "
            "192.0.2.7. Repeat the option for several."
        )
    return text


class BrowserGuard:
    """Middleware that refuses requests with another Host or Origin than the server's. Programs send no Origin and pass.

    Without keys (`is_open`) every request is checked. With keys, a request with a key in a header passes: pages cannot
    make a browser send one. The others may carry what a browser adds by itself: cookies, a proxy's password.
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
        if not self._is_open and any(given.lower().startswith("bearer ") for given in headers.getlist("authorization")):
            return None
        hosts = headers.getlist("host")
        if self._is_open:
            # None at all: HTTP/1.0, which no browser speaks.
            strange = [host for host in hosts if not self._is_ours(_split(host)[0])]
            if strange:
                return (
                    f"this server does not answer to the name {strange[0][:100]!r}: reach it by 127.0.0.1 or "
                    "localhost, or start it with --allowed-host NAME."
                )
            if len(hosts) > 1:
                return f"the request has {len(hosts)} Host headers: send one."
        if scope["type"] == "http" and scope["method"] in _SAFE_METHODS:
            return None
        site, origins = headers.get("sec-fetch-site"), headers.getlist("origin")
        if site in ("same-origin", "none"):  # as the browser itself saw it, whatever a proxy made of the Host
            return None
        strange = [origin for origin in origins if not self._is_same_site(origin, hosts)]
        if strange or (site is not None and not origins):
            site = (strange or [str(site)])[0]
            said = f"a web page of another site ({site[:100]!r}) may not do this: use this server's own page"
            return said + (
                ", or allow that site's name with --allowed-host NAME." if site.lower().startswith(_WEB) else "."
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
    """Return name and port, the port empty where none is given; of `[::1]:80`, `localhost:` and `LOCALHOST.`, too."""
    name, colon, port = netloc.strip().lower().rpartition(":")
    if not colon or (port and not port.isdecimal()):
        name, port = netloc.strip().lower(), ""
    return name.removeprefix("[").removesuffix("]").removesuffix("."), port
