"""A vLLM server that we start: found in its environment, run as a child process, ended with us."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path

from adapterhub.adapter import StoredBase
from adapterhub.errors import EngineStopped, UsageError
from adapterhub.units import format_duration
from serve.vllm_engine import cpu_lora_plugin
from serve.vllm_engine.client import VllmServer
from serve.vllm_engine.guard import GRACE_S

START_S = 600.0
"""Time limit of a start, in seconds: vLLM imports for a minute on a busy machine, then loads the weights."""
_PLUGIN = "adapterhub_vllm_cpu_lora"
_FIND = """
import importlib.metadata as metadata, json
def version(name):
    try: return metadata.version(name)
    except metadata.PackageNotFoundError: return None
print(json.dumps([version("vllm-cpu"), version("vllm")]))
"""


@dataclass(frozen=True)
class Environment:
    """A Python environment that has vLLM."""

    python: Path
    version: str
    is_cpu: bool

    @property
    def takes_plugin(self) -> bool:
        """Whether our plugin for the CPU build is used: it replaces private functions of one version of it."""
        return self.is_cpu and self.version == cpu_lora_plugin.MADE_FOR


def find_vllm(python: Path) -> Environment:
    """Find vLLM in the environment of `python`. Raises UsageError when it does not run or has no vLLM."""
    try:
        output = subprocess.run([python, "-c", _FIND], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise UsageError(f"{python} does not run ({error}): give the Python of an environment with vLLM.") from None
    cpu, version = json.loads(output)
    found = cpu or version
    if found is None:
        raise UsageError(
            f"{python} has no vLLM: install it in an environment of its own (docs/vllm.md) and give its Python as "
            "--vllm-python, or use --engine local."
        )
    return Environment(python, found.partition("+")[0], is_cpu=cpu is not None or found.endswith("+cpu"))


@dataclass(frozen=True)
class ChildOptions:
    """Settings of the vLLM server that is started."""

    max_loras: int
    max_lora_rank: int
    """One of the values that vLLM accepts, as `compat.allowed_rank` returns it."""
    max_num_seqs: int
    dtype: str
    max_model_len: int | None = None
    kv_cache_bytes: int = 1 << 30
    arguments: tuple[str, ...] = ()
    """Further arguments of vLLM, unchanged."""


class VllmProcess:
    """One vLLM server on a loopback port with a key of its own; `folder` holds its log and plugin."""

    def __init__(self, found: Environment, base: StoredBase, base_name: str, options: ChildOptions, folder: Path):
        self.found = found
        self._base = base
        self._base_name = base_name
        self._options = options
        self._folder = folder
        self._key = secrets.token_urlsafe(24)
        self._child: subprocess.Popen[bytes] | None = None
        self.log = folder / "vllm.log"

    @property
    def is_hazardous(self) -> bool:
        """Whether rows without an adapter get the last slot's: so does the CPU build without our plugin."""
        return self.found.is_cpu and not self.found.takes_plugin

    @property
    def slots(self) -> int:
        """Number of LoRA slots: one more where requests for the base go through the blank adapter."""
        return self._options.max_loras + self.is_hazardous

    @property
    def is_running(self) -> bool:
        return self._child is not None and self._child.poll() is None

    async def start(self) -> VllmServer:
        """Start it, and wait until it answers. Raises EngineStopped with the last error of its log."""
        await asyncio.to_thread(self.stop)
        self._folder.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        guard = str(package_files("serve.vllm_engine").joinpath("guard.py"))
        with self.log.open("wb") as log:
            self._child = subprocess.Popen(
                [self.found.python, guard, *self._command(port)], stdin=subprocess.PIPE, stdout=log,
                stderr=subprocess.STDOUT, env=self._environment(), start_new_session=True,
            )  # fmt: skip
        server = VllmServer(f"http://127.0.0.1:{port}", self._key)
        for _ in range(int(START_S / 0.5)):
            if not self.is_running:
                await self._abandon(server)
                raise EngineStopped(f"vLLM ended while starting: {self._last_error()} Its log is {self.log}.")
            if await server.is_healthy(timeout_s=5):
                return server
            await asyncio.sleep(0.5)
        await self._abandon(server)
        raise EngineStopped(
            f"vLLM did not answer within {format_duration(START_S)} of its start. Its log is {self.log}."
        )

    async def _abandon(self, server: VllmServer) -> None:
        await server.close()
        await asyncio.to_thread(self.stop)

    def stop(self) -> None:
        """End it and all its workers: by SIGTERM, then by SIGKILL."""
        if self._child is not None:
            self._child.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(timeout=GRACE_S + 5)
        self.kill()

    def kill(self) -> None:
        """Kill it and all its workers at once."""
        child, self._child = self._child, None
        if child is not None:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # its workers outlive it and a guard that was killed
            child.wait()
            assert child.stdin is not None
            child.stdin.close()

    def _command(self, port: int) -> list[str]:
        options = self._options
        length = [] if options.max_model_len is None else ["--max-model-len", str(options.max_model_len)]
        return [
            str(self.found.python), "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(self._base.path), "--served-model-name", self._base_name,
            "--host", "127.0.0.1", "--port", str(port), "--dtype", options.dtype,
            "--max-num-seqs", str(options.max_num_seqs), *length,
            "--enable-lora", "--max-loras", str(self.slots), "--max-lora-rank", str(options.max_lora_rank),
            "--max-cpu-loras", str(2 * self.slots), "--enable-prompt-tokens-details", *options.arguments,
        ]  # fmt: skip

    def _environment(self) -> dict[str, str]:
        mine = {
            "VLLM_API_KEY": self._key,
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": str(max(1, self._options.kv_cache_bytes >> 30)),
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        if self.found.takes_plugin:
            mine["PYTHONPATH"] = os.pathsep.join(
                [str(_write_plugin(self._folder)), *filter(None, [os.environ.get("PYTHONPATH")])]
            )
            if "VLLM_PLUGINS" in os.environ:  # lists the plugins to load: add ours
                mine["VLLM_PLUGINS"] = f"{os.environ['VLLM_PLUGINS']},{_PLUGIN}"
        # The other Python would take our VIRTUAL_ENV as its own.
        return {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"} | mine

    def _last_error(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line or "error:" in line]
        return (errors or lines or ["its log is empty."])[-1][-300:]


def _write_plugin(folder: Path) -> Path:
    """Write a folder for PYTHONPATH: our module, and the metadata by which vLLM finds it. Return it."""
    target = folder / "plugin"
    metadata = target / f"{_PLUGIN}-1.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    shutil.copy(str(cpu_lora_plugin.__file__), target / f"{_PLUGIN}.py")
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {_PLUGIN}\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{_PLUGIN} = {_PLUGIN}:register\n")
    return target


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
