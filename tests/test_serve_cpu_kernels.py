"""Our C kernels and the direct NF4 call against torch, PEFT's formula and bitsandbytes' own layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from adapterhub.base_model import PackedNf4
from serve import cpu_kernels
from serve.cpu_kernels import CpuKernels, Update, load_kernels
from serve.norms import FastRmsNorm, use_fast_norms

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def kernels() -> CpuKernels:
    found, choice = load_kernels()
    if found is None:
        pytest.skip(str(choice))
    return found


def _struct(rows: tuple[int, int], offset: int, scale: float, chain: int, a: torch.Tensor, bt: torch.Tensor) -> Update:
    return Update(*rows, bt.shape[0], bt.shape[1], offset, chain, scale, a.data_ptr(), bt.data_ptr())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 3, 4, 8, 17])
def test_low_rank_updates_are_the_formula_and_touch_nothing_else(
    kernels: CpuKernels, dtype: torch.dtype, rank: int
) -> None:
    torch.manual_seed(rank)
    x = torch.randn(9, 40).to(dtype)
    y = torch.randn(9, 50).to(dtype)
    parts = [(torch.randn(rank, 40).to(dtype) / 6, torch.randn(rank, 30).to(dtype)) for _ in range(3)]
    # rows 2-4: one adapter; rows 5-6: two adapters on the same columns, chained; the rest is the bare base
    plan = [((2, 5), 0, 0.5, 1, 0), ((5, 7), 20, 1.0, 2, 1), ((5, 7), 20, -0.25, 0, 2)]
    expected = y.float().clone()
    for (start, end), offset, scale, _, which in plan:
        a, bt = (part.float() for part in parts[which])
        expected[start:end, offset : offset + 30] += scale * (x[start:end].float() @ a.T) @ bt
    structs = [_struct(rows, offset, scale, chain, *parts[which]) for rows, offset, scale, chain, which in plan]
    before = y.clone()
    kernels.low_rank_updates(x, y, (Update * 3)(*structs), dtype)
    torch.testing.assert_close(y.float(), expected, rtol=1e-5, atol=1e-4 if dtype == torch.float32 else 5e-2)
    for untouched in (slice(0, 2), slice(7, 9)):
        assert torch.equal(y[untouched], before[untouched])
    assert torch.equal(y[2:5, 30:], before[2:5, 30:])
    assert torch.equal(y[5:7, :20], before[5:7, :20])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 64, 80, 128])
@pytest.mark.parametrize("window", [0, 5])
def test_decode_attention_is_torchs(kernels: CpuKernels, dtype: torch.dtype, dim: int, window: int) -> None:
    torch.manual_seed(0)
    heads, kv_heads, num_slots, lengths = 6, 2, 64, [1, 7, 33]
    query = torch.randn(1, 5, heads, dim).to(dtype).transpose(1, 2)[0]  # strided, as a model gives it
    keys, values = torch.randn(2, kv_heads, num_slots, dim)
    slots = torch.stack([torch.randperm(num_slots)[:33] for _ in lengths])
    rows = torch.tensor([4, 0, 2])
    out = torch.full((5, heads, dim), 7.0, dtype=dtype)
    kernels.decode_attention(
        query, rows, keys, values, slots, torch.tensor(lengths), out, scale=0.3, window=window, softcap=0.0
    )
    for row, length, mine in zip(rows, lengths, slots, strict=True):
        seen = mine[:length][-window:] if window else mine[:length]
        expected = scaled_dot_product_attention(
            query[None, :, row : row + 1].float(),
            keys[None, :, seen],
            values[None, :, seen],
            scale=0.3,
            enable_gqa=True,
        )[0, :, 0]
        torch.testing.assert_close(out[row].float(), expected, rtol=1e-5, atol=2e-6 if dtype == torch.float32 else 1e-2)
    assert bool((out[[1, 3]] == 7).all())


def test_decode_attention_survives_large_and_equal_scores(kernels: CpuKernels) -> None:
    keys, values = torch.full((1, 4, 16), 100.0), torch.arange(4.0)[None, :, None].expand(1, 4, 16).contiguous()
    out = torch.empty(1, 1, 16)
    rows, slots = torch.tensor([0]), torch.arange(4)[None]
    query = torch.full((1, 1, 16), 100.0)
    for length, mean in ((1, 0.0), (2, 0.5), (4, 1.5)):
        kernels.decode_attention(
            query, rows, keys, values, slots, torch.tensor([length]), out, scale=1.0, window=0, softcap=0.0
        )
        torch.testing.assert_close(out, torch.full_like(out, mean))


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


def _nf4(in_features: int, out_features: int, *, bias: bool = False) -> Any:
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(in_features, out_features, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.load_state_dict(nn.Linear(in_features, out_features, bias=bias).state_dict())
    return layer.to(torch.bfloat16).to("cpu").eval().requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
def test_joined_nf4_layers_give_exactly_what_bitsandbytes_gives_each(bias: bool) -> None:
    torch.manual_seed(0)
    layers = [_nf4(128, width, bias=bias) for width in (64, 32, 96)]
    if not layers[0].support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512-BF16, so there is no packed kernel")
    rows = torch.randn(1, 5, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = torch.cat([layer(rows) for layer in layers], dim=-1)
        assert PackedNf4.fits(layers)
        joined = PackedNf4(layers)
        assert torch.equal(joined(rows), expected)
        assert torch.equal(torch.cat([layer(rows) for layer in layers], dim=-1), expected)  # they still work alone


def test_layers_that_cannot_be_joined_are_not() -> None:
    assert not PackedNf4.fits([nn.Linear(64, 64)])
    assert not PackedNf4.fits([_nf4(128, 64), _nf4(64, 64)])
    assert not PackedNf4.fits([_nf4(64, 64), _nf4(64, 64, bias=True)])


def test_without_a_compiler_torch_does_the_work_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels.shutil, "which", lambda name: None)
    found, choice = load_kernels.__wrapped__()
    assert found is None
    assert "no C compiler" in str(choice)


def test_a_compiler_that_fails_is_said(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setattr(cpu_kernels, "_FLAGS", ("-fno-such-flag",))
    found, choice = load_kernels.__wrapped__()
    assert found is None
    assert "failed" in str(choice)
    assert list((home / "kernels").iterdir()) == []
