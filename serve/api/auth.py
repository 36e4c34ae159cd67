"""API keys: who may ask, and who may also load and unload adapters. Keys are compared in constant time."""

from __future__ import annotations

import hmac
import os
from dataclasses import dataclass
from pathlib import Path

from adapterhub.errors import InvalidKey, NotAllowed, UsageError
from adapterhub.net import is_loopback

KEYS_VARIABLE = "ADAPTERHUB_API_KEY"


@dataclass(frozen=True)
class ApiKeys:
    """Empty: everybody who reaches the server may do everything, which only a loopback server permits."""

    asking: tuple[str, ...] = ()
    admin: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path | None) -> ApiKeys:
        """Keys of a file, one a line (`KEY` or `KEY admin`, `#` comments), else of the environment variable.

        Raises UsageError with the line at fault, never with the key.
        """
        if path is None:
            key = os.environ.get(KEYS_VARIABLE, "").strip()
            return cls(admin=(key,)) if key else cls()
        try:
            lines = path.read_text().splitlines()
        except OSError as error:
            raise UsageError(f"the file of API keys {path} cannot be read ({error.strerror}).") from error
        asking: list[str] = []
        admin: list[str] = []
        for number, line in enumerate(lines, 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            if len(words) > 2 or words[1:] not in ([], ["admin"]):
                raise UsageError(f"{path}:{number} is not a key: expected KEY, or KEY admin.")
            (admin if len(words) == 2 else asking).append(words[0])
        if not asking and not admin:
            raise UsageError(f"{path} holds no key: write one a line (KEY, or KEY admin).")
        return cls(tuple(asking), tuple(admin))

    @property
    def are_required(self) -> bool:
        return bool(self.asking or self.admin)

    def check(self, authorization: str | None, *, needs_admin: bool = False) -> None:
        """Raises InvalidKey or NotAllowed for an `Authorization` header that does not suffice."""
        if not self.are_required:
            return
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else ""
        is_admin = _is_among(key, self.admin)
        if not (is_admin | _is_among(key, self.asking)):
            raise InvalidKey("the API key is missing or wrong: send Authorization: Bearer KEY.")
        if needs_admin and not is_admin:
            raise NotAllowed(
                "this API key may ask, but not load adapters, train or change what is kept here: use an admin key."
            )


def check_exposure(host: str, keys: ApiKeys) -> None:
    """Refuse to listen beyond this machine without a key. Raises UsageError."""
    if not is_loopback(host) and not keys.are_required:
        raise UsageError(
            f"--host {host} can be reached from other machines and there is no API key: set {KEYS_VARIABLE}, give "
            "--api-keys FILE, or stay on 127.0.0.1."
        )


def _is_among(key: str, keys: tuple[str, ...]) -> bool:
    """Looks at every key, so that the time taken tells nothing."""
    found = False
    for known in keys:
        found |= hmac.compare_digest(key.encode(), known.encode())
    return found
