"""Every refusal as a user sees it: one line, what to do next, the exit code of the error tree."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from child_signals import default_sigint
from hub_fixtures import ALICE, PEOPLE, start_hub
from packages import write_package, write_peft_folder
from road import COMMAND, run, run_any

from adapterhub import errors
from adapterhub.adapter import StoredBase
from adapterhub.cli.main import main

RECIPE = """
name = "short"
base = "{base}"
[data]
source = "file"
path = "data.jsonl"
[train]
steps = {steps}
batch_size = 1
"""
Done = subprocess.CompletedProcess[str]
LINE = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]})


def _recipe(folder: Path, base: StoredBase, *, steps: int = 1, extra: str = "", lines: list[str] | None = None) -> Path:
    different = [LINE.replace("Hi", f"Hi {n}") for n in range(20)]
    (folder / "data.jsonl").write_text("\n".join(different if lines is None else lines) + "\n")
    recipe = folder / "short.toml"
    recipe.write_text(RECIPE.format(base=base.path, steps=steps) + extra)
    return recipe


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """One command that fails, in this process, which has imported already what takes a process of its own seconds."""

    def run_command(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["adapterhub", *arguments])
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            signal.signal(signal.SIGTERM, handler)
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Done(arguments, ended.value.code, said.out, said.err)

    return run_command


def _refused(done: Done, code: int, *said: str) -> None:
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == code, done.stderr
    assert last.startswith("adapterhub: ")
    assert "Traceback" not in done.stderr
    for words in said:
        assert words in last


def test_every_error_class_has_an_exit_code_and_a_status() -> None:
    tree = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    for error in tree:
        assert error.exit_code in (1, 2, 3, 4, 5, 75, 130)  # type: ignore[attr-defined]
        assert 400 <= error.http_status < 600  # type: ignore[attr-defined]
        assert error.__name__ in (errors.__doc__ or "")


def test_help_and_version() -> None:
    done = subprocess.run([COMMAND, "--help"], capture_output=True, text=True, check=True)
    for verb in ("train", "pack", "verify", "inspect", "push", "pull", "list", "resolve", "serve", "chat", "demo"):
        assert f"  {verb} " in done.stdout
    assert "0.1.0" in subprocess.run([COMMAND, "--version"], capture_output=True, text=True, check=True).stdout


def test_a_mistyped_option_is_wrong_usage(home: Path) -> None:
    assert run_any("list", "--jsn", home=home).returncode == 2


def test_all_faults_of_a_recipe_come_at_once_with_the_nearest_key(
    run_here: Callable[..., Done], home: Path, tmp_path: Path, tiny_base: StoredBase
) -> None:
    recipe = _recipe(tmp_path, tiny_base, extra="learning_rat = 1\n[lora]\nranks = 4\n")
    done = run_here("train", str(recipe), "--output", str(tmp_path / "out"))
    _refused(done, 2, "learning_rate", "ranks", "rank", "short.toml")
    assert not (tmp_path / "out").exists()


def test_malformed_data_is_named_by_file_and_line(
    run_here: Callable[..., Done], home: Path, tmp_path: Path, tiny_base: StoredBase
) -> None:
    recipe = _recipe(tmp_path, tiny_base, lines=[LINE, "{", LINE, '{"messages": 1}'])
    done = run_here("train", str(recipe), "--output", str(tmp_path / "out"))
    *faults, advice = done.stderr.strip().splitlines()[-4:]
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert faults[0].startswith("adapterhub: ")
    assert ["data.jsonl:2" in faults[1], "data.jsonl:4" in faults[2]] == [True, True]
    assert advice.startswith("Correct these rows")
    assert not (tmp_path / "out").exists()


def test_an_output_folder_in_use_is_refused(
    run_here: Callable[..., Done], home: Path, tmp_path: Path, tiny_base: StoredBase
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    done = run_here("train", str(_recipe(tmp_path, tiny_base)), "--output", str(tmp_path / "out"))
    _refused(done, 2, str(tmp_path / "out"))
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--output", "taken"), "taken already exists"),
        (("--nodes", "2"), "give --launch N"),
        (("--rendezvous", "a:1"), "give --launch N"),
        (("--launch", "2", "--nodes", "2"), "--rendezvous HOST:PORT"),
        (("--shard",), "give --launch N"),
    ],
)
def test_train_refuses_its_options_before_it_looks_for_the_base(
    run_here: Callable[..., Done], home: Path, tmp_path: Path, tiny_base: StoredBase, monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...], said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").touch()
    recipe = _recipe(tmp_path, tiny_base)
    recipe.write_text(recipe.read_text().replace(str(tiny_base.path), "./no-base"))
    _refused(run_here("train", str(recipe), *options), 2, said)


def test_an_interrupted_training_writes_no_adapter_and_says_how_to_resume(
    home: Path, tmp_path: Path, tiny_base: StoredBase
) -> None:
    recipe, output = _recipe(tmp_path, tiny_base, steps=100_000), tmp_path / "out"
    with default_sigint():
        process = subprocess.Popen(
            [COMMAND, "train", str(recipe), "--output", str(output)], stderr=subprocess.PIPE, text=True
        )
    log = tmp_path / "out.run" / "train_log.jsonl"
    while not (log.exists() and '"step"' in log.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert f"adapterhub train --resume {output}" in said
    assert not output.exists()


def test_a_folder_with_a_pickle_is_refused(home: Path, tmp_path: Path) -> None:
    package = write_package(tmp_path / "p")
    (package / "adapter_model.bin").write_bytes(b"\x80\x04.")
    _refused(run_any("verify", str(package), home=home), 4, "adapter_model.bin")


def test_truncated_tensors_are_refused(home: Path, tmp_path: Path) -> None:
    package = write_package(tmp_path / "p")
    weights = package / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    _refused(run_any("verify", str(package), home=home), 4, "bytes")
    _refused(run_any("add", str(package), home=home), 4, "bytes")
    assert run("list", "--json", home=home).stdout.strip() == "[]"


def test_packing_without_a_base_says_what_is_missing(home: Path, tmp_path: Path) -> None:
    _refused(run_any("pack", str(write_peft_folder(tmp_path / "p")), home=home), 2, "--base")


def test_an_adapter_for_another_base_is_refused_by_the_server(
    home: Path, tmp_path: Path, tiny_base: StoredBase
) -> None:
    package = write_package(tmp_path / "p")
    arguments = ["serve", "--base", str(tiny_base.path), "--adapter", f"x={package}", "--port", "0", "--no-page"]
    _refused(run_any(*arguments, home=home), 5, "owner/base", str(tiny_base.path))


def test_an_open_interface_without_a_key_is_refused(home: Path, tiny_base: StoredBase) -> None:
    done = run_any("serve", "--base", str(tiny_base.path), "--host", "0.0.0.0", home=home, ADAPTERHUB_API_KEY="")
    _refused(done, 2, "ADAPTERHUB_API_KEY")


def test_an_unknown_base_lists_the_known_ones(home: Path) -> None:
    _refused(run_any("base", "pull", "smolm", home=home), 3, "smollm2-135m-instruct")


def test_an_unknown_adapter_names_the_nearest(home: Path, tmp_path: Path) -> None:
    run("add", str(write_package(tmp_path / "p", name="captain")), home=home)
    _refused(run_any("inspect", "captan", home=home), 3, "captain")
    assert "captain" in run("list", home=home).stdout


def test_an_unreachable_hub_is_worth_another_try(home: Path, tmp_path: Path) -> None:
    _refused(run_any("pull", "a/b", "--hub", "http://127.0.0.1:9", home=home), 75, "127.0.0.1:9", "later")
    package = write_package(tmp_path / "p")
    _refused(run_any("push", str(package), "a/b", "--hub", "http://127.0.0.1:9", home=home), 75, "later")


def test_a_wrong_token_is_refused_without_printing_it(home: Path, tmp_path: Path) -> None:
    package = write_package(tmp_path / "p")
    with start_hub(tmp_path / "hub", PEOPLE) as url:
        arguments = ["push", str(package), "alice/p"]
        refused = run_any(*arguments, home=home, HF_ENDPOINT=url, HF_TOKEN="hf_wrong")
        _refused(refused, 1, "HF_TOKEN")
        assert "hf_wrong" not in refused.stderr
        assert run(*arguments, home=home, HF_ENDPOINT=url, HF_TOKEN=ALICE).stdout.startswith("alice/p@")
        assert "alice/p" in run("list", "--hub", url, home=home).stdout
        run("pull", "alice/p", "--hub", url, home=home)
        assert run("resolve", "alice/p", "--hub", url, home=home).stdout.startswith("sha256:")


def test_a_busy_port_of_the_hub_is_reported(home: Path, tmp_path: Path) -> None:
    with start_hub(tmp_path / "hub", PEOPLE) as url:
        port = url.rpartition(":")[2]
        _refused(run_any("hub", "serve", "--root", str(tmp_path / "x"), "--port", port, home=home), 1, port)


def test_inspect_shows_what_an_adapter_is(home: Path, tmp_path: Path) -> None:
    package = write_package(tmp_path / "p", name="captain")
    text = run("inspect", str(package), home=home).stdout
    for fact in ("captain", "rank 4", "owner/base", "384", "sha256:"):
        assert fact in text
    assert json.loads(run("inspect", str(package), "--json", home=home).stdout)["name"] == "captain"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a RAM disk")
def test_a_full_disk_is_one_line_and_leaves_nothing(home: Path, tmp_path: Path) -> None:
    """A RAM disk of 64 KiB; where this process may not mount one, a user namespace of its own."""
    package = write_package(tmp_path / "p")
    with (package / "tokenizer.json").open("w") as file:
        json.dump({"padding": "x" * 200_000}, file)
    from packages import write_manifest

    write_manifest(package)
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        f"mount -t tmpfs -o size=64k tmpfs {disk} && ADAPTERHUB_HOME={disk}/home {COMMAND} add {package}; "
        f"status=$?; find {disk} -name '*.tmp' -o -path '*/adapters/*' -o -name '*.json' >&2; exit $status"
    )
    done = subprocess.run(["unshare", "--mount", "--map-root-user", "sh", "-c", script], capture_output=True, text=True)
    if "unshare failed" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no RAM disk can be had here: {done.stderr.strip()}")
    _refused(done, 1, "the disk is full", "ADAPTERHUB_HOME")
