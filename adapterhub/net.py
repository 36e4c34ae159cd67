"""Listening sockets, and whether other machines can reach an address."""

from __future__ import annotations

import errno
import ipaddress
import socket
from urllib.parse import urlsplit

from adapterhub.errors import PortBusy, UsageError


def is_loopback(host: str) -> bool:
    """Return whether only programs on this machine can reach a server bound to `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Port 0 takes a free one. Raises PortBusy, UsageError for an unusable address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UsageError(f"cannot listen on {host}: {error.strerror}.") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortBusy(
                f"port {port} on {host} is in use: stop the program that has it, or choose another --port "
                "(0 takes a free one)."
            ) from None
        raise UsageError(f"cannot listen on {host} port {port}: {error.strerror}.") from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the URL at which this machine reaches the server behind `listener`."""
    host, port = listener.getsockname()[:2]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 (nothing is bound here)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def trusts_proxy(url: str) -> bool:
    """Return whether the environment's proxy settings apply to `url`. They never apply to this machine."""
    return urlsplit(url).hostname not in _LOOPBACK
