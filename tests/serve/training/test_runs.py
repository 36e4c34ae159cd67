"""Training over HTTP: the routes on real child processes of the installed command, on a tiny base."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from stopped_runs import assert_nothing_lost

from adapterhub.adapter import StoredBase
from adapterhub.bases.store import _RECORD_NAME
from adapterhub.errors import AdapterHubError, UsageError
from adapterhub.files import sha256_of
from adapterhub.package.run_record import LOG_NAME
from serve.api.auth import ApiKeys
from serve.api.body import BodyReader
from serve.api.lanes import Lanes
from serve.api.route import RequestGuard
from serve.api.training import training_routes
from serve.training.runs import TrainingRuns, _is_start, _last_line, _start_of_process, check_paths

RECIPE = """
name = "mine"
base = "tiny"
[data]
source = "file"
path = "data/lines.jsonl"
held_out = 4
[lora]
rank = 4
dropout = 0.1
[train]
steps = 120
batch_size = 4
checkpoint_every = 5
evaluate_every = 20
[quantization]
compute_dtype = "float32"
"""
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def folder(home: Path, tiny_base: StoredBase) -> Path:
    """Return the training folder of a home that has the tiny base under the name `tiny`, with data."""
    place = home / "bases" / "tiny"
    place.parent.mkdir(parents=True)
    place.symlink_to(tiny_base.path)
    ref = tiny_base.ref
    record = {"id": ref.id, "revision": ref.revision, "fingerprint": ref.fingerprint, "license": tiny_base.license}
    (place / _RECORD_NAME).write_text(json.dumps(record))
    lines = [
        [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"{n}."}] for n in range(12)
    ]
    data = home / "training" / "data"
    data.mkdir(parents=True)
    (data / "lines.jsonl").write_text("\n".join(json.dumps({"messages": line}) for line in lines))
    return home / "training"


@asynccontextmanager
async def server(folder: Path, keys: ApiKeys | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """Return the routes as the API mounts them."""
    app = FastAPI()
    app.state.guard = RequestGuard(keys or ApiKeys(), BodyReader(max_bytes=1 << 20, max_tokens=512), Lanes())
    app.include_router(training_routes(TrainingRuns(folder)))

    @app.exception_handler(AdapterHubError)
    async def on_known(request: Request, error: AdapterHubError) -> JSONResponse:
        return JSONResponse({"code": error.code, "message": str(error)}, status_code=error.http_status)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test/v1/training") as client:
        yield client


def run(
    folder: Path,
    test: Callable[[httpx.AsyncClient], Awaitable[None]],
    keys: ApiKeys | None = None,
    limit_s: float = 120,
) -> None:
    async def whole() -> None:
        async with server(folder, keys) as client:
            await asyncio.wait_for(test(client), limit_s)

    asyncio.run(whole())


async def until(client: httpx.AsyncClient, name: str, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Wait until the run is so. Fail when it has ended otherwise."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        found = (await client.get(f"/runs/{name}")).json()
        if is_so(found):
            return dict(found)
        assert found["status"] == "running", found
        await asyncio.sleep(0.05)
    raise AssertionError(f"still {found['status']} after {len(found['steps'])} steps: {found['message']}")


async def started(client: httpx.AsyncClient) -> str:
    """Start a run, and wait for its first steps."""
    response = await client.post("/runs", json={"recipe": RECIPE})
    assert response.status_code == 201, response.text
    assert response.json()["status"] == "running"
    name = str(response.json()["id"])
    await until(client, name, lambda found: len(found["steps"]) >= 6)
    return name


def pid_of(folder: Path, name: str) -> int:
    return int(json.loads((folder / f"{name}.json").read_text())["pid"])


def test_a_run_is_stopped_found_by_the_next_server_resumed_killed_resumed_and_done(folder: Path) -> None:
    names: list[str] = []

    async def first(client: httpx.AsyncClient) -> None:
        names.append(await started(client))
        assert os.getpgid(pid_of(folder, names[0])) == pid_of(folder, names[0])  # a Ctrl-C for us is not for it
        again = await client.post("/runs", json={"recipe": RECIPE})
        assert (again.status_code, again.json()["code"]) == (409, "training_busy")

    async def second(client: httpx.AsyncClient) -> None:
        name = names[0]
        listed = (await client.get("/runs")).json()["data"]
        assert [(entry["id"], entry["status"]) for entry in listed] == [(name, "running")]
        for _ in range(3):  # a second click, a client that tries again
            assert (await client.post(f"/runs/{name}/stop")).json()["status"] in ("running", "stopped")
        found = await until(client, name, lambda found: found["status"] == "stopped")
        assert "--resume" in found["message"]
        assert not found["is_stopping"]
        assert_nothing_lost(folder / name)
        assert found["output"] is None
        taken = len(found["steps"])
        assert 6 <= taken < 120
        assert (await client.post(f"/runs/{name}/resume")).json()["status"] == "running"
        await until(client, name, lambda found: len(found["steps"]) >= taken + 6)
        os.killpg(pid_of(folder, name), signal.SIGKILL)
        await until(client, name, lambda found: found["status"] == "failed")
        await client.post(f"/runs/{name}/resume")
        found = await until(client, name, lambda found: found["status"] == "done")
        assert [step["step"] for step in found["steps"]] == list(range(1, 121))
        assert [measured["step"] for measured in found["held_out"]] == list(range(20, 121, 20))
        assert (Path(found["output"]) / WEIGHTS).is_file()
        assert "held-out loss" in found["message"]
        assert (await client.post(f"/runs/{name}/resume")).status_code == 400

    run(folder, first)
    run(folder, second)


def test_a_run_is_asked_once_to_stop(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once more would be a second Ctrl-C to programs that count."""
    sent: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda pid, number: sent.append(number))
    monkeypatch.setattr(TrainingRuns, "_is_alive", lambda self, record: True)

    async def test(client: httpx.AsyncClient) -> None:
        name = recorded(folder, 1)
        for _ in range(3):
            assert (await client.post(f"/runs/{name}/stop")).json()["is_stopping"]
        assert sent == [signal.SIGTERM]

    run(folder, test)


def test_a_run_is_killed_and_its_checkpoint_stays(folder: Path) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        name = await started(client)
        found = (await client.post(f"/runs/{name}/kill")).json()
        assert found["status"] == "stopped"
        (kept,) = (folder / f"{name}.run").glob("step-*")
        assert found["message"].startswith(f"killed: a checkpoint of step {int(kept.name[5:])} is kept.")
        assert (await client.post(f"/runs/{name}/kill")).json()["message"] == found["message"]  # it has ended: nothing
        assert (await client.post("/runs/run-none/kill")).status_code == 404

    run(folder, test)


def test_a_run_that_is_complete_when_it_is_killed_is_not_offered_to_be_resumed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lives = iter([True])
    monkeypatch.setattr(os, "killpg", lambda pid, number: None)
    monkeypatch.setattr(TrainingRuns, "_is_alive", lambda self, record: next(lives, False))

    async def test(client: httpx.AsyncClient) -> None:
        name = recorded(folder, 1)
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "train_log.jsonl").touch()
        found = (await client.post(f"/runs/{name}/kill")).json()
        assert found["status"] == "done"
        assert "killed" not in found["message"]

    run(folder, test)


@pytest.mark.skipif("ADAPTERHUB_SOAK_S" not in os.environ, reason="minutes: run make soak")
def test_stopped_at_random_moments_over_http_no_step_is_lost(folder: Path) -> None:
    """Each run is stopped and resumed four times, by one to three requests, and ends in the same bytes."""
    draw = random.Random(int(os.environ.get("ADAPTERHUB_SEED", "3")))
    digests: set[str] = set()

    async def stopped(client: httpx.AsyncClient, name: str) -> None:
        await asyncio.sleep(draw.uniform(0, 5))
        for _ in range(draw.randint(1, 3)):
            await client.post(f"/runs/{name}/stop")
            await asyncio.sleep(draw.choice((0.0, draw.uniform(0, 0.2))))
        found = await until(client, name, lambda found: found["status"] != "running")
        assert found["status"] in ("stopped", "done"), found
        assert_nothing_lost(folder / name)

    async def test(client: httpx.AsyncClient) -> None:
        for _ in range(10):
            name = str((await client.post("/runs", json={"recipe": RECIPE})).json()["id"])
            for _ in range(4):
                await stopped(client, name)
                if (await client.get(f"/runs/{name}")).json()["status"] == "done":
                    break
                await client.post(f"/runs/{name}/resume")
            await until(client, name, lambda found: found["status"] == "done")
            digests.add(sha256_of(folder / name / WEIGHTS))
        assert len(digests) == 1

    run(folder, test, limit_s=1800)


def test_a_plan_is_the_commands_own(folder: Path) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        found = (await client.post("/plan", json={"recipe": RECIPE})).json()
        assert (found["steps"], found["masks"]["samples"]) == (120, 8)
        assert found["servable"][0] == {"engine": "adapterhub", "can_serve": True, "how": "as it is"}
        refused = await client.post("/plan", json={"recipe": RECIPE.replace("rank", "rnak")})
        assert refused.status_code == 400
        assert "nearest: rank in [lora]" in refused.json()["message"]
        assert not list(folder.glob("plan-*"))

    run(folder, test)


def test_recipes_are_those_that_come_with_the_command(folder: Path) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        found = (await client.get("/recipes")).json()["data"]
        assert "demo-trivia" in [entry["name"] for entry in found]
        assert all("[train]" in entry["toml"] for entry in found)

    run(folder, test)


def test_a_run_that_cannot_begin_says_why(folder: Path) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        response = await client.post("/runs", json={"recipe": RECIPE.replace("data/lines", "data/none")})
        found = await until(client, response.json()["id"], lambda found: found["status"] == "failed")
        assert "expected UTF-8 text" in found["message"]
        assert (found["steps"], found["output"]) == ([], None)

    run(folder, test)


@pytest.mark.parametrize("route", ["/runs/run-none", "/runs/..%2Fdata"])
def test_no_such_run(folder: Path, route: str) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        assert (await client.get(route)).status_code == 404

    run(folder, test)


@pytest.mark.parametrize("route", ["/recipes", "/runs", "/runs/run-x"])
def test_training_is_for_administrators(folder: Path, route: str) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        assert (await client.get(route)).status_code == 401
        assert (await client.get(route, headers={"authorization": "Bearer ask"})).status_code == 403
        posted = await client.post("/runs", json={"recipe": RECIPE}, headers={"authorization": "Bearer ask"})
        assert posted.status_code == 403
        assert not list(folder.glob("run-*"))

    run(folder, test, ApiKeys(asking=("ask",), admin=("admin",)))


@pytest.mark.parametrize("path", ["/etc/passwd", "../x.jsonl", "data/../../x", "~/x"])
def test_a_recipe_that_reaches_for_the_servers_files(path: str) -> None:
    with pytest.raises(UsageError, match="is outside the server's training folder"):
        check_paths(RECIPE.replace("data/lines.jsonl", path))
    with pytest.raises(UsageError, match="is outside the server's training folder"):
        check_paths(f'[data]\nsource = "mix"\n[[data.sources]]\nsource = "file"\npath = "{path}"\n')


@pytest.mark.parametrize("line", ['base = "/models/x"', 'base = "tiny"\nstart = "./x"'])
def test_a_base_or_start_that_is_a_path(line: str) -> None:
    with pytest.raises(UsageError, match="is a path on the server's disk"):
        check_paths(RECIPE.replace('base = "tiny"', line))


@pytest.mark.parametrize("recipe", ["name = ", f"rank = {'[' * 100_000}", f"rank = {'1' * 5000}"], ids=len)
def test_a_recipe_that_is_not_toml(recipe: str) -> None:
    with pytest.raises(UsageError, match="not valid TOML"):
        check_paths(recipe)


def recorded(folder: Path, pid: int) -> str:
    """Write the record of a run that an earlier server started."""
    (folder / "run-1.toml").write_text(RECIPE)
    (folder / "run-1.json").write_text(json.dumps({"id": "run-1", "created": 1, "pid": pid, "started": 1.0}))
    return "run-1"


def test_a_run_that_completes_while_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, runs = recorded(tmp_path, 1), TrainingRuns(tmp_path)

    def completes(record: object) -> bool:
        (tmp_path / name).mkdir()
        (tmp_path / name / LOG_NAME).touch()
        return False

    monkeypatch.setattr(runs, "_is_alive", completes)
    assert runs.get(name).status == "done"


def test_a_run_that_ends_before_it_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    ended.wait()
    name, runs = recorded(tmp_path, ended.pid), TrainingRuns(tmp_path)
    answers = iter((True, False))
    monkeypatch.setattr(runs, "_is_alive", lambda record: next(answers))
    assert asyncio.run(runs.stop(name)).status == "stopped"


def test_a_run_that_is_resumed_while_it_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        loop, has_resumed = asyncio.get_running_loop(), threading.Event()

        def resumes() -> None:
            recorded(tmp_path, 2)
            has_resumed.set()

        def ends(runs: TrainingRuns, record: object) -> bool:
            if not has_resumed.is_set():
                loop.call_soon_threadsafe(resumes)
                has_resumed.wait(0.1)  # the loop continues meanwhile, if this is not on it
            return True

        monkeypatch.setattr(TrainingRuns, "_is_alive", ends)
        monkeypatch.setattr(os, "killpg", lambda pid, number: None)
        await client.post(f"/runs/{recorded(tmp_path, 1)}/stop")
        assert pid_of(tmp_path, "run-1") == 2

    run(tmp_path, test)


def test_a_process_is_recognized_by_its_start_also_in_ticks_as_version_0_1_recorded_it() -> None:
    found = _start_of_process(os.getpid())
    assert found is not None
    for recorded in (found, round(found * os.sysconf("SC_CLK_TCK"))):
        assert _is_start(found, recorded)
    assert not _is_start(found, found + 60)


def test_a_process_that_ended_has_no_start() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
        assert _start_of_process(child.pid) is None
    assert _start_of_process(child.pid) is None


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("", ""),
        ("masks: ok\nadapterhub: no room. Free some.\n", "no room. Free some."),
        ("adapterhub: old\nstep 1\n  step 2\nadapterhub: x has 2 faults:\n  x:1: a\n  x:2: b\nCorrect them.",
         "x has 2 faults:\n  x:1: a\n  x:2: b\nCorrect them."),
        ("adapterhub: old\nstep 1\nstep 2", "step 2"),
    ],
)  # fmt: skip
def test_the_message_of_a_run_is_its_last_line_or_error(output: str, message: str) -> None:
    assert _last_line(output) == message
