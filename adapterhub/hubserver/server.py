"""Starting the hub as a process: socket, tokens, the ready line. Knows nothing of the protocol."""

from __future__ import annotations

import shlex
import socket
import sys
from pathlib import Path

import uvicorn

from adapterhub.errors import UsageError
from adapterhub.files import write_atomic
from adapterhub.hubserver.app import create_hub_app
from adapterhub.hubserver.auth.tickets import UPLOAD_LIFETIME_S
from adapterhub.hubserver.auth.tokens import ANY_NAMESPACE, Account, Tokens, kept_secret
from adapterhub.hubserver.storage.objects import ObjectStore
from adapterhub.hubserver.storage.quotas import Limits
from adapterhub.net import is_loopback, listen, url_of

DEFAULT_PORT = 8089
LOCAL_USER = "local"
_SHUTDOWN_S = 5


def serve_hub(
    root: Path,
    *,
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    tokens_file: Path | None = None,
    limits: Limits | None = None,
) -> None:
    """Serve the hub over the folder `root` until interrupted.

    `port` 0 takes a free one. The address is printed to stderr in one line and written to `root/url`. Without
    `tokens_file` (loopback only) there is one user, "local", whose token is kept in `root/token`.
    Raises PortBusy; UsageError for an address beyond this machine without tokens, or an unusable tokens file.
    """
    if tokens_file is None and not is_loopback(host):
        raise UsageError(
            f"listening on {host} lets other machines in, and there are no tokens to tell who is who: "
            "give a tokens file, or listen on 127.0.0.1."
        )
    root = root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    tokens = _local_tokens(root / "token") if tokens_file is None else Tokens.load(tokens_file)
    with listen(host, port) as listener:
        app = create_hub_app(root, tokens, limits=limits)
        ObjectStore(root).sweep_uploads(older_than_s=UPLOAD_LIFETIME_S)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=_SHUTDOWN_S, lifespan="off"
        )
        ready = _ready_lines(url_of(listener), root, token_file=root / "token" if tokens_file is None else None)
        server = _AnnouncingServer(config, url=url_of(listener), root=root, ready=ready)
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
