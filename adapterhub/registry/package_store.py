"""Packages on disk by content: each file once, each package complete when it exists, gone only when nothing holds it.

    objects/<sha256>       a file, read-only
    adapters/<digest>/     a package: hard links to objects

Knows files and digests; refuses to know names.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from adapterhub.adapter import Adapter
from adapterhub.errors import AdapterNotFound, Conflict, DigestMismatch, PackageError
from adapterhub.files import copy_and_hash, hold, is_held, new_folder, raise_storage_full, sha256_of, write_atomic
from adapterhub.package.layout import SIGNATURE_NAME, files_of, open_adapter
from adapterhub.package.manifest import MANIFEST_NAME, read_manifest

_ABANDONED_S = 60.0
"""age from which something temporary that nobody holds was left by a process that died"""


@dataclass(frozen=True)
class Removed:
    """What a collection took away."""

    packages: tuple[str, ...]
    """digests"""
    num_files: int
    num_bytes: int


@dataclass(frozen=True)
class PackageStore:
    """The packages under one folder."""

    root: Path

    def folder(self, digest: str) -> Path:
        return self._packages / digest.removeprefix("sha256:")

    def has(self, digest: str) -> bool:
        return self.folder(digest).is_dir()

    def digests(self) -> list[str]:
        if not self._packages.is_dir():
            return []
        return [f"sha256:{name}" for name in sorted(os.listdir(self._packages)) if not name.startswith(".")]

    def open(self, digest: str) -> Adapter:
        """Raises AdapterNotFound, and PackageError kinds for a package that no longer is what it was."""
        if not self.has(digest):
            raise AdapterNotFound(f"{digest} is not in {self.root}: pull it, or add its folder.")
        return open_adapter(self.folder(digest))

    @contextmanager
    def keep(self, adapter: Adapter, *, is_scratch: bool = False) -> Iterator[Adapter]:
        """Store a verified package, and lease it while the block runs: until a name leads to it, say.

        One that is here already is verified, and replaced when it is damaged. A folder that is scratch, on the same
        disk and nobody else's, gives its files away instead of having them copied. Raises DigestMismatch for a file
        that changed since it was verified, Conflict for a signature of another manifest than the one kept.
        """
        folder = self.folder(adapter.digest)
        is_ours, is_trusted = False, True
        with ExitStack() as leased:
            while True:
                if not self._lease(folder, leased):
                    self._make(adapter, folder, is_trusted=is_trusted, is_scratch=is_scratch)
                    is_ours = True
                elif is_ours or _is_sound(folder):
                    break
                else:
                    folder.rename(self._trash(folder))
                    is_trusted = False
            if not is_ours:
                _take_signature(adapter.path, folder)
            yield Adapter(folder, read_manifest(folder))

    @contextmanager
    def lease(self, digest: str) -> Iterator[None]:
        """No collection takes the package while the block runs, in this process or any other.

        Raises AdapterNotFound when it is gone already.
        """
        with ExitStack() as leased:
            if not self._lease(self.folder(digest), leased):
                raise AdapterNotFound(f"{digest} is not in {self.root} any more: pull or add it again.")
            yield

    def collect(self, needed: Callable[[], set[str]], *, grace_s: float, is_trial: bool = False) -> Removed:
        """Take away packages that are not `needed`, not leased and older than `grace_s`; then files of no package.

        Also what killed processes left half-done. With `is_trial` nothing is touched, only told.
        """
        now_needed = needed()
        packages = [
            digest
            for digest in self.digests()
            if digest not in now_needed and self._may_go(self.folder(digest), grace_s)
        ]
        if is_trial:
            return Removed(tuple(packages), 0, sum(_size(self.folder(digest)) for digest in packages))
        gone = [digest for digest in packages if self._retire(digest, needed, grace_s)]
        num_files = num_bytes = 0
        for path in self._leftovers():
            num_bytes += _size(path) if path.is_dir() else 0
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        for path in self._objects.glob("[0-9a-f]*"):
            about = path.stat()
            if about.st_nlink == 1 and time.time() - about.st_mtime >= grace_s:
                path.unlink(missing_ok=True)
                num_files += 1
                num_bytes += about.st_size
        return Removed(tuple(gone), num_files, num_bytes)

    @property
    def _packages(self) -> Path:
        return self.root / "adapters"

    @property
    def _objects(self) -> Path:
        return self.root / "objects"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Finding a package and leasing it is one act, as is finding it free and taking it away."""
        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / ".packages.lock"):
            yield

    def _lease(self, folder: Path, until: ExitStack) -> bool:
        with self._locked():
            if not folder.is_dir():
                return False
            until.enter_context(hold(folder))
        return True

    def _make(self, adapter: Adapter, folder: Path, *, is_trusted: bool, is_scratch: bool) -> None:
        listed = adapter.manifest.files
        with new_folder(folder) as temporary:
            for path in files_of(adapter.path):
                digest = listed[path.name].sha256 if path.name in listed else sha256_of(path)
                stored = self._objects / digest
                if not is_trusted and stored.exists() and sha256_of(stored) != digest:
                    stored.unlink(missing_ok=True)
                self._place(path, stored, temporary / path.name, is_scratch=is_scratch)

    def _place(self, source: Path, stored: Path, target: Path, *, is_scratch: bool) -> None:
        """`target` becomes a link to `stored`, the copy of `source`'s content, made if it is not there yet."""
        while True:
            if not stored.exists():
                self._store(source, stored, is_scratch=is_scratch)
            with suppress(FileNotFoundError):  # collected between the two
                _link(stored, target)
                return

    def _store(self, source: Path, stored: Path, *, is_scratch: bool) -> None:
        stored.parent.mkdir(parents=True, exist_ok=True)
        if is_scratch:
            source.chmod(0o444)
            with suppress(OSError):  # no hard links here: copied as others are
                os.link(source, stored)
            if stored.exists():
                return
        temporary = stored.with_name(f".{stored.name}.{secrets.token_hex(4)}.tmp")
        temporary.touch()
        try:
            with hold(temporary), raise_storage_full(stored):
                if copy_and_hash(source, temporary) != stored.name:
                    raise DigestMismatch(f"{source} changed while it was copied: nothing of it is kept; add it again.")
                temporary.chmod(0o444)
                temporary.replace(stored)
        finally:
            temporary.unlink(missing_ok=True)

    def _may_go(self, folder: Path, grace_s: float) -> bool:
        return time.time() - folder.stat().st_mtime >= grace_s and not is_held(folder)

    def _retire(self, digest: str, needed: Callable[[], set[str]], grace_s: float) -> bool:
        folder = self.folder(digest)
        with self._locked():
            if not folder.is_dir() or not self._may_go(folder, grace_s):
                return False
            # Asked after the lease: whoever let a name lead here held the package until the name was written.
            if digest in needed():
                return False
            trash = self._trash(folder)
            folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)
        return True

    def _trash(self, folder: Path) -> Path:
        return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")

    def _leftovers(self) -> list[Path]:
        temporary = [
            *self._packages.glob(".*.tmp"), *self._objects.glob(".*.tmp"), *self.root.glob(".pull-*"),
        ]  # fmt: skip
        found = []
        for path in temporary:
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime >= _ABANDONED_S and not is_held(path):
                    found.append(path)
        return found


def _take_signature(source: Path, folder: Path) -> None:
    """A signature may join a package that has none, and never takes the place of one, or of a manifest: more than the
    digest covers stands there, and whoever brings the same content again need not be who signed it."""
    signature, stored = source / SIGNATURE_NAME, folder / SIGNATURE_NAME
    if not signature.is_file() or stored.is_file():
        return
    if (source / MANIFEST_NAME).read_bytes() != (folder / MANIFEST_NAME).read_bytes():
        raise Conflict(
            f"{source} is signed, and the same content is kept here unsigned with another {MANIFEST_NAME}, which the "
            "signature would not cover: remove its names, run `adapterhub gc --grace 0`, then bring the signed one."
        )
    write_atomic(stored, signature.read_bytes())


def _is_sound(folder: Path) -> bool:
    try:
        open_adapter(folder)
    except PackageError:
        return False
    return True


def _size(folder: Path) -> int:
    """Bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _link(stored: Path, target: Path) -> None:
    """A hard link, or a copy on a file system that has none."""
    try:
        os.link(stored, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(stored, target)
