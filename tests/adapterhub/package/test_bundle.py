"""Untrusted .zip files of packages: what is refused, and that nothing of it stays."""

from __future__ import annotations

import shutil
import stat
import struct
import zipfile
from pathlib import Path

import pytest
from packages import write_package

from adapterhub.errors import (
    BundleTooLarge,
    DigestMismatch,
    InvalidBundle,
    MissingFile,
    PackageError,
    UnexpectedFile,
    UnsafeFile,
)
from adapterhub.package.bundle import opened_bundle
from adapterhub.package.layout import open_adapter

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return write_package(tmp_path / "captain", name="captain")


def _zip(package: Path, **more: str | bytes) -> Path:
    """The package in a folder, as zip tools write it; `more` is added or replaces, by path (`__` for `/`)."""
    path = package.with_suffix(".zip")
    files = {f"captain/{file.name}": file.read_bytes() for file in sorted(package.iterdir())}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, content in {**files, **more}.items():
            bundle.writestr(name, content)
    return path


def _refused(path: Path, kind: type[PackageError], *said: str, max_bytes: int = 1 << 20) -> None:
    scratch = path.parent / "scratch"
    with pytest.raises(kind) as refusal, opened_bundle(path, scratch, max_bytes=max_bytes):
        pass
    for words in said:
        assert words in str(refusal.value)
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("in_folder", [True, False])
def test_a_zipped_package_is_the_package(package: Path, tmp_path: Path, in_folder: bool) -> None:
    root, base = (package.parent, package.name) if in_folder else (package, None)
    path = Path(shutil.make_archive(str(tmp_path / "zipped"), "zip", root, base))
    with opened_bundle(path, tmp_path / "scratch") as adapter:
        assert adapter.digest == open_adapter(package).digest
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize(
    "name", ["../evil.json", "/etc/evil.json", "captain/../../evil.json", "captain\\evil", "a/b/c.json"]
)
def test_a_path_that_climbs_out_is_refused(package: Path, name: str) -> None:
    _refused(_zip(package, **{name: "x"}), InvalidBundle, "leaves the package's folder")
    assert not list(package.parent.rglob("evil*"))


def test_a_symbolic_link_is_refused(package: Path) -> None:
    path = package.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as bundle:
        link = zipfile.ZipInfo("captain/tokenizer.json")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        bundle.writestr(link, "/etc/passwd")
    _refused(path, InvalidBundle, "symbolic link")


def test_two_folders_are_refused(package: Path) -> None:
    _refused(_zip(package, **{"other/README.md": "x"}), InvalidBundle, "several folders")


def test_more_bytes_than_allowed_are_refused_before_they_are_written(package: Path) -> None:
    bomb = _zip(package, **{"captain/tokenizer.json": b"\0" * 3_000_000})
    assert bomb.stat().st_size < 20_000
    _refused(bomb, BundleTooLarge, "1,048,576")


def test_a_zip_that_lies_about_its_sizes_is_refused_while_it_unpacks(package: Path) -> None:
    """Its directory says 10 bytes; the stream holds 3 MB."""
    path = _zip(package, **{"captain/tokenizer.json": b"\0" * 3_000_000})
    raw = path.read_bytes()
    path.write_bytes(raw.replace(struct.pack("<I", 3_000_000), struct.pack("<I", 10)))
    _refused(path, PackageError)


def test_a_pickle_is_refused_by_name(package: Path) -> None:
    _refused(_zip(package, **{"captain/adapter_model.bin": b"\x80\x04."}), UnsafeFile, "adapter_model.bin")


def test_an_unexpected_file_is_refused(package: Path) -> None:
    _refused(_zip(package, **{"captain/thesis.txt": "x"}), UnexpectedFile, "thesis.txt")


def test_changed_weights_are_refused(package: Path) -> None:
    torn = (package / WEIGHTS).read_bytes()[:-4] + b"\1\2\3\4"
    _refused(_zip(package, **{f"captain/{WEIGHTS}": torn}), DigestMismatch, WEIGHTS)


def test_a_missing_file_is_refused(package: Path) -> None:
    (package / WEIGHTS).unlink()
    _refused(_zip(package), MissingFile, WEIGHTS)


@pytest.mark.parametrize("content", [b"", b"PK\3\4 no more", b"\x1f\x8b a tarball, perhaps"])
def test_what_is_no_zip_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(content)
    _refused(path, InvalidBundle, "not a readable zip")


def test_a_damaged_zip_is_refused(package: Path) -> None:
    path = _zip(package)
    raw = bytearray(path.read_bytes())
    raw[120] ^= 255
    path.write_bytes(raw)
    _refused(path, PackageError)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_entry_of_any_compression_is_refused(package: Path, compression: int) -> None:
    path = package.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", compression) as bundle:
        bundle.write(package / WEIGHTS, WEIGHTS)
    raw = bytearray(path.read_bytes())
    begin = 30 + len(WEIGHTS) + 12  # behind the local header, and what LZMA says of itself
    raw[begin : begin + 12] = bytes(byte ^ 0x5A for byte in raw[begin : begin + 12])
    path.write_bytes(raw)
    _refused(path, InvalidBundle, "not a readable zip")


def test_an_encrypted_zip_is_refused(package: Path) -> None:
    path = _zip(package)
    raw = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = raw.find(signature)
        while at >= 0:
            raw[at + flags] |= 1
            at = raw.find(signature, at + 1)
    path.write_bytes(raw)
    _refused(path, InvalidBundle, "encrypted")


@pytest.mark.parametrize("name", [".", "\0x", "captain/."])
def test_an_entry_without_a_name_is_refused(package: Path, name: str) -> None:
    path = package.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as bundle:
        entry = zipfile.ZipInfo("x" * len(name))
        entry.filename = name  # ZipInfo itself would cut it
        bundle.writestr(entry, "x")
    _refused(path, PackageError)


def test_a_directory_before_the_file_s_beginning_is_refused(package: Path) -> None:
    path = _zip(package)
    raw = bytearray(path.read_bytes())
    at = raw.rfind(b"PK\5\6")
    raw[at + 16 : at + 20] = struct.pack("<I", 0x7FFFFFFF)
    path.write_bytes(raw)
    _refused(path, InvalidBundle)
