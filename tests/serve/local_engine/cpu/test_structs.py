"""Every tensor that C is given, in every way it may be wrong: refused by name, before its address is handed over."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adapterhub.bases.nf4 import Nf4Weights
from adapterhub.errors import AdapterUnsupported
from adapterhub.tensor_address import TensorMismatch
from serve.adapters.weights import LowRank
from serve.engine import AdapterScale
from serve.local_engine.cpu.kernels import CpuKernels, load_kernels
from serve.local_engine.cpu.memory import HugePages
from serve.local_engine.cpu.structs import (
    AdapterTable,
    DecoderLayer,
    DecoderLayers,
    Heads,
    SegmentTable,
    Tiles,
    WeightMatrix,
)
from serve.local_engine.lora_layers import LinearGroup
from serve.local_engine.lora_segments import Segments

ROOT = Path(__file__).parents[4]
HEADS = Heads(4, 2, 16, 0, 0.25, 0.0)
LOW = LowRank(torch.randn(4, 32), torch.randn(4, 48), 1.0, torch.rand(48))
TABLE = AdapterTable(((32, 48),), [[(0, LOW)]])
SEGMENTS = SegmentTable([(1, 3, [(TABLE, 1.0)])], num_rows=3)
TILES = Tiles([(0, 2, [1]), (5, 1, [0, 2])], block_size=4)


def _kernels() -> CpuKernels:
    found, choice = load_kernels()
    if found is None:
        pytest.skip(str(choice))
    return found


def _nf4(codes: torch.Tensor, absmax: torch.Tensor, book: torch.Tensor) -> WeightMatrix:
    return WeightMatrix(Nf4Weights(codes, absmax, book, 64, (6, 128)))


def _layers(**changed: torch.Tensor) -> DecoderLayers:
    """One layer of 64 numbers, four heads over two, and an MLP of 32."""
    sizes = ((128, 64), (64, 64), (64, 64), (64, 32))
    qkv, output, gate_up, down = ((WeightMatrix(torch.randn(size)), group) for group, size in enumerate(sizes))
    cache = torch.zeros(2, 2, 12, 16)
    layer = DecoderLayer(
        qkv, output, gate_up, down, *torch.ones(2, 64), *torch.ones(2, 16), cache[0], cache[1], window=0
    )
    return DecoderLayers([replace(layer, **changed)], heads=HEADS, intermediate=32, block_size=4, eps=1e-5)


def _run_layers(hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> None:
    _kernels().run_layers(_layers(), hidden, (cosine, sine), TILES, SegmentTable())


CASES: dict[str, tuple[Callable[..., Any], dict[str, torch.Tensor]]] = {
    "weights": (lambda **given: WeightMatrix(*given.values()), {"weights": torch.randn(6, 32), "bias": torch.randn(6)}),
    "bf16 weights": (lambda **given: WeightMatrix(*given.values()), {"weights": torch.randn(6, 32).bfloat16()}),
    "nf4": (
        _nf4,
        {"codes": torch.zeros(384, dtype=torch.uint8), "absmax": torch.ones(12), "book": torch.ones(16)},
    ),
    "adapter": (
        lambda **given: AdapterTable(((32, 48),), [[(0, replace(LOW, **given))]]),
        {"a": LOW.a, "bt": LOW.bt, "magnitude": torch.rand(48)},
    ),
    "bf16 adapter": (
        lambda **given: AdapterTable(((32, 48),), [[(0, replace(LOW, **given))]]),
        {"a": LOW.a.bfloat16(), "bt": LOW.bt.bfloat16()},
    ),
    "matmul": (lambda x: _kernels().matmul(WeightMatrix(torch.randn(6, 32)), x), {"x": torch.randn(3, 32)}),
    "updates": (
        lambda x, y, bias: _kernels().low_rank_updates(SEGMENTS, 0, x, y, bias=bias),
        {"x": torch.randn(3, 32), "y": torch.randn(3, 48), "bias": torch.randn(48)},
    ),
    "bf16 updates": (
        lambda x, y: _kernels().low_rank_updates(SEGMENTS, 0, x, y),
        {"x": torch.randn(3, 32).bfloat16(), "y": torch.randn(3, 48).bfloat16()},
    ),
    "attention": (
        lambda query, keys, values: _kernels().attention(query, keys, values, TILES, scale=0.25),
        {"query": torch.randn(4, 3, 16), "keys": torch.randn(2, 12, 16), "values": torch.randn(2, 12, 16)},
    ),
    "norm": (
        lambda x, weight: _kernels().rms_norm(x, weight, 1e-5),
        {"x": torch.randn(3, 32), "weight": torch.randn(32)},
    ),
    "bf16 norm": (
        lambda x, weight: _kernels().rms_norm(x, weight, 1e-5),
        {"x": torch.randn(3, 32).bfloat16(), "weight": torch.randn(32).bfloat16()},
    ),
    "layers": (
        _layers,
        {
            "input_norm": torch.ones(64),
            "post_norm": torch.ones(64),
            "query_norm": torch.ones(16),
            "key_norm": torch.ones(16),
            "keys": torch.zeros(2, 12, 16),
            "values": torch.zeros(2, 12, 16),
        },
    ),
    "step": (
        _run_layers,
        {"hidden": torch.randn(3, 64), "cosine": torch.ones(3, 16), "sine": torch.zeros(3, 16)},
    ),
}
"""name -> (what hands tensors to C, tensors that it takes)"""


def _released(tensor: torch.Tensor) -> torch.Tensor:
    copy = tensor.clone()
    copy.untyped_storage().resize_(0)
    return copy


def _at_an_odd_byte(tensor: torch.Tensor) -> torch.Tensor:
    room = bytearray(1 + tensor.nbytes)
    return torch.frombuffer(room, dtype=tensor.dtype, offset=1).view(tensor.shape)


FAULTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "fp16": lambda tensor: tensor.half(),
    "fp64": lambda tensor: tensor.double(),
    "too narrow": lambda tensor: tensor[..., :-1].contiguous(),
    "too few rows": lambda tensor: tensor[:-1].contiguous(),
    "with a dimension more": lambda tensor: tensor[None, None],
    "with gaps": lambda tensor: torch.cat([tensor, tensor], -1)[..., ::2],
    "transposed": lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1),
    "on another device": lambda tensor: tensor.to("meta"),
    "released": _released,
    "at an odd byte": _at_an_odd_byte,
}


@pytest.mark.parametrize("case", CASES)
def test_right_tensors_are_taken(case: str) -> None:
    call, tensors = CASES[case]
    call(**tensors)


ANY_ROWS = {("matmul", "x"), ("norm", "x"), ("bf16 norm", "x"), ("bf16 weights", "weights")}
"""what says by itself how many rows there are"""


def _is_no_fault(case: str, name: str, fault: str, tensor: torch.Tensor) -> bool:
    if fault in ("too few rows", "with a dimension more") and (case, name) in ANY_ROWS:
        return not (case == "bf16 weights" and fault == "with a dimension more")
    return (fault == "transposed" and tensor.dim() == 1) or (fault == "at an odd byte" and tensor.dtype == torch.uint8)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("case", CASES)
def test_a_wrong_tensor_is_refused(case: str, fault: str) -> None:
    call, tensors = CASES[case]
    for name, tensor in tensors.items():
        if not _is_no_fault(case, name, fault, tensor):
            with pytest.raises(
                ValueError, match=r"expected|unpack"
            ):  # a TensorMismatch, or a shape of other dimensions
                call(**{**tensors, name: FAULTS[fault](tensor)})


def test_rows_that_lie_apart_are_taken_and_those_that_overlap_are_not() -> None:
    """As a model gives them: every other row, and queries whose heads are the inner dimension."""
    kernels = _kernels()
    x, y = torch.randn(6, 32)[::2], torch.zeros(3, 96)[:, :48]
    kernels.low_rank_updates(SEGMENTS, 0, x, y)
    with pytest.raises(TensorMismatch, match="rows to update is .* strides"):
        kernels.low_rank_updates(SEGMENTS, 0, x, torch.zeros(48).expand(3, 48))


def test_rows_that_are_not_the_batch_are_refused() -> None:
    with pytest.raises(TensorMismatch, match="rows 1 to 3 .* expected some of rows 0 to 2"):
        SegmentTable([(1, 3, [(TABLE, 1.0)])], num_rows=2)
    with pytest.raises(TensorMismatch, match="rows 1 to 3"):
        SegmentTable([(0, 2, [(TABLE, 1.0)]), (1, 3, [(TABLE, 1.0)])], num_rows=3)
    other = AdapterTable(((32, 64),), [[(0, LOW)]])
    with pytest.raises(TensorMismatch, match="adapters of one model"):
        SegmentTable([(1, 3, [(TABLE, 1.0), (other, 1.0)])], num_rows=3)
    with pytest.raises(TensorMismatch, match="adapters update other layers"):
        rotary = (torch.ones(3, 16), torch.ones(3, 16))
        _kernels().run_layers(_layers(), torch.randn(3, 64), rotary, TILES, SEGMENTS)


@pytest.mark.parametrize(
    "chunks",
    [[(0, 5, [1])], [(4, 1, [2])], [(0, 1, [-1])], [(-1, 1, [0])], [(0, 1, [])]],
    ids=["more rows than blocks", "a token behind its blocks", "no such block", "before the start", "no block"],
)
def test_blocks_that_do_not_hold_the_rows(chunks: list[tuple[int, int, list[int]]]) -> None:
    with pytest.raises(TensorMismatch):
        Tiles(chunks, block_size=4)


def test_blocks_that_the_cache_does_not_have() -> None:
    tiles = Tiles([(0, 1, [3])], block_size=4)
    with pytest.raises(TensorMismatch, match="attend over 16 slots in blocks of 4: expected at most the 12"):
        _kernels().attention(torch.randn(4, 1, 16), *torch.randn(2, 2, 12, 16), tiles, scale=1.0)


@pytest.mark.parametrize(("rank", "offset"), [(0, 0), (1025, 0), (4, 1), (4, -1)])
def test_an_update_of_a_rank_or_at_a_column_that_does_not_exist(rank: int, offset: int) -> None:
    with pytest.raises(TensorMismatch, match="rank"):
        AdapterTable(((32, 48),), [[(offset, LowRank(torch.randn(rank, 32), torch.randn(rank, 48), 1.0))]])


def test_heads_and_widths_that_the_vectors_do_not_divide() -> None:
    with pytest.raises(TensorMismatch, match="multiple of 16"):
        WeightMatrix(torch.randn(4, 24))
    with pytest.raises(TensorMismatch, match="whole blocks of 64"):
        WeightMatrix(Nf4Weights(torch.zeros(48, dtype=torch.uint8), torch.ones(1), torch.ones(16), 64, (1, 96)))
    for heads, dim in ((4, 24), (4, 272), (3, 16)):
        with pytest.raises(TensorMismatch, match="heads of"):
            _kernels().attention(torch.randn(heads, 3, dim), *torch.randn(2, 2, 12, dim), TILES, scale=1.0)


def test_layers_are_called_with_rows_of_any_shape_but_not_with_some_of_them() -> None:
    """As the routers and experts of some bases call theirs."""
    kernels = _kernels()
    segments = Segments()
    group = LinearGroup(0, [nn.Linear(32, 48)], segments, kernels, HugePages())
    group.install("a", 0, LOW)
    tables = {"a": AdapterTable(((32, 48),), [group.updates("a")])}
    segments.set([(1, ()), (2, (AdapterScale("a"),))], tables)
    x = torch.randn(1, 3, 32)
    found = group.output(0, x)
    assert torch.equal(group.output(0, x[0]), found[0])
    assert torch.equal(group.output(0, x[:, :, None]), found[:, :, None])
    with pytest.raises(AdapterUnsupported, match="called on 2 rows of a batch of 3"):
        group.output(0, x[0, :2])
    group.remove("a")
    assert group.output(0, x[0, :2]).shape == (2, 48)  # of no matter to the base


def test_no_rows_at_all() -> None:
    kernels = _kernels()
    assert kernels.matmul(WeightMatrix(torch.randn(6, 32)), torch.empty(1, 0, 32)).shape == (1, 0, 6)
    assert kernels.rms_norm(torch.empty(0, 32), torch.ones(32), 1e-5).shape == (0, 32)
    tiles = Tiles([], block_size=4)
    assert kernels.attention(torch.empty(4, 0, 16), *torch.randn(2, 2, 12, 16), tiles, scale=1.0).shape == (0, 4, 16)
    nobody = SegmentTable([(0, 0, [(TABLE, 1.0)])], num_rows=0)
    kernels.low_rank_updates(nobody, 0, torch.empty(0, 32), torch.empty(0, 48))
    kernels.run_layers(_layers(), torch.empty(0, 64), (torch.empty(0, 16),) * 2, tiles, SegmentTable())


def test_the_structs_keep_alive_what_they_point_to() -> None:
    """Their tensors' memory would else be somebody else's by the time C reads it."""
    kernels = _kernels()
    matrix = WeightMatrix(torch.ones(64, 1024), torch.ones(64))
    table = AdapterTable(((1024, 64),), [[(0, LowRank(torch.ones(4, 1024), torch.ones(4, 64), 1.0, torch.ones(64)))]])
    segments = SegmentTable([(0, 2, [(table, 1.0)])], num_rows=2)
    del table
    others = [torch.full((64, 1024), 9.0) for _ in range(4)]
    y = kernels.matmul(matrix, torch.ones(2, 1024))
    assert torch.equal(y, torch.full((2, 64), 1025.0))
    kernels.low_rank_updates(segments, 0, torch.ones(2, 1024), y, bias=torch.ones(64))
    assert torch.equal(y, torch.full((2, 64), 1025.0 + 4 * 1024))
    assert others


def test_the_address_of_a_tensor_is_asked_for_at_one_place() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for package in ("adapterhub", "serve", "train")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "data_ptr"
    }
    assert users == {"adapterhub/tensor_address.py"}
