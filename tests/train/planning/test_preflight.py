"""Problems of a run before its first step: reported by the plan and, where they would end the run, refused."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from hub_fixtures import ALICE, LFS_UPLOADS_WARN, PEOPLE, READER, start_hub
from tiny_models import TINY_VOCABULARY
from training import make_recipe, run
from typer.testing import CliRunner

from adapterhub.adapter import BaseName, BaseRef, StoredBase
from adapterhub.bases.store import outline_base
from adapterhub.cli.main import app
from adapterhub.errors import BaseNotFound, HubUnavailable, IncompatibleBase, StorageFull
from adapterhub.hub.client import Hub
from train.inputs import load_inputs
from train.planning import preflight
from train.planning.plan import make_plan
from train.planning.preflight import disk_problems, hub_access, memory_problems

pytestmark = [LFS_UPLOADS_WARN, pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")]
Usage = namedtuple("Usage", "total used free")  # as shutil's own


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 1000, 1000))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, tiny_base: StoredBase) -> str:  # type: ignore[misc]
    """A hub with accounts, that has the tiny base as alice/tiny."""
    with start_hub(tmp_path_factory.mktemp("hub"), PEOPLE) as url:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=url, token=ALICE)
        api.create_repo("alice/tiny", private=True)
        for path in sorted(tiny_base.path.iterdir()):
            with path.open("rb") as file:  # of a file object the client asks no more than LFS
                api.upload_file(path_or_fileobj=file, path_in_repo=path.name, repo_id="alice/tiny")
        yield url


def test_a_full_disk_is_a_problem_of_the_plan(tmp_path: Path, tiny_base: StoredBase, full_disk: None) -> None:
    plan = make_plan(make_recipe(tmp_path), tiny_base, tmp_path / "out")
    assert plan.disk_bytes > plan.disk_free_bytes == 1000
    assert any(problem.startswith("disk: the run and its checkpoints need up to") for problem in plan.problems)


def test_a_run_on_a_full_disk_ends_before_its_first_step(
    tmp_path: Path, tiny_base: StoredBase, full_disk: None
) -> None:
    with pytest.raises(StorageFull, match="disk: the run and its checkpoints need"):
        run(make_recipe(tmp_path), tiny_base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.run").exists()


def test_a_disk_without_room_for_the_base_itself(tmp_path: Path, home: Path, full_disk: None) -> None:
    found = list(disk_problems(tmp_path, 10, StoredBase(tmp_path, BaseRef("a/b")), 10**9))
    assert len(found) == 1
    assert "the weights of a/b need up to 2.00 GB" in found[0]


def test_more_memory_than_the_machine_has() -> None:
    assert "memory: at least 9000.00 GB are needed and cpu has" in next(memory_problems(9e12, "cpu"))
    assert list(memory_problems(1e6, "cpu")) == []


def test_a_sound_plan_has_no_problems(tmp_path: Path, tiny_base: StoredBase) -> None:
    assert make_plan(make_recipe(tmp_path), tiny_base, tmp_path / "out").problems == []


def test_without_a_token_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hub, "_api", property(lambda self: pytest.fail("the Hub was asked")))
    found = hub_access(Hub("http://127.0.0.1:9"))
    assert (found.user, found.can_push, found.problems) == (None, False, [])
    assert "set HF_TOKEN" in found.note


def test_a_hub_says_whose_the_token_is_and_whether_it_may_push(hub: str) -> None:
    writer, reader = hub_access(Hub(hub, ALICE)), hub_access(Hub(hub, READER))
    assert (writer.user, writer.can_push) == ("alice", True)
    assert (reader.user, reader.can_push) == ("reader", False)
    assert writer.problems == reader.problems == []


def test_a_token_the_hub_does_not_know_is_a_problem(hub: str) -> None:
    found = hub_access(Hub(hub, "hub_nobodys_token"))
    assert (found.user, found.can_push) == (None, False)
    assert len(found.problems) == 1
    assert hub in found.problems[0]


def test_a_hub_that_does_not_answer_is_no_problem_of_a_base_that_is_here() -> None:
    found = hub_access(Hub("http://127.0.0.1:9", "token"))
    assert "nothing can be pulled or pushed now" in found.note
    assert found.problems == []


def test_a_plan_fetches_config_and_tokenizer_but_no_weights(
    tmp_path: Path, home: Path, hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub)
    monkeypatch.setenv("HF_TOKEN", ALICE)
    make_recipe(tmp_path)
    path = tmp_path / "mine.toml"
    path.write_text(path.read_text().replace("smollm2-135m-instruct", "alice/tiny"))
    done = CliRunner().invoke(app, ["train", str(path), "--plan"])
    assert done.exit_code == 0, done.output
    assert "nothing was trained" in done.stdout
    assert "the token is alice's and may push" in done.stdout
    names = {file.name for file in (home / "outlines" / "alice--tiny").iterdir()}
    assert {"config.json", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith(".safetensors")]
    assert not (home / "bases").exists()


def test_a_base_that_is_not_visible_is_reported_before_anything_else(
    home: Path, hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub)
    with pytest.raises(BaseNotFound, match=r"shows no alice/tiny without a token.* or set HF_TOKEN"):
        outline_base(BaseName.parse("alice/tiny"))


def test_an_outline_of_a_base_no_hub_gives(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubUnavailable):
        outline_base(BaseName.parse("some/base"))
    with pytest.raises(BaseNotFound, match="is not known"):
        outline_base(BaseName.parse("llama-7"))


def test_a_base_that_is_here_is_its_own_outline(tiny_base: StoredBase) -> None:
    found = outline_base(BaseName.parse(str(tiny_base.path)))
    assert found.ref.fingerprint == tiny_base.ref.fingerprint


def test_a_tokenizer_larger_than_the_base(tmp_path: Path, tiny_base: StoredBase) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base.path, folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace(f'"vocab_size": {TINY_VOCABULARY}', '"vocab_size": 1000'))
    with pytest.raises(IncompatibleBase, match=r"gives token \d+: expected ids below 1000"):
        load_inputs(make_recipe(tmp_path), StoredBase(folder, tiny_base.ref), start=None)


def test_the_problems_are_shown(tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_memory_of", lambda device: 1000)
    make_recipe(tmp_path)
    path = tmp_path / "mine.toml"
    path.write_text(path.read_text().replace("smollm2-135m-instruct", str(tiny_base.path)))
    done = CliRunner().invoke(app, ["train", str(path), "--plan"])
    assert "problem: memory: at least" in done.stdout
