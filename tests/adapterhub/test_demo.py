"""The demo's own part: what it takes up again after an interruption, and how it runs commands side by side."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from adapterhub import demo
from adapterhub.errors import DemoFailed, PortBusy

PACK = "pack"


@pytest.mark.parametrize(
    ("left", "verbs"),
    [
        ((), ["train", PACK]),
        # Killed before its first checkpoint: `train` itself removes what such a run left.
        (("captain.run/lock", "captain.run/recipe.toml"), ["train", PACK]),
        (("captain.run/step-000005/state.json",), ["train --resume", PACK]),
        (("captain/adapter_config.json",), [PACK]),
        (("captain/adapter_config.json", "captain.run/step-000035/state.json"), [PACK]),
        (("captain/adapter_config.json", "captain/adapterhub.json"), []),
    ],
    ids=["nothing", "a lock", "a checkpoint", "an adapter", "an adapter and its run", "a package"],
)
def test_an_interrupted_demo_continues_where_it_was(tmp_path: Path, left: tuple[str, ...], verbs: list[str]) -> None:
    for name in left:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = [" ".join(words[: 1 + ("--resume" in words)]) for words in demo._commands(tmp_path / "captain", "captain")]
    assert found == verbs


def test_a_busy_port_is_reported_before_anything_is_made(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(PortBusy, match="--port"):
        demo.run_demo(tmp_path / "work", port=taken.getsockname()[1], leave=True)
    assert not (tmp_path / "work").exists()


def test_lines_of_commands_side_by_side_carry_their_lanes_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    environment = os.environ | {"ADAPTERHUB_HOME": str(tmp_path)}
    lanes = {"one": [("base", "list"), ("--version",)], "three": [("list",)]}
    asyncio.run(demo._side_by_side(lanes, environment))
    lines = capfd.readouterr().out.splitlines()
    assert {line[:8] for line in lines} == {"one   | ", "three | "}
    assert [line for line in lines if line.startswith("one") and "$" in line] == [
        "one   | $ adapterhub base list",
        "one   | $ adapterhub --version",
    ]


def test_a_command_that_fails_ends_its_lane_and_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    environment = os.environ | {"ADAPTERHUB_HOME": str(tmp_path)}
    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(demo._side_by_side({"one": [("resolve", "nobody/nothing"), ("list",)]}, environment))
    (failure,) = caught.value.exceptions
    assert isinstance(failure, DemoFailed)
    assert "`adapterhub resolve` ended with status" in str(failure)
    assert "$ adapterhub list" not in capfd.readouterr().out


def test_an_interrupted_command_is_waited_for_then_ended_and_heard_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "_STOP_S", 0.1)
    root = tmp_path / "hub"

    async def interrupted() -> None:
        serve = ("hub", "serve", "--root", str(root), "--port", "0")
        lane = asyncio.create_task(demo._run_lane("hub | ", [serve], dict(os.environ)))
        while not (root / "url").exists():
            await asyncio.sleep(0.02)
        lane.cancel()
        await lane

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(interrupted())
    assert "hub | stopped" in capfd.readouterr().out
