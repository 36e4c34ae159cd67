"""API keys: which may request completions, and which may also manage adapters. Compared in constant time."""

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
    """The server's keys. Without any, every client may do everything, which only a server on loopback permits."""

    asking: tuple[str, ...] = ()
    admin: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path | None) -> ApiKeys:
        """Read the keys of a file, one a line (`KEY` or `KEY admin`, `#` comments), else of the environment variable.

        Raises UsageError with the invalid line's number, never with the key, and for a variable that is set but empty.
        """
        if path is None:
            if (key := os.environ.get(KEYS_VARIABLE)) is None:
                return cls()
            if not key.strip():
                raise UsageError(f"{KEYS_VARIABLE} is set but empty: expected a key. Give it one, or unset it.")
            return cls(admin=(key.strip(),))
        try:
            lines = path.read_text().splitlines()
        except OSError as error:
            raise UsageError(
                f"cannot read the API keys in {path} ({error.strerror}): expected a text file. Check its permissions."
            ) from error
        asking: list[str] = []
        admin: list[str] = []
        for number, line in enumerate(lines, 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            if len(words) > 2 or words[1:] not in ([], ["admin"]):
                raise UsageError(f"{path}:{number} is not an API key: expected KEY or 'KEY admin'. Correct the line.")
            (admin if len(words) == 2 else asking).append(words[0])
        if not asking and not admin:
            raise UsageError(f"{path} has no API key: expected one a line, KEY or 'KEY admin'. Add one.")
        return cls(tuple(asking), tuple(admin))

    @property
    def are_required(self) -> bool:
        """Return whether requests need a key."""
        return bool(self.asking or self.admin)

    def check(self, authorization: str | None, *, needs_admin: bool = False) -> None:
        """Check an `Authorization` header. Raises InvalidKey, or NotAllowed for a key that is no admin key."""
        if not self.are_required:
            return
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else ""
        is_admin = _is_among(key, self.admin)
        if not (is_admin | _is_among(key, self.asking)):
            raise InvalidKey(
                "the API key is missing or wrong: this server requires one. Send 'Authorization: Bearer KEY'."
            )
        if needs_admin and not is_admin:
            raise NotAllowed(
                "this API key may request completions only: loading adapters, training and changing the registry need "
                "an admin key. Use one."
            )


def check_exposure(host: str, keys: ApiKeys) -> None:
    """Refuse to listen beyond this machine without a key. Raises UsageError."""
    if not is_loopback(host) and not keys.are_required:
        raise UsageError(
            f"--host {host} is reachable from other machines and there is no API key: such a server needs one. Set "
            f"{KEYS_VARIABLE}, pass --api-keys FILE, or use 127.0.0.1."
        )


def _is_among(key: str, keys: tuple[str, ...]) -> bool:
    """Compare every key, so that the time taken reveals nothing."""
    found = False
    for known in keys:
        found |= hmac.compare_digest(key.encode(), known.encode())
    return found
