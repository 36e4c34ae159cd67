"""Chat templates of recipes: Guanaco's and Alpaca's against their published texts; stop strings."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from training import make_recipe, run

from adapterhub.adapter import AdapterRef, StoredBase
from adapterhub.bases.loading import load_base
from adapterhub.errors import DatasetError, RecipeError
from adapterhub.packer import pack
from adapterhub.registry.registry import Registry
from serve.adapters.cache import AdapterCache
from serve.adapters.catalog import Catalog
from serve.api.app import create_app
from serve.api.auth import ApiKeys
from serve.api.metrics import Metrics
from serve.api.prompts import PromptRenderer
from serve.api.services import Services
from serve.local_engine.engine import LocalEngine
from train.data.chat_template import chat_template_of
from train.data.conversation import Conversation, Message, Text
from train.data.formats import examples_of
from train.data.readers import Row, Rows
from train.data.tokenization import Sample, check_has_template, tokenize, tokenize_text
from train.inputs import load_inputs
from train.objectives.mask_report import mask_report
from train.recipe import Recipe, read_recipe

GUANACO = (
    "### Human: Who are you?### Assistant: Me! Who else?### Human: I see... Why?### Assistant: Because.\n\n- one\n- two"
)
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nName the odd one.\n\n### Input:\n"
    "cat, car\n\n### Response: car"
)
ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName a ship.\n\n### Response: The Beagle"
)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def tokenizer(tiny_base: StoredBase) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base.path)


def with_template(folder: Path, tokenizer: Any, name: str, **data: Any) -> Any:
    chat = chat_template_of(make_recipe(folder, data={"template": name, **data}), None)
    tokenizer.chat_template = chat.text
    return tokenizer


def conversation(**row: str) -> Conversation:
    found = examples_of(Rows((Row("x:1", row),), ()), name="x", format=None).examples[0]
    assert isinstance(found, Conversation)
    return found


def trained_texts(sample: Sample, tokenizer: Any) -> list[str]:
    """Texts of neighbouring trained tokens."""
    found, last = [], False
    for token, mark in zip(sample.tokens, sample.trained, strict=True):
        if mark and last:
            found[-1].append(token)
        elif mark:
            found.append([token])
        last = mark
    return [tokenizer.decode(tokens) for tokens in found]


def test_guanacos_template_renders_the_published_text_with_beginning_and_end(tmp_path: Path, tokenizer: Any) -> None:
    with_template(tmp_path, tokenizer, "guanaco")
    sample = tokenize(conversation(text=GUANACO), tokenizer, loss_on="all")
    text = f"{tokenizer.bos_token}{GUANACO}{tokenizer.eos_token}"
    assert list(sample.tokens) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert sample.trained == (False, *[True] * (len(sample.tokens) - 1))


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"instruction": "Name the odd one.", "input": "cat, car", "output": "car"}, ALPACA),
        ({"instruction": "Name a ship.", "input": "", "output": "The Beagle"}, ALPACA_NO_INPUT),
    ],
    ids=["with input", "without input"],
)
def test_alpacas_template_renders_the_published_prompts(
    tmp_path: Path, tokenizer: Any, row: dict[str, str], text: str
) -> None:
    with_template(tmp_path, tokenizer, "alpaca")
    sample = tokenize(conversation(**row), tokenizer, loss_on="assistant")
    assert tokenizer.decode(sample.tokens) == f"{tokenizer.bos_token}{text}{tokenizer.eos_token}"
    assert trained_texts(sample, tokenizer) == [f" {row['output']}{tokenizer.eos_token}"]


def test_a_serving_prompt_is_the_beginning_of_what_was_trained(tmp_path: Path, tokenizer: Any) -> None:
    with_template(tmp_path, tokenizer, "guanaco")
    talk = conversation(text=GUANACO)
    trained = tokenize(talk, tokenizer, loss_on="all").tokens
    messages = [{"role": message.role, "content": message.content} for message in talk.messages]
    for place in (1, 3):
        prompt = tokenizer.apply_chat_template(messages[:place], add_generation_prompt=True, return_dict=True)
        assert tuple(prompt["input_ids"]) == trained[: len(prompt["input_ids"])]


def test_answers_inside_a_guanaco_conversation_are_trained_up_to_their_stop_string(
    tmp_path: Path, tokenizer: Any
) -> None:
    with_template(tmp_path, tokenizer, "guanaco")
    sample = tokenize(conversation(text=GUANACO), tokenizer, loss_on="assistant", stop=("### Human:",))
    assert trained_texts(sample, tokenizer) == [
        " Me! Who else?### Human:",
        f" Because.\n\n- one\n- two{tokenizer.eos_token}",
    ]


def test_more_stop_strings_do_not_change_where_answers_end(tokenizer: Any) -> None:
    talk = conversation(text=GUANACO)
    plain, stopped = (tokenize(talk, tokenizer, loss_on="assistant", stop=stop) for stop in ((), ("###",)))
    assert plain == stopped


def test_the_last_answer_of_a_guanaco_conversation_can_be_trained_alone(tmp_path: Path, tokenizer: Any) -> None:
    with_template(tmp_path, tokenizer, "guanaco")
    sample = tokenize(conversation(text=GUANACO), tokenizer, loss_on="last", stop=("### Human:",))
    assert trained_texts(sample, tokenizer) == [f" Because.\n\n- one\n- two{tokenizer.eos_token}"]


def test_a_system_message_stands_before_the_first_question(tmp_path: Path, tokenizer: Any) -> None:
    with_template(tmp_path, tokenizer, "guanaco")
    talk = Conversation((Message("system", "Be kind."), Message("user", "Hi?"), Message("assistant", "Ho.")), "x:1")
    text = tokenizer.decode(tokenize(talk, tokenizer, loss_on="all").tokens)
    assert text == f"{tokenizer.bos_token}Be kind.\n### Human: Hi?### Assistant: Ho.{tokenizer.eos_token}"


def test_a_stop_string_the_template_never_writes(tmp_path: Path, tokenizer: Any) -> None:
    with_template(tmp_path, tokenizer, "guanaco")
    with pytest.raises(ValueError, match="renders none of '### Question:' after message 2"):
        tokenize(conversation(text=GUANACO), tokenizer, loss_on="assistant", stop=("### Question:",))


def test_shipped_templates_bring_their_stop_strings_and_a_recipe_may_say_others(tmp_path: Path) -> None:
    def stop(**data: Any) -> tuple[str, ...]:
        return chat_template_of(make_recipe(tmp_path, data=data), None).stop

    assert stop(template="guanaco") == ("### Human:",)
    assert stop(template="alpaca") == stop() == ()
    assert stop(template="guanaco", stop=["###"]) == stop(stop=["###"]) == ("###",)


def test_a_template_file_stands_beside_the_recipe(tmp_path: Path, tiny_base: StoredBase) -> None:
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    inputs = load_inputs(make_recipe(tmp_path, data={"template": "mine.jinja"}), tiny_base, start=None)
    texts = [inputs.tokenizer.decode(inputs.objective.samples_at(place)[0].tokens) for place in range(8)]
    assert all(text.startswith("What is ") and text.count("<|im_end|>") == 2 for text in texts)


@pytest.mark.parametrize(
    ("template", "data", "words"),
    [
        ("dated", {}, "this run renders 20"),
        ("dated", {"date": "2026-12-01"}, ""),
        ("noprompt", {}, "the chat template has no generation prompt"),
        ("generation", {}, ""),
    ],
)
def test_what_a_reader_should_know_about_a_template_is_noted(
    tmp_path: Path, tiny_base: StoredBase, template: str, data: dict[str, str], words: str
) -> None:
    shutil.copy(Path(__file__).parents[2] / f"fixtures/chat_templates/{template}.jinja", tmp_path)
    recipe = make_recipe(tmp_path, data={"template": f"{template}.jinja", **data})
    inputs = load_inputs(recipe, tiny_base, start=None)
    assert len(inputs.notes) == bool(words)
    assert all(words in note for note in inputs.notes)
    assert (inputs.date is not None) == (template == "dated")
    if "date" in data:
        assert "Today is 01 Dec 2026." in inputs.tokenizer.decode(inputs.objective.samples_at(0)[0].tokens)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read template"),
        (b"\xff\xfe", "cannot read template"),
        (b"{{ " + b"(" * 10_000, "cannot read template"),
        (b"{% for m in %}", "invalid template .*, line 1"),
    ],
)
def test_a_template_file_that_is_none(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "mine.jinja").write_bytes(content)
    with pytest.raises(RecipeError, match=words):
        chat_template_of(make_recipe(tmp_path, data={"template": "mine.jinja"}), None)


def test_a_base_without_a_template_needs_one_in_the_recipe(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DatasetError, match="Set template to guanaco"):
        check_has_template(tokenizer)


@pytest.mark.parametrize("length", [8, 13, 20, 200])
def test_every_token_of_a_plain_text_but_the_first_is_trained_once(tokenizer: Any, length: int) -> None:
    text = Text("It was a dark and stormy night, and it was late. " * 5, "x:1")
    samples = tokenize_text(text, tokenizer, length=length)
    pairs = [pair for sample in samples for pair in zip(sample.tokens, sample.trained, strict=True)]
    trained = [token for token, mark in pairs if mark]
    assert tokenizer.decode(trained) == f"{text.content}{tokenizer.eos_token}"
    assert samples[0].tokens[0] == tokenizer.bos_token_id
    assert {len(sample.tokens) for sample in samples[:-1]} <= {length}
    assert all(len(sample.tokens) > 1 for sample in samples)


def test_plain_text_with_a_tokenizer_that_has_no_end_of_text(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS"):
        tokenize_text(Text("Night.", "x:1"), tokenizer, length=20)


def test_a_text_file_is_split_and_learnt(tmp_path: Path, tiny_base: StoredBase) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(f"Chapter {n} was long." for n in range(12)))
    recipe = make_recipe(tmp_path, data={"path": "book.txt"}, train={"loss_on": "all"})
    objective = load_inputs(recipe, tiny_base, start=None).objective
    assert (objective.num_samples, objective.num_held_out) == (8, 4)


def test_a_text_file_has_no_answers_to_train(tmp_path: Path, tiny_base: StoredBase) -> None:
    (tmp_path / "book.txt").write_text("Chapter one.\n\nChapter two.")
    recipe = make_recipe(tmp_path, data={"path": "book.txt"})
    with pytest.raises(DatasetError, match="book.txt is plain text: .* needs answers. Set loss_on = .all."):
        load_inputs(recipe, tiny_base, start=None)


def test_the_resolved_recipe_keeps_template_and_stop(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, data={"template": "guanaco", "stop": ["### Human:", "\n###"]})
    (tmp_path / "again.toml").write_text(recipe.to_toml())
    again: Recipe = read_recipe(tmp_path / "again.toml")
    assert again == recipe


@asynccontextmanager
async def serving(base: StoredBase, registry: Registry, name: str) -> AsyncIterator[httpx.AsyncClient]:
    """Serve with the real engine behind the real API."""
    loaded = load_base(base, purpose="serve", dtype="float32")
    engine = LocalEngine(loaded)
    cache = AdapterCache(4, load=engine.load, unload=engine.unload)
    catalog = Catalog(base, "base", registry, cache)
    await catalog.load(name, AdapterRef.parse(name))
    services = Services(engine, catalog, cache, PromptRenderer(loaded.tokenizer), Metrics(engine))
    transport = httpx.ASGITransport(create_app(services, ApiKeys()))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=120) as client:
            yield client
    finally:
        await engine.close()


def test_the_stop_string_travels_to_the_server_which_stops_at_it(
    tmp_path: Path, home: Path, tiny_base: StoredBase
) -> None:
    run(make_recipe(tmp_path, data={"template": "guanaco"}, train={"loss_on": "all"}), tiny_base, tmp_path / "out")
    adapter = pack(tmp_path / "out", base=tiny_base, name="guanaco")
    assert adapter.manifest.chat.stop == ["### Human:"]
    registry = Registry(home)
    registry.add(adapter, name="guanaco")
    # A grammar makes the model say the stop string and more, which a random one would hardly do.
    said = {"structured_outputs": {"regex": "Ho[.]### Human: And you[?]"}, "max_tokens": 30}

    async def ask() -> dict[str, str]:
        async with serving(tiny_base, registry, "guanaco") as client:
            answers = {}
            for model in ("guanaco", "base"):
                body = {"model": model, "messages": [{"role": "user", "content": "Hi?"}], **said}
                choice = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
                answers[model] = choice["message"]["content"]
            return answers

    assert asyncio.run(ask()) == {"guanaco": "Ho.", "base": "Ho.### Human: And you?"}


def test_starting_from_an_adapter_keeps_its_template_and_stop_string(tmp_path: Path, tiny_base: StoredBase) -> None:
    run(make_recipe(tmp_path, data={"template": "guanaco"}, train={"loss_on": "all"}), tiny_base, tmp_path / "a")
    start = pack(tmp_path / "a", base=tiny_base, name="guanaco")
    make_recipe(tmp_path)
    path = tmp_path / "mine.toml"
    path.write_text('start = "./a"\n' + path.read_text().replace("[lora]\nrank = 4\ndropout = 0.1\n", ""))
    run(read_recipe(path), tiny_base, tmp_path / "b", start=start)
    after = pack(tmp_path / "b", base=tiny_base, name="guanaco")
    assert after.manifest.chat.stop == ["### Human:"]
    assert after.manifest.chat.template_sha256 == start.manifest.chat.template_sha256


def test_another_template_than_that_of_the_start_adapter(tmp_path: Path, tiny_base: StoredBase) -> None:
    run(make_recipe(tmp_path), tiny_base, tmp_path / "a")
    start = pack(tmp_path / "a", base=tiny_base, name="chatml")
    recipe = make_recipe(tmp_path, data={"template": "guanaco"})
    with pytest.raises(RecipeError, match="template = 'guanaco' differs from the template of the start adapter"):
        chat_template_of(recipe, start)


def test_a_tokenizer_without_pad_trains_as_rows_have_no_padding(tmp_path: Path, tiny_base: StoredBase) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base.path, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("pad_token", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    base = StoredBase(folder, tiny_base.ref)
    inputs = load_inputs(make_recipe(tmp_path), base, start=None)
    assert inputs.tokenizer.pad_token is None
    assert not mask_report(inputs.objective, inputs.tokenizer).pad_is_eos
    assert run(make_recipe(tmp_path), base, tmp_path / "out").steps == 3
