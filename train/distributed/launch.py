"""Start several processes that train one adapter, through torchrun."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil

from adapterhub.errors import TrainingFailed, TrainingStopped, UsageError
from train.loop.stopping import StopRequest, stop_requests

_RESTARTS = 2
"""Maximum number of restarts of all processes after one died, each from the last checkpoint."""
_SHUTDOWN_TIMEOUT_S = 3 * 3600
"""Deadline of a stop, in seconds: torchrun kills processes that have not ended by then (its default is 30 s).

A step, an evaluation and a save may take half an hour each, as long as a process waits for the others (world.py); twice
that, since a stop that comes too late loses steps, while a person who cannot wait presses Ctrl-C again.
"""
_POLL_S = 0.2
_MMAP_BYTES = 1 << 20
"""Size above which glibc returns blocks at once; its defaults quadrupled the peak of loading a base (measured)."""


@dataclass(frozen=True)
class Launch:
    """Number of processes and machines, and their rendezvous."""

    processes: int
    """Number of processes on this machine: one for each GPU, or several that share the CPU's cores."""
    nodes: str = "1"
    """Number of machines: `N`, or `MIN:MAX`."""
    rendezvous: str | None = None
    """Rendezvous endpoint `HOST:PORT`, on one of the machines; None: this machine only."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise UsageError(
                f"invalid --launch {self.processes}: expected at least 1 process. Give the number of GPUs, or of "
                "processes that share the CPU."
            )
        if self.nodes != "1" and self.rendezvous is None:
            raise UsageError(
                f"--nodes {self.nodes} without --rendezvous: expected the machine that all connect to. Give "
                "--rendezvous HOST:PORT, the same on each machine."
            )
        if self.rendezvous is not None and not re.fullmatch(r".+:[1-9]\d{0,4}", self.rendezvous):
            raise UsageError(
                f"invalid --rendezvous {self.rendezvous!r}: expected HOST:PORT. Give the same one on each machine."
            )
        if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", self.nodes):
            raise UsageError(
                f"invalid --nodes {self.nodes!r}: expected a number of machines, or MIN:MAX. Give for example "
                "--nodes 2."
            )

    @property
    def is_on_loopback(self) -> bool:
        """Whether all processes run on this machine, so that nothing needs to listen beyond it."""
        host = (self.rendezvous or "127.0.0.1:0").rpartition(":")[0].strip("[]")
        return host == "localhost" or host.startswith("127.") or host == "::1"


def command(launch: Launch, arguments: Sequence[str]) -> list[str]:
    """Return the torchrun command line that runs `adapterhub` with these arguments.

    -P keeps the current folder off the module path: a user may have a train.py there.
    """
    python = [sys.executable, "-P"]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", launch.rendezvous or "127.0.0.1:0"]
    if launch.is_on_loopback:
        rendezvous += ["--local-addr", "127.0.0.1"]
    elif launch.rendezvous is not None:
        # torchrun compares host names to decide who opens the store, and misses other addresses of this machine.
        rendezvous += ["--rdzv-conf", f"is_host={int(_is_here(launch.rendezvous.rpartition(':')[0]))}"]
    return [
        *python, "-m", "torch.distributed.run", "--nnodes", launch.nodes, "--nproc-per-node", str(launch.processes),
        "--max-restarts", str(_RESTARTS), *rendezvous, "--rdzv-id", "adapterhub", "--no-python",
        *python, "-c", "from adapterhub.cli.main import main; main()", *arguments,
    ]  # fmt: skip


def _is_here(host: str) -> bool:
    """Return whether `host` is this machine: only its own addresses can be bound."""
    try:
        address = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(address[0], address[1]) as probe:
            probe.bind(address[4])
    except OSError:
        return False
    return True


def environment(launch: Launch, given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the processes: our defaults, overridden by `given`."""
    threads = max(1, (os.cpu_count() or 1) // launch.processes)
    defaults = {
        "OMP_NUM_THREADS": str(threads),
        "MALLOC_MMAP_THRESHOLD_": str(_MMAP_BYTES),
        "MALLOC_TRIM_THRESHOLD_": str(_MMAP_BYTES),
        # Without it restarted processes read the addresses of dead ones: 6 of 16 restarts worked; with it, all 16.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # As `--shutdown-timeout`, which older versions of torchrun do not have.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_SHUTDOWN_TIMEOUT_S),
        "PYTHONHASHSEED": "0",
    }
    if launch.is_on_loopback and sys.platform == "linux":
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    return defaults | dict(given)


def run(launch: Launch, arguments: Sequence[str], *, kept: Callable[[], str]) -> None:
    """Start the processes and wait for them. SIGINT, SIGTERM and SIGHUP ask them once to stop, with a checkpoint.

    `kept` returns what is on disk after they have ended and what to do, for the error. Raises TrainingStopped when they
    were asked to stop, TrainingFailed when they fail after the last restart, and KeyboardInterrupt, after killing them,
    at a second Ctrl-C at the terminal.
    """
    with stop_requests() as stop:
        # A session of its own: Ctrl-C reaches only this process, which asks the workers once, however often it comes.
        process = subprocess.Popen(
            command(launch, arguments), env=environment(launch, os.environ), start_new_session=True
        )  # fmt: skip
        try:
            code = _wait(process, stop)
        except BaseException:
            _kill_tree(process)
            raise
    if code and stop.is_set:
        raise TrainingStopped(f"stopped by a signal: {kept()}")
    if code:
        raise TrainingFailed(
            f"the training processes ended with status {code}, after at most {_RESTARTS} restarts: expected status 0. "
            f"See the reason above; {kept()}"
        )


def _wait(process: subprocess.Popen[bytes], stop: StopRequest) -> int:
    """Wait for torchrun to end, pass on a request to stop, and return its exit status."""
    is_asked = False
    while True:
        if stop.is_set and not is_asked:
            process.send_signal(signal.SIGTERM)
            is_asked = True
        with suppress(subprocess.TimeoutExpired):
            return process.wait(_POLL_S)


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill torchrun and its workers, which have sessions of their own."""
    children: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
    process.kill()  # first, since it would start new workers for those that die
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()
