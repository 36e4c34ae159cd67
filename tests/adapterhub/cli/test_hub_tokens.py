"""Which Hub gets which token, on the wire."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hub_fixtures import start_hub
from packages import write_package
from road import run, run_any


@dataclass
class Listener:
    """A server that notes the tokens it is sent and answers 404."""

    url: str
    heard: list[str | None]


@pytest.fixture
def listener() -> Iterator[Listener]:
    heard: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.headers["Authorization"])
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Listener(f"http://127.0.0.1:{server.server_port}", heard)
    server.shutdown()
    server.server_close()


def write_lock(path: Path, hub: str) -> Path:
    adapter = {"name": "a/b", "hub": hub, "commit": "0" * 40, "digest": "sha256:" + "0" * 64}
    path.write_text(json.dumps({"adapters": {"x": adapter}}))
    return path


@pytest.mark.parametrize("elsewhere", [{}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_an_address_that_only_a_lock_file_names_gets_no_token(
    listener: Listener, tmp_path: Path, elsewhere: dict[str, str]
) -> None:
    lock = write_lock(tmp_path / "adapterhub.lock", listener.url)
    done = run_any("pull", "--locked", str(lock), home=tmp_path / "home", HF_TOKEN="hf_public", **elsewhere)
    assert done.returncode != 0
    assert set(listener.heard) == {None}


def test_a_locked_address_that_the_environment_names_gets_its_token(listener: Listener, tmp_path: Path) -> None:
    lock = write_lock(tmp_path / "adapterhub.lock", listener.url)
    run_any("pull", "--locked", str(lock), home=tmp_path / "home", HF_TOKEN="hf_ours", HF_ENDPOINT=listener.url)
    assert set(listener.heard) == {"Bearer hf_ours"}


def test_an_option_alone_does_not_send_the_token_of_another_hub(listener: Listener, tmp_path: Path) -> None:
    run_any("pull", "a/b", "--hub", listener.url, home=tmp_path / "home", HF_TOKEN="hf_public")
    assert set(listener.heard) == {None}


def test_mirror_uses_a_token_for_each_hub(tmp_path: Path) -> None:
    package = write_package(tmp_path / "p")
    home = tmp_path / "home"
    with start_hub(tmp_path / "one") as source, start_hub(tmp_path / "two") as target:
        tokens = {name: tmp_path / name / "token" for name in ("one", "two")}
        ours = {"HF_ENDPOINT": source, "HF_TOKEN": tokens["one"].read_text()}
        run("push", str(package), "me/p", "--private", home=home, **ours)
        options = ["--from", source, "--to", target, "--to-token-file", str(tokens["two"])]
        # The first by the environment, the second by its file; then both by files.
        assert "1 commits copied" in run("mirror", "me/p", *options, home=home, **ours).stderr
        options += ["--from-token-file", str(tokens["one"])]
        assert "0 commits copied" in run("mirror", "me/p", *options, home=home).stderr
        refused = run_any("mirror", "me/p", "--from", source, "--to", target, home=home, **ours)
        assert refused.returncode != 0
        assert "without a token" in refused.stderr


def test_an_empty_token_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("\n")
    options = [
        "--from",
        "http://127.0.0.1:9",
        "--to",
        "http://127.0.0.1:9",
        "--from-token-file",
        str(tmp_path / "token"),
    ]
    refused = run_any("mirror", "me/p", *options, home=tmp_path / "home")
    assert refused.returncode == 2
    assert "is empty" in refused.stderr
