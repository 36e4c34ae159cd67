"""What a server's runs start from and produce, on runs that train nothing."""

from __future__ import annotations

import asyncio
import shutil
import tomllib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest
from api_bench import ASKED, Bench, answer, bench
from packages import write_package

from adapterhub.adapter import AdapterRef, StoredBase
from adapterhub.errors import AdapterNotFound, Conflict, ServerBusy, SignatureInvalid, UsageError
from adapterhub.feedback.improvement import Improvement, Method
from adapterhub.feedback.store import Correction
from adapterhub.package.layout import open_adapter
from serve.training.candidates import CandidatePipeline
from serve.training.runs import TrainingRun, TrainingRuns


class FinishedRuns:
    """Each run is done as soon as it begins, and made the package `folder / name`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runs: dict[str, TrainingRun] = {}
        self.licenses: list[str | None] = []

    async def start(self, recipe: str, *, improves: str | None = None) -> TrainingRun:
        name = f"run-{len(self._runs)}"
        made = write_package(self.folder / name, name=str(tomllib.loads(recipe)["name"]), seed=77 + len(self._runs))
        self._runs[name] = TrainingRun(name, 1, "done", recipe, (), (), (), None, improves, made, "")
        return self._runs[name]

    def get(self, name: str) -> TrainingRun:
        return self._runs[name]

    async def pack(self, name: str, *, license: str | None = None) -> None:
        self.licenses.append(license)


def corrected(model: str) -> Correction:
    return Correction.model_validate(
        {"kind": "correction", "messages": ASKED, "answer": answer(model), "text": f"Aye, {model}."}
    )


def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, test: Callable[[Bench, CandidatePipeline], Awaitable[None]]
) -> None:
    async def whole() -> None:
        async with bench(tmp_path) as b:
            catalog, feedback = b.services.catalog, b.services.feedback
            assert feedback is not None
            for model in ("captain", "visitor", "favourite"):
                feedback.add(corrected(model), owner="me")

            def bases() -> list[tuple[str, StoredBase]]:
                return [("tiny", catalog.base)]

            monkeypatch.setattr("adapterhub.bases.store.list_bases", bases)
            runs = cast("TrainingRuns", FinishedRuns(tmp_path / "training"))
            await test(b, CandidatePipeline(runs, feedback, b.registry, catalog))

    asyncio.run(whole())


def test_adapter_served_from_a_folder_is_improved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(b: Bench, w: CandidatePipeline) -> None:
        folder = write_package(tmp_path / "elsewhere", name="elsewhere", seed=5)
        await b.services.catalog.load("visitor", AdapterRef(folder=folder))
        begun = await w.improve("visitor", Improvement())
        start = str(tomllib.loads(begun.recipe)["start"])
        assert b.registry.resolve(AdapterRef.parse(start)).manifest.name == "elsewhere"

    run(tmp_path, monkeypatch, test)


def test_only_feedback_about_the_adapter_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name it is served under, the registry's names that point to it, and its digest."""

    async def test(b: Bench, w: CandidatePipeline) -> None:
        assert b.services.feedback is not None
        await b.services.catalog.load("favourite", AdapterRef.parse("spare"))
        digest = b.registry.resolve(AdapterRef.parse("spare")).digest
        begun = await w.improve("favourite", Improvement())
        assert tomllib.loads(begun.recipe)["data"]["adapters"] == ["favourite", "spare", digest]
        with pytest.raises(UsageError, match="left out 3 rows about other adapters"):
            await w.improve("poet", Improvement())
        begun = await w.improve("poet", Improvement(all_adapters=True))
        assert tomllib.loads(begun.recipe)["data"]["adapters"] == "all"
        b.services.feedback.delete("me")
        with pytest.raises(UsageError, match="there is no feedback to train from: 0 rows"):
            await w.improve("captain", Improvement(Method.kto))

    run(tmp_path, monkeypatch, test)


def test_improving_one_whose_folder_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(b: Bench, w: CandidatePipeline) -> None:
        folder = write_package(tmp_path / "elsewhere", name="elsewhere", seed=5)
        await b.services.catalog.load("visitor", AdapterRef(folder=folder))
        shutil.rmtree(folder)
        with pytest.raises(AdapterNotFound, match="from which visitor is served"):
            await w.improve("visitor", Improvement())

    run(tmp_path, monkeypatch, test)


def test_path_on_the_server_s_disk_is_not_improved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(b: Bench, w: CandidatePipeline) -> None:
        with pytest.raises(UsageError, match="is a path on the server's disk"):
            await w.improve(str(tmp_path / "spare"), Improvement())

    run(tmp_path, monkeypatch, test)


def test_promoting_keeps_the_pin_the_share_and_who_did_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(b: Bench, w: CandidatePipeline) -> None:
        await b.services.catalog.load("favourite", AdapterRef.parse("spare"), weight=3.0, is_pinned=True)
        begun = await w.improve("favourite", Improvement())
        pinned: list[str] = []
        pin: Any = b.services.cache.pin
        monkeypatch.setattr(b.services.cache, "pin", lambda adapter: (pinned.append(adapter.digest), pin(adapter)))
        assert await w.promote(begun.id, by="key 12345678") == "spare"
        served = b.services.catalog.find("favourite")
        assert served is not None
        assert (served.weight, served.is_pinned, pinned) == (3.0, True, [served.adapter.digest])
        move = b.registry.history("spare")[-1]
        assert (move.after, move.by) == (served.adapter.digest, "key 12345678")
        called = await w.publish(begun.id, by="key 87654321")
        assert b.registry.history(called)[-1].by == "key 87654321"

    run(tmp_path, monkeypatch, test)


async def _refused(b: Bench, act: Awaitable[str], match: str, kind: type[Exception]) -> None:
    """Names point where they pointed, here and wherever they are served."""

    def names() -> list[tuple[str, str]]:
        kept = [(entry.name, entry.digest) for entry in b.registry.list()]
        return kept + [(published.name, published.adapter.digest) for published in b.services.catalog.list()]

    before = names()
    with pytest.raises(kind, match=match):
        await act
    assert names() == before


@pytest.mark.parametrize("act", ["publish", "promote"])
def test_unsigned_result_where_all_is_to_be_signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str) -> None:
    async def test(b: Bench, w: CandidatePipeline) -> None:
        begun = await w.improve("captain", Improvement())
        (b.registry.root / "policy.toml").write_text('[[trust]]\nnames = "*"\nkeys = []\n')
        await _refused(b, getattr(w, act)(begun.id), "sign", SignatureInvalid)

    run(tmp_path, monkeypatch, test)


@pytest.mark.parametrize("act", ["publish", "promote"])
def test_result_for_which_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str) -> None:
    async def test(b: Bench, w: CandidatePipeline) -> None:
        begun = await w.improve("captain", Improvement())
        b.services.engine.load_error = ServerBusy("all are pinned")
        await _refused(b, getattr(w, act)(begun.id), "pinned", ServerBusy)

    run(tmp_path, monkeypatch, test)


def test_promoting_for_a_name_that_points_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(b: Bench, w: CandidatePipeline) -> None:
        visitor = write_package(tmp_path / "elsewhere", name="captain", seed=5)
        await b.services.catalog.load("visitor", AdapterRef(folder=visitor))
        begun = await w.improve("visitor", Improvement())
        await _refused(b, w.promote(begun.id), "captain points to", Conflict)

    run(tmp_path, monkeypatch, test)


def test_promoting_for_a_name_that_moved_during_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(b: Bench, w: CandidatePipeline) -> None:
        begun = await w.improve("captain", Improvement())
        b.registry.add(open_adapter(write_package(tmp_path / "v2", name="captain", seed=6)))
        await _refused(b, w.promote(begun.id), "captain points to", Conflict)

    run(tmp_path, monkeypatch, test)


def test_promoting_twice_moves_the_name_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(b: Bench, w: CandidatePipeline) -> None:
        begun = await w.improve("captain", Improvement())
        assert [await w.promote(begun.id), await w.promote(begun.id)] == ["captain", "captain"]
        assert [move.act for move in b.registry.history("captain")] == ["add", "add"]

    run(tmp_path, monkeypatch, test)


@pytest.mark.parametrize("act", ["publish", "promote"])
def test_candidate_is_packed_with_the_license_of_what_it_improves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    async def test(b: Bench, w: CandidatePipeline) -> None:
        begun = await w.improve("captain", Improvement())
        await getattr(w, act)(begun.id)
        assert cast("FinishedRuns", w._runs).licenses == ["apache-2.0"]

    run(tmp_path, monkeypatch, test)
