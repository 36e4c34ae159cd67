"""Answers that must match: a random model, which would never write JSON by itself, with SmolLM2's tokenizer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import threading
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_runs import GREEDY, NUM_TOKENS, ask, load_tiny, run, running, tokens_of
from tiny_models import TINY_VOCABULARY
from tokenizers_made import byte_fallback, unigrams, whole_words, word_pieces
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from adapterhub.adapter import BaseName, BaseRef, StoredBase
from adapterhub.bases.loading import load_base
from adapterhub.errors import ConstraintFailed, RequestFailed, ServerBusy, UsageError
from adapterhub.registry.registry import Registry
from serve.api.request_limits import MAX_GRAMMAR_LENGTH
from serve.api.schemas import ChatRequest
from serve.config import LocalEngineConfig, ServeConfig
from serve.engine import Delta, FinishReason, GenerationRequest, GuidedDecoding, SamplingParams
from serve.engine_choice import start_engine
from serve.local_engine import guided_decoding as module
from serve.local_engine.engine import LocalEngine
from serve.local_engine.guided_decoding import GuidedDecoder

PROMPT = (5, 6, 7)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def _answers(base: StoredBase, *guides: GuidedDecoding | None, temperature: float = 1.0) -> list[tuple[str, bool]]:
    """(text, did it end by itself) of one request per guided, all in one batch."""

    async def one(engine: LocalEngine, number: int, guided: GuidedDecoding | None) -> tuple[str, bool]:
        sampling = SamplingParams(max_tokens=120, temperature=temperature, seed=number, guided_decoding=guided)
        chunks = [chunk async for chunk in engine.generate(GenerationRequest(str(number), PROMPT, sampling))]
        return "".join(chunk.text for chunk in chunks), chunks[-1].finish_reason is FinishReason.STOP

    async def test() -> list[tuple[str, bool]]:
        engine = LocalEngine(load_base(base, purpose="serve", dtype="float32"))
        try:
            return await asyncio.gather(*(one(engine, n, guided) for n, guided in enumerate(guides)))
        finally:
            await engine.close()

    return asyncio.run(test())


def test_a_schema_an_expression_and_a_grammar_hold_beside_free_text(tiny_base: StoredBase) -> None:
    schema = GuidedDecoding("json_schema", json.dumps(SCHEMA))
    regex = GuidedDecoding("regex", "(red|green|blue) [0-9]{3}")
    grammar = GuidedDecoding("grammar", 'start: "yes" | "no"')
    (text, ended), (colour, colour_ended), (word, word_ended), (free, _) = _answers(
        tiny_base, schema, regex, grammar, None
    )
    assert (ended, colour_ended, word_ended) == (True, True, True)
    found = json.loads(text)
    assert found.keys() == {"name", "age"}
    assert len(found["name"]) <= 5
    assert 0 <= found["age"] <= 99
    assert re.fullmatch("(red|green|blue) [0-9]{3}", colour)
    assert word in ("yes", "no")
    assert not free.startswith("{")


def test_greedy_answers_hold_too(tiny_base: StoredBase) -> None:
    ((text, ended),) = _answers(tiny_base, GuidedDecoding("regex", "[a-c]{4}"), temperature=0.0)
    assert ended
    assert re.fullmatch("[a-c]{4}", text)


@pytest.mark.parametrize(
    ("guided", "said"),
    [
        (GuidedDecoding("regex", "(unclosed"), "regex"),
        (GuidedDecoding("json_schema", "{not json"), "json_schema"),
        (GuidedDecoding("json_schema", '{"type": "number", "minimum": 5, "maximum": 1}'), "json_schema"),
        (GuidedDecoding("grammar", "start: nothing"), "grammar"),
    ],
    ids=["bad expression", "not JSON", "impossible schema", "unknown rule"],
)
def test_guided_decoding_that_no_answer_can_follow_is_refused(
    tiny_base: StoredBase, guided: GuidedDecoding, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        _answers(tiny_base, guided)


X2500 = "start: " + " | ".join(f"x{n}" for n in range(2500)) + "".join(f'\nx{n}: "a" x{n} | "a"' for n in range(2500))
ITSELF = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}


NO_NEXT_TOKEN = [
    (GuidedDecoding("regex", r"[^\s\S]"), "no text satisfies it"),
    (GuidedDecoding("regex", r"a[^\s\S]"), "no text satisfies it"),
    (GuidedDecoding("json_schema", '{"$ref": "#"}'), "no text satisfies it"),
    (GuidedDecoding("json_schema", json.dumps(ITSELF)), "no text satisfies it"),
    (GuidedDecoding("grammar", "start: s\ns: s"), "no text satisfies it"),
    (GuidedDecoding("grammar", X2500), "Too many items"),
    (GuidedDecoding("grammar", 'start: s\ns: "a" s'), "Too many items"),  # the second token
    (GuidedDecoding("grammar", "start: " + " ".join(["A?"] * 1990) + '\nA: "a"'), "items"),
    (GuidedDecoding("json_schema", "[" * 100_000), "cannot be read"),
]


def test_guided_decoding_without_a_next_token_is_an_error_and_no_empty_answer(tiny_base: StoredBase) -> None:
    async def test() -> None:
        engine = LocalEngine(load_base(tiny_base, purpose="serve", dtype="float32"))

        async def one(number: int, guided: GuidedDecoding | None) -> list[int]:
            sampling = SamplingParams(max_tokens=20, temperature=0, guided_decoding=guided, ignore_eos=True)
            request = GenerationRequest(str(number), PROMPT, sampling)
            return [token async for chunk in engine.generate(request) for token in chunk.tokens]

        try:
            alone = await one(0, None)
            asked = [one(number, guided) for number, (guided, _) in enumerate(NO_NEXT_TOKEN, 1)]
            beside, *found = await asyncio.gather(one(0, None), *asked, return_exceptions=True)
            assert beside == alone
            for error, (guided, said) in zip(found, NO_NEXT_TOKEN, strict=True):
                assert isinstance(error, ConstraintFailed), guided
                assert said in str(error), guided
            assert await one(0, None) == alone
        finally:
            await engine.close()

    asyncio.run(test())


def test_a_complete_match_ends_the_answer_however_often_the_end_is_ignored(tiny_base: StoredBase) -> None:
    async def test() -> None:
        engine = LocalEngine(load_base(tiny_base, purpose="serve", dtype="float32"))
        try:
            for text in ("", "(a?){2000}", "ab?"):
                guided = GuidedDecoding("regex", text)
                sampling = SamplingParams(max_tokens=6, temperature=0, guided_decoding=guided, ignore_eos=True)
                chunks = [chunk async for chunk in engine.generate(GenerationRequest("a", PROMPT, sampling))]
                assert chunks[-1].finish_reason is FinishReason.LENGTH
                assert re.fullmatch(text, "".join(chunk.text for chunk in chunks))
        finally:
            await engine.close()

    asyncio.run(test())


def _sampling(**options: object) -> SamplingParams:
    body = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "x"}], **options})
    return body.sampling(max_tokens=5, extra_stop=[], end_tokens=[], top_logprobs=None)[0]


def test_openais_and_vllms_ways_to_ask_give_the_same() -> None:
    wanted = GuidedDecoding("json_schema", json.dumps(SCHEMA, separators=(",", ":")))
    openai = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    assert _sampling(response_format=openai).guided_decoding == wanted
    assert _sampling(structured_outputs={"json": SCHEMA}).guided_decoding == wanted
    assert _sampling(response_format={"type": "json_object"}).guided_decoding == GuidedDecoding(
        "json_schema", '{"type":"object"}'
    )
    assert _sampling(structured_outputs={"choice": ["a.b", "c"]}).guided_decoding == GuidedDecoding(
        "regex", r"(?:a\.b)|(?:c)"
    )
    assert _sampling(response_format={"type": "text"}).guided_decoding is None
    assert _sampling(logit_bias={"7": -100, "8": 2.5}).logit_bias == ((7, -100.0), (8, 2.5))


@pytest.mark.parametrize(
    "options",
    [
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "yaml"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": "{}"}}},
        {"structured_outputs": {}},
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        {"logit_bias": {"7": 101}},
        {"logit_bias": {"seven": 1}},
    ],
    ids=str,
)
def test_contradictions_and_strange_values_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        _sampling(**options)


def test_a_bias_on_a_token_that_does_not_exist_is_refused(tiny_base: StoredBase) -> None:
    async def test() -> None:
        engine = LocalEngine(load_base(tiny_base, purpose="serve", dtype="float32"))
        try:
            sampling = SamplingParams(logit_bias=((TINY_VOCABULARY, 1.0),))
            with pytest.raises(UsageError, match=str(TINY_VOCABULARY)):
                await anext(engine.generate(GenerationRequest("a", PROMPT, sampling)))
        finally:
            await engine.close()

    asyncio.run(test())


def _schema_chain(length: int) -> str:
    """Make a JSON schema of about `length` characters, in which each object holds the next."""
    count = (length - 80) // 54
    links = {f"{n:05}": {"properties": {"a": {"$ref": f"#/$defs/{n + 1:05}"}}} for n in range(count)} | {
        f"{count:05}": {"type": "null"}
    }
    return json.dumps({"$defs": links, "$ref": "#/$defs/00000"}, separators=(",", ":"))


def _rule_chain(length: int) -> str:
    """Make a grammar of about `length` characters, in which each rule is the next."""
    count = (length - 40) // 15
    return "start: r00000\n" + "\n".join(f"r{n:05}: r{n + 1:05}" for n in range(count)) + f'\nr{count:05}: "a"\n'


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", _schema_chain(MAX_GRAMMAR_LENGTH)),
        ("grammar", _rule_chain(MAX_GRAMMAR_LENGTH)),
        ("grammar", f"start: {'(' * 30_000}'a'{')' * 30_000}"),
        ("regex", f"{'(' * 30_000}a{')' * 30_000}"),
        ("json_schema", f"{'[' * 30_000}{']' * 30_000}"),
        ("choice", "." * MAX_GRAMMAR_LENGTH),
        ("choice", ",".join(f"{n:05}." for n in range(MAX_GRAMMAR_LENGTH // 7))),
    ],
    ids=[
        "schema that refers on", "rules that refer on", "brackets in a grammar", "brackets in a regex", "lists",
        "one long choice", "many choices",
    ],
)  # fmt: skip
def test_the_deepest_grammars_within_the_limit_end_nothing(tiny_base: StoredBase, kind: str, text: str) -> None:
    """A stack that overflows would end this process, or the server."""
    assert len(text) <= MAX_GRAMMAR_LENGTH
    given = GuidedDecoding(kind, text)  # type: ignore[arg-type]
    if kind == "choice":
        built = _sampling(structured_outputs={"choice": text.split(",")}).guided_decoding
        assert built is not None
        given = built
    decoder = GuidedDecoder(AutoTokenizer.from_pretrained(tiny_base.path))
    try:
        with contextlib.suppress(ConstraintFailed):
            decoder.begin(given).result()
        matcher = decoder.begin(GuidedDecoding("regex", "a")).result()
        assert matcher.is_ready
    finally:
        decoder.close()


class Panic(BaseException):
    """As PyO3's, of a Rust library that failed: no Exception."""


def _tokenizer(made: Any, eos: str | None = "</s>") -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos)


TOKENIZERS = {
    "byte fallback": (_tokenizer(byte_fallback()), True),
    "byte fallback, as Gemma's": (_tokenizer(byte_fallback(strips_a_space=False)), True),
    "without an end": (_tokenizer(byte_fallback(), None), True),
    "word pieces": (_tokenizer(word_pieces(), "[UNK]"), False),
    "unigrams": (_tokenizer(unigrams()), False),
    "no decoder": (_tokenizer(whole_words()), False),
}
"""name -> (tokenizer, can llguidance read it?)"""


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_guided_decoding_cannot_read_serves_all_but_that(name: str, tiny_base: StoredBase) -> None:
    tokenizer, is_readable = TOKENIZERS[name]
    guided = replace(GREEDY, guided_decoding=GuidedDecoding("regex", "a[ab]*"))

    async def test() -> None:
        async with running(replace(load_tiny(tiny_base), tokenizer=tokenizer)) as engine:
            engine.prepare()
            noted = [choice for choice in engine.choices if choice.what == "guided decoding"]
            assert len(noted) == (not is_readable)
            if is_readable:
                assert len(tokens_of(await ask(engine, GenerationRequest("guided", PROMPT, guided)))) == NUM_TOKENS
            else:
                assert "cannot read this base's tokenizer: can't determine decoder type" in noted[0].reason
                for _ in range(2):
                    with pytest.raises(ConstraintFailed, match="guided decoding cannot read this base's tokenizer"):
                        await ask(engine, GenerationRequest("guided", PROMPT, guided))
            assert len(tokens_of(await ask(engine, GenerationRequest("free", PROMPT, GREEDY)))) == NUM_TOKENS

    run(test)


def test_a_server_starts_on_a_base_whose_tokenizer_guided_decoding_cannot_read(
    tiny_base: StoredBase, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_base.path, tmp_path / "base")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    TOKENIZERS["word pieces"][0].save_pretrained(folder)
    reported: list[str] = []

    async def test() -> None:
        config = ServeConfig(base=BaseName.parse(str(folder)), dtype="float32")
        stored = StoredBase(folder, BaseRef("tests/words"), "apache-2.0")
        engine, _ = await start_engine(config, stored, Registry(tmp_path), report=reported.append)
        await engine.close()

    run(test)
    assert any(line.startswith("guided decoding: refused (guided decoding cannot read") for line in reported)


def test_a_panic_while_the_vocabulary_is_read_is_a_refusal(
    tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(tokenizer: Any) -> None:
        raise Panic("index out of bounds")

    monkeypatch.setattr(module, "from_tokenizer", broken)
    with pytest.raises(ConstraintFailed, match="tokenizer: index out of bounds"):
        _answers(tiny_base, GuidedDecoding("regex", "a"))


@pytest.mark.parametrize("error", [KeyError("broken"), Panic("broken"), SystemExit("broken")], ids=repr)
def test_what_fails_while_a_grammar_is_read_ends_its_request_with_the_reason(
    tiny_base: StoredBase, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(guided: GuidedDecoding) -> None:
        raise error

    monkeypatch.setattr(module, "_grammar", broken)
    with pytest.raises(RequestFailed, match=f"{type(error).__name__}: .?broken"):
        _answers(tiny_base, GuidedDecoding("regex", "a"))


class _Reading:
    """Grammars whose text begins with `slow` are read once `may_continue` is set; all that were read are noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_continue = threading.Event()
        self.read: list[str] = []
        grammar = module._grammar

        def held(guided: GuidedDecoding) -> str:
            self.read.append(guided.text)
            if guided.text.startswith("slow"):
                self.may_continue.wait()
            return grammar(guided)

        monkeypatch.setattr(module, "_grammar", held)


def test_a_guided_answer_continues_while_others_are_being_read_and_those_count_as_waiting(
    tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def guided(name: str, text: str) -> GenerationRequest:
        return GenerationRequest(name, PROMPT, replace(GREEDY, guided_decoding=GuidedDecoding("regex", text)))

    async def rest(stream: AsyncGenerator[Delta, None]) -> int:
        return len([chunk async for chunk in stream])

    async def test() -> None:
        reading = _Reading(monkeypatch)
        async with running(load_tiny(tiny_base), LocalEngineConfig(max_queue=6)) as engine:
            stream = engine.generate(guided("first", "[a-z]{200}"))
            try:
                await anext(stream)
                crowd = [asyncio.ensure_future(ask(engine, guided(f"{n}", f"slow{n}[a-z]*"))) for n in range(6)]
                while engine.status().num_waiting < 6:
                    await asyncio.sleep(0.001)
                with pytest.raises(ServerBusy, match="6 requests are waiting"):
                    await ask(engine, guided("one too many", "a"))
                assert await rest(stream) == NUM_TOKENS - 1
                assert not any(one.done() for one in crowd)
                crowd[0].cancel()
            finally:
                reading.may_continue.set()
            _, *answers = await asyncio.gather(*crowd, return_exceptions=True)
            for number, answer in enumerate(answers, 1):
                assert isinstance(answer, list), answer
                assert "".join(chunk.text for chunk in answer).startswith(f"slow{number}")
            assert engine.status().num_waiting == 0

    run(test)


def test_the_choices_of_a_question_share_what_was_read_and_draw_for_themselves(
    tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = _Reading(monkeypatch)
    wanted = GuidedDecoding("regex", "(red|green|blue) [0-9]{3}")
    answers = _answers(tiny_base, *[wanted] * 8)
    assert len(reading.read) <= module._NUM_COMPILERS
    assert all(re.fullmatch(wanted.text, text) and ended for text, ended in answers)
    assert len({text for text, _ in answers}) > 4
