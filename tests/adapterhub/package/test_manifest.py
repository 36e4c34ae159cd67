"""What the digest covers, and that a manifest agrees with the files that it describes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packages import write_package

from adapterhub.errors import InvalidManifest
from adapterhub.package.layout import open_adapter
from adapterhub.package.manifest import Manifest, parse_manifest, read_manifest

PROBE = {
    "dtype": "float32",
    "answers": [
        {"prompt": "Hi", "prompt_tokens": [1], "tokens": [2], "gaps": [0.5], "top_tokens": [2], "top_logits": [1.25]}
    ],
}
TRAINING = {
    "recipe_sha256": "0" * 64, "data_sha256": "1" * 64, "samples": 1, "steps": 1, "trained_tokens": 1, "seconds": 1.0,
    "seed": 1, "versions": {},
}  # fmt: skip
FILES = ("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja")
WEIGHTS = {"kind": "nf4", "double_quant": True, "block_size": 64, "compute_dtype": "bfloat16"}

INSIDE: dict[str, Any] = {
    "base.id": "owner/other",
    "base.revision": "0" * 40,
    "base.fingerprint": "fp1:" + "0" * 64,
    "base.quantization": WEIGHTS,
    "lora.method": "dora",
    "lora.rank": 8,
    "lora.alpha": 16.0,
    "lora.scaling": 1.0,
    "lora.targets": ["v_proj"],
    "lora.rank_pattern": {"q_proj": 2},
    "lora.alpha_pattern": {"q_proj": 2.0},
    "chat.template_sha256": "0" * 64,
    "chat.bos": None,
    "chat.eos": "<end>",
    "chat.pad": None,
    "chat.stop": ["###"],
    "chat.stop_token_ids": [2],
    "probe": PROBE,
    "files.chat_template.jinja": {"sha256": "0" * 64, "size": 1},
}
"""Facts that change what is served. Each fact of these parts is here."""
OUTSIDE: dict[str, Any] = {
    "name": "other",
    "license": "mit",
    "training": TRAINING,
    "evaluations": [{"data": "x", "tokens": 1, "base_loss": 1.0, "adapter_loss": 0.5}],
}


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((write_package(tmp_path / "p") / "adapterhub.json").read_text())
    return raw


def _changed(raw: dict[str, Any], fact: str, value: object) -> dict[str, Any]:
    part, _, key = fact.partition(".")
    return raw | {part: raw[part] | {key: value} if key else value}


def _digest(raw: dict[str, Any]) -> str:
    return parse_manifest(json.dumps(raw).encode(), where="here").digest


@pytest.mark.parametrize("fact", INSIDE)
def test_what_serving_reads_is_in_the_digest(raw: dict[str, Any], fact: str) -> None:
    assert _digest(_changed(raw, fact, INSIDE[fact])) != _digest(raw)


@pytest.mark.parametrize("fact", OUTSIDE)
def test_what_people_read_is_not_in_the_digest(raw: dict[str, Any], fact: str) -> None:
    assert _digest(_changed(raw, fact, OUTSIDE[fact])) == _digest(raw)


def test_every_key_of_the_manifest_is_in_one_of_the_two_tables() -> None:
    parts = {fact.partition(".")[0] for fact in INSIDE} | set(OUTSIDE) | {"format"}
    assert parts == set(Manifest.model_fields)
    for part in ("base", "lora", "chat"):
        keys = {fact.partition(".")[2] for fact in INSIDE if fact.startswith(f"{part}.")}
        assert keys == set(Manifest.model_fields[part].annotation.model_fields)  # type: ignore[union-attr]


def test_a_key_that_has_its_default_changes_no_digest(raw: dict[str, Any]) -> None:
    """So that later versions may add one."""
    full = _changed(raw, "chat.stop", [])
    del raw["chat"]["stop"], raw["lora"]["rank_pattern"], raw["probe"], raw["base"]["quantization"]
    assert _digest(raw) == _digest(full)


def test_the_digest_is_that_of_the_document(raw: dict[str, Any]) -> None:
    """As docs/adapter-format.md describes it: another program must get the same."""
    files = raw["files"]
    listed = ",".join(f'"{name}":{{"sha256":"{files[name]["sha256"]}","size":{files[name]["size"]}}}' for name in FILES)
    canonical = (
        f'{{"base":{{"fingerprint":"fp1:{"ab" * 32}","id":"owner/base"}},'
        '"chat":{"bos":"<s>","eos":"</s>","pad":"</s>",'
        f'"template_sha256":"{files["chat_template.jinja"]["sha256"]}"}},"files":{{{listed}}},'
        '"lora":{"alpha":8.0,"method":"lora","rank":4,"scaling":2.0,"targets":["q_proj"]}}'
    )
    assert _digest(raw) == "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def _set(fact: str, value: object) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda raw: _changed(raw, fact, value)


LIES = {
    "rank": _set("lora.rank", 4096),
    "alpha": _set("lora.alpha", 9.0),
    "scaling": _set("lora.scaling", 2.5),
    "method": _set("lora.method", "rslora"),
    "targets": _set("lora.targets", ["q_proj", "v_proj"]),
    "rank_pattern": _set("lora.rank_pattern", {"q_proj": 4}),
    "alpha_pattern": _set("lora.alpha_pattern", {"q_proj": 4.0}),
    "template_sha256": _set("chat.template_sha256", "0" * 64),
    "alpha-in-words": _set("lora.alpha", "NaN"),
    "alpha-as-text": _set("lora.alpha", "8.0"),
    "scaling-not-a-number": _set("lora.scaling", float("nan")),
    "scaling-infinite": _set("lora.scaling", float("inf")),
    "loss-not-a-number": _set("evaluations", [OUTSIDE["evaluations"][0] | {"base_loss": float("nan")}]),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_does_not_agree_with_its_files_is_refused(tmp_path: Path, lie: str) -> None:
    folder = write_package(tmp_path / "p")
    path = folder / "adapterhub.json"
    path.write_text(json.dumps(LIES[lie](json.loads(path.read_text()))))
    with pytest.raises(InvalidManifest):
        open_adapter(folder)


@pytest.mark.parametrize("lie", ["rank", "alpha", "scaling", "template_sha256"])
def test_a_manifest_of_format_1_is_refused_for_the_same(tmp_path: Path, lie: str) -> None:
    folder = write_package(tmp_path / "p")
    path = folder / "adapterhub.json"
    path.write_text(json.dumps(LIES[lie](json.loads(path.read_text()) | {"format": 1})))
    with pytest.raises(InvalidManifest, match="expected the same"):
        open_adapter(folder)


def test_a_probe_beside_the_manifest_is_the_adapters_and_not_in_its_digest(tmp_path: Path) -> None:
    folder = write_package(tmp_path / "p")
    before = open_adapter(folder)
    assert before.probe is None
    (folder / "probe.json").write_text(json.dumps(PROBE))
    adapter = open_adapter(folder)
    assert adapter.probe is not None
    assert adapter.digest == before.digest
    (folder / "probe.json").write_text(json.dumps(PROBE | {"surprise": 1}))
    with pytest.raises(InvalidManifest, match="surprise"):
        open_adapter(folder)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    manifest = read_manifest(write_package(tmp_path / "p"))
    assert parse_manifest(manifest.to_json().encode(), where="here") == manifest
