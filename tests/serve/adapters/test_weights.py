"""An adapter's tensors as they come out of its file: the same numbers whatever its kind, or a refusal by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from packages import write_package
from safetensors.torch import save_file

from adapterhub.adapter import Adapter
from adapterhub.errors import InvalidTensors
from adapterhub.package.manifest import read_manifest
from serve.adapters.weights import LowRank, kept_bytes, read_weights

KEY = "base_model.model.model.layers.0.self_attn.q_proj"


def _on_a_cpu(stored: torch.dtype) -> torch.dtype:
    """Return the dtype that the engine stores on a CPU."""
    return stored if stored == torch.bfloat16 else torch.float32


def _read(folder: Path, tensors: dict[str, torch.Tensor]) -> LowRank:
    write_package(folder)
    save_file(tensors, folder / "adapter_model.safetensors")
    adapter = Adapter(folder, read_manifest(folder))
    weights = read_weights(adapter, device=torch.device("cpu"), dtype_of=_on_a_cpu, max_rank=64)
    (change,) = weights.values()
    assert isinstance(change, LowRank)
    return change


def _halves(first: torch.dtype, second: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"{KEY}.lora_A.weight": torch.randn(4, 32).to(first), f"{KEY}.lora_B.weight": torch.randn(32, 4).to(second)}


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("second", [torch.float32, torch.bfloat16])
def test_halves_of_any_kind_keep_their_numbers(tmp_path: Path, first: torch.dtype, second: torch.dtype) -> None:
    tensors = _halves(first, second)
    change = _read(tmp_path / "p", tensors)
    assert change.a.dtype == (first if first == torch.bfloat16 else torch.float32)
    assert torch.equal(change.a, tensors[f"{KEY}.lora_A.weight"].to(change.a.dtype))
    assert torch.equal(change.bt, tensors[f"{KEY}.lora_B.weight"].T.to(change.bt.dtype))


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("second", [torch.bfloat16, torch.float16])
def test_bytes_are_counted_as_they_are_kept(tmp_path: Path, first: torch.dtype, second: torch.dtype) -> None:
    change = _read(tmp_path / "p", _halves(first, second))
    adapter = Adapter(tmp_path / "p", read_manifest(tmp_path / "p"))
    assert kept_bytes(adapter, dtype_of=_on_a_cpu) == change.a.nbytes + change.bt.nbytes


def test_bytes_of_a_magnitude_are_counted_in_fp32(tmp_path: Path) -> None:
    tensors = _halves(torch.bfloat16, torch.bfloat16)
    write_package(tmp_path / "p")
    save_file(
        {**tensors, f"{KEY}.lora_magnitude_vector": torch.ones(32, dtype=torch.bfloat16)},
        tmp_path / "p" / "adapter_model.safetensors",
    )
    adapter = Adapter(tmp_path / "p", read_manifest(tmp_path / "p"))
    assert kept_bytes(adapter, dtype_of=_on_a_cpu) == (4 * 32 + 32 * 4) * 2 + 32 * 4


def test_bytes_of_a_file_that_is_gone_are_those_of_its_manifest(tmp_path: Path) -> None:
    write_package(tmp_path / "p")
    adapter = Adapter(tmp_path / "p", read_manifest(tmp_path / "p"))
    (tmp_path / "p" / "adapter_model.safetensors").unlink()
    assert kept_bytes(adapter, dtype_of=_on_a_cpu) == adapter.manifest.files["adapter_model.safetensors"].size


def test_tensors_that_begin_at_odd_bytes_are_read(tmp_path: Path) -> None:
    tensors = _halves(torch.float32, torch.float32)
    _read(tmp_path / "p", tensors)
    path = tmp_path / "p" / "adapter_model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.dumps(json.loads(whole[8 : 8 + length])).encode()
    header += b" " * (1 + len(header) % 2)
    path.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :])
    assert len(header) % 4
    adapter = Adapter(tmp_path / "p", read_manifest(tmp_path / "p"))
    weights = read_weights(adapter, device=torch.device("cpu"), dtype_of=lambda stored: stored, max_rank=64)
    (change,) = weights.values()
    assert isinstance(change, LowRank)
    assert torch.equal(change.a, tensors[f"{KEY}.lora_A.weight"])


@pytest.mark.parametrize("second", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_one_value_that_is_nan_or_inf(tmp_path: Path, second: torch.dtype, value: float) -> None:
    tensors = _halves(torch.float32, second)
    tensors[f"{KEY}.lora_B.weight"][-1, -1] = value
    with pytest.raises(InvalidTensors, match=r"q_proj\.lora_B\.weight has NaN or Inf"):
        _read(tmp_path / "p", tensors)


def test_large_numbers_whose_sum_is_none_are_numbers(tmp_path: Path) -> None:
    tensors = _halves(torch.float32, torch.float32)
    tensors[f"{KEY}.lora_A.weight"][:] = torch.finfo(torch.float32).max
    assert torch.equal(_read(tmp_path / "p", tensors).a, tensors[f"{KEY}.lora_A.weight"])


def test_whole_numbers_are_no_update(tmp_path: Path) -> None:
    tensors = _halves(torch.float32, torch.float32)
    tensors[f"{KEY}.lora_A.weight"] = torch.ones(4, 32, dtype=torch.int8)
    with pytest.raises(
        InvalidTensors, match=r"q_proj\.lora_A\.weight has dtype I8: expected one of F16, BF16, F32, F64"
    ):
        _read(tmp_path / "p", tensors)
