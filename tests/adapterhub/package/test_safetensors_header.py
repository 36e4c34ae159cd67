from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from adapterhub.errors import InvalidTensors
from adapterhub.package.safetensors_header import read_header


def _write(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def test_a_real_file_reads_as_the_library_wrote_it(tmp_path: Path) -> None:
    tensors = {"a": np.zeros((2, 3), "float32"), "b": np.ones((5,), "int8"), "empty": np.zeros((0, 4), "float16")}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert {name: info.shape for name, info in header.items()} == {k: v.shape for k, v in tensors.items()}
    assert header["a"].size_bytes == 24


def _tensor(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


BAD: dict[str, tuple[object, bytes]] = {
    "header is a list": ([], b""),
    "header is not JSON": (b"{nope", b""),
    "header is nested beyond reason": (b"[" * 100_000, b""),
    "tensor is a number": ({"a": 1}, b""),
    "shape is missing": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"\0" * 4),
    "dtype is unknown": ({"a": _tensor([1], 0, 4, "F31")}, b"\0" * 4),
    "dtype is a list": ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "shape is negative": ({"a": _tensor([-1], 0, 4)}, b"\0" * 4),
    "shape is true": ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"\0" * 4),
    "size does not match shape": ({"a": _tensor([2], 0, 4)}, b"\0" * 4),
    "shape is astronomically large": ({"a": _tensor([2**62, 2**62], 0, 4)}, b"\0" * 4),
    "end lies before start": ({"a": _tensor([1], 4, 0)}, b"\0" * 4),
    "data lies beyond the file": ({"a": _tensor([1], 0, 4)}, b"\0" * 3),
    "tensors overlap": ({"a": _tensor([2], 0, 8), "b": _tensor([1], 4, 8)}, b"\0" * 8),
    "a gap between tensors": ({"a": _tensor([1], 0, 4), "b": _tensor([1], 8, 12)}, b"\0" * 12),
    "bytes nobody owns at the end": ({"a": _tensor([1], 0, 4)}, b"\0" * 8),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_header_is_refused(case: str, tmp_path: Path) -> None:
    header, data = BAD[case]
    with pytest.raises(InvalidTensors, match="damaged"):
        read_header(_write(tmp_path / "x.safetensors", header, data))


@pytest.mark.parametrize("length", [2**63 - 1, 1 << 40, 200])
def test_a_header_length_beyond_the_file_allocates_nothing(length: int, tmp_path: Path) -> None:
    with pytest.raises(InvalidTensors, match="header claims"):
        read_header(_write(tmp_path / "x.safetensors", {}, length=length))


@settings(deadline=None)
@given(data=st.binary(max_size=400))
def test_any_bytes_are_refused_or_read(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(data)
    try:
        read_header(path)
    except InvalidTensors as error:
        assert "\n" not in str(error)
