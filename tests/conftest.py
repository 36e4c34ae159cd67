"""Real parts for the whole suite: SmolLM2-135M-Instruct, and a tiny random Llama with its tokenizer."""

from __future__ import annotations

import os
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
from tiny_models import free_port, make_peft_adapter, make_tiny_base

from adapterhub.adapter import BaseName, BaseRef, StoredBase
from adapterhub.bases.store import fingerprint, pull_base

_LONGEST = (
    "test_loop.py",
    "test_road.py",
    "train/distributed/test_world.py",
    "train/model/test_methods.py",
    "train/loop/test_resume.py",
)
"""files of tests that take minutes: begun first, so that none of them is what all processes wait for in the end"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    places = {folder / name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


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


@pytest.fixture(scope="session")
def served(smollm2: StoredBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedRoad]:
    """A real server with the adapters `trivia` and `captain`, trained, packed, pushed and pulled for real."""
    with walk_road(tmp_path_factory.mktemp("road"), smollm2.path, free_port()) as road:
        yield road


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
