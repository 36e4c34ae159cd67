"""Content-addressed storage of packages: each file is stored once, and a package exists only when it is complete.

    objects/<sha256>       a file, read-only
    adapters/<digest>/     a package: hard links to objects

A package is removed only by `gc`, when no name points to it and no process has a lease on it. Names are not known here.
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
"""Age from which a temporary file that no process holds counts as left by a process that died, in seconds."""


@dataclass(frozen=True)
class Removed:
    """What a garbage collection deleted."""

    packages: tuple[str, ...]
    """Digests of the packages."""
    num_files: int
    num_bytes: int


@dataclass(frozen=True)
class PackageStore:
    """The packages under one folder."""

    root: Path

    def folder(self, digest: str) -> Path:
        """Return the folder of a package, whether it is stored or not."""
        return self._packages / digest.removeprefix("sha256:")

    def has(self, digest: str) -> bool:
        """Return whether the package is stored."""
        return self.folder(digest).is_dir()

    def digests(self) -> list[str]:
        """Return the digests of all stored packages, sorted."""
        if not self._packages.is_dir():
            return []
        return [f"sha256:{name}" for name in sorted(os.listdir(self._packages)) if not name.startswith(".")]

    def open(self, digest: str) -> Adapter:
        """Return a stored package, verified. Raises AdapterNotFound, PackageError kinds for a damaged package."""
        if not self.has(digest):
            raise AdapterNotFound(f"{digest} is not in {self.root}. Pull it, or add its folder.")
        return open_adapter(self.folder(digest))

    @contextmanager
    def keep(self, adapter: Adapter, *, is_scratch: bool = False) -> Iterator[Adapter]:
        """Store a verified package and lease it while the block runs, for example until a name points to it.

        A package that is stored already is verified, and replaced if it is damaged. The files of a scratch folder on
        the same disk are linked, not copied.

        Raises:
            DigestMismatch: a file changed since it was verified.
            Conflict: the signature is of another manifest than the stored one.
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
        """Keep the package from garbage collection, by any process, while the block runs. Raises AdapterNotFound."""
        with ExitStack() as leased:
            if not self._lease(self.folder(digest), leased):
                raise AdapterNotFound(f"{digest} is no longer in {self.root}. Pull or add it again.")
            yield

    def gc(self, needed: Callable[[], set[str]], *, grace_s: float, dry_run: bool = False) -> Removed:
        """Delete unreferenced packages: those not `needed`, not leased and older than `grace_s` seconds.

        Then delete files that no package links to, and temporary files of processes that died. With `dry_run` nothing
        is deleted.
        """
        now_needed = needed()
        packages = [
            digest
            for digest in self.digests()
            if digest not in now_needed and self._may_go(self.folder(digest), grace_s)
        ]
        if dry_run:
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
        """Hold the store's lock: a package is found and leased, or found unused and deleted, in one step."""
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
        """Make `target` a link to `stored`, the copy of `source`'s content, which is made if it is missing."""
        while True:
            if not stored.exists():
                self._store(source, stored, is_scratch=is_scratch)
            with suppress(FileNotFoundError):  # garbage-collected between the two
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
                    raise DigestMismatch(f"{source} changed while it was copied, and nothing was stored. Add it again.")
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
            # Asked after the lease: whoever moves a name to the package leases it until the move is written.
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
    """Add a signature to a stored package that has none. It never replaces a signature or the manifest.

    The manifest has more than the digest covers, and who brings the same content again need not be who signed it.
    """
    signature, stored = source / SIGNATURE_NAME, folder / SIGNATURE_NAME
    if not signature.is_file() or stored.is_file():
        return
    if (source / MANIFEST_NAME).read_bytes() != (folder / MANIFEST_NAME).read_bytes():
        raise Conflict(
            f"{source} is signed, but the same content is stored unsigned with another {MANIFEST_NAME}, which the "
            "signature would not cover. Remove its names, run 'adapterhub gc --grace 0', then add the signed package."
        )
    write_atomic(stored, signature.read_bytes())


def _is_sound(folder: Path) -> bool:
    try:
        open_adapter(folder)
    except PackageError:
        return False
    return True


def _size(folder: Path) -> int:
    """Return the size in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _link(stored: Path, target: Path) -> None:
    """Make a hard link, or a copy on a file system without hard links."""
    try:
        os.link(stored, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(stored, target)
