"""The report of a run: answers during training, the page in its package, figures for a tracker, advice."""

from __future__ import annotations

import html
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from stopped_runs import train_and_stop
from training import WEIGHTS, make_recipe, run
from typer.testing import CliRunner

from adapterhub.adapter import StoredBase
from adapterhub.bases.loading import load_base
from adapterhub.cli.main import app
from adapterhub.errors import TrainingFailed, UnsafeFile, UsageError
from adapterhub.files import sha256_of
from adapterhub.memory.estimate import Item
from adapterhub.package.layout import open_adapter
from adapterhub.package.run_record import (
    REPORT_HEAD,
    REPORT_NAME,
    RunEnd,
    RunEvent,
    RunSampled,
    RunStep,
    read_run_events,
)
from adapterhub.packer import pack
from adapterhub.units import format_bytes
from train import trainer
from train.data.tokenization import Sample
from train.loop.progress import Silent
from train.objectives.evaluation import eval_rows
from train.planning.out_of_memory import what_to_cut
from train.recipe import Recipe
from train.reporting.trackers import TRACKERS, tracking

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

PROMPTS = ["What is 3?", "Is <b>this</b> & that so?"]


def asking(folder: Path, **train: Any) -> Recipe:
    return make_recipe(folder, train={"steps": 4, "sample_every": 2, "prompts": PROMPTS, "checkpoint_every": 1} | train)


def events_of(folder: Path) -> list[RunEvent]:
    return read_run_events(folder / "train_log.jsonl")


@pytest.fixture(scope="module")
def reported(tiny_base: StoredBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("reported")
    run(asking(place, evaluate_every=1, learning_rate=0.05, max_grad_norm=10.0), tiny_base, place / "out")
    return place / "out"


def test_the_same_prompts_are_answered_before_on_the_way_and_after(reported: Path) -> None:
    events = events_of(reported)
    sampled = [event for event in events if isinstance(event, RunSampled)]
    assert [event.step for event in sampled] == [0, 2, 4]
    end = events[-1]
    assert isinstance(end, RunEnd)
    for answers in (*(event.answers for event in sampled), end.answers):
        assert [answer.prompt for answer in answers] == PROMPTS
    assert sampled[-1].answers == end.answers != sampled[0].answers


def test_answering_changes_no_byte(tmp_path: Path, tiny_base: StoredBase) -> None:
    for name, every in (("with", 1), ("without", 0)):
        run(asking(tmp_path, sample_every=every), tiny_base, tmp_path / name)
    assert sha256_of(tmp_path / "with" / WEIGHTS) == sha256_of(tmp_path / "without" / WEIGHTS)
    assert not any(isinstance(event, RunSampled) for event in events_of(tmp_path / "without"))


def test_a_resumed_run_answers_as_one_that_was_not_stopped(tmp_path: Path, tiny_base: StoredBase) -> None:
    recipe = asking(tmp_path)
    run(recipe, tiny_base, tmp_path / "whole")
    train_and_stop(recipe, tiny_base, tmp_path / "parts", after=2)
    trainer.resume(tmp_path / "parts", tiny_base, progress=Silent())
    whole, parts = (
        [event for event in events_of(tmp_path / name) if isinstance(event, RunSampled)] for name in ("whole", "parts")
    )
    assert whole == parts


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_answers_of_a_soft_prompt_are_those_it_gives_each_question_alone(
    tmp_path: Path, tiny_base: StoredBase, method: str
) -> None:
    recipe = asking(tmp_path, learning_rate=0.05).model_copy(update={"method": method})
    end = run(recipe, tiny_base, tmp_path / "out")
    assert [event.step for event in events_of(tmp_path / "out") if isinstance(event, RunSampled)] == [0, 2, 4]
    base = load_base(tiny_base, purpose="serve", dtype="float32")
    model = PeftModel.from_pretrained(base.model, str(tmp_path / "out"))
    for answer in end.answers:
        ids = base.tokenizer.apply_chat_template(
            [{"role": "user", "content": answer.prompt}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        assert base.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip() == answer.text


class _Tags(HTMLParser):
    """Element names and attributes, and whether each element is closed in its turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(page)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "line", "polyline", "rect"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


def test_the_page_stands_alone(reported: Path) -> None:
    page = (reported / REPORT_NAME).read_text()
    assert page.startswith(REPORT_HEAD)
    tags = _Tags(page).found
    assert not {"script", "link", "img", "iframe", "a", "object"} & {tag for tag, _ in tags}
    assert not [name for _, attributes in tags for name in attributes if name in ("src", "href") or name[:2] == "on"]
    assert "url(" not in page
    assert "@import" not in page


def test_the_page_says_what_the_record_says(reported: Path) -> None:
    page = (reported / REPORT_NAME).read_text()
    end = events_of(reported)[-1]
    assert isinstance(end, RunEnd)
    found = end.evaluations[0]
    for part in (
        f"{found.base_loss:.3f}", f"{found.adapter_loss:.3f}", "Training loss", "Held-out loss", "float32 (as asked)",
        f"Measured peak <b>{format_bytes(end.peak_memory_bytes)}</b>", "quantization constants", "rank = 4",
    ):  # fmt: skip
        assert part in page
    assert "Is &lt;b&gt;this&lt;/b&gt; &amp; that so?" in page
    curves = [attributes["points"] for tag, attributes in _Tags(page).found if tag == "polyline"]
    assert [len(str(points).split()) for points in curves] == [4, 4, 4, 4]  # losses, their mean, held out, rate


def test_the_page_holds_no_training_text(reported: Path) -> None:
    page = html.unescape((reported / REPORT_NAME).read_text())
    for answer in answer_texts(reported):
        page = page.replace(answer, "")
    assert "indeed" in (reported.parent / "lines.jsonl").read_text()
    assert "indeed" not in page


def answer_texts(folder: Path) -> list[str]:
    return [answer.text for event in events_of(folder) if isinstance(event, RunSampled) for answer in event.answers]


def test_a_package_lists_its_page_and_the_card_links_to_it(
    tmp_path: Path, reported: Path, tiny_base: StoredBase
) -> None:
    folder = tmp_path / "packed"
    shutil.copytree(reported, folder)
    adapter = pack(folder, base=tiny_base)
    assert adapter.manifest.files[REPORT_NAME].sha256 == sha256_of(folder / REPORT_NAME)
    assert f"]({REPORT_NAME})" in (folder / "README.md").read_text()


@pytest.mark.parametrize("page", ["<script>alert(1)</script>", "<!-- -->" + REPORT_HEAD, REPORT_HEAD[:-9], ""])
def test_a_page_without_the_policy_against_scripts(
    tmp_path: Path, reported: Path, tiny_base: StoredBase, page: str
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(reported, folder)
    (folder / REPORT_NAME).write_text(page)
    with pytest.raises(UnsafeFile, match="lets a browser run no script"):
        pack(folder, base=tiny_base)


def test_a_page_slipped_into_a_package_is_refused(tmp_path: Path, reported: Path, tiny_base: StoredBase) -> None:
    import json

    folder = tmp_path / "packed"
    shutil.copytree(reported, folder)
    pack(folder, base=tiny_base)
    (folder / REPORT_NAME).write_text("<script>alert(1)</script>")
    manifest = json.loads((folder / "adapterhub.json").read_text())
    manifest["files"][REPORT_NAME] = {"sha256": sha256_of(folder / REPORT_NAME), "size": 25}
    (folder / "adapterhub.json").write_text(json.dumps(manifest))
    with pytest.raises(UnsafeFile):
        open_adapter(folder)


def test_trackio_keeps_the_figures_on_this_machine(
    tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.delenv("TRACKIO_SPACE_ID", raising=False)
    from trackio.sqlite_storage import SQLiteStorage

    recipe = make_recipe(tmp_path)
    with tracking(["trackio"], recipe) as listen:
        trainer.train(recipe, tiny_base, tmp_path / "out", progress=Silent(), listen=listen)
    assert list((tmp_path / "trackio").glob("*.db"))
    logs = SQLiteStorage.get_logs("adapterhub", "mine")
    steps = [event for event in events_of(tmp_path / "out") if isinstance(event, RunStep)]
    told = {log["step"]: log["train/loss"] for log in logs if "train/loss" in log}
    assert told == {step.step: pytest.approx(step.loss) for step in steps}


@pytest.mark.parametrize(("name", "said"), [("trackiO", "expected one of trackio"), ("absent", "pip install no_such")])
def test_a_tracker_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    monkeypatch.setitem(TRACKERS, "absent", ("no_such_module", TRACKERS["wandb"][1]))
    with pytest.raises(UsageError, match=said), tracking([name], make_recipe(tmp_path)):
        pass


def test_a_tracker_that_cannot_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(module: Any, recipe: Recipe) -> Any:
        raise ConnectionError("no key is configured")

    monkeypatch.setitem(TRACKERS, "keyless", ("json", begin))
    said = r"the tracker keyless cannot start \(ConnectionError: no key is configured\)"
    with pytest.raises(UsageError, match=said), tracking(["keyless"], make_recipe(tmp_path)):
        pass


def test_the_command_refuses_an_unknown_tracker_before_it_trains(tmp_path: Path, tiny_base: StoredBase) -> None:
    make_recipe(tmp_path)
    file = tmp_path / "mine.toml"
    file.write_text(file.read_text().replace("smollm2-135m-instruct", str(tiny_base.path)))
    outcome = CliRunner().invoke(app, ["train", str(file), "-o", str(tmp_path / "out"), "--report-to", "neptune"])
    assert outcome.exit_code == 2
    assert "neptune" in outcome.output
    assert "tensorboard" in outcome.output
    assert not (tmp_path / "out").exists()


def test_a_tracker_that_fails_does_not_end_the_run(
    tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def log(self, figures: dict[str, float], step: int) -> None:
            raise ConnectionError("the server is gone")

        finish = log

    monkeypatch.setitem(TRACKERS, "broken", ("json", lambda module, recipe: Broken()))
    recipe = make_recipe(tmp_path)
    with tracking(["broken"], recipe) as listen:
        trainer.train(recipe, tiny_base, tmp_path / "out", progress=Silent(), listen=listen)
    assert capsys.readouterr().err.count("the server is gone") == 1
    assert (tmp_path / "out" / WEIGHTS).exists()


@pytest.mark.parametrize(
    ("largest", "said"),
    [("logits", "halve batch_size"), ("optimizer", "paged-adamw-8bit"), ("base, 4-bit codes", "--launch N --shard")],
)
def test_out_of_memory_the_largest_part_that_can_be_cut_is_named(largest: str, said: str) -> None:
    items = [Item(name=name, size_bytes=1 << 20) for name in ("adapter, fp32", "activations", "optimizer")]
    items += [Item(name="process", size_bytes=1 << 40), Item(name=largest, size_bytes=3 << 30)]
    advice = what_to_cut(items)
    assert f"3.22 GB are for {largest}" in advice
    assert said in advice


def test_out_of_memory_in_a_run_names_the_plan(
    tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import failing_loss

    failing_loss(monkeypatch, MemoryError())
    with pytest.raises(TrainingFailed, match=r"memory ran out; of the [\d.]+ [MG]B planned, [\d.]+ [kMG]B are for"):
        run(make_recipe(tmp_path), tiny_base, tmp_path / "out")


@given(st.lists(st.integers(2, 900), max_size=40))
def test_measuring_takes_all_samples_in_order_in_rows_that_memory_bears(lengths: list[int]) -> None:
    samples = [Sample(tuple(range(length)), (False, *[True] * (length - 1))) for length in lengths]
    rows = list(eval_rows(samples))
    assert [sample for row in rows for sample in row] == samples
    for row in rows:
        assert 1 <= len(row) <= 8
        assert len(row) == 1 or sum(sample.num_trained for sample in row) <= 512
