"""The recorded probe: plain greedy answers, whatever a base says about generation, under a chat template."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from greedy_settings import GREEDY_SETTINGS, make_repeating_base
from peft import PeftModel
from tiny_models import make_peft_adapter
from transformers import GenerationConfig

from adapterhub import probe
from adapterhub.adapter import BaseRef, StoredBase
from adapterhub.bases.loading import LoadedBase, load_base
from adapterhub.bases.store import fingerprint
from adapterhub.errors import IncompatibleBase
from adapterhub.package.layout import TEMPLATE_NAME, open_adapter
from adapterhub.package.manifest import write_probe
from adapterhub.packer import pack
from adapterhub.probe import NUM_TOKENS, record, replay


@dataclass(frozen=True)
class _Repeating:
    """A base that repeats tokens, with an adapter."""

    base: LoadedBase
    folder: Path

    @contextmanager
    def configured(self, **settings: Any) -> Iterator[None]:
        plain = self.base.model.generation_config
        self.base.model.generation_config = GenerationConfig(**({"eos_token_id": 2} | settings))
        try:
            yield
        finally:
            self.base.model.generation_config = plain

    def tokens(self) -> list[int]:
        return record(self.base, self.folder).answers[0].tokens

    def default_tokens(self, prompt: list[int]) -> list[int] | str:
        """Return what transformers generates if nothing but greedy decoding is asked for, or its error."""
        model = PeftModel.from_pretrained(self.base.model, str(self.folder)).eval()
        ids = torch.tensor([prompt])
        try:
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False
            )
        except ValueError as error:
            return str(error)
        finally:
            model.unload()
        return list(out[0, len(prompt) :].tolist())


@pytest.fixture(scope="module")
def repeating(smollm2: StoredBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Repeating]:
    place = tmp_path_factory.mktemp("repeating")
    base = make_repeating_base(place / "base", smollm2)
    make_peft_adapter(place / "adapter", base, rank=8, seed=1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(probe, "PROMPTS", probe.PROMPTS[:1])
        yield _Repeating(load_base(base, dtype="float32"), place / "adapter")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", GREEDY_SETTINGS)
def test_generation_settings_of_the_base_do_not_change_the_probe(repeating: _Repeating, name: str) -> None:
    plain = record(repeating.base, repeating.folder).answers[0]
    settings = GREEDY_SETTINGS[name](plain.tokens)
    expected = plain.tokens[:2] if "eos_token_id" in settings else plain.tokens
    with repeating.configured(**settings):
        configured = repeating.base.model.generation_config
        assert repeating.default_tokens(plain.prompt_tokens) != expected, "this setting changes nothing here"
        assert repeating.tokens() == expected
        assert repeating.base.model.generation_config is configured


def test_the_end_tokens_of_the_base_end_an_answer(repeating: _Repeating) -> None:
    tokens = repeating.tokens()
    with repeating.configured(eos_token_id=[2, tokens[3]]):
        assert repeating.tokens() == tokens[:4]


def test_a_package_of_a_base_with_a_penalty_passes_its_probe(repeating: _Repeating, tmp_path: Path) -> None:
    """The penalty stays in the base's folder: it is there when the probe is recorded and when it is replayed."""
    base = shutil.copytree(repeating.base.model.name_or_path, tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "repetition_penalty": 3.0}))
    stored = StoredBase(base, BaseRef("tests/penalty", None, fingerprint(base)), "apache-2.0")
    adapter = pack(shutil.copytree(repeating.folder, tmp_path / "adapter"), base=stored)
    replay(load_base(stored, dtype="float32"), adapter)
    assert adapter.probe is not None
    assert adapter.probe.answers[0].tokens == repeating.tokens()


@pytest.mark.parametrize("own", [None, "", " \n"], ids=["no file", "an empty file", "white space"])
def test_a_base_without_a_chat_template_is_refused_before_anything_is_written(
    tiny_base: StoredBase, peft_folder: Path, tmp_path: Path, own: str | None
) -> None:
    base = _without_template(tiny_base, tmp_path)
    folder = shutil.copytree(peft_folder, tmp_path / "adapter")
    if own is not None:
        (folder / TEMPLATE_NAME).write_text(own)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(IncompatibleBase, match=r"base tests/bare \(.*\) has no chat template"):
        pack(folder, base=base)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(IncompatibleBase, match=r"base tests/bare \(.*\) has no chat template"):
        record(load_base(base, dtype="float32"), folder)


def test_an_adapter_may_bring_the_template_that_its_base_lacks(
    tiny_base: StoredBase, peft_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(peft_folder, tmp_path / "adapter")
    shutil.copy(tiny_base.path / TEMPLATE_NAME, folder)
    adapter = pack(folder, base=_without_template(tiny_base, tmp_path))
    assert adapter.probe is not None


def test_of_several_templates_of_a_base_the_default_one_is_packed(
    tiny_base: StoredBase, peft_folder: Path, tmp_path: Path
) -> None:
    base = _without_template(tiny_base, tmp_path)
    path = base.path / "tokenizer_config.json"
    text = (tiny_base.path / TEMPLATE_NAME).read_text()
    templates = [{"name": "default", "template": text}, {"name": "tool_use", "template": "{{ tools }}"}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": templates}))
    folder = shutil.copytree(peft_folder, tmp_path / "adapter")
    pack(folder, base=base)
    assert (folder / TEMPLATE_NAME).read_text() == text


def _without_template(base: StoredBase, place: Path) -> StoredBase:
    bare = shutil.copytree(base.path, place / "bare")
    (bare / TEMPLATE_NAME).unlink()
    return StoredBase(bare, BaseRef("tests/bare", None, fingerprint(bare)), "apache-2.0")


DATED = "{{ '<|im_start|>system\\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>' }}{{ messages[0].content }}"


def test_a_template_that_reads_the_clock_renders_the_recorded_date(
    tiny_base: StoredBase, peft_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(peft_folder, tmp_path / "adapter")
    (folder / TEMPLATE_NAME).write_text(DATED)
    adapter = pack(folder, base=tiny_base)
    assert adapter.probe is not None
    assert adapter.probe.date == datetime.date.today().isoformat()
    base = load_base(tiny_base, dtype="float32")
    of_that_day = record(base, folder, date=datetime.date(2020, 2, 29))
    assert of_that_day.date == "2020-02-29"
    assert "Today is 29 Feb 2020" in base.tokenizer.decode(of_that_day.answers[0].prompt_tokens)
    write_probe(folder, of_that_day)
    replay(base, open_adapter(folder))  # as on any later day
