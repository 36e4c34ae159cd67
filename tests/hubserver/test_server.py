"""Starting the hub: its address, its tokens and its messages."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hub_fixtures import PEOPLE, spawn_hub, start_hub
from huggingface_hub import HfApi

from adapterhub.errors import PortBusy, UsageError
from adapterhub.hubserver.server import serve_hub


def test_busy_port_is_reported(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortBusy) as refusal:
            serve_hub(tmp_path, port=port)
    assert f"port {port} on 127.0.0.1 is in use" in str(refusal.value)
    assert "choose another" in str(refusal.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "hub.example.org"])
def test_opening_to_others_without_tokens_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(UsageError) as refusal:
        serve_hub(tmp_path, host=host)
    assert "Give a tokens file" in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_address_of_another_machine_is_refused(tmp_path: Path) -> None:
    PEOPLE.save(tmp_path / "tokens.json")
    with pytest.raises(UsageError) as refusal:
        serve_hub(tmp_path, host="192.0.2.1", tokens_file=tmp_path / "tokens.json")
    assert "cannot listen on 192.0.2.1" in str(refusal.value)


def test_missing_tokens_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refusal:
        serve_hub(tmp_path, tokens_file=tmp_path / "none.toml")
    assert "none.toml" in str(refusal.value)


def test_single_user_hub_says_how_to_use_it_without_showing_the_token(tmp_path: Path) -> None:
    root = tmp_path / "my hub"
    with spawn_hub(root) as process:
        assert process.stderr is not None
        said = process.stderr.readline() + process.stderr.readline()
        process.terminate()
        said += process.stderr.read()
    token, url = (root / "token").read_text(), (root / "url").read_text().strip()
    assert said == (
        f"hub ready at {url} (data in {root})\n"
        f"  to use it: export HF_ENDPOINT={url} HF_TOKEN=\"$(cat '{root}/token')\"\n"
    )
    assert token not in said
    assert (root / "token").stat().st_mode & 0o777 == 0o600


def test_single_user_hub_keeps_its_token_and_owns_every_name(tmp_path: Path) -> None:
    with start_hub(tmp_path):
        token = (tmp_path / "token").read_text()
    with start_hub(tmp_path) as url:
        api = HfApi(endpoint=url, token=token)
        assert api.whoami()["name"] == "local"
        assert api.create_repo("anybody/poems").repo_id == "anybody/poems"
        assert api.create_repo("songs").repo_id == "local/songs"


def test_hf_command_uploads_and_downloads(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(bytes(11 << 20))
    (folder / "adapter_config.json").write_text("{}")
    with start_hub(tmp_path / "hub") as url:
        env = {
            **os.environ,
            "HF_ENDPOINT": url,
            "HF_TOKEN": (tmp_path / "hub" / "token").read_text(),
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        }
        hf = str(Path(sys.executable).with_name("hf"))
        subprocess.run([hf, "upload", "ana/poems", str(folder), "."], env=env, check=True, capture_output=True)
        got = tmp_path / "got"
        subprocess.run([hf, "download", "ana/poems", "--local-dir", str(got)], env=env, check=True, capture_output=True)
    for file in folder.iterdir():
        assert (got / file.name).read_bytes() == file.read_bytes()
