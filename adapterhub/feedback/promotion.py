"""From a trained candidate to the name it improves, shared by the command `improve` and a server.

`Improvement.recipe` -> a training run -> `pack_candidate` -> `Promotion`: the move of a name, under the trust policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adapterhub.adapter import Adapter, StoredBase
from adapterhub.errors import Conflict, SignatureInvalid
from adapterhub.package.layout import Report
from adapterhub.packer import pack
from adapterhub.registry.policy import Policy
from adapterhub.registry.registry import DEFAULT_REVISION, NOTHING, Registry


def pack_candidate(folder: Path, *, base: StoredBase, start: Adapter, report: Report = lambda line: None) -> Adapter:
    """Pack what a run made from `start`, under its name and license. Raises as `pack`."""
    return pack(folder, base=base, name=start.manifest.name, license=start.manifest.license, report=report)


def names_of(registry: Registry, adapter: Adapter) -> list[str]:
    """Return the registry's names that point to an adapter, by any alias; answers have these names in feedback."""
    return list(dict.fromkeys(entry.name for entry in registry.list() if entry.digest == adapter.digest))


def name_of(registry: Registry, adapter: Adapter) -> str:
    """Return the registry's name for an adapter; its manifest's where no name points to it."""
    named = (entry for entry in registry.list() if entry.digest == adapter.digest)
    return next((entry.name for entry in named if entry.revision == DEFAULT_REVISION), adapter.manifest.name)


@dataclass(frozen=True)
class Promotion:
    """The move of `name` to a candidate."""

    registry: Registry
    name: str
    start: str | None
    """Digest that the run started from; the name moves only from there. None: the name may point anywhere."""

    def check_before_run(self) -> None:
        """Check, before a candidate is trained, that `name` could be moved to it.

        Raises:
            Conflict: the name points elsewhere than to `start`.
            SignatureInvalid: the trust policy wants a signature, which a new candidate does not have.
        """
        self._expected()
        if Policy.read(self.registry.root).needs_signature(self.name):
            raise SignatureInvalid(
                f"{self.name} may point only to adapters that a trusted key signed, and a new candidate is unsigned. "
                f"Run without --promote, sign the output, then 'adapterhub add OUTPUT --name {self.name}'."
            )

    def check(self, candidate: Adapter) -> None:
        """Check that `move` may be called with this candidate. Raises as `move`."""
        self._expected(candidate)
        self.registry.check_move(candidate, self.name)

    def move(self, candidate: Adapter, *, by: str | None = None) -> None:
        """Keep the candidate and point `name` to it.

        Raises:
            Conflict: the name points elsewhere than to `start`.
            SignatureInvalid, AliasProtected: the trust policy protects the name.
        """
        self.registry.add(candidate, name=self.name, expect=self._expected(candidate), by=by)

    def _expected(self, candidate: Adapter | None = None) -> str | None:
        if self.start is None:
            return None
        known = self.registry.log.read(self.name)
        target = known.target(DEFAULT_REVISION) if known else None
        if target not in (None, self.start, candidate.digest if candidate else None):
            raise Conflict(
                f"{self.name} points to {target[:19]}: expected {self.start[:19]}, which the run started from. "
                "Publish the candidate under another name."
            )
        return target or NOTHING
