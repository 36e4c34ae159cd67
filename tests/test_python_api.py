"""The names of `import adapterhub`: lazy, typed, documented, and what docs/python.md shows runs as it stands."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_fixtures import start_hub
from tiny_home import BASE_NAME, make_tiny_home

import adapterhub
from adapterhub.adapter import StoredBase
from adapterhub.errors import AdapterNotFound, EngineStopped, InvalidRef, RecipeError, RequestTooLong, UsageError
from adapterhub.packer import pack
from serve import llm as llm_module
from serve.api.schemas import ChatRequest, CompletionRequest
from serve.llm import SamplingOptions

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "python.md"
GREEDY = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def tiny_home(tiny_base: StoredBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("home")
    make_tiny_home(home, tiny_base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPTERHUB_HOME", str(home))
        yield home


@pytest.fixture(scope="module")
def captain(tiny_home: Path, peft_folder: Path) -> adapterhub.Adapter:
    folder = shutil.copytree(peft_folder, tiny_home / "trained")
    adapter = pack(folder, base=BASE_NAME, name="captain")
    return adapterhub.Registry().add(adapter)


@pytest.fixture(scope="module")
def llm(captain: adapterhub.Adapter) -> Iterator[adapterhub.LLM]:
    with adapterhub.LLM(BASE_NAME, adapters={"mine": "captain"}) as engine:
        yield engine


def test_import_loads_nothing_heavy() -> None:
    code = (
        "import sys; before = set(sys.modules); import adapterhub; dir(adapterhub)\n"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert loaded - set(sys.stdlib_module_names) == {'adapterhub'}, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["Registry", "Hub", "AdapterRef", "open_adapter", "pack"])
def test_names_of_a_registry_client_load_no_torch(name: str) -> None:
    code = f"import sys, adapterhub; adapterhub.{name}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", adapterhub.__all__)
def test_every_public_name_can_be_imported_and_is_documented(name: str) -> None:
    assert getattr(adapterhub, name) is not None
    assert name in dir(adapterhub)
    assert name == "__version__" or f"`{name}`" in PAGE.read_text()


def test_types_that_checkers_see_are_those_that_are_imported() -> None:
    """The table of modules and the imports under TYPE_CHECKING are one list."""
    tree = ast.parse(Path(str(adapterhub.__file__)).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert typed == adapterhub._MODULES
    assert {*typed, "__version__"} == set(adapterhub.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'serve_all'"):
        adapterhub.serve_all  # noqa: B018


def test_loading_a_submodule_hides_no_public_name() -> None:
    """A submodule named like a function would replace it in the package as soon as anybody imports it."""
    package = Path(str(adapterhub.__file__)).parent
    modules = {path.stem for path in package.glob("*.py")} | {
        path.parent.name for path in package.glob("*/__init__.py")
    }
    assert not modules & set(adapterhub.__all__)


def test_page_documents_the_parameters_that_are_there() -> None:
    page = PAGE.read_text()
    for name in ("train", "pack", "open_adapter", "load_base"):
        shown = re.search(rf"^    {name}\((.*?)\)(?: ->|\n\n)", page, re.MULTILINE | re.DOTALL)
        assert shown, name
        code = getattr(adapterhub, name).__code__
        parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        words = re.findall(r"(\w+)(?==|,|\)|$)", re.sub(r"=[^,]*", "", shown[1]))
        assert set(words) == {*parameters} - {"tokenizer"}


def test_every_sampling_option_is_a_field_of_the_http_api() -> None:
    options = set(SamplingOptions.__annotations__)
    assert options <= set(ChatRequest.model_fields)
    assert options <= set(CompletionRequest.model_fields)


@pytest.mark.usefixtures("tiny_home")
def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 8
    with start_hub(tmp_path / "hub") as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("HF_TOKEN", (tmp_path / "hub" / "token").read_text().strip())
        exec(compile("\n".join(blocks), str(PAGE), "exec"), {"__name__": "docs"})


def test_adapter_of_a_request_decides_the_answer(llm: adapterhub.LLM, captain: adapterhub.Adapter) -> None:
    base = llm.chat("Hi", **GREEDY)
    mine = llm.chat([{"role": "user", "content": "Hi"}], adapter="mine", **GREEDY)
    assert (base.adapters, mine.adapters) == ((), (captain.digest,))
    assert str(mine) == mine.text != base.text
    assert (mine.num_tokens, mine.finish_reason) == (8, "length")


def test_scale_zero_is_the_base(llm: adapterhub.LLM) -> None:
    # A base's own chat template and the adapter's are the same text here.
    assert llm.generate("Hi", adapter={"mine": 0.0}, **GREEDY).text == llm.generate("Hi", **GREEDY).text


def test_reference_that_was_not_loaded_is_resolved(llm: adapterhub.LLM, captain: adapterhub.Adapter) -> None:
    assert llm.chat("Hi", adapter=captain.digest, **GREEDY).adapters == (captain.digest,)
    assert llm.adapters[captain.digest].digest == captain.digest
    llm.unload(captain.digest)
    assert set(llm.adapters) == {"mine"}


def test_package_of_format_1_is_served_under_its_own_digest(
    llm: adapterhub.LLM, captain: adapterhub.Adapter, tmp_path: Path
) -> None:
    folder = shutil.copytree(captain.path, tmp_path / "old")
    (folder / "probe.json").unlink()
    raw = json.loads((folder / "adapterhub.json").read_text())
    assert captain.probe is not None
    raw |= {"format": 1, "licence": raw.pop("license"), "probe": captain.probe.model_dump(mode="json")}
    (folder / "adapterhub.json").unlink()
    (folder / "adapterhub.json").write_text(json.dumps(raw))
    old = adapterhub.Registry().add(adapterhub.open_adapter(folder), name="old")
    answer = llm.chat("Hi", adapter="old", **GREEDY)
    assert answer.adapters == (old.digest,) != (captain.digest,)
    assert answer.text == llm.chat("Hi", adapter="mine", **GREEDY).text
    llm.unload("old")


def test_batch_keeps_the_order(llm: adapterhub.LLM) -> None:
    asked = [None, "mine", None, "mine"]
    answers = llm.chat_batch(["Hi"] * 4, adapters=asked, **GREEDY)
    alone = [llm.chat("Hi", adapter=adapter, **GREEDY) for adapter in asked]
    assert [one.text for one in answers] == [one.text for one in alone]


def test_stream_gives_the_same_text_and_can_be_left(llm: adapterhub.LLM) -> None:
    assert "".join(llm.stream("Hi", adapter="mine", **GREEDY)) == llm.chat("Hi", adapter="mine", **GREEDY).text
    endless = llm.stream("Hi", adapter="mine", max_tokens=400, ignore_eos=True)
    assert next(endless)
    endless.close()  # type: ignore[attr-defined]
    assert llm.chat("Hi", **GREEDY).num_tokens == 8


def test_threads_share_one_engine(llm: adapterhub.LLM) -> None:
    texts: dict[int, str] = {}

    def ask(number: int) -> None:
        texts[number] = llm.chat("Hi", adapter="mine", **GREEDY).text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(texts.values())) == 1
    assert len(texts) == 4


def test_unknown_adapter_is_never_answered_by_the_base(llm: adapterhub.LLM) -> None:
    with pytest.raises(AdapterNotFound, match="capitan"):
        llm.chat("Hi", adapter="capitan")
    with pytest.raises(AdapterNotFound, match="capitan"):
        next(llm.stream("Hi", adapter="capitan"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": 9}, "temperature"),
        ({"tempreature": 1}, "tempreature .*nearest: temperature"),
        ({"stop": ""}, "stop"),
        # Fields of the HTTP API whose result a Completion does not hold.
        ({"n": 2}, "n is no sampling option"),
        ({"stream": True}, "stream is no sampling option"),
        ({"logprobs": 1}, "logprobs is no sampling option"),
        ({"model": "mine"}, "model is no sampling option"),
    ],
)
def test_wrong_option_is_named(llm: adapterhub.LLM, options: dict[str, object], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        llm.chat("Hi", **options)
    with pytest.raises(UsageError, match=named):
        llm.generate("Hi", **options)


@pytest.mark.parametrize("adapter", [5, ["mine"], Path("mine"), adapterhub.AdapterRef.parse("mine"), {Path("mine"): 1}])
def test_adapter_of_another_type_is_refused(llm: adapterhub.LLM, adapter: object) -> None:
    with pytest.raises(UsageError, match=f"adapter is of type {type(adapter).__name__}"):
        llm.chat("Hi", adapter=adapter)
    if not isinstance(adapter, Path | adapterhub.AdapterRef):
        with pytest.raises(UsageError, match=f"an adapter is of type {type(adapter).__name__}"):
            llm.load("mine", adapter)


@pytest.mark.parametrize("messages", [None, 5, {"role": "user", "content": "Hi"}])
def test_messages_of_another_type_are_refused(llm: adapterhub.LLM, messages: object) -> None:
    with pytest.raises(UsageError, match="messages: .*list"):
        llm.chat(messages)


def test_batch_of_which_one_fails_leaves_nothing_running(llm: adapterhub.LLM) -> None:
    with pytest.raises(AdapterNotFound, match="capitan"):
        llm.chat_batch(["Hi", "Hi"], adapters=["mine", "capitan"], max_tokens=400, ignore_eos=True)
    assert llm.chat("Hi", **GREEDY).num_tokens == 8
    assert llm._open.engine.status().num_running == 0


def test_batch_with_too_few_adapters_is_refused(llm: adapterhub.LLM) -> None:
    with pytest.raises(UsageError, match="2 conversations and 1 adapters"):
        llm.chat_batch(["Hi", "Ho"], adapters=["mine"])


def test_prompt_that_is_too_long_is_refused(llm: adapterhub.LLM) -> None:
    with pytest.raises(RequestTooLong):
        llm.chat("word " * 600, adapter="mine")


def test_closed_llm_says_so(captain: adapterhub.Adapter) -> None:
    engine = adapterhub.LLM(BASE_NAME)
    assert engine.load("one", captain) == captain
    engine.close()
    engine.close()
    for ask in (lambda: engine.chat("Hi"), lambda: next(engine.stream("Hi")), lambda: engine.load("two", captain)):
        with pytest.raises(EngineStopped, match="closed"):
            ask()


def test_close_ends_the_answers_of_other_threads(tiny_home: Path) -> None:
    engine = adapterhub.LLM(BASE_NAME)
    started = next(stream := engine.stream("Hi", max_tokens=400, ignore_eos=True))
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            while True:
                engine.chat("Hi", max_tokens=100, ignore_eos=True)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    closers = [threading.Thread(target=engine.close) for _ in range(2)]
    for thread in closers:
        thread.start()
    for thread in (*closers, *threads):
        thread.join(60)
        assert not thread.is_alive()
    assert started
    assert [type(error) for error in errors] == [EngineStopped] * 4
    with pytest.raises(EngineStopped, match="closed"):
        list(stream)


def test_interrupt_while_the_base_is_loaded_keeps_no_engine(tiny_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter raises KeyboardInterrupt in the thread that waits; the engine is started in another."""
    before = set(threading.enumerate())
    result = llm_module.Future.result

    def interrupted(future: Any, timeout: float | None = None) -> Any:
        monkeypatch.setattr(llm_module.Future, "result", result)
        raise KeyboardInterrupt

    monkeypatch.setattr(llm_module.Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapterhub.LLM(BASE_NAME)
    assert "engine" not in {thread.name for thread in set(threading.enumerate()) - before}


def test_a_base_that_is_none_is_refused_before_a_thread_starts(tiny_home: Path) -> None:
    before = threading.active_count()
    with pytest.raises(InvalidRef):
        adapterhub.LLM("not a base!")
    assert threading.active_count() == before


@pytest.mark.parametrize("option", [{"purpose": "training"}, {"kind": "nf8"}, {"dtype": "int3"}])
def test_option_of_a_base_that_does_not_exist_is_refused(tiny_home: Path, option: dict[str, Any]) -> None:
    ((name, value),) = option.items()
    with pytest.raises(UsageError, match=f"invalid {name} '{value}'"):
        adapterhub.load_base(BASE_NAME, **option)


def test_registrys_root_may_be_text(captain: adapterhub.Adapter, tmp_path: Path) -> None:
    adapterhub.Registry(tmp_path).add(captain)
    assert adapterhub.Registry(str(tmp_path)).resolve("captain").digest == captain.digest


def test_unknown_recipe_is_refused(tiny_home: Path) -> None:
    with pytest.raises(RecipeError, match="there is no recipe demo-capitan"):
        adapterhub.train("demo-capitan")
