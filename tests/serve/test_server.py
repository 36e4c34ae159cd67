"""The process around the engine: what a supervisor sees when the engine dies."""

from __future__ import annotations

import re
import subprocess
import sys

import httpx

from adapterhub.adapter import StoredBase

_DYING_SERVER = """
import sys
from serve.local_engine.model_runner import ModelRunner

def broken(self, batch):
    raise MemoryError("no more")

ModelRunner.run = broken
sys.argv = ["adapterhub", "serve", "--base", sys.argv[1], "--port", "0", "--no-page"]
from adapterhub.cli.main import main
main()
"""


def test_a_server_whose_engine_dies_answers_its_clients_and_ends_by_itself(tiny_base: StoredBase) -> None:
    command = [sys.executable, "-c", _DYING_SERVER, str(tiny_base.path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            url = next(found[1] for line in server.stderr if (found := re.match(r"ready: (\S+)/v1", line)))
            body = {"model": tiny_base.path.name, "prompt": "Hello", "max_tokens": 3}
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=30)
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "engine_stopped"
            assert answer.headers["x-should-retry"] == "false"
            assert server.wait(timeout=30) == 1
            assert "no more" in server.stderr.read()
        finally:
            server.kill()
