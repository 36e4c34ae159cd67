"""Access tokens and the accounts they belong to."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from adapterhub.errors import UsageError
from adapterhub.files import link_durably, temporary_beside, write_atomic
from adapterhub.hubserver.errors import InvalidName, InvalidToken
from adapterhub.hubserver.names import check_namespace
from adapterhub.strict import Strict

ANY_NAMESPACE = "*"
_MIN_SECRET = 32
_SECRET = re.compile(rb"[!-~]{%d,}" % _MIN_SECRET)
Role = Literal["read", "write", "admin"]
"""The role of an account; an admin can read and write every repository."""


@dataclass(frozen=True)
class Account:
    """A user and the access rights of one of the user's tokens. Raises InvalidName."""

    user: str
    role: Role = "write"
    namespaces: tuple[str, ...] = ()
    """Other owners whose repositories the account can read and, with the role 'write', change; '*' stands for all."""

    def __post_init__(self) -> None:
        for name in (self.user, *self.namespaces):
            if name != ANY_NAMESPACE or name == self.user:
                check_namespace(name)

    def is_member_of(self, namespace: str) -> bool:
        """Return whether the account can read private repositories of `namespace`."""
        return (
            namespace == self.user
            or namespace in self.namespaces
            or ANY_NAMESPACE in self.namespaces
            or self.role == "admin"
        )

    def can_write(self, namespace: str) -> bool:
        """Return whether the account can write to repositories of `namespace`."""
        return self.is_writer and self.is_member_of(namespace)

    @property
    def is_writer(self) -> bool:
        """Return whether the role allows writing."""
        return self.role != "read"


class _TokenLine(Strict):
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    user: str
    role: Role
    namespaces: tuple[str, ...] = ()


class _TokenFile(Strict):
    token: tuple[_TokenLine, ...]


def token_hash(token: str) -> str:
    """Return the sha256 of a token in hex. Tokens are long and random, so a slow password hash is not needed."""
    return hashlib.sha256(token.encode()).hexdigest()


class Tokens:
    """The accounts of a hub, by the sha256 of their tokens."""

    def __init__(self, accounts: Mapping[str, Account]) -> None:
        """Store `accounts`, which maps the sha256 of a token, in hex, to its account."""
        self._accounts = dict(accounts)

    @classmethod
    def of(cls, accounts: Mapping[str, Account]) -> Tokens:
        """Return the accounts of a mapping from token to account."""
        return cls({token_hash(token): account for token, account in accounts.items()})

    @classmethod
    def load(cls, path: Path) -> Tokens:
        """Read a `.json` or TOML file of `[[token]]` entries: sha256, user, role, namespaces.

        Raises UsageError, which names the file and every fault.
        """
        try:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
            lines = _TokenFile.model_validate(content).token
            if any(line.sha256 == token_hash("") for line in lines):
                raise ValueError("a sha256 is that of the empty text: give the sha256 of a token")
            return cls({line.sha256: Account(line.user, line.role, line.namespaces) for line in lines})
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise UsageError(f"invalid tokens file {path}: {faults}.") from None
        except (OSError, ValueError, InvalidName) as error:
            raise UsageError(f"invalid tokens file {path}: {error}") from None

    def save(self, path: Path) -> None:
        """Write a JSON file that `load` can read."""
        lines = tuple(
            _TokenLine(sha256=known, user=account.user, role=account.role, namespaces=account.namespaces)
            for known, account in self._accounts.items()
        )
        write_atomic(path, _TokenFile(token=lines).model_dump_json(indent=1))

    def account(self, token: str) -> Account:
        """Return the account of a token, in constant time for all wrong tokens. Raises InvalidToken."""
        asked = token_hash(token)
        found = [account for known, account in self._accounts.items() if hmac.compare_digest(known, asked)]
        if not found:
            raise InvalidToken
        return found[0]


def load_or_create_secret(path: Path) -> str:
    """Return the secret in a file that only its owner can read; create it if it does not exist.

    Processes that call this at the same time get the same secret. Raises UsageError for a file that holds none, for
    example because its disk lost the content.
    """
    with contextlib.suppress(FileExistsError):
        temporary = temporary_beside(path)
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_urlsafe(32))
            # Unlike a rename, a link fails if the file exists: the first writer wins, and nobody reads a partial file.
            link_durably(temporary, path)
        finally:
            temporary.unlink()
    secret = path.read_bytes().removesuffix(b"\n")
    if _SECRET.fullmatch(secret) is None:
        raise UsageError(
            f"{path} holds no secret ({len(secret)} bytes): expected at least {_MIN_SECRET} letters, digits and "
            "punctuation marks. Restore the file, or delete it: the next start writes a new secret."
        )
    return secret.decode("ascii")
