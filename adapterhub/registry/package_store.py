"""Content-addressed storage of packages: each file is stored once, and a package exists only when it is complete.

    objects/<sha256>       a file, read-only
    adapters/<digest>/     a package: hard links to objects

A package is on disk before `keep` returns, and what is read is compared with the digest that was asked for. A package
is removed only by `gc`, when no name points to it and no process has a lease on it. Names are not known here.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from adapterhub.adapter import Adapter
from adapterhub.errors import AdapterNotFound, Conflict, DigestMismatch, PackageError
from adapterhub.files import (
    copy_and_hash,
    hold,
    is_held,
    make_folder,
    new_folder,
    raise_storage_full,
    sha256_of,
    sync,
    temporary_beside,
    write_atomic,
)
from adapterhub.package.layout import SIGNATURE_NAME, files_of, open_adapter
from adapterhub.package.manifest import MANIFEST_NAME, PROBE_NAME, read_manifest

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
        adapter = open_adapter(self.folder(digest))
        if adapter.digest != digest:
            raise DigestMismatch(
                f"{adapter.path} holds {adapter.digest}: expected the package of its name. Add or pull {digest} again."
            )
        return adapter

    def check(self, digest: str) -> None:
        """Open a stored package, and check that its signature, if it has one, is of its files. Raises as `open`.

        Raises SignatureInvalid.
        """
        adapter = self.open(digest)
        if (adapter.path / SIGNATURE_NAME).is_file():
            from adapterhub.package.signing import check_signed_files  # of few packages

            check_signed_files(adapter)

    def is_sound(self, digest: str) -> bool:
        """Return whether the package is stored and `check` finds no fault in it."""
        try:
            self.check(digest)
        except (AdapterNotFound, PackageError):
            return False
        return True

    def damaged_objects(self) -> list[Path]:
        """Return the files that no package links to and whose bytes are not those that their name states."""
        damaged = []
        for path in sorted(self._objects.glob("[0-9a-f]*")):
            with suppress(FileNotFoundError):  # another process collects meanwhile
                if path.stat().st_nlink == 1 and sha256_of(path) != path.name:
                    damaged.append(path)
        return damaged

    @contextmanager
    def keep(self, adapter: Adapter, *, is_scratch: bool = False) -> Iterator[Adapter]:
        """Store a verified package and lease it while the block runs, for example until a name points to it.

        A package that is stored already is verified, and replaced if it is damaged. The files of a scratch folder on
        the same disk are linked, not copied; they are on disk (`new_folder`).

        Raises:
            DigestMismatch: a file changed since it was verified.
            Conflict: the same digest is stored with another behavior (format 1), or with another manifest than the
                signature covers.
        """
        folder = self.folder(adapter.digest)
        is_ours = False
        with ExitStack() as leased:
            while True:
                if not self._lease(folder, leased):
                    self._make(adapter, folder, is_scratch=is_scratch)
                    is_ours = True
                elif is_ours or self.is_sound(adapter.digest):
                    break
                else:
                    with suppress(FileNotFoundError):  # another process did
                        folder.rename(temporary_beside(folder))
            if not is_ours:
                sync(self._packages)  # whoever made it may not have come to it yet
                _check_same_behavior(adapter, folder)
                _take_beside(adapter.path, folder)
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
        is deleted. Several processes may collect at once; each reports what it deleted.
        """
        now_needed = needed()
        packages = [
            digest
            for digest in self.digests()
            if digest not in now_needed and self._may_go(self.folder(digest), grace_s)
        ]
        if dry_run:
            return Removed(tuple(packages), 0, sum(_size(self.folder(digest)) for digest in packages))
        gone = self._retire(packages, needed, grace_s)
        num_files = num_bytes = 0
        for path in self._leftovers():
            num_bytes += _size(path) if path.is_dir() else 0
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        for path in self._objects.glob("[0-9a-f]*"):
            with suppress(FileNotFoundError):  # another process deletes, too
                about = path.stat()
                if about.st_nlink == 1 and time.time() - about.st_mtime >= grace_s:
                    path.unlink()
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
        make_folder(self.root)
        with FileLock(self.root / ".packages.lock"):
            yield

    def _lease(self, folder: Path, until: ExitStack) -> bool:
        with self._locked():
            if not folder.is_dir():
                return False
            until.enter_context(hold(folder))
        return True

    def _make(self, adapter: Adapter, folder: Path, *, is_scratch: bool) -> None:
        listed = adapter.manifest.files
        make_folder(self._objects)
        with new_folder(folder, holds_synced=True) as temporary:
            for path in files_of(adapter.path):
                digest = listed[path.name].sha256 if path.name in listed else sha256_of(path)
                self._place(path, self._objects / digest, temporary / path.name, is_scratch=is_scratch)
            sync(self._objects)

    def _place(self, source: Path, stored: Path, target: Path, *, is_scratch: bool) -> None:
        """Make `target` a link to `stored`, the copy of `source`'s content; make that if it is missing or damaged."""
        while True:
            with suppress(FileNotFoundError):  # garbage-collected meanwhile
                if not stored.exists():
                    self._store(source, stored, is_scratch=is_scratch)
                elif sha256_of(stored) != stored.name:
                    stored.unlink()  # packages that link to it keep it, and fail alone
                    continue
                _link(stored, target)
                return

    def _store(self, source: Path, stored: Path, *, is_scratch: bool) -> None:
        """Make `stored`. Its content is on disk when this returns; its name is after `sync(self._objects)`."""
        if is_scratch:
            source.chmod(0o444)
            with suppress(OSError):  # no hard links here: copied as others are
                os.link(source, stored)
            if stored.exists():
                return
        temporary = temporary_beside(stored)
        temporary.touch()
        try:
            with hold(temporary), raise_storage_full(stored):
                if copy_and_hash(source, temporary) != stored.name:
                    raise DigestMismatch(f"{source} changed while it was copied, and nothing was stored. Add it again.")
                temporary.chmod(0o444)
                sync(temporary)
                temporary.replace(stored)
        finally:
            temporary.unlink(missing_ok=True)

    def _may_go(self, folder: Path, grace_s: float) -> bool:
        try:
            return time.time() - folder.stat().st_mtime >= grace_s and not is_held(folder)
        except FileNotFoundError:  # another process deleted it
            return False

    def _retire(self, digests: list[str], needed: Callable[[], set[str]], grace_s: float) -> list[str]:
        """Delete those of the packages that are still unused, and return their digests."""
        with self._locked():
            idle = [digest for digest in digests if self._may_go(self.folder(digest), grace_s)]
            # Asked after the leases: whoever moves a name to a package leases it until the move is written.
            still_needed = needed() if idle else set()
            gone = [digest for digest in idle if digest not in still_needed]
            trash = [self.folder(digest).rename(temporary_beside(self.folder(digest))) for digest in gone]
        if trash:
            sync(self._packages)  # else a power cut may bring a folder back without its files
        for folder in trash:
            shutil.rmtree(folder, ignore_errors=True)
        return gone

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


def _check_same_behavior(adapter: Adapter, folder: Path) -> None:
    """Check that the stored package answers alike. The digest of format 1 does not cover all that serving reads."""
    stored = read_manifest(folder)
    for part in ("lora", "chat", "probe"):
        if getattr(stored, part) != getattr(adapter.manifest, part):
            raise Conflict(
                f"{adapter.path} has another {part!r} than the package that is stored under {adapter.digest}: expected "
                "the same. Format 1 gives both one digest; pack it again with this version, then add it."
            )


def _take_beside(source: Path, folder: Path) -> None:
    """Add a signature, or an adopter's probe, to a stored package that has none. Nothing that is there is replaced.

    Who brings the same content again need not be who signed it, and a signature covers more than the digest does.
    """
    if (folder / SIGNATURE_NAME).is_file():
        return
    is_signed = (source / SIGNATURE_NAME).is_file()
    for name in (MANIFEST_NAME, PROBE_NAME) if is_signed else ():
        if (folder / name).is_file() and _bytes(source / name) != _bytes(folder / name):
            raise Conflict(
                f"{source} is signed, but the same content is stored unsigned with another {name}, which the signature "
                "would not cover. Remove its names, run 'adapterhub gc --grace 0', then add the signed package."
            )
    for name in (PROBE_NAME, SIGNATURE_NAME):
        brought = _bytes(source / name)
        if brought is not None and not (folder / name).is_file():
            write_atomic(folder / name, brought)


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _size(folder: Path) -> int:
    """Return the size of what is there, in bytes: another process may be deleting it."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size += os.stat(os.path.join(parent, name)).st_size
    return size


def _link(stored: Path, target: Path) -> None:
    """Make a hard link, or a copy on a file system without hard links."""
    try:
        os.link(stored, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(stored, target)
        sync(target)
