from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub.errors import InvalidKey, NotAllowed, PortBusy, UsageError
from adapterhub.net import is_loopback, listen, url_of
from serve.api.auth import ApiKeys, check_exposure
from serve.config import parse_adapter


def test_keys_are_read_one_a_line_with_comments(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# team\nalpha\nbeta admin # the boss\n\n")
    keys = ApiKeys.read(path)
    keys.check("Bearer alpha")
    keys.check("Bearer beta", needs_admin=True)
    with pytest.raises(NotAllowed):
        keys.check("Bearer alpha", needs_admin=True)
    for wrong in (None, "", "Bearer", "Bearer ", "Bearer alph", "alpha", "Bearer alpha2", "Bearer ä"):
        with pytest.raises(InvalidKey):
            keys.check(wrong)


def test_a_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERHUB_API_KEY", "secret")
    ApiKeys.read(None).check("Bearer secret", needs_admin=True)
    monkeypatch.delenv("ADAPTERHUB_API_KEY")
    ApiKeys.read(None).check(None)


@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_key_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("ADAPTERHUB_API_KEY", value)
    with pytest.raises(UsageError, match="set but empty"):
        ApiKeys.read(None)


@pytest.mark.parametrize("text", ["", "# nothing\n", "secret boss\n", "a b c\n"])
def test_a_malformed_key_file_is_refused_without_its_keys(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        ApiKeys.read(path)
    assert "secret" not in str(caught.value)


def test_a_missing_key_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the API keys"):
        ApiKeys.read(tmp_path / "none")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *[("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True)],
        *[("0.0.0.0", False), ("::", False), ("192.168.1.2", False), ("example.org", False)],
    ],
)
def test_only_loopback_counts_as_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_another_interface_is_refused_without_a_key() -> None:
    with pytest.raises(UsageError, match="ADAPTERHUB_API_KEY"):
        check_exposure("0.0.0.0", ApiKeys())
    check_exposure("0.0.0.0", ApiKeys(admin=("k",)))
    check_exposure("127.0.0.1", ApiKeys())


def test_a_busy_port_is_reported_before_anything_is_loaded() -> None:
    with listen("127.0.0.1", 0) as first, pytest.raises(PortBusy, match="--port"):
        listen("127.0.0.1", first.getsockname()[1])


def test_adapters_are_named_by_hand_or_by_their_last_part() -> None:
    assert parse_adapter("cap=local/captain")[0] == "cap"
    assert parse_adapter("local/captain@v1")[0] == "captain"
    for bad in ("=x", "./folder"):
        with pytest.raises(UsageError):
            parse_adapter(bad)


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::1", "[::1]")])
def test_the_url_of_a_server_can_be_opened(host: str, shown: str) -> None:
    with listen(host, 0) as listener:
        assert url_of(listener) == f"http://{shown}:{listener.getsockname()[1]}"
