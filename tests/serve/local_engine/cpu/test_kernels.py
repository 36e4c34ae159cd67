"""Our C kernels and the direct NF4 call against torch, PEFT's formula and bitsandbytes' own layer."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from adapterhub.bases.nf4 import Nf4Weights, PackedNf4, dense_weight
from serve.adapters.weights import LowRank
from serve.local_engine.cpu import build as kernel_build
from serve.local_engine.cpu.kernels import CpuKernels, load_kernels
from serve.local_engine.cpu.memory import HugePages
from serve.local_engine.cpu.rms_norm import FastRmsNorm, use_fast_norms
from serve.local_engine.cpu.structs import AdapterTable, SegmentTable, Tiles, WeightMatrix

DTYPES = (torch.float32, torch.bfloat16)
_LEVELS = kernel_build.LEVELS.get(platform.machine(), {})


@pytest.fixture(scope="session", params=_LEVELS or ["this processor"])
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    """Compiled for every instruction set that csrc/ knows of here, and run for those that this machine has."""
    try:
        library, _ = kernel_build.build([_LEVELS[request.param]] if _LEVELS else kernel_build.NATIVE)
    except kernel_build.BuildFailed as error:
        pytest.skip(str(error))
    found = CpuKernels(library)
    if not _LEVELS:
        return found
    assert found.vectors == request.param
    if not kernel_build.can_run(request.param):
        pytest.skip(f"compiled, and this processor has no {request.param} to run it")
    return found


def _segments(plan: list[tuple[int, int, list[tuple[int, float, LowRank]]]], rows: int) -> SegmentTable:
    """Of (start, end, [(first column, scale, update)]), on rows of 50 numbers from 48."""
    return SegmentTable(
        [(start, end, [(_table(offset, low), scale) for offset, scale, low in mix]) for start, end, mix in plan],
        num_rows=rows,
    )


_WIDTHS = ((48, 50),)


def _table(offset: int, low: LowRank) -> AdapterTable:
    return AdapterTable(_WIDTHS, [[(offset, low)]])


def _low_rank(rank: int, dtype: torch.dtype, bt_dtype: torch.dtype, *, is_dora: bool) -> LowRank:
    a, bt = torch.randn(rank, 48).to(dtype) / 6, torch.randn(rank, 30).to(bt_dtype)
    return LowRank(a, bt, 0.7, torch.rand(30) + 0.5 if is_dora else None)


def _updated(x: torch.Tensor, before: torch.Tensor, low: LowRank, scale: float) -> torch.Tensor:
    """Compute what one update adds to W x, by the formula."""
    found = low.scaling * (x.float() @ low.a.float().T) @ low.bt.float()
    if low.magnitude is not None:
        found = low.magnitude * found + (low.magnitude - 1) * before
    return scale * found


@pytest.mark.parametrize("is_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 3, 4, 8, 17])
def test_low_rank_updates_are_the_formula_and_touch_nothing_else(
    kernels: CpuKernels, dtype: torch.dtype, rank: int, is_dora: bool
) -> None:
    torch.manual_seed(rank)
    x, y, bias = torch.randn(20, 48).to(dtype), torch.randn(20, 50).to(dtype), torch.randn(50)
    halves = [(dtype, dtype), DTYPES, DTYPES[::-1]]
    lows = [_low_rank(rank, *dtypes, is_dora=is_dora) for dtypes in halves]
    # rows 2-4: one adapter; 5-14: two adapters on the same columns, chained; the rest is the bare base
    plan = [(2, 5, [(0, 0.5, lows[0])]), (5, 15, [(20, 1.0, lows[1]), (20, -0.25, lows[2])])]
    expected, before = y.float().clone(), y.float() - bias
    for start, end, mix in plan:
        for offset, scale, low in mix:
            columns = slice(offset, offset + 30)
            expected[start:end, columns] += _updated(x[start:end], before[start:end, columns], low, scale)
    original = y.clone()
    kernels.low_rank_updates(_segments(plan, 20), 0, x, y, bias=bias)
    torch.testing.assert_close(y.float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
    for rows, columns in ((slice(0, 2), slice(50)), (slice(15, 20), slice(50)), (slice(2, 5), slice(30, 50))):
        assert torch.equal(y[rows, columns], original[rows, columns])
    assert torch.equal(y[5:15, :20], original[5:15, :20])


@pytest.mark.parametrize("kind", ["nf4", "bf16", "fp32"])
@pytest.mark.parametrize("out_features", [64, 70])
def test_a_matrix_product_is_torchs_and_the_same_bits_in_any_company(
    kernels: CpuKernels, kind: str, out_features: int
) -> None:
    torch.manual_seed(0)
    x, bias = torch.randn(101, 832), torch.randn(out_features)
    if kind == "nf4":
        layer = _nf4(832, out_features, compute=torch.float32)
        dense = layer(torch.eye(832)).T.contiguous()
        matrix = WeightMatrix(Nf4Weights.join([layer], keep=HugePages().keep), bias)
    else:
        weight = torch.randn(out_features, 832).to(torch.bfloat16 if kind == "bf16" else torch.float32)
        dense, matrix = weight.float(), WeightMatrix(weight, bias)
    found = kernels.matmul(matrix, x)
    torch.testing.assert_close(found, x @ dense.T + bias, rtol=1e-4, atol=1e-4)
    for rows in (slice(0, 1), slice(7, 9), slice(40, 43), slice(50, 101)):
        assert torch.equal(kernels.matmul(matrix, x[rows].contiguous()), found[rows])


def test_nf4_weights_are_bitsandbytes_to_the_bit(kernels: CpuKernels) -> None:
    from bitsandbytes.functional import dequantize_4bit

    layers = [_nf4(128, width, compute=torch.float32) for width in (64, 96)]
    theirs = torch.cat([dequantize_4bit(layer.weight.data, layer.weight.quant_state) for layer in layers]).float()
    joined = WeightMatrix(Nf4Weights.join(layers, keep=HugePages().keep))
    assert torch.equal(kernels.matmul(joined, torch.eye(128)).T, theirs)
    rows = torch.randn(3, 128)
    torch.testing.assert_close(torch.cat([layer(rows) for layer in layers], -1), rows @ theirs.T)  # they work alone


@pytest.mark.parametrize("block", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_nf4_blocks_of_any_size_have_their_own_constants(kernels: CpuKernels, block: int) -> None:
    """By every path: one row, a few, so many that weights are unpacked by panels, which may begin inside a block."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(block)
    width = max(1536, 3 * block)
    # Neighbouring blocks differ a thousandfold, so that another's constant cannot pass for rounding.
    weights = torch.randn(6, width) * 10.0 ** torch.randint(-2, 2, (6, width // 32)).repeat_interleave(32, 1)
    codes, state = quantize_4bit(weights, blocksize=block, quant_type="nf4")
    dense = dequantize_4bit(codes, state)
    matrix = WeightMatrix(Nf4Weights(codes.flatten(), state.absmax, state.code, block, (6, width)))
    x = torch.randn(50, width)
    expected = x.double() @ dense.double().T
    found = kernels.matmul(matrix, x)
    scale = (x.double().abs() @ dense.double().abs().T).max()
    torch.testing.assert_close(found.double() / scale, expected / scale, rtol=0, atol=1e-6)
    for rows in (1, 2, 4, 7):
        assert torch.equal(kernels.matmul(matrix, x[:rows]), found[:rows])


def _attended(
    kernels: CpuKernels,
    query: torch.Tensor,
    past: torch.Tensor,
    chunks: list[tuple[int, int, list[int]]],
    **options: Any,
) -> torch.Tensor:
    return kernels.attention(query, *past, Tiles(chunks, block_size=4), scale=0.3, **options)


@pytest.mark.parametrize("dim", [16, 64, 80, 128])
@pytest.mark.parametrize("window", [0, 5])
def test_attention_of_mixed_chunks_is_torchs(kernels: CpuKernels, dim: int, window: int) -> None:
    torch.manual_seed(0)
    heads, kv_heads = 6, 2
    past = torch.randn(2, kv_heads, 4 * 60, dim)
    blocks = torch.randperm(60).tolist()
    # a prompt's first chunk, a later chunk over more than one run of 64 keys, two decoding rows
    chunks = [(0, 7, blocks[:2]), (90, 11, blocks[2:28]), (0, 1, blocks[28:29]), (70, 1, blocks[30:48])]
    rows = sum(count for _, count, _ in chunks)
    query = torch.randn(1, rows, heads, dim).transpose(1, 2)[0]  # strided, as a model gives it
    found = _attended(kernels, query, past, chunks, window=window)
    row = 0
    for start, count, mine in chunks:
        slots = torch.tensor([mine[t // 4] * 4 + t % 4 for t in range(start + count)])
        at, to = torch.arange(start, start + count)[:, None], torch.arange(start + count)[None]
        mask = (to <= at) & (to > at - window if window else to >= 0)
        keys, values = past[:, None, :, slots]
        expected = scaled_dot_product_attention(
            query[None, :, row : row + count], keys, values, attn_mask=mask, scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(found[row : row + count].transpose(0, 1), expected[0], rtol=1e-4, atol=1e-5)
        row += count


def test_attention_is_the_same_bits_in_one_chunk_and_in_many(kernels: CpuKernels) -> None:
    torch.manual_seed(0)
    past, blocks = torch.randn(2, 3, 4 * 40, 64), torch.randperm(40).tolist()
    query = torch.randn(9, 130, 64)
    whole = _attended(kernels, query, past, [(0, 130, blocks)], window=0)
    for start, end in ((0, 1), (1, 64), (64, 65), (65, 130)):
        chunk = _attended(kernels, query[:, start:end].contiguous(), past, [(start, end - start, blocks)])
        assert torch.equal(chunk, whole[start:end])


def test_attention_survives_large_and_equal_scores(kernels: CpuKernels) -> None:
    keys, values = torch.full((1, 4, 16), 100.0), torch.arange(4.0)[None, :, None].expand(1, 4, 16).contiguous()
    query = torch.full((1, 1, 16), 100.0)
    for length, mean in ((1, 0.0), (2, 0.5), (4, 1.5)):
        found = _attended(kernels, query, torch.stack([keys, values]), [(length - 1, 1, [0])])
        torch.testing.assert_close(found, torch.full_like(found, mean))


def test_nan_is_kept_and_stays_in_its_row(kernels: CpuKernels) -> None:
    past, chunks = torch.randn(2, 2, 8, 16), [(2, 1, [0]), (1, 1, [1])]
    query = torch.randn(4, 2, 16)
    right = _attended(kernels, query, past, chunks)
    query[:, 0], past[:, :, :4] = float("nan"), float("nan")
    found = _attended(kernels, query, past, chunks)
    assert found[0].isnan().all()
    assert torch.equal(found[1], right[1])
    for bits in (0x7FC00000, 0x7FFFFFFF, -1):  # whatever the other bits of a NaN are
        x = torch.full((2, 16), bits, dtype=torch.int32).view(torch.float32)
        x[1] = 1.0
        y = x.bfloat16()
        table = AdapterTable(((16, 16),), [[(0, LowRank(torch.ones(1, 16), torch.ones(1, 16), 1.0))]])
        kernels.low_rank_updates(SegmentTable([(0, 2, [(table, 1.0)])], num_rows=2), 0, x.bfloat16(), y)
        assert y[0].isnan().all()
        assert torch.equal(y[1], torch.full((16,), 17.0).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_llama_norm_is_replaced_with_the_same_numbers(kernels: CpuKernels, dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    model = nn.Sequential(LlamaRMSNorm(96)).to(dtype)
    nn.init.normal_(model[0].weight)
    original = model[0]
    use_fast_norms(model, kernels)
    assert isinstance(model[0], FastRmsNorm)
    x = torch.randn(2, 5, 96).to(dtype)
    torch.testing.assert_close(model(x), original(x), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


def test_a_norm_with_other_numbers_stays(kernels: CpuKernels) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(32))
            self.variance_epsilon = 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)

    model = nn.Sequential(Shifted())
    use_fast_norms(model, kernels)
    assert isinstance(model[0], Shifted)


def _nf4(in_features: int, out_features: int, *, bias: bool = False, compute: torch.dtype = torch.bfloat16) -> Any:
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(in_features, out_features, bias=bias, compute_dtype=compute, quant_type="nf4")
    layer.load_state_dict(nn.Linear(in_features, out_features, bias=bias).state_dict())
    layer = layer.to(compute).to("cpu").eval().requires_grad_(False)
    if compute != torch.bfloat16:
        layer.support_avx512bf16_for_cpu = False  # that kernel computes in bf16
    return layer


@pytest.mark.parametrize("bias", [False, True])
def test_joined_nf4_layers_give_exactly_what_bitsandbytes_gives_each(bias: bool) -> None:
    torch.manual_seed(0)
    layers = [_nf4(128, width, bias=bias) for width in (64, 32, 96)]
    if not layers[0].support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512-BF16, so there is no packed kernel")
    rows = torch.randn(1, 5, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = torch.cat([layer(rows) for layer in layers], dim=-1)
        assert PackedNf4.can_pack(layers)
        joined = PackedNf4(layers)
        assert torch.equal(joined(rows), expected)
        assert torch.equal(torch.cat([layer(rows) for layer in layers], dim=-1), expected)  # they still work alone


def test_layers_that_cannot_be_joined_are_not() -> None:
    assert not PackedNf4.can_pack([nn.Linear(64, 64)])
    assert not PackedNf4.can_pack([_nf4(128, 64), _nf4(64, 64)])
    assert not PackedNf4.can_pack([_nf4(64, 64), _nf4(64, 64, bias=True)])


def test_without_a_compiler_torch_does_the_work_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_build.shutil, "which", lambda name: None)
    found, choice = load_kernels.__wrapped__()
    assert found is None
    assert "no C compiler" in str(choice)


def test_a_failed_compiler_is_reported(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setattr(kernel_build, "_FLAGS", ("-fno-such-flag",))
    found, choice = load_kernels.__wrapped__()
    assert found is None
    assert "failed" in str(choice)
    assert list((home / "kernels").iterdir()) == []


def test_the_weight_of_a_layer_held_in_less_than_its_bias() -> None:
    """As an unquantized Qwen2's, which lose nothing in bf16."""
    layer = nn.Linear(32, 16)
    layer.weight.data = layer.weight.data.bfloat16()
    assert torch.equal(dense_weight(layer), layer.weight.data.float())
