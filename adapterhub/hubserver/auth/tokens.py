"""Who is asking: tokens and what each stands for. Knows no HTTP and no repositories on disk."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapterhub.errors import UsageError
from adapterhub.files import write_atomic
from adapterhub.hubserver.errors import BadName, InvalidToken
from adapterhub.hubserver.names import check_namespace

ANY_NAMESPACE = "*"
Role = Literal["read", "write", "admin"]
"""an admin may see and change everything, and look after the hub"""


@dataclass(frozen=True)
class Account:
    """What a token stands for: a user, and what the user may do with it. Raises BadName for an unusable name."""

    user: str
    role: Role = "write"
    namespaces: tuple[str, ...] = ()
    """owners besides the user itself whose repositories it may see and, unless it only reads, change; '*' is all"""

    def __post_init__(self) -> None:
        for name in (self.user, *self.namespaces):
            if name != ANY_NAMESPACE or name == self.user:
                check_namespace(name)

    def is_member_of(self, namespace: str) -> bool:
        return (
            namespace == self.user
            or namespace in self.namespaces
            or ANY_NAMESPACE in self.namespaces
            or self.role == "admin"
        )

    def can_write(self, namespace: str) -> bool:
        return self.is_writer and self.is_member_of(namespace)

    @property
    def is_writer(self) -> bool:
        return self.role != "read"


class _TokenLine(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    user: str
    role: Role
    namespaces: tuple[str, ...] = ()


class _TokenFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    token: tuple[_TokenLine, ...]


def token_hash(token: str) -> str:
    """What is kept of a token: hex sha256 (a token is random and long, so it needs no slow hash)."""
    return hashlib.sha256(token.encode()).hexdigest()


class Tokens:
    """The tokens the hub knows, by their sha256 only."""

    def __init__(self, accounts: Mapping[str, Account]) -> None:
        """`accounts`: hex sha256 of a token -> what it stands for."""
        self._accounts = dict(accounts)

    @classmethod
    def of(cls, accounts: Mapping[str, Account]) -> Tokens:
        """From tokens themselves -> account."""
        return cls({token_hash(token): account for token, account in accounts.items()})

    @classmethod
    def load(cls, path: Path) -> Tokens:
        """Read a `.json` or TOML file of `[[token]]` entries: sha256, user, role, namespaces.

        Raises UsageError that names the file and every fault.
        """
        try:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
            lines = _TokenFile.model_validate(content).token
            return cls({line.sha256: Account(line.user, line.role, line.namespaces) for line in lines})
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise UsageError(f"the tokens file {path} is not usable: {faults}.") from None
        except (OSError, ValueError, BadName) as error:
            raise UsageError(f"the tokens file {path} is not usable: {error}") from None

    def save(self, path: Path) -> None:
        """Write as JSON that `load` reads."""
        lines = tuple(
            _TokenLine(sha256=known, user=account.user, role=account.role, namespaces=account.namespaces)
            for known, account in self._accounts.items()
        )
        write_atomic(path, _TokenFile(token=lines).model_dump_json(indent=1))

    def account(self, token: str) -> Account:
        """What a token stands for. Raises InvalidToken. Takes the same time for every wrong token."""
        asked = token_hash(token)
        found = [account for known, account in self._accounts.items() if hmac.compare_digest(known, asked)]
        if not found:
            raise InvalidToken
        return found[0]


def kept_secret(path: Path) -> str:
    """The random text in a file only its owner can read; made on the first call, also when two processes race."""
    with contextlib.suppress(FileExistsError):
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_urlsafe(32))
            # Linking fails where a rename would replace: the first writer wins, and nobody reads half a secret.
            os.link(temporary, path)
        finally:
            temporary.unlink()
    return path.read_text()
