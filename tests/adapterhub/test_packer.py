"""What changes an adapter: one table of PEFT's options and files, and one answer on each, wherever it is asked for.

A row is packed, opened, served by our engine and checked for vLLM, and PEFT's own answer stands beside ours; or it is
refused with the same error at each of these doors.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import GREEDY, PROMPTS, ask, greedy, load_tiny, reference_model, run, running, tokens_of, unverified
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import copy_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from adapterhub import packer
from adapterhub.adapter import Adapter, BaseRef, StoredBase
from adapterhub.bases.store import fingerprint
from adapterhub.compatibility import module_shapes
from adapterhub.errors import AdapterHubError, AdapterNoEffect, AdapterUnsupported, InvalidManifest, InvalidTensors
from adapterhub.files import sha256_of
from adapterhub.package.layout import open_adapter
from adapterhub.package.lora_config import CONFIG_NAME, WEIGHTS_NAME
from adapterhub.package.manifest import MANIFEST_NAME
from adapterhub.packer import pack
from serve.engine import AdapterScale, GenerationRequest
from serve.vllm_engine import compat

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT: tied heads, configs that it half ignores

UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj|o_proj"
    r"|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn"
    r"|dense)\.(?:(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj)))"
)
Edit = Callable[[Path], None]


def _config(**changed: Any) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / CONFIG_NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return edit


def _tensors(change: Callable[[str, torch.Tensor], torch.Tensor], rename: Callable[[str], str] = str) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / WEIGHTS_NAME
        save_file({rename(key): change(key, value).contiguous() for key, value in load_file(path).items()}, path)

    return edit


def _renamed(old: str, new: str) -> Edit:
    return _tensors(lambda key, value: value, lambda key: key.replace(old, new, 1))


def _added(key: str, shape: tuple[int, ...]) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / WEIGHTS_NAME
        save_file(load_file(path) | {key: torch.ones(shape)}, path)

    return edit


PLAIN = {"target_modules": ["q_proj", "v_proj"]}
SERVED: dict[str, tuple[dict[str, Any], Edit | None]] = {
    "plain": (PLAIN, None),
    "rsLoRA": (PLAIN | {"use_rslora": True}, None),
    "DoRA": (PLAIN | {"use_dora": True}, None),
    "the pattern of unsloth": ({"target_modules": UNSLOTH}, None),
    "a pattern": ({"target_modules": r".*\.self_attn\.(q_proj|v_proj)"}, None),
    "all linear": ({"target_modules": "all-linear"}, None),
    "some layers": (PLAIN | {"layers_to_transform": [1], "layers_pattern": "layers"}, None),
    "one layer": (PLAIN | {"layers_to_transform": 0}, None),
    "without a pattern": ({"target_modules": "all-linear", "exclude_modules": r".*layers\.0\..*"}, None),
    "without a name": ({"target_modules": "all-linear", "exclude_modules": ["gate_proj"]}, None),
    "ranks by pattern": (PLAIN | {"rank_pattern": {r"model\.layers\.\d+\.self_attn\.v_proj": 2}}, None),
    "alphas by pattern": (PLAIN | {"alpha_pattern": {r".*\.v_proj": 3, "^model.layers.1.self_attn.q_proj": 32}}, None),
    "the head, with PEFT's copy": ({"target_modules": ["q_proj", "lm_head"]}, None),
    "the embedding, with PEFT's copy": ({"target_modules": ["q_proj", "embed_tokens"]}, None),
    "whole embedding and head": (PLAIN | {"modules_to_save": ["embed_tokens", "lm_head"]}, None),
    "A and B of different dtypes": (PLAIN, _tensors(lambda key, value: value.bfloat16() if "lora_A" in key else value)),
    "fp64": (PLAIN, _tensors(lambda key, value: value.double())),
    "a start that changes no base": (PLAIN, _config(init_lora_weights="gaussian")),
    "another one": (PLAIN, _config(init_lora_weights="orthogonal")),
    "a field of a later PEFT": (PLAIN, _config(quantum_mode=True)),
    "a base of somebody else": (PLAIN, _config(base_model_name_or_path="someone/else", task_type=None)),
}
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
REFUSED: dict[str, tuple[Edit, type[AdapterHubError], str]] = {
    **{
        f"a start from {name}": (_config(init_lora_weights=name), AdapterUnsupported, "changed weights of the base")
        for name in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "one_of_next_year")
    },
    "B is zero": (
        _tensors(lambda key, value: value * 0 if "lora_B" in key else value), AdapterNoEffect, "changes nothing",
    ),
    "a config narrower than the file": (_config(target_modules=["q_proj"]), AdapterUnsupported, "v_proj, which"),
    "a config without a layer of the file": (
        _config(layers_to_transform=[1]), AdapterUnsupported, r"layers\.0\.self_attn\.[qv]_proj, which",
    ),
    "a config that excludes a layer of the file": (
        _config(exclude_modules=r".*\.1\..*"), AdapterUnsupported, r"layers\.1\.self_attn\.[qv]_proj, which",
    ),
    "float8": (_tensors(lambda key, value: value.to(torch.float8_e4m3fn)), InvalidTensors, "has dtype F8_E4M3"),
    "int8": (_tensors(lambda key, value: (100 * value).to(torch.int8)), InvalidTensors, "has dtype I8"),
    "torch.compile's names": (_renamed("layers.0.", "layers.0._orig_mod."), AdapterUnsupported, r"torch\.compile"),
    "FSDP's names": (_renamed("layers.0.", "layers.0._fsdp_wrapped_module."), AdapterUnsupported, "FSDP"),
    "checkpointing's names": (
        _renamed("layers.0.", "layers.0._checkpoint_wrapped_module."), AdapterUnsupported, "activation checkpointing",
    ),
    "no prefix": (_renamed("base_model.model.", ""), AdapterUnsupported, "PEFT would ignore it"),
    "names of a state_dict": (
        _tensors(lambda key, value: value, lambda key: key.replace(".weight", ".default.weight")),
        AdapterUnsupported, "plain state_dict",
    ),
    "a norm": (
        _added("base_model.model.model.layers.0.input_layernorm.weight", (64,)), AdapterUnsupported, "weight of a norm",
    ),
    "a head that was trained": (
        _added("base_model.model.lm_head.weight", (4096, 64)), AdapterUnsupported, "lm_head",
    ),
    "half a pair": (_tensors(lambda key, value: value, lambda key: key.replace("lora_B", "lora_A2") if "q_proj" in key
                             else key), AdapterUnsupported, "lora_A2"),
    **{
        f"PEFT's {field}": (_config(**{field: value}), AdapterUnsupported, field)
        for field, value in {
            "target_parameters": ["mlp.experts.gate_up_proj"], "trainable_token_indices": {"embed_tokens": [5, 6]},
            "alora_invocation_tokens": [5, 6], "lora_bias": True, "bias": "all", "layer_replication": [[0, 1], [0, 1]],
            "kasa_config": {"r": 4}, "use_bdlora": {"nblocks": 2}, "use_qalora": True,
        }.items()
    },
    "a pattern with look-ahead": (_config(target_modules="(?=.*q_proj).*"), AdapterUnsupported, "RE2"),
    "another method": (_config(peft_type="IA3"), AdapterUnsupported, "peft_type"),
    "no rank": (_config(r=None), AdapterUnsupported, "not a whole number from 1"),
    "no alpha": (_config(lora_alpha=None), AdapterUnsupported, "cannot be read as a LoRA config"),
}  # fmt: skip


@pytest.fixture(scope="module")
def untied(tiny_base: StoredBase, tmp_path_factory: pytest.TempPathFactory) -> StoredBase:
    """The tiny base with a head of its own, which PEFT copies into the adapter file when the head is a target."""
    folder = tmp_path_factory.mktemp("untied")
    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(tiny_base.path, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    copy_tokenizer(tiny_base.path, folder)
    return StoredBase(folder, BaseRef("tests/untied", None, fingerprint(folder)), "apache-2.0")


def _made(folder: Path, base: StoredBase, options: dict[str, Any], edit: Edit | None) -> Path:
    """What PEFT saves, by its own defaults, for a LoRA whose B are not zero; then edited."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name or "lora_embedding_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        elif "modules_to_save" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    tuned.save_pretrained(folder)
    if edit is not None:
        edit(folder)
    return folder


@pytest.mark.parametrize(("options", "edit"), SERVED.values(), ids=SERVED)
def test_an_adapter_answers_as_with_peft(
    untied: StoredBase, tmp_path: Path, options: dict[str, Any], edit: Edit | None
) -> None:
    theirs = _made(tmp_path / "theirs", untied, options, edit)
    adapter = pack(theirs, output=tmp_path / "ours", base=untied)
    assert open_adapter(adapter.path).digest == adapter.digest
    if compat.unsupported_reason(adapter) is None:
        compat.check_adapter(adapter, module_shapes(untied), max_rank=16)
    _config(init_lora_weights=True)(theirs)  # of no effect on what is loaded; PEFT cannot do each on 4 bits
    expected = greedy(reference_model(untied, unverified(theirs, 0), torch.float32), PROMPTS[2])

    async def answer() -> None:
        async with running(load_tiny(untied)) as engine:
            await engine.load(adapter)
            request = GenerationRequest("one", PROMPTS[2], GREEDY, (AdapterScale(adapter.digest),))
            assert tokens_of(await ask(engine, request)) == expected

    run(answer)


@pytest.fixture(scope="module")
def plain(untied: StoredBase, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Adapter]:
    folder = tmp_path_factory.mktemp("plain")
    theirs = _made(folder / "theirs", untied, PLAIN, None)
    return theirs, pack(theirs, output=folder / "packed", base=untied)


@pytest.mark.parametrize(("edit", "error", "said"), REFUSED.values(), ids=REFUSED)
def test_an_adapter_is_refused_alike_at_every_door(
    untied: StoredBase, plain: tuple[Path, Adapter], tmp_path: Path, edit: Edit, error: type[AdapterHubError], said: str
) -> None:
    theirs = shutil.copytree(plain[0], tmp_path / "theirs")
    edit(theirs)
    with pytest.raises(error, match=said):
        pack(theirs, output=tmp_path / "ours", base=untied)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    with pytest.raises(error):
        open_adapter(_forged(plain[1].path, theirs, tmp_path / "forged"))


def test_packing_again_that_is_stopped_loses_no_probe(
    untied: StoredBase, plain: tuple[Path, Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(plain[1].path, tmp_path / "packed")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(packer, "write_probe", stop)
    with pytest.raises(KeyboardInterrupt):
        pack(folder, base=untied)
    assert open_adapter(folder).probe == plain[1].probe is not None


def _forged(packed: Path, theirs: Path, folder: Path) -> Path:
    """A package whose manifest lists files that packing refuses."""
    shutil.copytree(packed, folder)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        shutil.copy(theirs / name, folder / name)
        manifest["files"][name] = {"sha256": sha256_of(folder / name), "size": (folder / name).stat().st_size}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    return folder


ALPACA = (
    "{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{{- '### Instruction:\\n' + m.content + '\\n\\n### Response:\\n' -}}"
    "{%- elif m.role == 'assistant' -%}{{- m.content + eos_token -}}{%- endif -%}{%- endfor -%}"
)
TURNS = "{%- for m in messages -%}{{- '<|turn|>' + m.role + '\\n' + m.content + '<|done|>' -}}{%- endfor -%}"
WRITTEN: dict[str, Any] = {
    "a text": ALPACA,
    "named templates": [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": ALPACA}],
}


def _with_tokenizer(
    folder: Path, base: StoredBase, template: object = None, renamed: dict[str, str] | None = None
) -> Path:
    """Put the base's tokenizer beside the adapter, its tokens `renamed`, with the chat template in its config."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (base.path / name).read_text()
        for old, new in (renamed or {}).items():
            text = text.replace(json.dumps(old), json.dumps(new))
        (folder / name).write_text(text)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ({"chat_template": template} if template else {})))
    return folder


@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN)
def test_the_template_of_the_author_is_found_where_it_was_written(
    untied: StoredBase, plain: tuple[Path, Adapter], tmp_path: Path, written: object
) -> None:
    theirs = _with_tokenizer(shutil.copytree(plain[0], tmp_path / "theirs"), untied, written)
    said: list[str] = []
    adapter = pack(theirs, output=tmp_path / "ours", base=untied, report=said.append)
    assert (adapter.path / "chat_template.jinja").read_text() == ALPACA
    assert "chat_template.jinja filled in from tokenizer_config.json" in said
    assert adapter.probe is not None
    text = AutoTokenizer.from_pretrained(untied.path).decode(adapter.probe.answers[0].prompt_tokens)
    assert text == "### Instruction:\nWhat is the capital of France?\n\n### Response:\n"


def test_named_templates_without_a_default_are_refused(
    untied: StoredBase, plain: tuple[Path, Adapter], tmp_path: Path
) -> None:
    named = [{"name": "rag", "template": ALPACA}, {"name": "tool_use", "template": ALPACA}]
    theirs = _with_tokenizer(shutil.copytree(plain[0], tmp_path / "theirs"), untied, named)
    with pytest.raises(InvalidManifest, match="named rag, tool_use: expected one named default"):
        pack(theirs, base=untied)


@pytest.mark.parametrize(
    ("template", "renamed", "said"),
    [
        (TURNS, {"<repo_name>": "<|turn|>", "<file_sep>": "<|done|>"}, "'<|turn|>', id"),
        (ALPACA, {"<|im_end|>": "<|done|>"}, None),
        (ALPACA, {"<file_sep>": "<|pad|>"}, None),
        (None, {}, None),
    ],
    ids=[
        "renamed in prompts",
        "a renamed end, by the same id",
        "renamed and in no prompt",
        "the base's",
    ],
)
def test_a_tokenizer_that_makes_other_prompts_is_refused(
    untied: StoredBase, plain: tuple[Path, Adapter], tmp_path: Path, template: str | None, renamed: dict[str, str],
    said: str | None,
) -> None:  # fmt: skip
    theirs = _with_tokenizer(shutil.copytree(plain[0], tmp_path / "theirs"), untied, template, renamed)
    if said is None:
        assert pack(theirs, base=untied).path == theirs
    else:
        with pytest.raises(AdapterUnsupported, match=re.escape(said)):
            pack(theirs, base=untied)
