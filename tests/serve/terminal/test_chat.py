"""The terminal chat: one question, conversations with commands, and every way a server can fail them."""

from __future__ import annotations

import io
import json
import os
import pty
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from child_signals import default_sigint
from fake_api import KEY, MODELS, FakeApi, start_fake_api

from adapterhub.errors import AdapterHubError, AdapterNotFound, NotAuthorized, ServeError, UsageError
from serve.client import Sampling
from serve.terminal.chat import ChatOptions, run_chat

COMMAND = str(Path(sys.executable).with_name("adapterhub"))
WAIT_S = 30


@pytest.fixture(scope="module")
def running() -> Iterator[FakeApi]:
    with start_fake_api(page=False) as api:
        yield api


@pytest.fixture
def api(running: FakeApi, monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    for variable in ("ADAPTERHUB_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    running.forget()
    return running


def options(api: FakeApi, **changes: Any) -> ChatOptions:
    given = {"url": f"{api.url}/v1", "model": "captain", "system": None, "sampling": Sampling(0.5, 64)}
    return ChatOptions(**(given | changes))


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Set the text on stdin when the chat starts."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


@pytest.fixture
def chat(
    api: FakeApi, typed: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """Have a conversation line by line; return stdout and stderr."""

    def run(*lines: str, **changes: Any) -> tuple[str, str]:
        typed("\n".join(lines) + "\n")
        run_chat(options(api, **changes), prompt=None)
        answered, said = capsys.readouterr()
        return answered, said

    return run


# One question


def test_prompt_is_answered_on_stdout_and_nothing_else_is(
    api: FakeApi, typed: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    typed("")
    run_chat(options(api, system="Be brief."), prompt="ahoy")
    assert capsys.readouterr() == ("captain says: ahoy\n", "")
    body = api.requests()[0]["body"]
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ahoy"}]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("captain", 64, 0.5)


def test_piped_text_follows_the_prompt(api: FakeApi, typed: Callable[[str], None]) -> None:
    typed("line one\nline two\n")
    run_chat(options(api), prompt="Sum up:")
    assert api.requests()[0]["body"]["messages"][-1]["content"] == "Sum up:\n\nline one\nline two"


def test_piped_bytes_that_are_no_utf8(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    piped = b"gr\xfc\xdfe"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped), encoding="utf-8"))
    run_chat(options(api), prompt="Sum up:")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped + b"\nnext\n"), encoding="utf-8"))
    run_chat(options(api), prompt=None)
    asked = [request["body"]["messages"][-1]["content"] for request in api.requests()]
    assert asked == ["Sum up:\n\ngr\ufffd\ufffde", "gr\ufffd\ufffde", "next"]


def test_without_a_model_the_base_answers(
    api: FakeApi, typed: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    typed("")
    run_chat(options(api, model=None), prompt="ahoy")
    assert capsys.readouterr().out == "tiny-base says: ahoy\n"


def test_answer_and_its_figures_are_one_json_object(
    api: FakeApi, typed: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    typed("")
    run_chat(options(api, sampling=Sampling(0.5, 64, 0.9, 7)), prompt="ahoy", as_json=True)
    out, said = capsys.readouterr()
    found = json.loads(out)
    assert (found["model"], found["answer"], found["finish_reason"]) == ("captain", "captain says: ahoy", "stop")
    assert (found["prompt_tokens"], found["completion_tokens"]) == (7, 3)
    assert found["first_token_s"] > 0
    assert said == ""
    assert (api.requests()[0]["body"]["top_p"], api.requests()[0]["body"]["seed"]) == (0.9, 7)


def test_json_without_a_prompt_is_wrong_usage() -> None:
    ended = subprocess.run([COMMAND, "chat", "captain", "--json"], capture_output=True, text=True)
    assert ended.returncode == 2
    assert "it needs --prompt" in ended.stderr


def test_empty_prompt_is_refused(api: FakeApi, typed: Callable[[str], None]) -> None:
    typed("")
    with pytest.raises(UsageError, match="the prompt is empty"):
        run_chat(options(api), prompt="")


# Failures


@pytest.mark.parametrize(
    ("question", "error", "said"),
    [
        ("404", AdapterNotFound, "the model 'captain' does not exist here; nearest: captain."),
        ("500 once", ServeError, "the server failed unexpectedly"),
        ("drop", ServeError, "broke before the answer was complete"),
        ("error event", ServeError, "the engine stopped."),
    ],
)
def test_failed_answer_is_one_line(
    api: FakeApi, typed: Callable[[str], None], question: str, error: type[AdapterHubError], said: str
) -> None:
    typed("")
    with pytest.raises(error) as raised:
        run_chat(options(api), prompt=question)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_no_server_says_how_to_start_one(api: FakeApi, typed: Callable[[str], None]) -> None:
    typed("")
    with pytest.raises(
        ServeError, match=r"cannot connect to http://127\.0\.0\.1:9/v1: .* Start one with 'adapterhub serve'"
    ):
        run_chat(options(api, url="http://127.0.0.1:9/v1"), prompt="ahoy")


def test_address_that_is_no_api_is_reported(api: FakeApi, typed: Callable[[str], None]) -> None:
    typed("")
    with pytest.raises(UsageError, match="expected an address that ends in /v1"):
        run_chat(options(api, url=api.url), prompt="ahoy")


def test_missing_key_says_where_it_is_read_from(api: FakeApi, typed: Callable[[str], None]) -> None:
    typed("")
    with pytest.raises(NotAuthorized, match="ADAPTERHUB_API_KEY or OPENAI_API_KEY"):
        run_chat(options(api, url=f"{api.keyed_url}/v1"), prompt="ahoy")


@pytest.mark.parametrize("variable", ["ADAPTERHUB_API_KEY", "OPENAI_API_KEY"])
def test_key_is_taken_from_the_environment(
    api: FakeApi,
    typed: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str,
) -> None:
    typed("")
    monkeypatch.setenv(variable, KEY)
    run_chat(options(api, url=f"{api.keyed_url}/v1"), prompt="ahoy")
    assert capsys.readouterr().out == "captain says: ahoy\n"


def test_unknown_adapter_ends_the_conversation_before_it_begins(api: FakeApi, typed: Callable[[str], None]) -> None:
    typed("ahoy\n")
    with pytest.raises(AdapterNotFound):
        run_chat(options(api, model="kaptain"), prompt=None)


def test_conversation_continues_after_a_failure(chat: Callable[..., tuple[str, str]]) -> None:
    answered, said = chat("500 once", "/retry", "next")
    assert answered == "captain says: 500 once\ncaptain says: next\n"
    assert "the server failed unexpectedly" in said


# Conversations


def test_whole_conversation_is_sent_and_the_adapter_can_change(
    api: FakeApi, chat: Callable[..., tuple[str, str]]
) -> None:
    answered, _ = chat("one", "/adapter trivia", "two")
    assert answered == "captain says: one\ntrivia says: two\n"
    last = api.requests()[-1]["body"]
    assert last["model"] == "trivia"
    assert [message["content"] for message in last["messages"]] == ["one", "captain says: one", "two"]


def test_question_without_an_answer_is_not_sent_again(api: FakeApi, chat: Callable[..., tuple[str, str]]) -> None:
    chat("404", "two")
    assert [message["content"] for message in api.requests()[-1]["body"]["messages"]] == ["two"]


def test_unknown_adapter_is_refused_and_the_old_one_stays(chat: Callable[..., tuple[str, str]]) -> None:
    answered, said = chat("/adapter kaptain", "one")
    assert answered == "captain says: one\n"
    assert "'kaptain' does not exist here" in said


def test_undo_removes_the_last_message_and_its_answer(api: FakeApi, chat: Callable[..., tuple[str, str]]) -> None:
    _, said = chat("one", "two", "/undo", "three")
    assert "removed: two" in said
    contents = [message["content"] for message in api.requests()[-1]["body"]["messages"]]
    assert contents == ["one", "captain says: one", "three"]


def test_retry_asks_the_last_question_again(api: FakeApi, chat: Callable[..., tuple[str, str]]) -> None:
    answered, _ = chat("one", "/adapter trivia", "/retry")
    assert answered == "captain says: one\ntrivia says: one\n"
    assert [message["content"] for message in api.requests()[-1]["body"]["messages"]] == ["one"]


def test_clear_forgets_turns_and_keeps_the_system_prompt(api: FakeApi, chat: Callable[..., tuple[str, str]]) -> None:
    chat("/system Be brief.", "one", "/clear", "two")
    messages = api.requests()[-1]["body"]["messages"]
    assert [message["content"] for message in messages] == ["Be brief.", "two"]


def test_adapters_marks_base_and_current(chat: Callable[..., tuple[str, str]]) -> None:
    _, said = chat("/adapters")
    assert "  tiny-base (base)\n* captain (rank 8, sha256:0123456789ab)\n  trivia" in said


def test_save_appends_one_line_of_training_data(tmp_path: Path, chat: Callable[..., tuple[str, str]]) -> None:
    file = tmp_path / "kept.jsonl"
    file.write_text('{"messages": []}')
    chat("one", "404", f"/save {file}", system="Be brief.")
    before, added = file.read_text().splitlines()
    assert before == '{"messages": []}'
    assert json.loads(added)["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "captain says: one"},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["kept.jsonl"]


def test_save_behind_bytes_that_are_no_utf8(tmp_path: Path, chat: Callable[..., tuple[str, str]]) -> None:
    file = tmp_path / "kept.jsonl"
    file.write_bytes(b"gr\xfc\xdfe")
    chat("one", f"/save {file}", f"/save {file}")
    before, *added = file.read_bytes().splitlines()
    assert before == b"gr\xfc\xdfe"
    assert [json.loads(line)["messages"][0]["content"] for line in added] == ["one", "one"]


def test_save_to_a_file_that_cannot_grow_by_a_line(tmp_path: Path, chat: Callable[..., tuple[str, str]]) -> None:
    file = tmp_path / "kept.jsonl"
    file.write_bytes(b"x" * 1_000_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_010, limits[1]))
    try:
        _, said = chat("one", f"/save {file}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in said
    assert file.read_bytes() == b"x" * 1_000_000


def test_undone_answer_is_judged_no_more(api: FakeApi, chat: Callable[..., tuple[str, str]]) -> None:
    _, said = chat("one", "two", "/undo", "/good", "/stats", "/undo", "/good")
    assert [given["answer"]["text"] for given in api.posted()] == ["captain says: one"]
    assert "1 answers, 3 tokens, 2 messages" in said
    assert "there is no answer to rate" in said


def test_compare_leaves_the_answer_to_be_judged(api: FakeApi, chat: Callable[..., tuple[str, str]]) -> None:
    chat("one", "/compare trivia", "/good")
    assert [given["answer"]["model"] for given in api.posted()] == ["captain"]


def test_compare_lets_others_answer_beside_the_conversation(api: FakeApi, chat: Callable[..., tuple[str, str]]) -> None:
    answered, said = chat("one", "/compare tiny-base trivia", "two")
    assert answered == "captain says: one\ntiny-base says: one\ntrivia says: one\ncaptain says: two\n"
    assert said.index("-- tiny-base") < said.index("-- trivia")
    contents = [message["content"] for message in api.requests()[-1]["body"]["messages"]]
    assert contents == ["one", "captain says: one", "two"]


def test_several_lines_between_marks_are_one_question(api: FakeApi, chat: Callable[..., tuple[str, str]]) -> None:
    chat('"""', "def f():", "    return 1", '"""', '"""on one line"""', '"""begun', 'ended"""')
    asked = [request["body"]["messages"][-1]["content"] for request in api.requests()]
    assert asked == ["def f():\n    return 1", "on one line", "begun\nended"]


def test_set_changes_the_sampling_of_the_next_answer(api: FakeApi, chat: Callable[..., tuple[str, str]]) -> None:
    _, said = chat("/set temperature 0", "/set max_tokens 9", "/set seed 4", "one", "/set seed", "two")
    first, second = (request["body"] for request in api.requests())
    assert (first["temperature"], first["max_tokens"], first["seed"]) == (0, 9, 4)
    assert "seed" not in second
    assert "temperature 0.0, max_tokens 9, top_p 1.0, seed 4" in said


def test_thumbs_and_a_correction_are_sent(api: FakeApi, chat: Callable[..., tuple[str, str]]) -> None:
    _, said = chat("one", "/good", "two", "/bad", "/correct Aye: two.", "three", system="Be brief.")
    up, down, correction = api.posted()
    assert (up["thumb"], down["thumb"], correction["text"]) == ("up", "down", "Aye: two.")
    assert up["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}]
    assert correction["answer"] == {"model": "captain", "digest": MODELS[1]["digest"], "text": "captain says: two"}
    assert "the conversation continues from it" in said
    assert "Aye: two." in [message["content"] for message in api.requests()[-1]["body"]["messages"]]


def test_stats_name_adapter_and_rate(chat: Callable[..., tuple[str, str]]) -> None:
    _, said = chat("one two three", "/stats")
    assert "captain · " in said
    assert " tok/s · " in said
    assert "1 answers, 5 tokens, 2 messages" in said


def test_help_lists_every_command(chat: Callable[..., tuple[str, str]]) -> None:
    _, said = chat("/help", "/quit", "never asked")
    for command in ("/adapter NAME", "/adapters", "/system TEXT", "/undo", "/retry", "/clear", "/save FILE", "/stats",
                    "/compare NAMES", "/set KEY VALUE", "/good", "/bad", "/correct TEXT"):  # fmt: skip
        assert f"  {command} " in said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/adapt", "unknown command /adapt: expected one of /help. Did you mean /adapter?"),
        ("/adapter", "/adapter has no NAME"),
        ("/save", "/save has no FILE"),
        ("/save nowhere.jsonl", "there is no answer to save"),
        ("/undo", "there is no message yet"),
        ("/retry", "there is no message yet"),
        ("/stats", "there is no answer yet"),
        ("/compare", "/compare has no NAMES"),
        ("/compare trivia", "there is no message yet"),
        ("/good", "there is no answer to rate"),
        ("/correct", "/correct has no TEXT"),
        ("/correct Aye.", "there is no answer to rate"),
        ("/set temprature 1", "unknown parameter temprature: expected temperature, top_p, max_tokens, seed."),
        ("/set temperature hot", "invalid temperature 'hot': expected a number from 0 to 2."),
        ("/set max_tokens 0", "invalid max_tokens '0': expected a number from 1 to 1e+06."),
    ],
)
def test_command_that_makes_no_sense_is_reported(chat: Callable[..., tuple[str, str]], line: str, said: str) -> None:
    assert said in chat(line)[1]


def test_unwritable_file_is_reported(tmp_path: Path, chat: Callable[..., tuple[str, str]]) -> None:
    answered, said = chat("one", f"/save {tmp_path}", "two")
    assert "Is a directory" in said
    assert answered.endswith("captain says: two\n")


def test_two_slashes_send_a_line_that_begins_with_one(api: FakeApi, chat: Callable[..., tuple[str, str]]) -> None:
    chat("//etc is what?")
    assert api.requests()[0]["body"]["messages"][-1]["content"] == "/etc is what?"


# A real terminal


class Terminal:
    """The command `adapterhub chat` in a terminal of its own."""

    def __init__(self, *arguments: str, home: Path) -> None:
        self._fd, theirs = pty.openpty()
        environment = {**os.environ, "ADAPTERHUB_HOME": str(home), "TERM": "dumb"}
        command = [COMMAND, "chat", *arguments]
        with default_sigint():
            self._child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        self._shown = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def interrupt(self) -> None:
        self._child.send_signal(signal.SIGINT)

    def wait_for(self, text: str) -> str:
        """Wait until `text` is shown and give what was shown before it; the next call looks behind it."""
        deadline = time.monotonic() + WAIT_S
        while text not in self._shown:
            ready, _, _ = select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} was never shown: {self._shown!r}"
            self._shown += os.read(self._fd, 4096).decode()
        before, _, self._shown = self._shown.partition(text)
        return before

    def end(self) -> int:
        """Type Ctrl+D; the exit status."""
        self.type("\x04")
        try:
            return self._child.wait(WAIT_S)
        finally:
            self._child.kill()
            os.close(self._fd)


def test_ctrl_c_stops_the_answer_and_keeps_what_came(api: FakeApi, tmp_path: Path) -> None:
    terminal = Terminal("captain", "--url", f"{api.url}/v1", home=tmp_path)
    terminal.wait_for("captain> ")
    terminal.type("slow\n")
    terminal.wait_for("and 3")
    terminal.interrupt()
    terminal.wait_for("[stopped; the text so far is kept]")
    terminal.wait_for("captain> ")
    terminal.type("go on\n")
    terminal.wait_for("captain says: go on")
    terminal.wait_for("captain> ")
    assert terminal.end() == 0
    stopped, following = api.requests()
    assert stopped["is_cancelled"]
    assert following["body"]["messages"][1]["content"].startswith("captain says: slow and 0 and 1 and 2 and 3")
    history = tmp_path / "chat_history"
    assert history.read_text().splitlines() == ["slow", "go on"]
    assert history.stat().st_mode & 0o777 == 0o600


def test_answer_cannot_command_the_terminal(api: FakeApi, tmp_path: Path) -> None:
    terminal = Terminal(
        "captain", "--url", f"{api.url}/v1", "--prompt", "red \x1b[31m title \x1b]0;mine\x07 done", home=tmp_path
    )
    assert "captain says: red [31m title ]0;mine done" in terminal.wait_for("\n")
    assert terminal.end() == 0


def test_command_line_reports_a_missing_server_in_one_line() -> None:
    command = [COMMAND, "chat", "--url", "http://127.0.0.1:9/v1", "-p", "ahoy"]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (1, "")
    expected = (
        "cannot connect to http://127.0.0.1:9/v1: no server is listening there. Start one with 'adapterhub serve'."
    )
    assert ended.stderr == f"adapterhub: {expected}\n"
