"""Signatures of adapters: OpenSSF Model Signing v1.0 with a key of one's own (elliptic curve, P-256).

`adapter.sig` is a Sigstore bundle v0.3: a DSSE envelope (https://github.com/secure-systems-lab/dsse) around an in-toto
statement v1 that lists every file but card, signature and `.gitattributes`. https://github.com/ossf/model-signing-spec
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from adapterhub.adapter import Adapter
from adapterhub.errors import SignatureInvalid, UsageError
from adapterhub.files import make_folder, sha256_of, write_atomic
from adapterhub.package.layout import SIGNATURE_NAME, UNLISTED
from adapterhub.package.manifest import MANIFEST_NAME, PROBE_NAME
from adapterhub.strict import parse_json

PASSWORD_VARIABLE = "ADAPTERHUB_KEY_PASSWORD"  # noqa: S105 (the name of the variable)
"""Environment variable with the password of an encrypted private key; unset: keys are not encrypted."""

_UNSIGNED = tuple(name for name in UNLISTED if name not in (MANIFEST_NAME, PROBE_NAME))
_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"
_MAX_SIGNATURE_BYTES = 1_000_000


@dataclass(frozen=True)
class PublicKey:
    """A key signatures are checked with; `hint` is how a bundle names it."""

    path: Path
    key: ec.EllipticCurvePublicKey

    @classmethod
    def read(cls, path: Path) -> PublicKey:
        """Read a public key. Raises UsageError for a file that is not a P-256 key in PEM."""
        try:
            key = serialization.load_pem_public_key(path.read_bytes())
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            raise UsageError(f"{path} cannot be read as a public key in PEM ({error}).") from error
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise UsageError(f"{path} is not an elliptic curve key on P-256: make one with `adapterhub keygen`.")
        return cls(path, key)

    @property
    def hint(self) -> str:
        return hashlib.sha256(_public_pem(self.key)).hexdigest()


def make_key(path: Path) -> tuple[Path, Path]:
    """Make a key pair: `path`, readable by its owner only, and `path`.pub. Raises UsageError when one is there."""
    public_path = path.with_name(path.name + ".pub")
    taken = [str(one) for one in (path, public_path) if one.exists()]
    if taken:
        raise UsageError(
            f"{' and '.join(taken)} already exists, and signatures made with it could no longer be verified. Choose "
            "another path."
        )
    key = ec.generate_private_key(ec.SECP256R1())
    password = os.environ.get(PASSWORD_VARIABLE, "").encode()
    hidden: serialization.KeySerializationEncryption = (
        serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    )
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden)
    make_folder(path.parent)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
    write_atomic(public_path, _public_pem(key.public_key()))
    return path, public_path


def sign(adapter: Adapter, key_path: Path) -> Path:
    """Write `adapter.sig` into the package of a verified adapter; its digest stays. Raises UsageError for a bad key."""
    key = _read_private(key_path)
    digests = _digests(adapter)
    statement = {
        "_type": _STATEMENT_TYPE,
        "subject": [{"name": adapter.manifest.name, "digest": {"sha256": _root(list(digests.values()))}}],
        "predicateType": _PREDICATE_TYPE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": sorted(_UNSIGNED),
            },
            "resources": [{"name": name, "algorithm": "sha256", "digest": digest} for name, digest in digests.items()],
        },
    }
    payload = json.dumps(statement, sort_keys=True).encode()
    signature = key.sign(_encoded(payload), ec.ECDSA(hashes.SHA256()))
    hint = hashlib.sha256(_public_pem(key.public_key())).hexdigest()
    bundle = {
        "mediaType": _MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": _PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    path = adapter.path / SIGNATURE_NAME
    write_atomic(path, json.dumps(bundle, indent=1) + "\n")
    return path


def verify(adapter: Adapter, keys: Sequence[PublicKey]) -> PublicKey:
    """Return the one of `keys` that signed the package as it is. Raises SignatureInvalid with the reason.

    The adapter is opened (`package.open_adapter`), so that its manifest's digests are those of the files.
    """
    path = adapter.path / SIGNATURE_NAME
    name = adapter.manifest.name
    if not path.is_file():
        raise SignatureInvalid(f"{name} has no {SIGNATURE_NAME}: sign it with `adapterhub sign {adapter.path}`.")
    payload, signature, hint = _read_bundle(path)
    for key in keys:
        if hint in (None, key.hint) and _is_signed(payload, signature, key):
            break
    else:
        known = ", ".join(str(key.path) for key in keys) or "no key"
        raise SignatureInvalid(f"{name} was signed with key {str(hint)[:16]}, trusted here: {known}; it is not used.")
    _check_files(adapter, _signed_digests(path, payload))
    return key


def check_signed_files(adapter: Adapter) -> None:
    """Check that a signature, if there is one, lists this package's files. Whose key made it is not checked.

    Raises SignatureInvalid.
    """
    path = adapter.path / SIGNATURE_NAME
    if path.is_file():
        _check_files(adapter, _signed_digests(path, _read_bundle(path)[0]))


def _check_files(adapter: Adapter, signed: dict[str, str]) -> None:
    found = _digests(adapter)
    wrong = sorted(file for file in found if signed.get(file) != found[file])
    missing = sorted(set(signed) - set(found) - set(_UNSIGNED))
    if wrong or missing:
        raise SignatureInvalid(
            f"{adapter.manifest.name}: {', '.join(wrong + missing)} is not what was signed: fetch it again, or sign it "
            "again."
        )


def signer_hint(adapter: Adapter) -> str | None:
    """Return the key that a signature names (`PublicKey.hint`), unchecked; None when there is no signature.

    Raises SignatureInvalid for one that cannot be read.
    """
    path = adapter.path / SIGNATURE_NAME
    return (_read_bundle(path)[2] or "of no name") if path.is_file() else None


def _digests(adapter: Adapter) -> dict[str, str]:
    """Return the sha256 of each file that is signed, sorted by name."""
    listed = {name: entry.sha256 for name, entry in adapter.manifest.files.items() if name not in _UNSIGNED}
    beside = [adapter.path / name for name in (MANIFEST_NAME, PROBE_NAME) if (adapter.path / name).is_file()]
    return dict(sorted((listed | {path.name: sha256_of(path) for path in beside}).items()))


def _root(digests: Sequence[str]) -> str:
    return hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in digests)).hexdigest()


def _encoded(payload: bytes) -> bytes:
    """Return DSSE's pre-authentication encoding, the bytes that are signed."""
    return f"DSSEv1 {len(_PAYLOAD_TYPE)} {_PAYLOAD_TYPE} {len(payload)} ".encode() + payload


def _public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _read_private(path: Path) -> ec.EllipticCurvePrivateKey:
    password = os.environ.get(PASSWORD_VARIABLE, "").encode() or None
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UsageError(
            f"{path} cannot be read as a private key in PEM ({error}); {PASSWORD_VARIABLE} holds its password, if any."
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise UsageError(f"{path} is not an elliptic curve key on P-256: make one with `adapterhub keygen`.")
    return key


def _read_bundle(path: Path) -> tuple[bytes, bytes, str | None]:
    """Return payload, signature, and the hint of the key, if it has one."""
    try:
        if path.stat().st_size > _MAX_SIGNATURE_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes are too many")
        bundle: Any = parse_json(path.read_bytes())
        envelope = bundle["dsseEnvelope"]
        kinds = (bundle["mediaType"], envelope["payloadType"])
        if kinds != (_MEDIA_TYPE, _PAYLOAD_TYPE):
            raise ValueError(f"its types are {kinds}")
        (signature,) = envelope["signatures"]
        hint = bundle["verificationMaterial"]["publicKey"].get("hint")
        return (
            base64.b64decode(envelope["payload"], validate=True),
            base64.b64decode(signature["sig"], validate=True),
            None if hint is None else str(hint),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SignatureInvalid(
            f"{path} is not a signature that adapterhub reads ({error!r}): sign the adapter again."
        ) from error


def _is_signed(payload: bytes, signature: bytes, key: PublicKey) -> bool:
    try:
        key.key.verify(signature, _encoded(payload), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def _signed_digests(path: Path, payload: bytes) -> dict[str, str]:
    try:
        statement: Any = parse_json(payload)
        predicate = statement["predicate"]
        serialized = predicate["serialization"]
        kinds = (statement["_type"], statement["predicateType"], serialized["method"], serialized["hash_type"])
        if kinds != (_STATEMENT_TYPE, _PREDICATE_TYPE, "files", "sha256"):
            raise ValueError(f"it states {kinds}")
        resources = [(str(one["name"]), str(one["digest"]), one["algorithm"]) for one in predicate["resources"]]
        (subject,) = statement["subject"]
        if {algorithm for _, _, algorithm in resources} != {"sha256"} or len(
            dict.fromkeys(r[0] for r in resources)
        ) != len(resources):
            raise ValueError("it lists a file twice, or by another digest than sha256")
        if subject["digest"]["sha256"] != _root([digest for _, digest, _ in resources]):
            raise ValueError("its own digest is not that of the files it lists")
    except (ValueError, KeyError, TypeError) as error:
        raise SignatureInvalid(f"{path} has no statement that adapterhub checks ({error!r}): sign it again.") from error
    return {name: digest for name, digest, _ in resources}
