"""Starting several processes that train one adapter, by torchrun. Trains nothing itself."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adapterhub.errors import TrainingFailed, TrainingStopped, UsageError

_RESTARTS = 2
"""of all processes together after one of them died, each from the newest checkpoint"""
_MMAP_BYTES = 1 << 20
"""glibc gives blocks above this back at once; its defaults quadrupled the peak of loading a base (measured)"""


@dataclass(frozen=True)
class Launch:
    """How many processes, and where they meet."""

    processes: int
    """on this machine: one for each GPU, or shares of the CPU's cores"""
    nodes: str = "1"
    """machines: a number, or `least:most`"""
    rendezvous: str | None = None
    """host:port of one of the machines; None: this machine only"""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise UsageError(f"--launch {self.processes}: expected at least one process.")
        if self.nodes != "1" and self.rendezvous is None:
            raise UsageError("several --nodes meet at one of them: give --rendezvous HOST:PORT on each.")
        if self.rendezvous is not None and not re.fullmatch(r".+:[1-9]\d{0,4}", self.rendezvous):
            raise UsageError(f"--rendezvous {self.rendezvous}: expected HOST:PORT, the same on each machine.")
        if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", self.nodes):
            raise UsageError(f"--nodes {self.nodes}: expected a number of machines, or least:most.")

    @property
    def is_on_loopback(self) -> bool:
        """Do all processes run here, so that nothing may listen beyond this machine?"""
        host = (self.rendezvous or "127.0.0.1:0").rpartition(":")[0].strip("[]")
        return host == "localhost" or host.startswith("127.") or host == "::1"


def command(launch: Launch, arguments: Sequence[str]) -> list[str]:
    """torchrun's command line around `adapterhub` with these arguments.

    -P keeps the current folder off the module path, where a user may keep a train.py of their own.
    """
    python = [sys.executable, "-P"]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", launch.rendezvous or "127.0.0.1:0"]
    if launch.is_on_loopback:
        rendezvous += ["--local-addr", "127.0.0.1"]
    elif launch.rendezvous is not None:
        # torchrun compares names to find out who opens the store; an address of this machine may not be its name's.
        rendezvous += ["--rdzv-conf", f"is_host={int(_is_here(launch.rendezvous.rpartition(':')[0]))}"]
    return [
        *python, "-m", "torch.distributed.run", "--nnodes", launch.nodes, "--nproc-per-node", str(launch.processes),
        "--max-restarts", str(_RESTARTS), *rendezvous, "--rdzv-id", "adapterhub", "--no-python",
        *python, "-c", "from adapterhub.cli.main import main; main()", *arguments,
    ]  # fmt: skip


def _is_here(host: str) -> bool:
    """Is `host` this machine? Only its own addresses can be bound."""
    try:
        address = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(address[0], address[1]) as probe:
            probe.bind(address[4])
    except OSError:
        return False
    return True


def environment(launch: Launch, given: Mapping[str, str]) -> dict[str, str]:
    """What the processes need beside `given`, which wins."""
    threads = max(1, (os.cpu_count() or 1) // launch.processes)
    ours = {
        "OMP_NUM_THREADS": str(threads),
        "MALLOC_MMAP_THRESHOLD_": str(_MMAP_BYTES),
        "MALLOC_TRIM_THRESHOLD_": str(_MMAP_BYTES),
        # Without it restarted processes read the addresses of dead ones: 6 of 16 restarts worked, with it all 16.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "PYTHONHASHSEED": "0",
    }
    if launch.is_on_loopback and sys.platform == "linux":
        ours["GLOO_SOCKET_IFNAME"] = "lo"
    return ours | dict(given)


def run(launch: Launch, arguments: Sequence[str]) -> None:
    """Run to the end. Raises TrainingFailed when processes fail more often than they are restarted, and
    TrainingStopped after SIGINT or SIGTERM, once the processes have written a checkpoint."""
    # A session of its own: Ctrl-C reaches this process alone, and each worker gets one signal instead of two.
    process = subprocess.Popen(
        command(launch, arguments), env=environment(launch, os.environ), start_new_session=True
    )  # fmt: skip
    try:
        code = process.wait()
    except KeyboardInterrupt as error:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise TrainingStopped("stopped; the same command goes on from the newest checkpoint.") from error
    except BaseException:
        process.kill()
        raise
    if code:
        raise TrainingFailed(
            f"the training processes ended with status {code}, after {_RESTARTS} restarts at most: the reason stands "
            "above; the same command goes on from the newest checkpoint."
        )
