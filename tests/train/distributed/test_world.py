"""Two processes over gloo against one: the same losses, a sharded base, a file that loads everywhere, and kill -9."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from preference_rows import preference_recipe
from tiny_models import TINY_VOCABULARY, free_port
from training import WEIGHTS, make_recipe, run, tensors_of
from typer.testing import CliRunner

from adapterhub.adapter import BaseName, StoredBase
from adapterhub.bases.loading import load_base
from adapterhub.bases.store import find_base
from adapterhub.cli.main import app
from adapterhub.errors import OutputNotFresh, UsageError
from adapterhub.files import sha256_of
from adapterhub.package.run_record import read_run_record
from adapterhub.packer import pack
from train.distributed.launch import Launch, command, environment
from train.distributed.world import World
from train.loop.run_folder import run_path
from train.recipe import Recipe, read_recipe
from train.worker import check_same_run

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

needs_soak = pytest.mark.skipif("ADAPTERHUB_SOAK_S" not in os.environ, reason="half a minute each: run make soak")
MAIN = "from adapterhub.cli.main import main; main()"


@dataclass(frozen=True)
class Outcome:
    folder: Path
    said: str


def recipe_on(folder: Path, base: StoredBase, **train: Any) -> Recipe:
    """Eight samples in steps of three: the last step of an epoch is not whole. One run is killed amid its steps."""
    folder.mkdir(exist_ok=True)
    make_recipe(folder, lora={"dropout": 0.0}, train={"steps": 12, "batch_size": 3, "checkpoint_every": 1} | train)
    file = folder / "mine.toml"
    file.write_text(re.sub('base = ".*"', f'base = "{base.path}"', file.read_text()))
    return read_recipe(file)


def launched(folder: Path, output: str, *options: str, processes: int = 2) -> subprocess.Popen[str]:
    arguments = ["train", "mine.toml", "--output", output, "--launch", str(processes), *options]
    return subprocess.Popen(
        [sys.executable, "-P", "-c", MAIN, *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def ended(folder: Path, output: str, *options: str) -> Outcome:
    process = launched(folder, output, *options)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return Outcome(folder / output, said)


def losses(folder: Path) -> list[float]:
    record = read_run_record(folder)
    assert record is not None
    return [step.loss for step in record.steps]


@pytest.fixture(scope="module")
def base(tiny_base: StoredBase) -> StoredBase:
    """Return the tiny base as a folder, which a recipe can name."""
    return find_base(BaseName.parse(str(tiny_base.path)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, base: StoredBase) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    run(recipe_on(folder, base), base, folder / "one")
    return folder


@pytest.fixture(scope="module", params=["whole", "divided"])
def two(place: Path, request: pytest.FixtureRequest) -> Outcome:
    return ended(place, f"two-{request.param}", *(["--shard"] if request.param == "divided" else []))


def test_two_processes_follow_the_losses_of_one_and_write_its_file(place: Path, two: Outcome) -> None:
    assert losses(two.folder) == pytest.approx(losses(place / "one"), rel=1e-5)
    assert {path.name for path in two.folder.iterdir()} == {path.name for path in (place / "one").iterdir()}
    assert sha256_of(two.folder / "adapter_config.json") == sha256_of(place / "one" / "adapter_config.json")
    ours, theirs = tensors_of(two.folder), tensors_of(place / "one")
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape)
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-5)
    assert not run_path(two.folder).exists()


def test_the_quantized_weights_are_divided_when_asked(two: Outcome) -> None:
    found = re.search(r"2 processes; of the base's ([\d.]+) MB each holds ([\d.]+) MB", two.said)
    assert found, two.said
    whole, held = map(float, found.groups())
    layers = whole - TINY_VOCABULARY * 64 * 4 / 1e6  # all but the embedding, which stays whole
    expected = layers / 2 if "divided" in two.folder.name else 0.0
    assert whole - held == pytest.approx(expected, abs=0.11)


def test_its_adapter_loads_in_peft_and_in_our_engine(tmp_path: Path, two: Outcome, base: StoredBase) -> None:
    """Packing records what PEFT's model answers; the engine replays that."""
    from serve.local_engine.engine import LocalEngine

    folder = shutil.copytree(two.folder, tmp_path / "packed")
    adapter = pack(folder, base=base)
    assert adapter.manifest.probe is not None

    async def serve() -> None:
        engine = LocalEngine(load_base(base, purpose="serve", dtype="float32"))
        try:
            await engine.load(adapter)
        finally:
            await engine.close()

    asyncio.run(serve())
    PeftModel.from_pretrained(load_base(base, purpose="serve", dtype="float32").model, str(folder))


@needs_soak
@pytest.mark.parametrize("two", ["whole"], indirect=True)
def test_two_nodes_on_loopback_write_what_two_processes_write(place: Path, two: Outcome) -> None:
    where = ["--nodes", "2", "--rendezvous", f"127.0.0.1:{free_port()}"]
    nodes = [launched(place, "nodes", *where, processes=1) for _ in range(2)]
    for node in nodes:
        _, said = node.communicate(timeout=240)
        assert node.returncode == 0, said
    assert sha256_of(place / "nodes" / WEIGHTS) == sha256_of(two.folder / WEIGHTS)


@pytest.mark.parametrize("two", ["divided"], indirect=True)
def test_parts_in_host_memory_and_activations_computed_again_change_no_byte(
    tmp_path: Path, two: Outcome, base: StoredBase
) -> None:
    recipe_on(tmp_path, base, activation_checkpointing=True)
    offloaded = ended(tmp_path, "offloaded", "--shard", "--offload")
    assert sha256_of(offloaded.folder / WEIGHTS) == sha256_of(two.folder / WEIGHTS)
    assert "base sharded in host memory" in (offloaded.folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["mine.toml", "--launch", "2", "--offload"], "give --shard with it"),
        (["mine.toml", "--plan", "--launch", "2", "--shard"], "--plan plans one process"),
        (["--resume", "one", "--shard"], "--resume continues in one process"),
        (["--resume", "one", "--rendezvous", "127.0.0.1:1"], "--resume continues in one process"),
    ],
)
def test_options_of_several_processes_where_they_mean_nothing(options: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["train", *options])
    assert isinstance(done.exception, UsageError)
    assert said in str(done.exception)


@needs_soak
@pytest.mark.parametrize("two", ["whole"], indirect=True)
def test_accelerate_with_the_shipped_config_writes_the_same(place: Path, two: Outcome) -> None:
    config = Path(__file__).parents[3] / "docs" / "accelerate.yaml"
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    command = [sys.executable, "-P", "-c", MAIN, "train", "mine.toml", "--output", "accelerated"]
    done = subprocess.run(
        [accelerate, "launch", "--config_file", str(config), "--no_python", *command],
        cwd=place, env=os.environ | environment(Launch(2), {"OMP_NUM_THREADS": "1"}),
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stderr
    assert sha256_of(place / "accelerated" / WEIGHTS) == sha256_of(two.folder / WEIGHTS)


@pytest.mark.parametrize("two", ["whole"], indirect=True)
def test_a_killed_worker_is_started_again_and_resumes_from_the_checkpoint(place: Path, two: Outcome) -> None:
    process = launched(place, "killed")
    try:
        while not any(run_path(place / "killed").glob("step-*")):
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(_worker_of(process.pid, rank=1), signal.SIGKILL)
        _, said = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert "resuming after step" in said
    assert sha256_of(place / "killed" / WEIGHTS) == sha256_of(two.folder / WEIGHTS)


ROUNDS_DIFFERENTLY = """
import datetime, os
from types import SimpleNamespace
from transformers.generation.stopping_criteria import EosTokenCriteria
from adapterhub.cli.main import main
from train import inputs
from train.objectives import sft
class Day(datetime.date):
    @classmethod
    def today(cls):
        return cls(2027, 3, 1 + int(os.environ["RANK"]))
inputs.datetime = SimpleNamespace(date=Day)
if os.environ["RANK"] == "1":
    own_loss, calls = sft.held_out_loss, []
    def worse_each_time(model, samples):
        calls.append(1)
        loss, tokens = own_loss(model, samples)
        return loss + len(calls), tokens
    sft.held_out_loss = worse_each_time
    own_call = EosTokenCriteria.__call__
    EosTokenCriteria.__call__ = lambda *a, **k: own_call(*a, **k) | True  # the answer ends with its first token
main()
"""


def test_the_first_process_decides_early_stopping_the_best_weights_the_length_of_answers_and_the_day(
    tmp_path: Path, base: StoredBase
) -> None:
    """On other hardware a near-tie falls otherwise: here the second process alone sees a loss that only grows.

    It also starts after midnight.
    """
    choices = {"evaluate_every": 1, "patience": 1, "keep": "best", "sample_every": 2, "steps": 6, "batch_size": 4}
    recipe_on(tmp_path, base, **choices, prompts=["Hi?"], schedule="constant", learning_rate=1e-4)
    shutil.copy(Path(__file__).parents[2] / "fixtures/chat_templates/dated.jinja", tmp_path)
    file = tmp_path / "mine.toml"
    file.write_text(file.read_text().replace("[data]", '[data]\ntemplate = "dated.jinja"'))
    (tmp_path / "script.py").write_text(ROUNDS_DIFFERENTLY)
    arguments = command(Launch(2), ["train", "mine.toml", "--output", "out", "--shard"])
    program = arguments.index("--no-python") + 1
    arguments[program + 2 : program + 4] = [str(tmp_path / "script.py")]
    done = subprocess.run(
        arguments, cwd=tmp_path, env=os.environ | environment(Launch(2), {"OMP_NUM_THREADS": "1"}),
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "out")) == 6
    assert '"date":"2027-03-01"' in (tmp_path / "out" / "train_log.jsonl").read_text()


def test_a_machine_with_other_data_is_refused_in_every_process(tmp_path: Path, base: StoredBase) -> None:
    port, processes = str(free_port()), []
    for rank in range(2):
        recipe_on(tmp_path / str(rank), base)
        data = tmp_path / str(rank) / "lines.jsonl"
        lines = data.read_text().splitlines(keepends=True)
        data.write_text("".join(lines[rank:]))
        processes.append(
            subprocess.Popen(
                [sys.executable, "-P", "-c", MAIN, "train", "mine.toml", "--output", str(tmp_path / "out")],
                cwd=tmp_path / str(rank),
                env=os.environ
                | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                | {"OMP_NUM_THREADS": "1"},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert all("the data of this run is not the same in all 2 processes" in one for one in said), said
    assert not (tmp_path / "out").exists()


SLOW = """
import time
from adapterhub.cli.main import main
from train.loop.steps import TrainingLoop
own_step = TrainingLoop._step
def slow_step(self, number, places, state):
    done = own_step(self, number, places, state)
    if number == 2:
        print("slow", flush=True)
        time.sleep(40)
    return done
TrainingLoop._step = slow_step
main()
"""


@needs_soak
def test_a_stop_waits_for_a_step_that_is_longer_than_torchrun_waits_by_itself(tmp_path: Path, base: StoredBase) -> None:
    recipe_on(tmp_path, base, checkpoint_every=0)
    (tmp_path / "script.py").write_text(SLOW)
    arguments = command(Launch(2), ["train", "mine.toml", "--output", "out"])
    program = arguments.index("--no-python") + 1
    arguments[program + 2 : program + 4] = [str(tmp_path / "script.py")]
    process = subprocess.Popen(
        arguments, cwd=tmp_path, env=os.environ | environment(Launch(2), {"OMP_NUM_THREADS": "1"}),
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "slow\n"
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
    process.wait()
    assert [path.name for path in run_path(tmp_path / "out").glob("step-*")] == ["step-000002"]


def _worker_of(parent: int, *, rank: int) -> int:
    """Return the process below `parent` whose environment has this RANK."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"RANK={rank}".encode() in variables and _descends(int(entry.name), parent):
            return int(entry.name)
    raise AssertionError(f"no worker of rank {rank} below {parent}")


def _descends(number: int, ancestor: int) -> bool:
    while number > 1:
        number = int((Path("/proc") / str(number) / "stat").read_text().rpartition(")")[2].split()[1])
        if number == ancestor:
            return True
    return False


@pytest.mark.parametrize(("size", "rows"), [(2, [[0, 1, 2], [3, 4, 5], [6]]), (3, [[5]]), (4, [[1, 2], [3, 4], [5]])])
def test_each_sample_is_taken_once_and_all_take_as_many_passes(size: int, rows: list[list[int]]) -> None:
    worlds = [World(rank, size) for rank in range(size)]
    shares = [world.share(rows) for world in worlds]
    assert len({len(share) for share in shares}) == 1
    assert all(row for share in shares for row in share)
    own = [place for w, share in zip(worlds, shares, strict=True) if w.has_own(rows) for row in share for place in row]
    assert sorted(own) == sorted(place for row in rows for place in row)


def test_one_process_takes_the_rows_as_they_are() -> None:
    assert World().share([[1, 2], [3]]) == [[1, 2], [3]]


def test_torchrun_listens_on_loopback_unless_given_a_rendezvous() -> None:
    alone = command(Launch(2), ["train", "x"])
    assert alone[alone.index("--local-addr") + 1] == "127.0.0.1"
    many = command(Launch(8, nodes="1:2", rendezvous="192.0.2.1:29500"), ["train", "x"])
    assert "--local-addr" not in many
    assert many[many.index("--rdzv-endpoint") + 1] == "192.0.2.1:29500"
    assert many[many.index("--rdzv-conf") + 1] == "is_host=0"
    assert "GLOO_SOCKET_IFNAME" not in environment(Launch(8, nodes="2", rendezvous="192.0.2.1:29500"), {})
    assert environment(Launch(2), {"OMP_NUM_THREADS": "5"})["OMP_NUM_THREADS"] == "5"
    assert environment(Launch(2), {})["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert int(environment(Launch(2), {})["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) >= 3600  # seconds for a checkpoint


@pytest.mark.parametrize(
    "wrong",
    [
        {"processes": 0},
        {"processes": 1, "nodes": "2"},
        {"processes": 1, "nodes": "two", "rendezvous": "a:1"},
        {"processes": 1, "nodes": "2", "rendezvous": "a"},
    ],
)
def test_an_impossible_launch_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Launch(**wrong)


def test_a_stopped_run_of_another_recipe_is_not_resumed(tmp_path: Path, base: StoredBase) -> None:
    from stopped_runs import train_and_stop

    recipe = recipe_on(tmp_path, base)
    train_and_stop(recipe, base, tmp_path / "out", after=1)
    check_same_run(recipe, tmp_path / "out", None)
    with pytest.raises(OutputNotFresh, match="another recipe"):
        check_same_run(recipe_on(tmp_path, base, steps=9), tmp_path / "out", None)


def test_preference_tuning_is_not_launched(tmp_path: Path) -> None:
    preference_recipe(tmp_path, "dpo")
    outcome = CliRunner().invoke(app, ["train", str(next(tmp_path.glob("*.toml"))), "--launch", "2"])
    assert isinstance(outcome.exception, UsageError)


def test_sharding_needs_several_processes(place: Path) -> None:
    outcome = CliRunner().invoke(app, ["train", str(place / "mine.toml"), "--shard", "-o", str(place / "x")])
    assert isinstance(outcome.exception, UsageError)
    assert "--launch" in str(outcome.exception)
