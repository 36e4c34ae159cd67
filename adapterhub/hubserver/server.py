"""Run the hub server as a process: its socket, its tokens and the message that it is ready."""

from __future__ import annotations

import shlex
import socket
import sys
from pathlib import Path

import uvicorn

from adapterhub.errors import UsageError
from adapterhub.files import make_folder, write_atomic
from adapterhub.hubserver.app import create_hub_app
from adapterhub.hubserver.auth.tickets import UPLOAD_LIFETIME_S
from adapterhub.hubserver.auth.tokens import ANY_NAMESPACE, Account, Tokens, load_or_create_secret
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
    """Serve the folder `root` until interrupted.

    `port` 0 chooses a free port. The URL is printed to stderr and written to `root/url`. Without `tokens_file`, which
    is allowed on loopback only, there is one user, "local", whose token is stored in `root/token`.
    Raises PortBusy; UsageError for a public address without tokens, or for an invalid tokens file.
    """
    if tokens_file is None and not is_loopback(host):
        raise UsageError(
            f"cannot listen on {host} without tokens: other machines could write to the hub. "
            "Give a tokens file, or listen on 127.0.0.1."
        )
    root = root.resolve()
    make_folder(root)
    tokens = _local_tokens(root / "token") if tokens_file is None else Tokens.load(tokens_file)
    with listen(host, port) as listener:
        app = create_hub_app(root, tokens, limits=limits)
        ObjectStore(root).remove_stale_uploads(older_than_s=UPLOAD_LIFETIME_S)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=_SHUTDOWN_S, lifespan="off"
        )
        ready = _ready_lines(url_of(listener), root, token_file=root / "token" if tokens_file is None else None)
        server = _AnnouncingServer(config, url=url_of(listener), root=root, ready=ready)
        server.run(sockets=[listener])


class _AnnouncingServer(uvicorn.Server):
    """A uvicorn server that prints its URL once it accepts requests."""

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
    return Tokens.of({load_or_create_secret(token_file): Account(LOCAL_USER, "write", (ANY_NAMESPACE,))})
