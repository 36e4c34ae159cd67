"""Who is trusted with which names, and which aliases are protected: `$ADAPTERHUB_HOME/policy.toml`.

    protected = ["production"]     # aliases that need a signature and a passed probe

    [[trust]]
    names = "acme/*"               # shell pattern over names
    keys = ["acme.pub"]            # public keys, beside this file; one of them must have signed

A policy that cannot be read lets nothing pass.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapterhub.adapter import Adapter
from adapterhub.errors import SignatureInvalid, UsageError

POLICY_NAME = "policy.toml"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Trust(_Part):
    names: str = Field(min_length=1)
    keys: list[str]


class _File(_Part):
    protected: list[str] = []
    trust: list[_Trust] = []


@dataclass(frozen=True)
class Policy:
    """What must be signed by whom. Without a file: nothing."""

    folder: Path
    protected: frozenset[str] = frozenset()
    trust: tuple[_Trust, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Policy:
        """Raises UsageError for a file that is there and cannot be read."""
        path = folder / POLICY_NAME
        if not path.exists():
            return cls(folder)
        try:
            raw = _File.model_validate(tomllib.loads(path.read_text()))
        except (OSError, ValueError, ValidationError) as error:
            faults = "; ".join(str(error).splitlines()[:4])
            raise UsageError(f"{path} cannot be read, so nothing is trusted: {faults}.") from error
        return cls(folder, frozenset(raw.protected), tuple(raw.trust))

    def check(self, adapter: Adapter, name: str | None) -> None:
        """Raises SignatureInvalid unless `adapter` may be used under `name`.

        A folder or a digest has no name: where anything is to be signed, it needs the signature of any trusted key.
        """
        asked = [entry for entry in self.trust if name is None or fnmatchcase(name, entry.names)]
        if asked:
            self._verify(adapter, asked)

    def check_protected(self, adapter: Adapter, name: str, alias: str) -> None:
        """Raises SignatureInvalid unless a key trusted with `name` signed it; nobody trusted is nobody."""
        asked = [entry for entry in self.trust if fnmatchcase(name, entry.names)]
        if not asked:
            raise SignatureInvalid(
                f"{alias} is protected and no key is trusted with {name}: add a [[trust]] entry to "
                f"{self.folder / POLICY_NAME}."
            )
        self._verify(adapter, asked)

    def _verify(self, adapter: Adapter, asked: list[_Trust]) -> None:
        from adapterhub.package.signing import PublicKey, verify

        paths = dict.fromkeys(self.folder / key for entry in asked for key in entry.keys)
        verify(adapter, [PublicKey.read(path) for path in paths])
