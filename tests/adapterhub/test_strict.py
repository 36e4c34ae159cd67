"""JSON that others wrote is read as RFC 8259 defines it, by every reader of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from packages import write_package

from adapterhub.adapter import BaseName
from adapterhub.bases.store import find_base
from adapterhub.errors import AdapterHubError
from adapterhub.package.layout import open_adapter
from adapterhub.package.lora_config import read_lora_config
from adapterhub.package.manifest import read_manifest, read_probe
from adapterhub.package.run_record import read_run_events
from adapterhub.package.safetensors_header import read_header
from adapterhub.package.signing import signer_hint
from adapterhub.registry.lock_file import read_lock
from adapterhub.registry.name_log import NameLog
from adapterhub.strict import parse_json

NOT_JSON = {
    "NaN": b'{"x": NaN}',
    "Infinity": b'{"x": [-Infinity]}',
    "beyond-float64": b'{"x": 1e999}',
    "twice": b'{"x": {"a": 1, "a": 1}}',
    "half-a-pair": b'{"x": "\\ud800"}',
    "half-a-pair-as-key": b'{"\\uDC00": 1}',
    "latin-1": b'{"x": "\xe9"}',
    "mark-at-the-start": b'\xef\xbb\xbf{"x": 1}',
    "utf-16": '{"x": 1}'.encode("utf-16"),
    "deep": b"[" * 100_000,
    "two-values": b"{} {}",
    "nothing": b"",
}


@pytest.mark.parametrize("data", NOT_JSON.values(), ids=NOT_JSON)
def test_what_other_readers_would_read_otherwise_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="."):
        parse_json(data)


@pytest.mark.parametrize(
    "text", ["{}", '{"a": [1, 2.5, null, true, "é"]}', '"\\ud83d\\ude00"', "1e308", "-0.0", '{"ud800": 1}']
)
def test_json_is_read_as_it_is(text: str) -> None:
    assert parse_json(text.encode()) == json.loads(text)


def _manifest(folder: Path, data: bytes) -> object:
    (folder / "adapterhub.json").write_bytes(data)
    return read_manifest(folder)


def _probe(folder: Path, data: bytes) -> object:
    (folder / "probe.json").write_bytes(data)
    return read_probe(folder)


def _config(folder: Path, data: bytes) -> object:
    (folder / "adapter_config.json").write_bytes(data)
    return read_lora_config(folder)


def _header(folder: Path, data: bytes) -> object:
    (folder / "x.safetensors").write_bytes(len(data).to_bytes(8, "little") + data)
    return read_header(folder / "x.safetensors")


def _signature(folder: Path, data: bytes) -> object:
    adapter = open_adapter(write_package(folder / "p"))
    (adapter.path / "adapter.sig").write_bytes(data)
    return signer_hint(adapter)


def _lock(folder: Path, data: bytes) -> object:
    (folder / "adapterhub.lock").write_bytes(data)
    return read_lock(folder / "adapterhub.lock")


def _name_log(folder: Path, data: bytes) -> object:
    (folder / "x.jsonl").write_bytes(data + b"\n")
    return NameLog(folder).read("x")


def _train_log(folder: Path, data: bytes) -> object:
    (folder / "train_log.jsonl").write_bytes(data + b"\n{}")
    return read_run_events(folder / "train_log.jsonl")


def _base_record(folder: Path, data: bytes) -> object:
    (folder / "config.json").write_text("{}")
    (folder / "base.json").write_bytes(data)
    return find_base(BaseName(folder=folder))


MODULES = (
    "package.manifest", "package.lora_config", "package.safetensors_header", "package.signing", "package.run_record",
    "registry.lock_file", "registry.name_log", "bases.store",
)  # fmt: skip
READERS = [_manifest, _probe, _config, _header, _signature, _lock, _name_log, _train_log, _base_record]


@pytest.mark.parametrize("name", ["NaN", "twice", "half-a-pair", "deep"])
@pytest.mark.parametrize("read", READERS)
def test_each_file_of_others_is_read_strictly(
    read: Callable[[Path, bytes], object], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused by name; by the strict reader, and not for the keys that are missing."""
    refused: list[bytes] = []

    def strictly(data: bytes) -> object:
        try:
            return parse_json(data)
        except ValueError:
            refused.append(data)
            raise

    for module in MODULES:
        monkeypatch.setattr(f"adapterhub.{module}.parse_json", strictly)
    with pytest.raises(AdapterHubError):
        read(tmp_path, NOT_JSON[name])
    assert refused == [NOT_JSON[name]]
