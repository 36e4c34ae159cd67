"""Xet uploads: the two formats, invalid input, and files rebuilt from chunks."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import lz4.frame
import pytest
from hub_fixtures import ALICE, BOB, PEOPLE, READER, start_hub
from huggingface_hub import get_session
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub.hubserver.auth.tickets import Signer, XetTicket
from adapterhub.hubserver.errors import InvalidToken, TooLarge, UploadMismatch
from adapterhub.hubserver.names import RepoId
from adapterhub.hubserver.storage.objects import ObjectStore
from adapterhub.hubserver.xet.format import (
    MAX_XORB_BYTES,
    ShardFile,
    Term,
    XorbChunk,
    hash_text,
    shard_files,
    unpack,
    xorb_chunks,
)
from adapterhub.hubserver.xet.xorb_store import XorbStore

REPO = "alice/poems"
XORB = "0123456789abcdef" * 4
RAW = [b"first chunk " * 50, bytes(range(256)) * 3 + b"xyz", b"", b"last"]
"""The second chunk has 771 bytes, not a multiple of four."""


def packed(raw: bytes, scheme: int) -> bytes:
    """A chunk as clients send it, written after the specification."""
    grouped = b"".join(raw[place::4] for place in range(4)) if scheme == 2 else raw
    data = grouped if scheme == 0 else lz4.frame.compress(grouped)
    return bytes([0]) + len(data).to_bytes(3, "little") + bytes([scheme]) + len(raw).to_bytes(3, "little") + data


def hash_bytes(text: str) -> bytes:
    return struct.pack("<4Q", *(int(text[at : at + 16], 16) for at in range(0, 64, 16)))


def shard(*files: tuple[bytes, list[tuple[str, int, int, int]]], flags: int = 0b11 << 30) -> bytes:
    """`files`: content and terms (xorb, bytes, first chunk, end)."""
    parts = [b"HFRepoMetaData\0".ljust(32, b"U") + struct.pack("<QQ", 2, 0)]
    for content, terms in files:
        parts.append(b"\1" * 32 + struct.pack("<II", flags, len(terms)) + bytes(8))
        parts += [hash_bytes(xorb) + struct.pack("<4I", 0, size, first, end) for xorb, size, first, end in terms]
        parts += [bytes(48)] * (len(terms) if flags >> 31 else 0)
        if flags >> 30 & 1:
            parts.append(hash_bytes(hashlib.sha256(content).hexdigest()) + bytes(16))
    return b"".join([*parts, b"\xff" * 32 + bytes(16)])


XORB_BODY = b"".join(packed(raw, scheme) for raw, scheme in zip(RAW, (1, 2, 0, 0), strict=True))
WHOLE = b"".join(RAW)
SHARD = shard((WHOLE, [(XORB, len(RAW[0]), 0, 1), (XORB, len(WHOLE) - len(RAW[0]), 1, 4)]))


# The formats


def test_xorb_is_unpacked_in_all_three_schemes() -> None:
    file = io.BytesIO(XORB_BODY + b"XETBLOB\1 a footer, as older clients send it")
    chunks = xorb_chunks(file)
    assert [chunk.scheme for chunk in chunks] == [1, 2, 0, 0]
    body = file.getvalue()
    assert [unpack(c, body[c.start : c.start + c.packed_size]) for c in chunks] == RAW


@given(st.binary(max_size=300), st.sampled_from([0, 1, 2]))
def test_any_chunk_comes_back(raw: bytes, scheme: int) -> None:
    body = packed(raw, scheme)
    (chunk,) = xorb_chunks(io.BytesIO(body))
    assert unpack(chunk, body[8:]) == raw


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_any_bytes_are_a_xorb_or_refused(body: bytes) -> None:
    try:
        chunks = xorb_chunks(io.BytesIO(body))
    except UploadMismatch as refusal:
        assert str(refusal)
    else:
        assert chunks[-1].start + chunks[-1].packed_size <= len(body)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "no chunks"),
        (XORB_BODY[:5], "ends inside the header"),
        (XORB_BODY[:-1], "beyond the end"),
        (b"\1" + XORB_BODY[1:], "unknown header"),
        (packed(b"x", 0)[:4] + b"\3" + packed(b"x", 0)[5:], "unknown header"),
        (bytes([0, 0, 0, 0, 0]) + (200 << 10).to_bytes(3, "little"), "unknown header"),
        (packed(b"", 0) * 8193, "too many chunks"),
    ],
)
def test_broken_xorb_is_refused(body: bytes, said: str) -> None:
    with pytest.raises(UploadMismatch) as refusal:
        xorb_chunks(io.BytesIO(body))
    assert said in str(refusal.value)


@pytest.mark.parametrize("raw_size", [0, 100, 1 << 20])
def test_chunk_that_unpacks_to_another_size_is_refused(raw_size: int) -> None:
    bomb = lz4.frame.compress(bytes(1000))
    with pytest.raises(UploadMismatch) as refusal:
        unpack(XorbChunk(0, len(bomb), 1, raw_size), bomb)
    assert "as announced" in str(refusal.value)


def test_chunk_that_is_no_lz4_frame_is_refused() -> None:
    with pytest.raises(UploadMismatch) as refusal:
        unpack(XorbChunk(0, 40, 1, 10), b"junk" * 10)
    assert "not an LZ4 frame" in str(refusal.value)


def test_shard_names_files_and_their_chunks() -> None:
    (file,) = shard_files(io.BytesIO(SHARD))
    assert file == ShardFile(
        hashlib.sha256(WHOLE).hexdigest(),
        (Term(XORB, 0, 1, len(RAW[0])), Term(XORB, 1, 4, len(WHOLE) - len(RAW[0]))),
    )
    assert hash_text(hash_bytes(XORB)) == XORB


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not a Xet shard"),
        (b"x" * 100, "not a Xet shard"),
        (SHARD[:-1], "middle of an entry"),
        (SHARD[:100], "middle of an entry"),
        (shard((WHOLE, []), flags=0), "has no sha256"),
        (SHARD[:80] + b"\xff" * 8 + SHARD[88:], "middle of an entry"),
    ],
)
def test_broken_shard_is_refused(body: bytes, said: str) -> None:
    with pytest.raises(UploadMismatch) as refusal:
        list(shard_files(io.BytesIO(body)))
    assert said in str(refusal.value)


# Kept chunks


@pytest.fixture
def objects(tmp_path: Path) -> ObjectStore:
    return ObjectStore(tmp_path)


@pytest.fixture
def xet(tmp_path: Path, objects: ObjectStore) -> XorbStore:
    return XorbStore(tmp_path, objects)


def keep(xet: XorbStore, user: str, body: bytes = XORB_BODY, xorb: str = XORB) -> None:
    with closing(xet.begin_xorb(user, xorb)) as spool:
        spool.write(body)
        spool.publish()


def file_of(content: bytes, *terms: tuple[int, int]) -> ShardFile:
    sizes = [sum(len(raw) for raw in RAW[first:end]) for first, end in terms]
    return ShardFile(
        hashlib.sha256(content).hexdigest(),
        tuple(Term(XORB, first, end, size) for (first, end), size in zip(terms, sizes, strict=True)),
    )


def test_file_is_put_together_in_any_order(xet: XorbStore, objects: ObjectStore) -> None:
    keep(xet, "alice")
    content = RAW[3] + RAW[0] + RAW[1]
    file = file_of(content, (3, 4), (0, 2))
    xet.rebuild(file, user="alice")
    assert objects.lfs_path(file.sha256).read_bytes() == content


def test_chunks_of_another_user_can_be_neither_read_nor_spoilt(xet: XorbStore, objects: ObjectStore) -> None:
    keep(xet, "alice")
    file = file_of(WHOLE, (0, 4))
    with pytest.raises(UploadMismatch) as refusal:
        xet.rebuild(file, user="bob")
    assert "of 'bob' is not on this hub" in str(refusal.value)
    keep(xet, "bob", packed(b"spoilt", 0) * 4)
    xet.rebuild(file, user="alice")
    assert objects.lfs_path(file.sha256).read_bytes() == WHOLE


@pytest.mark.parametrize("number", range(4))
def test_refusal_tells_no_hash_of_a_chunk(xet: XorbStore, number: int) -> None:
    """With its hash, the chunk could be asked for again, committed and downloaded."""
    keep(xet, "alice")
    for user in ("alice", "mallory"):
        with pytest.raises(UploadMismatch) as refusal:
            xet.rebuild(ShardFile("0" * 64, (Term(XORB, number, number + 1, len(RAW[number])),)), user=user)
        assert hashlib.sha256(RAW[number]).hexdigest() not in str(refusal.value)


def test_xorb_that_is_sent_again_packed_otherwise_serves(xet: XorbStore, objects: ObjectStore) -> None:
    file = file_of(WHOLE, (0, 4))
    for scheme in (0, 1, 2):
        keep(xet, "alice", b"".join(packed(raw, scheme) for raw in RAW))
        objects.lfs_path(file.sha256).unlink(missing_ok=True)
        xet.rebuild(file, user="alice")
        assert objects.lfs_path(file.sha256).read_bytes() == WHOLE


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (ShardFile(hashlib.sha256(b"other").hexdigest(), (Term(XORB, 0, 4, len(WHOLE)),)), "not those announced"),
        (ShardFile(hashlib.sha256(WHOLE).hexdigest(), (Term(XORB, 0, 5, len(WHOLE)),)), "has 4 chunks"),
        (ShardFile(hashlib.sha256(WHOLE).hexdigest(), (Term(XORB, 1, 1, 0),)), "has 4 chunks"),
        (
            ShardFile(hashlib.sha256(WHOLE).hexdigest(), (Term("f" * 64, 0, 4, len(WHOLE)),)),
            "not on this hub (any more)",
        ),
    ],
)
def test_file_that_does_not_come_out_is_refused(
    xet: XorbStore, objects: ObjectStore, tmp_path: Path, file: ShardFile, said: str
) -> None:
    keep(xet, "alice")
    with pytest.raises(UploadMismatch) as refusal:
        xet.rebuild(file, user="alice")
    assert said in str(refusal.value)
    assert not objects.lfs_path(file.sha256).exists()
    assert list((tmp_path / "uploads").iterdir()) == []


def test_announced_size_bounds_what_is_written(xet: XorbStore) -> None:
    keep(xet, "alice")
    with pytest.raises(TooLarge):
        xet.rebuild(ShardFile("0" * 64, (Term(XORB, 0, 4, 10),)), user="alice")


def test_only_chunks_long_unused_are_deleted(xet: XorbStore, tmp_path: Path) -> None:
    keep(xet, "alice")
    path = tmp_path / "xet" / "alice" / XORB
    assert xet.remove_unused() == 0
    old = time.time() - 40 * 24 * 3600
    os.utime(path, (old, old))
    xet.rebuild(file_of(WHOLE, (0, 4)), user="alice")
    assert xet.remove_unused() == 0
    os.utime(path, (old, old))
    assert xet.remove_unused() == len(XORB_BODY)
    assert not path.exists()


@pytest.mark.parametrize("name", ["../../etc", "A" * 64, "0" * 63, ""])
def test_xorb_by_an_unsafe_name_is_refused(xet: XorbStore, name: str) -> None:
    with pytest.raises(UploadMismatch):
        xet.begin_xorb("alice", name)


def test_xorb_beyond_the_limit_is_refused(xet: XorbStore) -> None:
    with closing(xet.begin_xorb("alice", XORB)) as spool, pytest.raises(TooLarge):
        for _ in range(MAX_XORB_BYTES // (1 << 20) + 1):
            spool.write(bytes(1 << 20))


# Over HTTP


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def url(root: Path) -> Iterator[str]:
    with start_hub(root, PEOPLE) as url:
        assert ask(url, "POST", "/api/repos/create", json={"name": "poems", "organization": "alice"}).status_code == 200
        yield url


def ask(url: str, method: str, path: str, token: str = ALICE, **options: Any) -> Any:
    return get_session().request(method, f"{url}{path}", headers={"Authorization": f"Bearer {token}"}, **options)


def xet_token(url: str) -> str:
    return str(ask(url, "GET", f"/api/models/{REPO}/xet-write-token/main").json()["accessToken"])


def test_chunks_and_shard_become_an_lfs_object(url: str, root: Path) -> None:
    token = xet_token(url)
    assert ask(url, "POST", f"/v1/xorbs/default/{XORB}", token, content=XORB_BODY).json() == {"was_inserted": True}
    assert ask(url, "POST", "/v1/shards", token, content=SHARD).json() == {"result": 1}
    sha256 = hashlib.sha256(WHOLE).hexdigest()
    verify = ask(url, "POST", f"/{REPO}.git/info/lfs/verify", json={"oid": sha256, "size": len(WHOLE)})
    assert verify.status_code == 200
    assert (root / "objects" / "lfs" / sha256).read_bytes() == WHOLE
    assert list((root / "uploads").iterdir()) == []


def test_file_that_is_here_is_not_put_together_again(url: str, root: Path) -> None:
    token = xet_token(url)
    ask(url, "POST", f"/v1/xorbs/default/{XORB}", token, content=XORB_BODY)
    inodes = []
    for _ in range(2):
        assert ask(url, "POST", "/v1/shards", token, content=SHARD).json() == {"result": 1}
        inodes.append((root / "objects" / "lfs" / hashlib.sha256(WHOLE).hexdigest()).stat().st_ino)
    assert inodes[0] == inodes[1]


@pytest.mark.parametrize(
    ("who", "revision", "status"),
    [(BOB, "main", 403), (READER, "main", 403), (READER, "main?create_pr=1", 403), (BOB, "main?create_pr=1", 200)],
)
def test_token_is_for_writers_and_for_proposals(url: str, who: str, revision: str, status: int) -> None:
    assert ask(url, "GET", f"/api/models/{REPO}/xet-write-token/{revision}", who).status_code == status


@pytest.mark.parametrize("path", [f"/v1/xorbs/default/{XORB}", "/v1/shards"])
def test_sending_without_the_token_is_refused(url: str, path: str) -> None:
    good = xet_token(url)
    for token in (ALICE, good[:-1] + ("0" if good[-1] != "0" else "1"), good.replace("alice", "bob")):
        assert ask(url, "POST", path, token, content=b"").status_code == 401


def test_broken_bodies_are_refused_and_leave_nothing(url: str, root: Path) -> None:
    token = xet_token(url)
    assert ask(url, "POST", f"/v1/xorbs/default/{'a' * 64}", token, content=b"junk").status_code == 400
    assert ask(url, "POST", "/v1/shards", token, content=b"junk").status_code == 400
    assert not (root / "xet" / "alice" / ("a" * 64)).exists()
    assert list((root / "uploads").iterdir()) == []


@pytest.mark.parametrize("path", ["/v2/shards", "/v1/chunks/default-merkledb/" + XORB, "/v1/xorb-grants/x"])
def test_rest_of_the_protocol_is_not_found(url: str, path: str) -> None:
    assert ask(url, "GET", path).status_code == 404


def test_expired_token_is_refused() -> None:
    signer = Signer("secret")
    late = signer.xet_token(XetTicket(RepoId.parse(REPO), "alice", int(time.time()) - 1))
    with pytest.raises(InvalidToken):
        signer.xet_ticket(late)
