"""The trust policy of a registry: which names need a signature, and which aliases are protected.

It is the file `$ADAPTERHUB_HOME/policy.toml`:

    protected = ["production"]     # aliases that need a trusted signature and a passed probe

    [[trust]]
    names = "acme/*"               # shell pattern over names
    keys = ["acme.pub"]            # public keys, beside this file; one of them must have signed

While the file cannot be read, every check fails.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from pydantic import Field, ValidationError

from adapterhub.adapter import Adapter
from adapterhub.errors import AliasProtected, ProbeMismatch, SignatureInvalid, UsageError
from adapterhub.strict import Strict

POLICY_NAME = "policy.toml"


class _Trust(Strict):
    names: str = Field(min_length=1)
    keys: list[str]


class _File(Strict):
    protected: list[str] = Field(default_factory=list)
    trust: list[_Trust] = Field(default_factory=list)


@dataclass(frozen=True)
class Policy:
    """The rules of one registry. Without a file there are none."""

    folder: Path
    protected: frozenset[str] = frozenset()
    trust: tuple[_Trust, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Policy:
        """Read the policy of the registry in `folder`. Raises UsageError for a file that cannot be read."""
        path = folder / POLICY_NAME
        if not path.exists() and not path.is_symlink():  # a link that leads nowhere is a policy that cannot be read
            return cls(folder)
        try:
            raw = _File.model_validate(tomllib.loads(path.read_text()))
        except (OSError, ValueError, ValidationError) as error:
            faults = "; ".join(str(error).splitlines()[:4])
            raise UsageError(f"{path} cannot be read, so nothing is trusted: {faults}. Correct the file.") from error
        return cls(folder, frozenset(raw.protected), tuple(raw.trust))

    def check(self, adapter: Adapter, name: str | None) -> None:
        """Check that `adapter` may be used under `name`.

        A folder or a digest has no name (None). Where any name needs a signature, it needs that of any trusted key.

        Raises:
            SignatureInvalid: no key that the policy asks for signed the adapter.
        """
        if asked := self._asked(name):
            self._verify(adapter, asked, name)

    def needs_signature(self, name: str) -> bool:
        """Return whether `name` may point only to adapters that a trusted key signed."""
        return bool(self._asked(name))

    def check_move(
        self, adapter: Adapter | None, name: str, revision: str, *, act: str, has_probe_passed: bool = False
    ) -> None:
        """Check that `act` may point `name@revision` to `adapter` (None: remove the revision).

        Raises:
            AliasProtected: the alias is protected, and neither promote nor rollback moves it.
            SignatureInvalid: no key trusted with `name` signed the adapter, or no key is trusted with a protected name.
            ProbeMismatch: the alias is protected and the adapter's probe has not passed on this machine.
        """
        is_protected = revision in self.protected
        if is_protected and act not in ("promote", "rollback"):
            how = f"'adapterhub promote {name}@{adapter.digest[:19]} {revision}'" if adapter else "'adapterhub promote'"
            raise AliasProtected(
                f"{act} cannot move {name}@{revision}: the alias {revision!r} is protected and only promote and "
                f"rollback move it. Keep the adapter under another revision, then run {how}."
            )
        if adapter is None:
            return
        self.check(adapter, name)
        if is_protected and not self.needs_signature(name):
            raise SignatureInvalid(
                f"{act} cannot move {name}@{revision}: the alias {revision!r} is protected and no key is trusted with "
                f"{name}. Add a [[trust]] entry to {self.folder / POLICY_NAME}."
            )
        if is_protected and not has_probe_passed:
            raise ProbeMismatch(
                f"{act} cannot move {name}@{revision}: the alias {revision!r} is protected and the probe of "
                f"{adapter.digest[:19]} has not passed here. Run 'adapterhub verify {name}@{adapter.digest[:19]} "
                f"--probe', then {act} again."
            )

    def _asked(self, name: str | None) -> list[_Trust]:
        return [entry for entry in self.trust if name is None or fnmatchcase(name, entry.names)]

    def _verify(self, adapter: Adapter, asked: list[_Trust], name: str | None) -> None:
        from adapterhub.package.signing import PublicKey, verify

        paths = dict.fromkeys(self.folder / key for entry in asked for key in entry.keys)
        try:
            verify(adapter, [PublicKey.read(path) for path in paths])
        except SignatureInvalid as error:
            used = "a folder or a digest" if name is None else name
            raise SignatureInvalid(f"{used} needs the signature of a key that {POLICY_NAME} trusts: {error}") from error
