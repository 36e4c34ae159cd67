"""bitsandbytes against the published code books and error figures, and what a base loaded with each option holds."""

from __future__ import annotations

import shutil
from typing import Any, get_args

import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import load_file, save_file
from tiny_models import copy_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from adapterhub.adapter import BaseRef, StoredBase
from adapterhub.bases.loading import LoadedBase, load_base
from adapterhub.bases.nf4 import quantized_layers
from adapterhub.bases.quantization import Kind
from adapterhub.errors import UsageError
from adapterhub.memory.estimate import constant_bytes
from adapterhub.package.manifest import Quantization

# QLoRA (arXiv 2305.14314), appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3)
"""twelfths, in bit order; then the negatives"""


@pytest.fixture(scope="module")
def weights() -> torch.Tensor:
    """As large a matrix as a 7B model's, and as small its values."""
    return torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)) * 0.02


def book_of(kind: str) -> list[float]:
    """The values that codes 0 to 15 stand for, as the packed bytes of a block say."""
    codes = torch.arange(16, dtype=torch.uint8)
    packed = (codes[0::2] << 4 | codes[1::2]).repeat(4)  # the first of two in the high half
    state = functional.QuantState(
        torch.ones(1), torch.Size([64]), functional.get_4bit_type(kind, "cpu"), 64, kind, torch.float32
    )
    return functional.dequantize_4bit(packed[:, None], state).flatten()[:16].tolist()  # type: ignore[no-any-return]


def test_nf4_is_the_papers_code_book() -> None:
    assert book_of("nf4") == pytest.approx(NF4, abs=1e-7)


def test_the_code_book_is_made_of_a_normal_distributions_quantiles() -> None:
    """bitsandbytes' recipe; the paper's equation 4 gives other numbers."""
    normal = torch.distributions.Normal(0.0, 1.0)

    def quantiles(count: int) -> list[float]:
        return normal.icdf(torch.linspace(0.9677083, 0.5, count)[:-1]).tolist()  # type: ignore[no-any-return]

    made = sorted([0.0, *quantiles(9), *(-value for value in quantiles(8))])
    assert [value / made[-1] for value in made] == pytest.approx(NF4, abs=1e-6)


def test_fp4_has_the_published_values() -> None:
    wanted = [value / 12 for value in FP4] + [-value / 12 for value in FP4]
    # 1/192 is where bitsandbytes' kernels put the smallest value: one sixteenth of a twelfth.
    assert book_of("fp4") == pytest.approx(wanted, abs=1e-6)


def errors(weights: torch.Tensor, kind: str, **options: Any) -> tuple[float, float]:
    """(root mean square, mean absolute) error, both over the root mean square of the weights."""
    packed, state = functional.quantize_4bit(weights, quant_type=kind, **options)
    off = functional.dequantize_4bit(packed, state) - weights
    scale = weights.square().mean().sqrt()
    return float(off.square().mean().sqrt() / scale), float(off.abs().mean() / scale)


@pytest.mark.parametrize(
    ("kind", "double", "rmse", "mae"),
    [("nf4", False, 0.0920, 0.0728), ("nf4", True, 0.0920, 0.0729), ("fp4", False, 0.1220, 0.0966)],
)
def test_error_of_each_kind(weights: torch.Tensor, kind: str, double: bool, rmse: float, mae: float) -> None:
    assert errors(weights, kind, compress_statistics=double) == pytest.approx((rmse, mae), abs=2e-4)


@pytest.mark.parametrize(
    ("block", "rmse"),
    [(32, 0.0873), (64, 0.0920), (128, 0.0956), (256, 0.0987), (512, 0.1015), (1024, 0.1043), (4096, 0.1100)],
)
def test_error_grows_with_the_block(weights: torch.Tensor, block: int, rmse: float) -> None:
    assert errors(weights, "nf4", blocksize=block, compress_statistics=False)[0] == pytest.approx(rmse, abs=2e-4)


@pytest.mark.parametrize(
    ("double", "bits"), [(False, 4.5), (True, 4.127)], ids=["constants in fp32", "double quantization"]
)
def test_bits_of_a_weight(weights: torch.Tensor, double: bool, bits: float) -> None:
    packed, state = functional.quantize_4bit(weights, quant_type="nf4", compress_statistics=double)
    constants = [state.absmax, state.state2.absmax] if double else [state.absmax]
    held = packed.nbytes + sum(tensor.nbytes for tensor in constants)
    assert 8 * held / weights.numel() == pytest.approx(bits, abs=1e-3)
    assert sum(tensor.nbytes for tensor in constants) == constant_bytes(weights.numel(), is_double=double)


def load(base: StoredBase, **options: Any) -> LoadedBase:
    return load_base(base, purpose="train", dtype="float32", **options)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("block", "double"), [(64, True), (64, False), (32, True), (256, False)])
def test_every_option_reaches_the_layers(tiny_base: StoredBase, kind: Any, block: int, double: bool) -> None:
    base = load(tiny_base, kind=kind, block_size=block, double_quant=double)
    assert base.quantization == Quantization(kind=kind, block_size=block, double_quant=double, compute_dtype="float32")
    layers = quantized_layers(base.model)
    assert len(layers) == 2 * 7
    original = load(tiny_base, kind="none").model
    for name, layer in layers.items():
        state = layer.weight.quant_state
        assert (state.blocksize, state.nested, state.quant_type) == (block, double, kind)
        assert layer.compute_dtype == torch.float32
        found = functional.dequantize_4bit(layer.weight.data, state)
        wanted, its_state = functional.quantize_4bit(
            original.get_submodule(name).weight.data, blocksize=block, compress_statistics=double, quant_type=kind
        )
        assert torch.equal(found, functional.dequantize_4bit(wanted, its_state))


@pytest.fixture(scope="module", params=["float16", "float32", "bfloat16"])
def stored_in(request: pytest.FixtureRequest, tiny_base: StoredBase, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny base, stored in a dtype."""
    folder = shutil.copytree(tiny_base.path, tmp_path_factory.mktemp("stored") / request.param)
    weights = load_file(folder / "model.safetensors")
    dtype = getattr(torch, request.param)
    save_file(
        {name: tensor.to(dtype) for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return StoredBase(folder, tiny_base.ref)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("block", [64, 128])
def test_the_weights_do_not_depend_on_the_dtype_that_computes(stored_in: StoredBase, kind: Any, block: int) -> None:
    """Nor on whether a weight was cast, without loss, before it was quantized: packages of earlier versions hold."""
    found = []
    originals = load(stored_in, kind="none").model
    for dtype in ("float16", "bfloat16", "float32"):
        model = load_base(stored_in, purpose="train", dtype=dtype, kind=kind, block_size=block).model
        parts = {name: values_of(model.get_submodule(name)) for name in LAYERS}
        found.append({(name, part): value.clone() for name in parts for part, value in parts[name].items()})
        assert {str(p.dtype) for p in model.parameters() if p.is_floating_point()} == {f"torch.{dtype}"}
        assert model.dtype == getattr(torch, dtype)
        assert "_get_dtype_plan" not in vars(model)
    assert all(torch.equal(value, other[key]) for other in found[1:] for key, value in found[0].items())
    if kind != "int8":
        for name in LAYERS:
            codes, _ = functional.quantize_4bit(
                originals.get_submodule(name).weight.data, quant_type=kind, blocksize=block, compress_statistics=True
            )
            assert torch.equal(codes, found[0][name, "codes"])


LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


def values_of(layer: Any) -> dict[str, torch.Tensor]:
    """Codes and constants of a quantized layer."""
    if layer.weight.dtype == torch.int8:
        return {"codes": layer.weight.data, "constants": layer.weight.SCB}
    state = layer.weight.quant_state
    assert state.dtype == layer.compute_dtype
    return {"codes": layer.weight.data, "constants": state.absmax, "offset": state.offset}


def test_int8_answers_and_learns_on_this_machine(tiny_base: StoredBase) -> None:
    """LLM.int8's forward and the gradient to its input, against the weights it was made of."""
    whole, eight = (load(tiny_base, kind=kind).model.model.layers[0].mlp.up_proj for kind in ("none", "int8"))
    assert eight.weight.dtype == torch.int8
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for of in (lambda y: y, lambda y: torch.autograd.grad(y.square().sum(), x)[0]):
        found, wanted = of(eight(x)).detach(), of(whole(x)).detach()
        assert float((found - wanted).norm() / wanted.norm()) < 0.03


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (Quantization(), "nf4"),
        (Quantization(kind="fp4", block_size=128), "fp4, blocks of 128"),
        (Quantization(double_quant=False), "nf4, constants in fp32"),
        (Quantization(kind="int8"), "int8"),
        (Quantization(kind="none"), "bfloat16"),
    ],
)
def test_weights_are_named_by_what_they_are(held: Quantization, words: str) -> None:
    assert held.weights == words


CHECKPOINTS: dict[str, tuple[dict[str, Any], Quantization]] = {
    "fp4, one quantization": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": "bfloat16"},
        Quantization(kind="fp4", double_quant=False, compute_dtype="float32"),
    ),
    "nf4, one quantization": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        Quantization(kind="nf4", double_quant=False, compute_dtype="float32"),
    ),
    "nf4, double": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        Quantization(kind="nf4", compute_dtype="float32"),
    ),
    "int8": ({"load_in_8bit": True}, Quantization(kind="int8", compute_dtype="float32")),
}  # fmt: skip
"""What bitsandbytes checkpoints are saved with -> what is recorded of them."""


@pytest.fixture(params=CHECKPOINTS, scope="module")
def checkpoint(
    request: pytest.FixtureRequest, tiny_base: StoredBase, tmp_path_factory: pytest.TempPathFactory
) -> tuple[StoredBase, Quantization]:
    options, recorded = CHECKPOINTS[request.param]
    folder = tmp_path_factory.mktemp("checkpoint")
    model = AutoModelForCausalLM.from_pretrained(
        tiny_base.path, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**options)
    )
    model.save_pretrained(folder)
    copy_tokenizer(tiny_base.path, folder)
    return StoredBase(folder, BaseRef("tests/checkpoint", None, None)), recorded


def test_a_quantized_checkpoint_is_recorded_as_it_is(checkpoint: tuple[StoredBase, Quantization]) -> None:
    stored, recorded = checkpoint
    base = load(stored)
    assert base.quantization == recorded
    assert base.quantization == load(stored, kind=recorded.kind, double_quant=True, block_size=128).quantization
    assert {layer.compute_dtype for layer in quantized_layers(base.model).values()} <= {torch.float32}
    reference = AutoModelForCausalLM.from_pretrained(stored.path, dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        difference = base.model(ids).logits.float() - reference(ids).logits.float()
    assert difference.abs().max() < 0.05 * reference(ids).logits.abs().max()


@pytest.mark.parametrize("kind", get_args(Kind))
def test_another_kind_than_the_checkpoint_has_is_refused(
    checkpoint: tuple[StoredBase, Quantization], kind: Kind
) -> None:
    stored, recorded = checkpoint
    if kind != recorded.kind:
        with pytest.raises(UsageError, match=f"quantized as {recorded.kind} and {kind} was asked for"):
            load(stored, kind=kind)
