"""Starting the hub as a process: socket, tokens, the ready line. Knows nothing of the protocol."""

from __future__ import annotations

import errno
import ipaddress
import shlex
import socket
import sys
from pathlib import Path

import uvicorn

from adapterhub.errors import PortBusy, UsageError
from adapterhub.files import write_atomic
from adapterhub.hubserver.app import create_hub_app
from adapterhub.hubserver.auth import ANY_NAMESPACE, UPLOAD_LIFETIME_S, Account, Tokens, kept_secret
from adapterhub.hubserver.objects import ObjectStore

DEFAULT_PORT = 8089
LOCAL_USER = "local"
_SHUTDOWN_S = 5


def serve_hub(
    root: Path, *, host: str = "127.0.0.1", port: int = DEFAULT_PORT, tokens_file: Path | None = None
) -> None:
    """Serve the hub over the folder `root` until interrupted.

    `port` 0 takes a free one. The address is printed to stderr in one line and written to `root/url`. Without
    `tokens_file` (loopback only) there is one user, "local", whose token is kept in `root/token`.
    Raises PortBusy; UsageError for an address beyond this machine without tokens, or an unusable tokens file.
    """
    if tokens_file is None and not _is_loopback(host):
        raise UsageError(
            f"listening on {host} lets other machines in, and there are no tokens to tell who is who: "
            "give a tokens file, or listen on 127.0.0.1."
        )
    root = root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    tokens = _local_tokens(root / "token") if tokens_file is None else Tokens.load(tokens_file)
    with _listen(host, port) as listener:
        app = create_hub_app(root, tokens)
        ObjectStore(root).sweep_uploads(older_than_s=UPLOAD_LIFETIME_S)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=_SHUTDOWN_S, lifespan="off"
        )
        ready = _ready_lines(_url(listener), root, token_file=root / "token" if tokens_file is None else None)
        server = _AnnouncingServer(config, url=_url(listener), root=root, ready=ready)
        server.run(sockets=[listener])


class _AnnouncingServer(uvicorn.Server):
    """Says where it is once it answers, not before."""

    def __init__(self, config: uvicorn.Config, *, url: str, root: Path, ready: str) -> None:
        super().__init__(config)
        self._url, self._root, self._ready = url, root, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        write_atomic(self._root / "url", self._url + "\n")
        print(self._ready, file=sys.stderr, flush=True)


def _ready_lines(url: str, root: Path, *, token_file: Path | None) -> str:
    ready = f"hub ready at {url} (data in {root})"
    if token_file is None:
        return ready
    return f'{ready}\n  to use it: export HF_ENDPOINT={url} HF_TOKEN="$(cat {shlex.quote(str(token_file))})"'


def _local_tokens(token_file: Path) -> Tokens:
    return Tokens.of({kept_secret(token_file): Account(LOCAL_USER, "write", (ANY_NAMESPACE,))})


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
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
                f"port {port} on {host} is in use: stop the program that has it, or choose another port "
                "(0 takes a free one)."
            ) from None
        raise UsageError(f"cannot listen on {host} port {port}: {error.strerror}.") from None
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
