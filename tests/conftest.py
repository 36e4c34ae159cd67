"""Real parts for the whole suite: SmolLM2-135M-Instruct, and a tiny random Llama with its tokenizer."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

# Before any Hugging Face import: some of these are read once, at import.
os.environ.update(
    # The base and the compiled kernels, kept between runs; never the user's own folder.
    ADAPTERHUB_HOME=str(Path(__file__).parent.parent / ".cache"),
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_UPDATE_CHECK="1",
    GRADIO_ANALYTICS_ENABLED="False",
    TOKENIZERS_PARALLELISM="false",
    GOMP_SPINCOUNT="20000",  # as the command sets it
)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests beside this one have the other cores

import pytest
from filelock import FileLock
from road import ServedRoad, walk_road

from adapterhub.adapter import BaseName, BaseRef
from adapterhub.base_store import StoredBase, fingerprint, pull_base

TINY_VOCABULARY = 4096
"""tokens of the tiny base: a twelfth of SmolLM2's, which take longer to read than most tests to run"""
_LONGEST = ("test_loop", "test_road", "test_train_distributed", "test_train_methods", "test_train_resume")
"""files of tests that take minutes: begun first, so that none of them is what all processes wait for in the end"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {stem: place for place, stem in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session")
def smollm2() -> StoredBase:
    """The real base, fetched once per checkout, whichever test process comes first."""
    folder = Path(os.environ["ADAPTERHUB_HOME"])
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "tests.lock"):
        return pull_base(BaseName.parse("smollm2-135m-instruct"))


@pytest.fixture(scope="session")
def tiny_base(smollm2: StoredBase, tmp_path_factory: pytest.TempPathFactory) -> StoredBase:
    """A two-layer random Llama (hidden 64, four heads, two KV heads) in fp32 with SmolLM2's tokenizer, cut."""
    folder = tmp_path_factory.mktemp("tiny-base")
    make_tiny_base(folder, smollm2, layers=2, seed=0)
    return StoredBase(folder, BaseRef("tests/tiny-llama", None, fingerprint(folder)), "apache-2.0")


def make_tiny_base(folder: Path, tokenizer_from: StoredBase, *, layers: int, seed: int, hidden: int = 64) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=TINY_VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
        initializer_range=0.2,  # large enough for greedy decoding without near-ties
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    copy_tokenizer(tokenizer_from.path, folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Write SmolLM2's tokenizer with its first tokens only: any text is still spelt, in more of them."""
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder / name)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    model = tokenizer["model"]
    vocabulary = {token: number for token, number in model["vocab"].items() if number < TINY_VOCABULARY}
    merges = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= vocabulary.keys()]
    model |= {"vocab": vocabulary, "merges": merges}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.fixture(scope="session")
def served(smollm2: StoredBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedRoad]:
    """A real server with the adapters `trivia` and `captain`, trained, packed, pushed and pulled for real."""
    with walk_road(tmp_path_factory.mktemp("road"), smollm2.path, free_port()) as road:
        yield road


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ADAPTERHUB_HOME of this test's own."""
    folder = tmp_path / "home"
    monkeypatch.setenv("ADAPTERHUB_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def peft_folder(tiny_base: StoredBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What PEFT itself saves for a random LoRA of rank 8 on every linear layer of the tiny base."""
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    make_peft_adapter(folder, tiny_base, rank=8, seed=1)
    return folder


def make_peft_adapter(folder: Path, base: StoredBase, *, rank: int, seed: int, **options: object) -> None:
    """A LoRA with random A and B, so that it changes every answer; saved by PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    targets = options.pop("target_modules", "all-linear")
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM", **options)
    peft_model = get_peft_model(model, config)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name or "lora_embedding_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        elif "modules_to_save" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    peft_model.save_pretrained(folder, save_embedding_layers=False)
