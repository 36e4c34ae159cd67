"""Write a package as one .zip file, and read such a file without trusting it. layout.py checks the content."""

from __future__ import annotations

import lzma
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from adapterhub.adapter import Adapter
from adapterhub.errors import BundleTooLarge, InvalidBundle
from adapterhub.files import raise_storage_full, write_stream_atomic
from adapterhub.package.layout import ALLOWED, check_names, files_of, open_adapter

MAX_BYTES = 4 << 30
"""Maximum size of an unpacked package, in bytes: several times the largest LoRA of a model that one machine serves."""
_CHUNK = 1 << 20
_NO_DATE = (1980, 1, 1, 0, 0, 0)


def write_bundle(adapter: Adapter, path: Path) -> None:
    """Write the package's files, the signature included, uncompressed. The same package gives the same bytes.

    Raises StorageFull; `path` is then unchanged.
    """
    with write_stream_atomic(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as bundle:
        for source in files_of(adapter.path):
            entry = zipfile.ZipInfo(source.name, _NO_DATE)
            entry.external_attr = 0o644 << 16
            entry.file_size = source.stat().st_size
            with source.open("rb") as read, bundle.open(entry, "w") as write:
                shutil.copyfileobj(read, write, _CHUNK)


@contextmanager
def opened_bundle(path: Path, scratch: Path, *, max_bytes: int = MAX_BYTES) -> Iterator[Adapter]:
    """Yield the verified adapter of the zip at `path`, unpacked below `scratch` while the block runs.

    Its files are at the top or in one folder. Names, number and sizes are checked before the first byte is written,
    and the bytes are counted while they are written: the sizes that a zip declares may be wrong. Raises InvalidBundle,
    BundleTooLarge, and the PackageError that open_adapter finds.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".bundle-") as temporary, raise_storage_full(scratch):
        folder = Path(temporary) / "package"
        folder.mkdir()
        try:
            with zipfile.ZipFile(path) as bundle:
                left = max_bytes
                for name, entry in _entries(bundle, max_bytes=max_bytes).items():
                    with _opened(bundle, entry) as source, (folder / name).open("wb") as target:
                        left -= _copy(source, target, at_most=left, name=name)
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, UnicodeDecodeError) as error:
            # RuntimeError: an encrypted entry, or a compression that Python does not have.
            raise _unreadable(error) from error
        yield open_adapter(folder)


def _entries(bundle: zipfile.ZipFile, *, max_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """Return name -> entry of the plain files."""
    files = [entry for entry in bundle.infolist() if not entry.filename.endswith("/")]
    if len(files) > len(ALLOWED):
        raise InvalidBundle(f"{len(files)} files in the zip: expected at most {len(ALLOWED)}. Zip one packed folder.")
    parts = [PurePosixPath(entry.filename).parts for entry in files]
    for entry, part in zip(files, parts, strict=True):
        if not part or entry.filename.startswith("/") or ".." in part or "\\" in entry.filename or len(part) > 2:
            raise InvalidBundle(f"{entry.filename!r} leaves the package's folder: zip one packed folder as it is.")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise InvalidBundle(f"{entry.filename!r} is a symbolic link: packages hold plain files only.")
    if len({part[:-1] for part in parts}) > 1:
        raise InvalidBundle("the zip contains several folders: expected one packed folder. Zip that alone.")
    found = {part[-1]: entry for entry, part in zip(files, parts, strict=True)}
    if len(found) != len(files):
        raise InvalidBundle("the zip contains two files of one name: expected one packed folder. Zip it again.")
    check_names(found)
    size = sum(entry.file_size for entry in files)
    if size > max_bytes:
        raise BundleTooLarge(f"the zip unpacks to {size:,} bytes: expected at most {max_bytes:,}.")
    return found


def _opened(bundle: zipfile.ZipFile, entry: zipfile.ZipInfo) -> IO[bytes]:
    try:
        return bundle.open(entry)
    except OSError as error:  # a place before the file's beginning
        raise _unreadable(error) from error


def _copy(source: IO[bytes], target: IO[bytes], *, at_most: int, name: str) -> int:
    """Copy a file and return its size, in bytes. Raises InvalidBundle past `at_most`."""
    copied = 0
    while chunk := _read(source):
        copied += len(chunk)
        if copied > at_most:
            raise InvalidBundle(f"{name!r} unpacks to more bytes than the zip declares: zip the packed folder again.")
        target.write(chunk)
    return copied


def _read(source: IO[bytes]) -> bytes:
    try:
        return source.read(_CHUNK)
    except OSError as error:  # bzip2's word for damage; one while writing is a full disk, not the zip's fault
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> InvalidBundle:
    return InvalidBundle(f"the file is not a readable zip ({error}): zip the packed folder again.")
