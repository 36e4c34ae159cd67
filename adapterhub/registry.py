"""The adapters on this machine, by content: which are here, what they are called, where a name leads.

    $ADAPTERHUB_HOME/objects/<sha256>           each file once, read-only
    $ADAPTERHUB_HOME/adapters/<digest>/         a package: hard links to objects, complete when it exists
    $ADAPTERHUB_HOME/names/<name>.json          name -> revision -> digest, under a lock between processes

Knows disk and Hub; refuses to know engines.
"""

from __future__ import annotations

import difflib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from adapterhub.adapter import Adapter, AdapterRef
from adapterhub.errors import AdapterNotFound, InvalidManifest
from adapterhub.files import disk_full_is_said, new_folder, sha256_of, write_atomic
from adapterhub.home import home
from adapterhub.hub import Hub
from adapterhub.manifest import Manifest, read_manifest
from adapterhub.package import open_adapter

DEFAULT_REVISION = "main"

Report = Callable[[str], None]


class _Revision(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: str
    origin: str
    """where it came from: a Hub endpoint and commit, or `local`"""


class _Name(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    revisions: dict[str, _Revision]


@dataclass(frozen=True)
class Entry:
    """One line of `list`: a name, a revision, and the package it leads to."""

    name: str
    revision: str
    origin: str
    manifest: Manifest


@dataclass(frozen=True)
class Registry:
    """The store under one folder, and the Hub to ask for what is not in it (None: ask nobody)."""

    root: Path
    hub: Hub | None = None

    @classmethod
    def default(cls, hub: Hub | None = None) -> Registry:
        return cls(home(), hub)

    def add(
        self, adapter: Adapter, *, name: str | None = None, revision: str = DEFAULT_REVISION, origin: str = "local"
    ) -> Adapter:
        """Keep a verified package, file by file and each content once, and let `name@revision` lead to it."""
        kept = self._keep(adapter)
        self._point(name or adapter.manifest.name, {revision: _Revision(digest=adapter.digest, origin=origin)})
        return kept

    def pull(self, ref: AdapterRef, hub: Hub, *, report: Report = lambda line: None) -> Adapter:
        """Fetch `owner/name[@revision]` from `hub`, verify, and keep it under that name."""
        if ref.name is None:
            raise AdapterNotFound(f"{ref} cannot be pulled: expected owner/name or owner/name@revision.")
        report(f"pulling {ref} from {hub.endpoint}")
        self.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.root, prefix=".pull-") as scratch, disk_full_is_said(self.root):
            adapter, commit = hub.pull(ref.name, Path(scratch) / "package", revision=ref.revision)
            report(f"verified {len(adapter.manifest.files)} files, {adapter.digest}")
            kept = self._keep(adapter)
        found = _Revision(digest=kept.digest, origin=f"{hub.endpoint} {commit}")
        self._point(ref.name, {ref.revision or DEFAULT_REVISION: found, commit: found})
        return kept

    def resolve(self, ref: AdapterRef) -> Adapter:
        """The verified package a reference leads to; asks the Hub for names that are not here.

        Raises AdapterNotFound with the places looked at and the nearest names, PackageError kinds for a
        package that no longer is what it was, HubError kinds.
        """
        if ref.folder is not None:
            return open_adapter(ref.folder.expanduser())
        if ref.digest is not None:
            return self._open(ref.digest, ref)
        known = self._read_name(str(ref.name))
        found = known.revisions.get(ref.revision or DEFAULT_REVISION) if known else None
        if found is not None:
            return self._open(found.digest, ref)
        if self.hub is not None and "/" in str(ref.name):
            return self.pull(ref, self.hub)
        raise AdapterNotFound(self._where_we_looked(ref, known))

    def list(self) -> list[Entry]:
        """Every name and revision, sorted; reads manifests only."""
        entries = []
        for path in sorted(self._names.glob("*.json")):
            name = self._parse_name(path)
            for revision, target in sorted(name.revisions.items()):
                folder = self._folder(target.digest)
                if folder.is_dir() and not _is_commit(revision):
                    entries.append(Entry(name.name, revision, target.origin, read_manifest(folder)))
        return entries

    @property
    def _names(self) -> Path:
        return self.root / "names"

    def _folder(self, digest: str) -> Path:
        return self.root / "adapters" / digest.removeprefix("sha256:")

    def _open(self, digest: str, ref: AdapterRef) -> Adapter:
        folder = self._folder(digest)
        if not folder.is_dir():
            raise AdapterNotFound(f"{ref} is not in {self.root}: pull it, or add its folder.")
        return open_adapter(folder)

    def _keep(self, adapter: Adapter) -> Adapter:
        folder = self._folder(adapter.digest)
        if not folder.is_dir():
            with new_folder(folder) as temporary:
                for path in sorted(p for p in adapter.path.iterdir() if p.is_file()):
                    _link(self._object(path), temporary / path.name)
        return Adapter(folder, read_manifest(folder))

    def _object(self, source: Path) -> Path:
        """The stored copy of a file's content, made if it is not there yet."""
        stored = self.root / "objects" / sha256_of(source)
        if not stored.exists():
            stored.parent.mkdir(parents=True, exist_ok=True)
            with disk_full_is_said(stored), tempfile.TemporaryDirectory(dir=stored.parent) as scratch:
                copy = Path(scratch) / stored.name
                shutil.copyfile(source, copy)
                copy.chmod(0o444)
                copy.replace(stored)
        return stored

    def _name_path(self, name: str) -> Path:
        return self._names / f"{quote(name, safe='')}.json"

    def _read_name(self, name: str) -> _Name | None:
        path = self._name_path(name)
        return self._parse_name(path) if path.is_file() else None

    def _parse_name(self, path: Path) -> _Name:
        try:
            return _Name.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise InvalidManifest(f"{path} is damaged: delete it and pull or add that adapter again.") from error

    def _point(self, name: str, revisions: dict[str, _Revision]) -> None:
        path = self._name_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._names / ".lock"):
            known = self._read_name(name)
            merged = {**(known.revisions if known else {}), **revisions}
            write_atomic(path, _Name(name=name, revisions=merged).model_dump_json(indent=1) + "\n")

    def _where_we_looked(self, ref: AdapterRef, known: _Name | None) -> str:
        if known is not None:
            have = ", ".join(r for r in sorted(known.revisions) if not _is_commit(r))
            return f"{ref} is not in {self.root}; it has {known.name} at: {have}."
        names = [self._parse_name(path).name for path in self._names.glob("*.json")]
        near = difflib.get_close_matches(str(ref.name), names, n=3, cutoff=0.4)
        hint = f"nearest: {', '.join(near)}" if near else f"it holds {len(names)} adapters: `adapterhub list`"
        asked = "no Hub was asked" if self.hub is None else "a name without an owner is not looked up on a Hub"
        return f"no adapter {ref} in {self.root} ({hint}); {asked}. `adapterhub pull OWNER/NAME` fetches one."


def _is_commit(revision: str) -> bool:
    return len(revision) == 40 and all(c in "0123456789abcdef" for c in revision)


def _link(stored: Path, target: Path) -> None:
    """A hard link, or a copy on a file system that has none."""
    try:
        os.link(stored, target)
    except OSError:
        shutil.copyfile(stored, target)
