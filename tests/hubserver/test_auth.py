"""Tokens, access rights and signed upload URLs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from disk_operations import recorded

from adapterhub.errors import UsageError
from adapterhub.hubserver.app import create_hub_app
from adapterhub.hubserver.auth.tickets import Signer, UploadTicket
from adapterhub.hubserver.auth.tokens import Account, Tokens, load_or_create_secret, token_hash
from adapterhub.hubserver.errors import InvalidName, InvalidToken, InvalidUploadTicket
from adapterhub.hubserver.names import RepoId
from adapterhub.hubserver.server import serve_hub

TOKENS = Tokens.of({"a-token": Account("alice", "write", ("team",)), "r-token": Account("rob", "read")})
TICKET = UploadTicket(RepoId("alice", "poems"), "0" * 64, size_bytes=7, expires_s=4_000_000_000)


def test_token_names_its_user() -> None:
    assert TOKENS.account("a-token") == Account("alice", "write", ("team",))


@pytest.mark.parametrize("token", ["", "a-toke", "a-token ", "é", token_hash("a-token")])
def test_wrong_token_is_refused(token: str) -> None:
    with pytest.raises(InvalidToken) as refusal:
        TOKENS.account(token)
    assert str(refusal.value) == "Invalid credentials in Authorization header"


def test_rights_follow_role_and_membership() -> None:
    alice, rob, everywhere = TOKENS.account("a-token"), TOKENS.account("r-token"), Account("local", "write", ("*",))
    assert [alice.can_write(name) for name in ("alice", "team", "rob")] == [True, True, False]
    assert (rob.is_member_of("rob"), rob.can_write("rob")) == (True, False)
    assert everywhere.can_write("anybody")


@pytest.mark.parametrize("name", ["", "*", "a b", "a<b>", "../a", "api"])
def test_unusable_user_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidName) as refusal:
        Account(name)
    assert repr(name) in str(refusal.value)


def test_tokens_file_is_saved_without_the_tokens(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    TOKENS.save(path)
    assert "a-token" not in path.read_text()
    assert Tokens.load(path).account("r-token") == Account("rob", "read")


def test_tokens_file_can_be_toml(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(f'[[token]]\nsha256 = "{token_hash("t")}"\nuser = "ana"\nrole = "write"\nnamespaces = ["lab"]\n')
    assert Tokens.load(path).account("t") == Account("ana", "write", ("lab",))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "invalid tokens file"),
        ("[]", "invalid tokens file"),
        (json.dumps({"token": [{"sha256": "xyz", "user": "a", "role": "root"}]}), "token.0.role"),
        (json.dumps({"token": [{"sha256": "0" * 64, "user": "a", "role": "read", "rol": 1}]}), "token.0.rol"),
        (json.dumps({"token": [{"sha256": "0" * 64, "user": "a/b", "role": "read"}]}), "'a/b'"),
        (json.dumps({"token": [{"sha256": token_hash(""), "user": "a", "role": "read"}]}), "empty text"),
    ],
)
def test_unusable_tokens_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(text)
    with pytest.raises(UsageError) as refusal:
        Tokens.load(path)
    assert said in str(refusal.value)
    assert str(path) in str(refusal.value)


def test_missing_tokens_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refusal:
        Tokens.load(tmp_path / "none.toml")
    assert "none.toml" in str(refusal.value)


def test_kept_secret_stays_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    first = load_or_create_secret(path)
    assert len(first) >= 32
    assert load_or_create_secret(path) == first
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["secret"]


@pytest.mark.parametrize("left", [b"", b"\n", b"short", b"\0" * 43, b"x" * 31, b"two words " * 5, "é".encode() * 40])
def test_secret_that_a_disk_lost_is_refused_at_the_start(tmp_path: Path, left: bytes) -> None:
    for name, serve in (
        ("secret", lambda: load_or_create_secret(tmp_path / "secret")),
        ("token", lambda: serve_hub(tmp_path, port=0)),
        ("upload.secret", lambda: create_hub_app(tmp_path, TOKENS)),
    ):
        (tmp_path / name).write_bytes(left)
        with pytest.raises(UsageError, match="holds no secret") as refusal:
            serve()
        assert str(tmp_path / name) in str(refusal.value)
        assert (tmp_path / name).read_bytes() == left


def test_secret_is_on_disk_before_its_name(tmp_path: Path) -> None:
    with recorded(tmp_path / "hub") as recording:
        secret = load_or_create_secret(tmp_path / "hub" / "token")
        recording.acknowledge(secret)
    recording.check_order()
    for told, found in recording.crashes(tmp_path / "after"):
        # At any moment there is the whole secret or none.
        assert (found / "token").read_text() == secret if (found / "token").exists() else not told


def test_secret_that_a_person_wrote_may_end_in_a_newline(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("x" * 40 + "\n")
    assert load_or_create_secret(tmp_path / "token") == "x" * 40


def test_own_upload_ticket_is_good() -> None:
    signer = Signer("secret")
    signer.check(TICKET, signer.signature(TICKET))


@pytest.mark.parametrize(
    "changed",
    [
        replace(TICKET, repo_id=RepoId("bob", "poems")),
        replace(TICKET, sha256="1" * 64),
        replace(TICKET, size_bytes=8),
        replace(TICKET, expires_s=TICKET.expires_s + 1),
    ],
)
def test_changed_upload_ticket_is_refused(changed: UploadTicket) -> None:
    signer = Signer("secret")
    with pytest.raises(InvalidUploadTicket) as refusal:
        signer.check(changed, signer.signature(TICKET))
    assert "not from this hub" in str(refusal.value)


def test_upload_ticket_of_another_hub_is_refused() -> None:
    with pytest.raises(InvalidUploadTicket):
        Signer("secret").check(TICKET, Signer("other").signature(TICKET))


def test_expired_upload_ticket_is_refused() -> None:
    signer, late = Signer("secret"), replace(TICKET, expires_s=1)
    with pytest.raises(InvalidUploadTicket) as refusal:
        signer.check(late, signer.signature(late))
    assert "expired" in str(refusal.value)


def test_admin_may_change_what_is_anybodys() -> None:
    admin = Account("root", "admin")
    assert admin.is_member_of("alice")
    assert admin.can_write("alice")
    assert not Account("rob", "read", ("alice",)).can_write("alice")
