"""Aliases: moved on purpose, by compare-and-swap, with a history nobody rewrites."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packages import write_package
from road import run, run_any

from adapterhub.adapter import AdapterRef
from adapterhub.errors import AdapterNotFound, Conflict, InvalidManifest, InvalidRef, UsageError
from adapterhub.package.layout import open_adapter
from adapterhub.registry.name_log import Move, Name, NameLog
from adapterhub.registry.registry import NOTHING, Registry


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "home")


@pytest.fixture
def digests(registry: Registry, tmp_path: Path) -> list[str]:
    """Three adapters that were `captain` one after the other."""
    packages = [write_package(tmp_path / f"p{seed}", name="captain", seed=seed) for seed in range(3)]
    return [registry.add(open_adapter(package), by="ada").digest for package in packages]


def _ref(text: str) -> AdapterRef:
    return AdapterRef.parse(text)


def _led(registry: Registry, text: str) -> str:
    return registry.resolve(_ref(text)).digest


def test_an_alias_points_where_it_was_moved_when_main_moves(
    registry: Registry, digests: list[str], tmp_path: Path
) -> None:
    registry.promote(_ref("captain"), "production")
    newer = registry.add(open_adapter(write_package(tmp_path / "p9", name="captain", seed=9))).digest
    assert _led(registry, "captain@production") == digests[2]
    assert _led(registry, "captain") == newer


def test_an_alias_can_be_moved_to_a_digest_the_name_once_pointed_to(registry: Registry, digests: list[str]) -> None:
    registry.promote(_ref(f"captain@{digests[0]}"), "production")
    registry.promote(_ref(f"captain@{digests[1][:19]}"), "canary")
    assert (_led(registry, "captain@production"), _led(registry, "captain@canary")) == tuple(digests[:2])


def test_a_rollback_moves_back_step_by_step_and_no_further(registry: Registry, digests: list[str]) -> None:
    for digest in digests:
        registry.promote(_ref(f"captain@{digest}"), "production")
    assert registry.rollback("captain", "production").after == digests[1]
    assert registry.rollback("captain", "production").after == digests[0]
    with pytest.raises(UsageError, match="has never pointed anywhere but to"):
        registry.rollback("captain", "production")
    assert _led(registry, "captain@production") == digests[0]


def test_after_a_rollback_the_next_promotion_can_be_taken_back_too(registry: Registry, digests: list[str]) -> None:
    for digest in digests[:2]:
        registry.promote(_ref(f"captain@{digest}"), "production")
    registry.rollback("captain", "production")
    registry.promote(_ref(f"captain@{digests[2]}"), "production")
    assert registry.rollback("captain", "production").after == digests[0]


def test_a_promotion_that_expects_another_digest_moves_nothing(registry: Registry, digests: list[str]) -> None:
    registry.promote(_ref(f"captain@{digests[0]}"), "production", expect=NOTHING)
    with pytest.raises(Conflict, match=f"points to {digests[0]}: expected {digests[1]}"):
        registry.promote(_ref("captain"), "production", expect=digests[1])
    with pytest.raises(Conflict, match="expected nothing"):
        registry.promote(_ref("captain"), "production", expect=NOTHING)
    assert _led(registry, "captain@production") == digests[0]
    assert registry.promote(_ref("captain"), "production", expect=digests[0][:19]).after == digests[2]


def test_of_many_promotions_that_expect_the_same_exactly_one_wins(registry: Registry, digests: list[str]) -> None:
    def race(number: int) -> bool:
        try:
            registry.promote(_ref(f"captain@{digests[number % 3]}"), "production", expect=NOTHING)
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(race, range(16))) == 1


def test_the_history_shows_who_moved_what_where(registry: Registry, digests: list[str]) -> None:
    registry.promote(_ref("captain"), "production", by="grace")
    registry.remove("captain", "production", by="linus")
    told = [(move.by, move.act, move.revision, move.before, move.after) for move in registry.history("captain")]
    assert told == [
        ("ada", "add", "main", None, digests[0]),
        ("ada", "add", "main", digests[0], digests[1]),
        ("ada", "add", "main", digests[1], digests[2]),
        ("grace", "promote", "production", None, digests[2]),
        ("linus", "remove", "production", digests[2], None),
    ]


def test_what_moves_nothing_leaves_no_line(registry: Registry, digests: list[str], tmp_path: Path) -> None:
    registry.promote(_ref("captain"), "production")
    before = registry.history("captain")
    registry.promote(_ref("captain"), "production")
    registry.add(open_adapter(tmp_path / "p2"))
    assert registry.history("captain") == before


@pytest.mark.parametrize("alias", ["main", "a" * 40, "", "a/b", "../x", "-x", "a b", "sha256:" + "0" * 64, "é"])
def test_what_cannot_be_an_alias_is_refused(registry: Registry, digests: list[str], alias: str) -> None:
    with pytest.raises(UsageError, match="invalid alias"):
        registry.promote(_ref("captain"), alias)


def test_a_nameless_reference_cannot_be_promoted(registry: Registry, digests: list[str], tmp_path: Path) -> None:
    for text in (digests[0], str(tmp_path / "p0")):
        with pytest.raises(UsageError, match="no name"):
            registry.promote(_ref(text), "production")


@pytest.mark.parametrize("key", ["license", "licence"])
def test_log_of_either_spelling(registry: Registry, digests: list[str], key: str) -> None:
    path = registry.root / "names" / "captain.jsonl"
    # An earlier version, which refuses every other key, may read the same store: a server that still runs, say.
    assert path.read_text().count('"licence":"apache-2.0"') == 3
    path.write_text(path.read_text().replace('"licence"', f'"{key}"'))
    assert [entry.about.license for entry in registry.list()] == ["apache-2.0"]


def test_rollback_that_expects_what_another_process_moved_meanwhile(
    registry: Registry, digests: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rollback would go back from the last move, and the one that it was computed from is another one."""
    for digest in digests[:2]:
        registry.promote(_ref(f"captain@{digest}"), "production")
    read = NameLog.read

    def read_then_move(log: NameLog, name: str) -> Name | None:
        found = read(log, name)
        monkeypatch.setattr(NameLog, "read", read)
        Registry(registry.root).promote(_ref(f"captain@{digests[2]}"), "production")
        return found

    monkeypatch.setattr(NameLog, "read", read_then_move)
    with pytest.raises(Conflict):
        registry.rollback("captain", "production", expect=digests[2])
    assert _led(registry, "captain@production") == digests[2]


def test_an_expectation_that_is_no_digest_is_refused(registry: Registry, digests: list[str]) -> None:
    for text in ("", "sha256:", "abc"):
        with pytest.raises(UsageError, match="invalid --expect"):
            registry.promote(_ref("captain"), "production", expect=text)


def test_an_unknown_name_revision_or_digest_is_not_found(registry: Registry, digests: list[str]) -> None:
    for text in ("captian", "captain@v9", "captain@sha256:" + "0" * 64):
        with pytest.raises(AdapterNotFound):
            registry.promote(_ref(text), "production")
    with pytest.raises(AdapterNotFound, match="captain at: main"):
        registry.rollback("captain", "production")
    with pytest.raises(AdapterNotFound):
        registry.remove("captain", "production")
    with pytest.raises(AdapterNotFound, match="nearest: captain"):
        registry.history("captian")


def test_a_name_that_would_climb_out_is_refused(registry: Registry, tmp_path: Path) -> None:
    adapter = open_adapter(write_package(tmp_path / "p"))
    for name in ("../x", "/etc/x", "sha256:" + "0" * 64, "a/b/c", "..", "a\nb", " "):
        with pytest.raises((UsageError, InvalidRef), match="name"):
            registry.add(adapter, name=name)
    assert not (registry.root / "names").exists()


def test_a_line_a_killed_writer_left_half_is_no_move_and_is_cut_off(registry: Registry, digests: list[str]) -> None:
    path = registry.root / "names" / "captain.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"at":"2026-01-01T00:00:00+00:00","by":"x"')
    assert _led(registry, "captain") == digests[2]
    registry.promote(_ref("captain"), "production")
    assert path.read_bytes().startswith(whole + b'{"at"')
    assert len(registry.history("captain")) == 4


def test_a_damaged_line_is_named(registry: Registry, digests: list[str]) -> None:
    path = registry.root / "names" / "captain.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{", lines[2]]) + "\n")
    with pytest.raises(InvalidManifest, match=r"captain\.jsonl:2"):
        registry.history("captain")


_MOVES = st.lists(st.tuples(st.sampled_from(["promote", "rollback", "remove"]), st.integers(0, 3)), max_size=20)


@settings(deadline=None, max_examples=200)
@given(steps=_MOVES)
def test_rollbacks_undo_promotions_like_a_stack(steps: list[tuple[str, int]]) -> None:
    """Against a plain list as the model."""
    moves: list[Move] = []
    stack: list[str | None] = []
    for act, number in steps:
        name = Name("n", tuple(moves))
        target = name.target("a")
        assert target == (stack[-1] if stack else None)
        if act == "rollback":
            expected = stack[-2] if len(stack) > 1 else None
            assert name.before("a") == expected
            if expected is None:
                continue
            stack.pop()
            after = expected
        elif act == "remove":
            if target is None:
                continue
            stack.append(None)
            after = None
        else:
            after = f"sha256:{number}"
            stack.append(after)
        moves.append(
            Move(at="2026-01-01T00:00:00+00:00", by="x", act=act, revision="a", before=target, after=after)  # type: ignore[arg-type]
        )


def test_the_log_of_a_name_with_a_slash_is_one_file(tmp_path: Path) -> None:
    log = NameLog(tmp_path)
    move = Move(at="2026-01-01T00:00:00+00:00", by="x", act="add", revision="main", before=None, after="sha256:0")
    with log.locked():
        log.append("owner/name", [move])
    assert log.names() == ["owner/name"]
    assert [name.moves for name in log.all()] == [(move,)]


_PROMOTE_FOREVER = """
import sys
from pathlib import Path
from adapterhub.adapter import AdapterRef
from adapterhub.registry.registry import Registry
registry = Registry(Path(sys.argv[1]))
print("ready", flush=True)
while True:
    for digest in sys.argv[2:]:
        registry.promote(AdapterRef.parse(f"captain@{digest}"), "production")
"""


def test_promotions_killed_at_random_moments_leave_a_whole_history(registry: Registry, digests: list[str]) -> None:
    for round_ in range(6):
        command = [sys.executable, "-c", _PROMOTE_FOREVER, str(registry.root), *digests]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.02 + 0.017 * round_)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        moves = [move for move in registry.history("captain") if move.revision == "production"]
        assert all(later.before == earlier.after for earlier, later in itertools.pairwise(moves))
        assert registry.promote(_ref(f"captain@{digests[round_ % 3]}"), "production").after == digests[round_ % 3]


def test_the_verbs(home: Path, tmp_path: Path) -> None:
    first = run("add", str(write_package(tmp_path / "a", name="captain")), home=home).stdout.strip()
    second = run("add", str(write_package(tmp_path / "b", name="captain", seed=1)), home=home).stdout.strip()
    run("promote", f"captain@{first[:19]}", "production", "--expect", "nothing", home=home)
    assert run("promote", "captain", "production", home=home).stdout.strip() == second
    assert run_any("promote", "captain", "production", "--expect", first, home=home).returncode == 1
    assert run("rollback", "captain", "production", home=home).stdout.strip() == first
    told = json.loads(run("history", "captain", "--json", home=home).stdout)
    assert [line["act"] for line in told] == ["add", "add", "promote", "promote", "rollback"]
    assert "production" in run("list", home=home).stdout
    layers = run("diff", "captain@production", "captain", home=home)
    assert "q_proj" in layers.stdout
    run("remove", "captain@production", home=home)
    assert "production" not in run("list", home=home).stdout


def test_promotion_and_rollback_know_where_the_package_came_from(registry: Registry, tmp_path: Path) -> None:
    for seed in range(2):
        package = open_adapter(write_package(tmp_path / f"h{seed}", name="captain", seed=seed))
        registry.add(package, origin=f"https://hub.example {seed:040x}")
        registry.promote(_ref("captain"), "stable")
    registry.rollback("captain", "stable")
    locked = registry.lock({"captain": _ref("captain@stable")}).adapters["captain"]
    assert (locked.hub, locked.commit) == ("https://hub.example", f"{0:040x}")


@pytest.mark.parametrize("name", ["captain@v2", "./captain", "sha256:" + "0" * 64])
def test_what_would_not_parse_back_is_no_name(registry: Registry, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="invalid name"):
        registry.add(open_adapter(write_package(tmp_path / "p", name="captain")), name=name)
    assert registry.list() == []


def test_a_move_without_room_on_disk_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    log = NameLog(tmp_path)
    move = Move(at="2026-01-01T00:00:00+00:00", by="x", act="add", revision="main", before=None, after="sha256:0")
    with log.locked():
        log.append("owner/name", [move])
        (file,) = tmp_path.glob("*.jsonl")
        before = file.read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                log.append("owner/name", [move])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert file.read_bytes() == before


def test_a_last_line_that_the_disk_never_wrote_is_no_move(tmp_path: Path) -> None:
    """After a power cut a file may have its new length, and NUL bytes where a block was not written."""
    log = NameLog(tmp_path)
    move = Move(at="2026-01-01T00:00:00+00:00", by="x", act="add", revision="main", before=None, after="sha256:0")
    with log.locked():
        log.append("owner/name", [move])
        (file,) = tmp_path.glob("*.jsonl")
        whole = file.read_bytes()
        file.write_bytes(whole + bytes(100) + whole[100:])
        assert log.read("owner/name").moves == (move,)
        log.append("owner/name", [move])
        assert file.read_bytes() == whole * 2
    file.write_bytes(bytes(10) + whole * 2)
    with pytest.raises(InvalidManifest, match="jsonl:1 is damaged"):
        log.read("owner/name")
