"""Every method on a tiny base: its trained, reloaded and served logits are the same."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_methods import CPU, layers_of, load_fp32, logits, recipe_of
from engine_runs import PROMPTS, greedy, running, tokens_of, unverified
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from stopped_runs import StopAfter
from training import WEIGHTS, run, tensors_of
from transformers import Trainer

from adapterhub.adapter import BaseRef, StoredBase
from adapterhub.bases.loading import LoadedBase, load_base
from adapterhub.errors import AdapterUnsupported, TrainingStopped, UsageError
from adapterhub.files import sha256_of
from adapterhub.package.run_record import LOG_NAME, RunStep, read_run_events, read_run_record
from adapterhub.packer import pack as pack_folder
from serve.config import LocalEngineConfig
from serve.engine import AdapterScale, GenerationRequest, SamplingParams
from train import trainer
from train.data.packing import pack
from train.data.tokenization import Sample
from train.loop.optimizer import make_optimizer, set_learning_rate, undecayed_parameters
from train.loop.progress import Silent
from train.loop.run_folder import run_path
from train.model.lora import add_lora, lora_b_parameters, trainable
from train.model.methods import adapter_disabled, attach
from train.objectives.forward import token_losses
from train.recipe import LoraSection, Recipe, TrainSection
from train.trainer import resume
from train.worker import run_worker

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]

SERVED: dict[str, dict[str, Any]] = {
    "lora": {},
    "attention": {"lora": {"targets": "attention"}},
    "mlp": {"lora": {"targets": "mlp"}},
    "embeddings and head": {"lora": {"targets": ["all-linear", "embeddings", "head"]}},
    "rslora": {"lora": {"method": "rslora"}},
    "dora": {"lora": {"method": "dora"}},
    "pissa": {"lora": {"init": "pissa"}},
    "pissa and rslora": {"lora": {"init": "pissa", "method": "rslora"}},
    "loftq": {"lora": {"init": "loftq"}},
    "eva": {"lora": {"init": "eva"}},
    "lora+": {"train": {"lora_plus_ratio": 16.0}},
    "neftune": {"train": {"neftune_alpha": 5.0}},
    "head": {"method": "head"},
}
SOFT = ("prompt", "prefix")


def trained(recipe: Recipe, base: StoredBase, output: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the model in memory, as the run that wrote `output` left it."""
    kept: list[Any] = []

    def put(*args: Any) -> Any:
        kept.append(attach(*args))
        return kept[0]

    monkeypatch.setattr(trainer, "attach", put)
    run(recipe, base, output)
    return kept[0].eval()


def served(loaded: LoadedBase, folder: Path | None) -> tuple[list[list[int]], list[dict[int, float]]]:
    """Greedy tokens, and the strongest first tokens' log-probabilities, by our engine."""
    sampling = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, top_logprobs=5)

    async def test() -> Any:
        adapter = unverified(folder, 1) if folder else None
        async with running(loaded, LocalEngineConfig()) as engine:
            if adapter:
                await engine.load(adapter)
            mix = (AdapterScale(adapter.digest),) if adapter else ()
            answers = []
            for number, prompt in enumerate(PROMPTS):
                request = GenerationRequest(str(number), prompt, sampling, mix)
                answers.append([chunk async for chunk in engine.generate(request)])
            firsts = [next(one for chunk in answer for one in chunk.logprobs) for answer in answers]
            first = [{one.token: one.logprob for one in chosen.top} for chosen in firsts]
            return [tokens_of(answer) for answer in answers], first

    return asyncio.run(asyncio.wait_for(test(), 60))  # type: ignore[no-any-return]


def assert_served(model: Any, loaded: LoadedBase, folder: Path | None) -> None:
    tokens, strongest = served(loaded, folder)
    assert tokens == [greedy(model, prompt) for prompt in PROMPTS]
    for row, found in zip(logits(model).log_softmax(-1), strongest, strict=True):
        assert found == pytest.approx({token: float(row[token]) for token in found}, abs=1e-3)


@pytest.mark.parametrize("name", SERVED)
def test_trained_reloaded_and_served_logits_are_the_same(
    name: str, tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path, **SERVED[name])
    model = trained(recipe, tiny_base, tmp_path / "out", monkeypatch)
    wanted = logits(model)
    assert float((wanted - logits(load_fp32(tiny_base).model)).abs().max()) > 0.1
    reloaded = PeftModel.from_pretrained(load_fp32(tiny_base).model, str(tmp_path / "out")).eval()
    torch.testing.assert_close(logits(reloaded), wanted, rtol=1e-5, atol=1e-5)
    assert_served(model, load_fp32(tiny_base, "serve"), tmp_path / "out")


@pytest.mark.parametrize(
    "held",
    [{"kind": "nf4", "block_size": 32, "double_quant": False}, {"kind": "fp4"}, {"kind": "int8"}, {"kind": "none"}],
    ids=lambda held: " ".join(map(str, held.values())),
)
@pytest.mark.parametrize("init", ["default", "pissa"])
def test_other_ways_to_hold_the_base_are_trained_reloaded_and_served(
    held: dict[str, Any], init: str, tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path, quantization=held, lora={"init": init})
    model = trained(recipe, tiny_base, tmp_path / "out", monkeypatch)
    again = load_base(tiny_base, purpose="train", dtype="float32", **held).model
    reloaded = PeftModel.from_pretrained(again, str(tmp_path / "out")).eval()
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=1e-5, atol=1e-5)
    if held["kind"] != "int8":  # LLM.int8 lets rows of a batch decide about each other's outliers
        assert_served(model, load_base(tiny_base, purpose="serve", dtype="float32", **held), tmp_path / "out")
    record = read_run_record(tmp_path / "out")
    assert record is not None
    assert (
        record.quantization.model_dump() == {"double_quant": True, "block_size": 64, "compute_dtype": "float32"} | held
    )


@pytest.mark.parametrize("method", SOFT)
def test_a_soft_prompt_is_reloaded_by_peft_and_refused_by_pack(
    method: str, tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path, method=method)
    model = trained(recipe, tiny_base, tmp_path / "out", monkeypatch)
    bare = load_fp32(tiny_base).model
    assert sum(parameter.numel() for parameter in trainable(model)) == 4 * (64 if method == "prompt" else 2 * 2 * 32)
    assert float((logits(model) - logits(bare)).abs().max()) > 0.1
    reloaded = PeftModel.from_pretrained(bare, str(tmp_path / "out")).eval()
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=1e-5, atol=1e-5)
    with pytest.raises(AdapterUnsupported, match=rf"{method.upper()}_TUNING.*no package holds one"):
        pack_folder(tmp_path / "out", base=tiny_base)


@pytest.mark.parametrize("method", SOFT)
def test_rows_behind_a_soft_prompt_have_the_losses_peft_computes(
    method: str, tmp_path: Path, tiny_base: StoredBase
) -> None:
    torch.manual_seed(0)
    model = attach(load_fp32(tiny_base).model, recipe_of(tmp_path, method=method))
    texts = [(1, 2, 3, *prompt) for prompt in PROMPTS[:3]]
    samples = [Sample(text, (False,) * 4 + (True,) * (len(text) - 4)) for text in texts]
    ours = token_losses(model, pack(samples, device=CPU))

    def alone(text: tuple[int, ...], marks: tuple[bool, ...]) -> torch.Tensor:
        labels = [token if mark else -100 for token, mark in zip(text, marks, strict=True)]
        ids = torch.tensor([text])
        # A prefix adds no logits, so PEFT leaves the labels alone.
        return model(input_ids=ids, labels=torch.tensor([labels])).loss * sum(marks)  # type: ignore[no-any-return]

    theirs = torch.stack([alone(sample.tokens, sample.trained) for sample in samples]).sum()
    assert ours.sum().item() == pytest.approx(theirs.item(), rel=1e-5)
    (own,) = trainable(model)
    found, wanted = (torch.autograd.grad(loss, own)[0] for loss in (ours.sum(), theirs))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    with adapter_disabled(model):
        bare = token_losses(model, pack(samples, device=CPU))
    assert not torch.allclose(bare, ours)


def test_a_model_trained_whole_is_a_base_and_no_package(
    tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path, method="full", train={"learning_rate": 1e-3})
    model = trained(recipe, tiny_base, tmp_path / "out", monkeypatch)
    assert sum(p.numel() for p in trainable(model)) == sum(p.numel() for p in model.parameters())
    stored = StoredBase(tmp_path / "out", BaseRef("mine"))
    reloaded = load_base(stored, purpose="train", dtype="float32", kind="none")
    assert torch.equal(logits(reloaded.model), logits(model))
    assert float((logits(model) - logits(load_fp32(tiny_base).model)).abs().max()) > 0.1
    assert_served(model, load_base(stored, purpose="serve", dtype="float32", kind="none"), None)
    with pytest.raises(AdapterUnsupported, match="is a whole model"):
        pack_folder(tmp_path / "out", base=tiny_base)


def test_a_model_trained_whole_is_not_divided(tmp_path: Path, tiny_base: StoredBase) -> None:
    with pytest.raises(UsageError, match="Leave --shard out"):
        run_worker(recipe_of(tmp_path, method="full"), tiny_base, tmp_path / "out", start=None, shards="device")


@pytest.mark.parametrize("method", ["head", *SOFT, "full"])
def test_other_methods_resume_to_the_same_bytes(method: str, tmp_path: Path, tiny_base: StoredBase) -> None:
    recipe = recipe_of(tmp_path, method=method, train={"steps": 3, "checkpoint_every": 1})
    run(recipe, tiny_base, tmp_path / "whole")
    with pytest.raises(TrainingStopped):
        run(recipe, tiny_base, tmp_path / "parts", progress=StopAfter(2))
    resume(tmp_path / "parts", tiny_base, progress=Silent())
    name = "model.safetensors" if method == "full" else WEIGHTS
    assert sha256_of(tmp_path / "whole" / name) == sha256_of(tmp_path / "parts" / name)


def test_a_head_is_packed_by_its_name(tmp_path: Path, tiny_base: StoredBase) -> None:
    run(recipe_of(tmp_path, method="head"), tiny_base, tmp_path / "out")
    manifest = pack_folder(tmp_path / "out", base=tiny_base).manifest
    assert (manifest.lora.method, manifest.lora.targets) == ("head", ["lm_head"])
    assert list(tensors_of(tmp_path / "out")) == ["base_model.model.lm_head.weight"]


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
        (("embeddings",), {"embed_tokens"}),
        (("attention", "down_proj", "head"), {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "lm_head"}),
    ],
)
def test_words_for_targets_name_layers(targets: Any, names: set[str], tiny_base: StoredBase) -> None:
    model = add_lora(load_fp32(tiny_base).model, LoraSection(rank=2, targets=targets))
    assert {name.split(".")[-1] for name in layers_of(model)} == names


def test_lora_plus_gives_the_rates_peft_gives(tiny_base: StoredBase) -> None:
    model = add_lora(load_fp32(tiny_base).model, LoraSection(rank=2))
    train = TrainSection(steps=1, lora_plus_ratio=16.0)
    ours, _ = make_optimizer(trainable(model), train, lora_b_parameters=lora_b_parameters(model))
    set_learning_rate(ours, 1e-3)
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)

    def rates(optimizer: torch.optim.Optimizer) -> dict[int, float]:
        return {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}

    assert rates(ours) == pytest.approx(rates(theirs))


@pytest.mark.parametrize("method", ["lora", "head", "full"])
def test_weight_decay_spares_what_transformers_trainer_spares(
    method: str, tmp_path: Path, tiny_base: StoredBase
) -> None:
    model = attach(
        load_base(tiny_base, purpose="train", dtype="float32", kind="none").model, recipe_of(tmp_path, method=method)
    )
    ours, _ = make_optimizer(
        trainable(model), TrainSection(steps=1, weight_decay=0.1), undecayed=undecayed_parameters(model)
    )
    decayed = {id(p) for group in ours.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    theirs = Trainer.get_decay_parameter_names(None, model)
    assert names == {name for name, p in model.named_parameters() if p.requires_grad and name in theirs}
    assert ("model.norm.weight" in names, len(ours.param_groups)) == (False, 2 if method == "full" else 1)


@pytest.mark.parametrize("method", ["lora", "head", "prompt", "full"])
def test_others_may_read_what_the_run_writes(method: str, tmp_path: Path, tiny_base: StoredBase) -> None:
    """As far as the umask lets them: a server may run as another user."""
    before = os.umask(0o022)
    try:
        run(recipe_of(tmp_path, method=method, train={"steps": 1}), tiny_base, tmp_path / "out")
        if method == "lora":
            pack_folder(tmp_path / "out", base=tiny_base)
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {
        path.name: 0o644 for path in (tmp_path / "out").iterdir()
    }


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adamw", "AdamW, fused (LoRA's moments are small"),
        ("adamw-8bit", "AdamW, 8 bit (as asked)"),
        ("paged-adamw", "AdamW, fused (as asked, but unpaged: paging needs CUDA)"),
        ("paged-adamw-8bit", "AdamW, 8 bit (as asked, but unpaged: paging needs CUDA)"),
    ],
)
def test_the_optimizers_counterpart_on_a_cpu_is_reported_with_the_reason(name: Any, words: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    _, choice = make_optimizer([parameter], TrainSection(steps=1, optimizer=name))
    assert f"optimizer: {words}" in str(choice)


def test_gradients_are_shortened_to_the_longest_allowed(tmp_path: Path, tiny_base: StoredBase) -> None:
    """After one step Adam's first moment is a tenth of the gradient it was given."""
    recipe = recipe_of(tmp_path, train={"max_grad_norm": 0.3, "checkpoint_every": 1})
    with pytest.raises(TrainingStopped):
        run(recipe, tiny_base, tmp_path / "out", progress=StopAfter(1))
    (step,) = [event for event in read_run_events(run_path(tmp_path / "out") / LOG_NAME) if isinstance(event, RunStep)]
    assert step.grad_norm > 0.3
    state = load_file(run_path(tmp_path / "out") / "step-000001" / "optimizer.safetensors")
    moments = torch.cat([tensor.flatten() for name, tensor in state.items() if name.endswith("exp_avg")])
    assert float(moments.norm()) == pytest.approx(0.1 * 0.3, rel=1e-4)


def test_neftune_noise_depends_on_each_samples_length(tmp_path: Path, tiny_base: StoredBase) -> None:
    model = attach(load_fp32(tiny_base).model, recipe_of(tmp_path, train={"neftune_alpha": 5.0}))
    seen: list[torch.Tensor] = []
    model.get_decoder().layers[0].register_forward_pre_hook(lambda m, x: seen.append(x[0][0]))
    short, long = (Sample(tuple(range(1, size + 1)), (False,) * (size - 1) + (True,)) for size in (8, 50))
    row = pack([Sample((9, *short.tokens[1:]), short.trained), long], device=CPU)
    torch.manual_seed(0)
    for is_training in (False, True):
        model.train(is_training)
        token_losses(model, row)
    noise = (seen[-1] - seen[-2]).abs().detach()
    for part, length in ((noise[:8], 8), (noise[8:], 50)):
        bound = 5.0 / (length * 64) ** 0.5
        assert float(part.max()) <= bound * 1.0001
        assert float(part.max()) > 0.95 * bound
        assert float(part.mean()) == pytest.approx(bound / 2, rel=0.1)  # uniform


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_checkpointing_changes_no_byte(dtype: str, method: str, tmp_path: Path, tiny_base: StoredBase) -> None:
    for name, is_on in (("without", False), ("with", True)):
        options = {"train": {"activation_checkpointing": is_on}, "quantization": {"compute_dtype": dtype}}
        run(recipe_of(tmp_path, method=method, **options), tiny_base, tmp_path / name)
    assert sha256_of(tmp_path / "without" / WEIGHTS) == sha256_of(tmp_path / "with" / WEIGHTS)


def test_a_bf16_base_stays_bf16_and_what_is_trained_is_fp32(tmp_path: Path, tiny_base: StoredBase) -> None:
    """PEFT's `prepare_model_for_kbit_training` would turn embedding, head and norms into fp32."""
    loaded = load_base(tiny_base, purpose="train", dtype="bfloat16")
    model = attach(loaded.model, recipe_of(tmp_path)).train()
    sizes = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    assert sizes == {torch.uint8, torch.bfloat16}
    sample = Sample((1, *PROMPTS[2]), (False, *(True for _ in PROMPTS[2])))
    inputs: set[torch.dtype] = set()
    for layer in layers_of(model).values():
        layer.lora_A["default"].register_forward_hook(lambda m, x, y: inputs.update({x[0].dtype, y.dtype}))
    token_losses(model, pack([sample], device=CPU)).sum().backward()
    assert inputs == {torch.bfloat16}
    assert {(p.dtype, p.grad.dtype) for p in trainable(model) if p.grad is not None} == {(torch.float32,) * 2}
