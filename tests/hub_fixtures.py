"""A hub as a child process for any test: `with start_hub(folder, tokens) as url`. Knows no test."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import pytest

from adapterhub.hubserver.auth import Account, Tokens
from adapterhub.hubserver.names import RepoId
from adapterhub.hubserver.quotas import Limits
from adapterhub.hubserver.store import HubStore

_SERVE = """
import json, sys
from pathlib import Path
from adapterhub.hubserver.quotas import Limits
from adapterhub.hubserver.server import serve_hub
limits = Limits(**json.loads(sys.argv[2]))
serve_hub(Path(sys.argv[1]), port=0, limits=limits, tokens_file=Path(sys.argv[3]) if len(sys.argv) > 3 else None)
"""
_READY = "hub ready at "

LFS_UPLOADS_WARN = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
"""For tests that upload by LFS: huggingface_hub 2.4 hands the file to its HTTP client in a way that one deprecates."""

ALICE, BOB, READER = "hub_alice_token", "hub_bob_token", "hub_reader_token"
PEOPLE = Tokens.of(
    {
        ALICE: Account("alice", "write", namespaces=("team",)),
        BOB: Account("bob", "write"),
        READER: Account("reader", "read", namespaces=("team", "alice")),
    }
)
"""Two who write and one who only reads, though a member of alice's and of the team's."""


@contextlib.contextmanager
def start_hub(root: Path, tokens: Tokens | None = None, limits: Limits | None = None) -> Iterator[str]:
    """Serve the folder `root` on a free port and yield the address; stopped at the end.

    Without `tokens` it is the single-user hub: its write token, good for every owner, is in `root/token`.
    """
    with spawn_hub(root, tokens, limits) as process:
        try:
            yield wait_until_ready(process)
        finally:
            process.terminate()
            # Before the pipe is closed under the thread that reads it.
            process.wait()


def spawn_hub(root: Path, tokens: Tokens | None = None, limits: Limits | None = None) -> subprocess.Popen[str]:
    """The bare process of `start_hub`; what it says is on its `stderr`."""
    checkout = str(Path(__file__).resolve().parent.parent)
    paths = [checkout, *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.Popen(hub_command(root, tokens, limits), env=env, stderr=subprocess.PIPE, text=True)


def hub_command(root: Path, tokens: Tokens | None = None, limits: Limits | None = None) -> list[str]:
    """What starts a hub over the folder `root`; the tokens are written into it."""
    arguments = [str(root), json.dumps(asdict(limits or Limits()))]
    if tokens is not None:
        tokens.save(root / "tokens.json")
        arguments.append(str(root / "tokens.json"))
    return [sys.executable, "-c", _SERVE, *arguments]


def wait_until_ready(process: subprocess.Popen[str]) -> str:
    """The address, once it answers."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith(_READY):
            # Later lines are read away, or the child would stop at a full pipe.
            last_words: deque[str] = deque(maxlen=100)
            threading.Thread(target=last_words.extend, args=(process.stderr,), daemon=True).start()
            return line.removeprefix(_READY).split()[0]
    raise RuntimeError(f"the hub did not start:\n{''.join(said)}")


REPO = RepoId.parse("alice/poems")


def upload(store: HubStore, data: bytes, repo: RepoId = REPO) -> str:
    sha256 = hashlib.sha256(data).hexdigest()
    with closing(store.objects.begin_upload(sha256, size_bytes=len(data))) as incoming:
        incoming.write(data)
        incoming.finish()
    store.mark_lfs(repo, sha256)
    return sha256


def objects(root: Path) -> set[bytes]:
    return {path.read_bytes() for path in (root / "objects").rglob("*") if path.is_file()}
