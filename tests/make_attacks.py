"""Adapter packages made to harm, each for one refusal: `python tests/make_attacks.py` writes tests/attacks/ again.

Every sample is a complete package but for the one thing its name says. A few hundred bytes each; none does anything.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from packages import write_manifest, write_package
from safetensors.numpy import load_file, save_file

ATTACKS = Path(__file__).parent / "attacks"
_KEY = "base_model.model.model.layers.0.self_attn.q_proj"


def _rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    write_manifest(folder)


def _header(folder: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    """Edit the header alone: the data stays."""
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])


def _offsets(name: str, start: int, end: int) -> Callable[[dict[str, dict[str, object]]], object]:
    return lambda header: header[f"{_KEY}.{name}.weight"].update(data_offsets=[start, end])


def _manifest(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = folder / "adapterhub.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def _config(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    write_manifest_unchecked(folder)


def write_manifest_unchecked(folder: Path) -> None:
    """A manifest that fits files no reader takes: of a sound package, with these files' digests."""
    sound = write_package(folder.parent / ".sound")
    raw = json.loads((sound / "adapterhub.json").read_text())
    shutil.rmtree(sound)
    import hashlib

    for name in raw["files"]:
        data = (folder / name).read_bytes()
        raw["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (folder / "adapterhub.json").write_text(json.dumps(raw))


def _weights(folder: Path, data: bytes) -> None:
    (folder / "adapter_model.safetensors").write_bytes(data)
    write_manifest_unchecked(folder)


def _set(name: str, value: float) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors[f"{_KEY}.{name}.weight"].__setitem__((0, 0), value)


def _beside(name: str, data: bytes = b"{}") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def _edited(change: Callable[[dict[str, dict[str, object]]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        _header(folder, change)
        write_manifest_unchecked(folder)

    return edit


SAMPLES: dict[str, tuple[str, Callable[[Path], object]]] = {
    # Code. b"cos\nsystem\n" is how a pickle that calls os.system begins; these are not loaded by anybody.
    "pickle": ("UnsafeFile", _beside("adapter_model.bin", b"cos\nsystem\n(S'true'\ntR.")),
    "optimizer-state": ("UnsafeFile", _beside("optimizer.pt", b"\x80\x04.")),
    "python-beside": ("UnsafeFile", _beside("modeling_llama.py", b"raise SystemExit\n")),
    "shared-library": ("UnsafeFile", _beside("kernel.so", b"\x7fELF")),
    "symbolic-link": ("UnsafeFile", lambda folder: os.symlink("/etc/hostname", folder / "tokenizer.json")),
    # What does not belong.
    "whole-model": ("UnexpectedFile", _beside("model.safetensors", (2).to_bytes(8, "little") + b"{}")),
    "config-of-a-model": ("UnexpectedFile", _beside("config.json")),
    "notes": ("UnexpectedFile", _beside("notes.txt", b"hello")),
    "unlisted-tokenizer": ("UnexpectedFile", _beside("tokenizer.json")),
    "path-that-climbs-out": (
        "UnexpectedFile",
        lambda folder: _manifest(
            folder, lambda raw: raw["files"].update({"../x": raw["files"]["adapter_config.json"]})
        ),  # type: ignore[attr-defined, index]
    ),
    # Not what was packed.
    "flipped-bit": (
        "DigestMismatch",
        lambda folder: (folder / "chat_template.jinja").write_bytes(b"{{ messagez }}"),
    ),
    "another-size": ("DigestMismatch", lambda folder: (folder / "chat_template.jinja").write_bytes(b"{{ x }}")),
    "missing-weights": ("MissingFile", lambda folder: (folder / "adapter_model.safetensors").unlink()),
    "missing-template": ("MissingFile", lambda folder: (folder / "chat_template.jinja").unlink()),
    # Manifests.
    "manifest-not-json": ("InvalidManifest", lambda folder: (folder / "adapterhub.json").write_text("{")),
    "manifest-nested": ("InvalidManifest", lambda folder: (folder / "adapterhub.json").write_text("[" * 100_000)),
    "manifest-of-the-future": ("InvalidManifest", lambda folder: _manifest(folder, lambda raw: raw.update(format=2))),
    "manifest-unknown-key": ("InvalidManifest", lambda folder: _manifest(folder, lambda raw: raw.update(run="rm"))),
    "manifest-missing": ("InvalidManifest", lambda folder: (folder / "adapterhub.json").unlink()),
    # Tensors.
    "header-of-a-tebibyte": (
        "InvalidTensors",
        lambda folder: _weights(folder, (1 << 40).to_bytes(8, "little") + b"{}"),
    ),
    "header-not-json": ("InvalidTensors", lambda folder: _weights(folder, (5).to_bytes(8, "little") + b"{nope")),
    "no-tensors": ("InvalidTensors", lambda folder: _weights(folder, (2).to_bytes(8, "little") + b"{}")),
    "empty-weights": ("InvalidTensors", lambda folder: _weights(folder, b"")),
    "overlap": ("InvalidTensors", _edited(_offsets("lora_B", 512, 1024))),
    "offsets-beyond-the-file": ("InvalidTensors", _edited(_offsets("lora_B", 1024, 1 << 40))),
    "negative-offset": ("InvalidTensors", _edited(_offsets("lora_A", -1024, 0))),
    "astronomic-shape": (
        "InvalidTensors",
        _edited(lambda header: header[f"{_KEY}.lora_A.weight"].update(shape=[2**62, 2**62])),
    ),
    "truncated": (
        "InvalidTensors",
        lambda folder: _weights(folder, (folder / "adapter_model.safetensors").read_bytes()[:-4]),
    ),
    "nan": ("InvalidTensors", lambda folder: _rewrite(folder, _set("lora_A", float("nan")))),
    "infinity": ("InvalidTensors", lambda folder: _rewrite(folder, _set("lora_B", float("-inf")))),
    "rank-of-another": ("InvalidTensors", lambda folder: _config(folder, r=8)),
    "half-a-pair": (
        "InvalidTensors",
        _edited(
            lambda header: header.update({"base_model.model.x.lora_B.weight": header.pop(f"{_KEY}.lora_B.weight")})
        ),
    ),
    # Not a LoRA.
    "whole-weights": (
        "AdapterUnsupported",
        _edited(lambda header: header.update({"base_model.model.lm_head.weight": header.pop(f"{_KEY}.lora_B.weight")})),
    ),
    "another-method": ("AdapterUnsupported", lambda folder: _config(folder, peft_type="IA3")),
    "unloadable-rank": ("AdapterUnsupported", lambda folder: _config(folder, r=-1)),
    "rank-pattern-that-hangs": (
        "AdapterUnsupported",
        lambda folder: _config(folder, rank_pattern={"(a+)+$": 4}),
    ),
}
"""name -> the refusal, and what is done to a sound package"""


def make(name: str, folder: Path) -> Path:
    write_package(folder)
    SAMPLES[name][1](folder)
    return folder


if __name__ == "__main__":
    shutil.rmtree(ATTACKS, ignore_errors=True)
    for sample in SAMPLES:
        make(sample, ATTACKS / sample)
