"""Signatures: ours and the `model-signing` package's are each other's; whatever was changed is noticed."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from model_signing import hashing, signing, verifying
from packages import write_manifest, write_package
from road import run, run_any

from adapterhub.adapter import Adapter, AdapterRef
from adapterhub.errors import Conflict, ProbeMismatch, SignatureInvalid, UsageError
from adapterhub.package.layout import open_adapter
from adapterhub.package.signing import PublicKey, make_key, sign, verify
from adapterhub.registry.registry import Registry

SMALL_FILES = ["README.md", ".gitattributes", "adapter.sig"]


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return make_key(tmp_path / "keys" / "ada")


@pytest.fixture
def signed(tmp_path: Path, keys: tuple[Path, Path]) -> Adapter:
    adapter = open_adapter(write_package(tmp_path / "package", name="captain"))
    sign(adapter, keys[0])
    return open_adapter(adapter.path)


def _hashing(folder: Path) -> hashing.Config:
    ignored = [folder / name for name in SMALL_FILES]
    return hashing.Config().set_ignored_paths(paths=ignored, ignore_git_paths=True)


def _theirs_verifies(folder: Path, key: Path) -> None:
    config = verifying.Config().use_elliptic_key_verifier(public_key=key)
    config.set_hashing_config(_hashing(folder)).verify(folder, folder / "adapter.sig")


def test_what_we_sign_we_verify_and_the_digest_stays(signed: Adapter, keys: tuple[Path, Path], tmp_path: Path) -> None:
    assert verify(signed, [PublicKey.read(keys[1])]).path == keys[1]
    assert signed.digest == open_adapter(write_package(tmp_path / "again", name="captain")).digest


def test_the_model_signing_package_verifies_what_we_sign(signed: Adapter, keys: tuple[Path, Path]) -> None:
    _theirs_verifies(signed.path, keys[1])


def test_we_verify_what_the_model_signing_package_signs(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    folder = write_package(tmp_path / "package")
    config = signing.Config().use_elliptic_key_signer(private_key=keys[0])
    config.set_hashing_config(_hashing(folder)).sign(folder, folder / "adapter.sig")
    assert verify(open_adapter(folder), [PublicKey.read(keys[1])])


def test_the_card_may_change_and_nothing_else(signed: Adapter, keys: tuple[Path, Path]) -> None:
    (signed.path / "README.md").write_text("# another card")
    assert verify(open_adapter(signed.path), [PublicKey.read(keys[1])])
    _theirs_verifies(signed.path, keys[1])


def _other_weights(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    write_manifest(folder, name="captain")


def _other_name(folder: Path) -> None:
    write_manifest(folder, name="admiral")


def _one_more_file(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    write_manifest(folder, name="captain")


@pytest.mark.parametrize("change", [_other_weights, _other_name, _one_more_file])
def test_what_is_changed_after_signing_is_noticed_by_both(
    signed: Adapter, keys: tuple[Path, Path], change: Callable[[Path], None]
) -> None:
    change(signed.path)
    with pytest.raises(SignatureInvalid, match="is not what was signed"):
        verify(open_adapter(signed.path), [PublicKey.read(keys[1])])
    with pytest.raises(ValueError, match=r"(?i)mismatch"):
        _theirs_verifies(signed.path, keys[1])


def test_another_key_is_not_trusted(signed: Adapter, tmp_path: Path) -> None:
    _, other = make_key(tmp_path / "keys" / "eve")
    with pytest.raises(SignatureInvalid, match=r"trusted here: .*eve\.pub"):
        verify(signed, [PublicKey.read(other)])
    with pytest.raises(SignatureInvalid, match="no key"):
        verify(signed, [])


def test_a_hint_that_lies_does_not_help(signed: Adapter, keys: tuple[Path, Path], tmp_path: Path) -> None:
    _, other = make_key(tmp_path / "keys" / "eve")
    path = signed.path / "adapter.sig"
    bundle = json.loads(path.read_text())
    bundle["verificationMaterial"]["publicKey"]["hint"] = PublicKey.read(other).hint
    path.write_text(json.dumps(bundle))
    for key in (other, keys[1]):
        with pytest.raises(SignatureInvalid):
            verify(signed, [PublicKey.read(key)])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"dsseEnvelope": 1}',
        "[" * 50_000,
        '{"mediaType": "x", "dsseEnvelope": {"payloadType": "y"}}',
    ],
)
def test_a_damaged_signature_is_refused(signed: Adapter, keys: tuple[Path, Path], text: str) -> None:
    (signed.path / "adapter.sig").write_text(text)
    with pytest.raises(SignatureInvalid, match=r"adapter\.sig") as caught:
        verify(signed, [PublicKey.read(keys[1])])
    assert "\n" not in str(caught.value)


def test_a_signature_of_gigabytes_is_not_read(signed: Adapter, keys: tuple[Path, Path]) -> None:
    with (signed.path / "adapter.sig").open("wb") as file:
        file.truncate(1 << 34)
    with pytest.raises(SignatureInvalid, match="too many"):
        verify(signed, [PublicKey.read(keys[1])])


def test_an_unsigned_adapter_is_not_signed(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    with pytest.raises(SignatureInvalid, match="adapterhub sign"):
        verify(open_adapter(write_package(tmp_path / "p")), [PublicKey.read(keys[1])])


def test_a_key_is_not_overwritten_and_readable_by_its_owner_only(keys: tuple[Path, Path]) -> None:
    assert keys[0].stat().st_mode & 0o077 == 0
    with pytest.raises(UsageError, match="already exists"):
        make_key(keys[0])


def test_a_key_of_another_kind_is_refused(tmp_path: Path, signed: Adapter) -> None:
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ed25519

    key = ed25519.Ed25519PrivateKey.generate()
    path = tmp_path / "ed"
    path.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    with pytest.raises(UsageError, match="P-256"):
        sign(signed, path)
    path.write_bytes(key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(UsageError, match="P-256"):
        PublicKey.read(path)
    with pytest.raises(UsageError, match="cannot be read"):
        PublicKey.read(tmp_path / "nothing")


def test_an_encrypted_key_needs_its_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERHUB_KEY_PASSWORD", "correct horse")
    private, public = make_key(tmp_path / "k")
    adapter = open_adapter(write_package(tmp_path / "p"))
    sign(adapter, private)
    assert verify(adapter, [PublicKey.read(public)])
    monkeypatch.setenv("ADAPTERHUB_KEY_PASSWORD", "wrong")
    with pytest.raises(UsageError, match="ADAPTERHUB_KEY_PASSWORD"):
        sign(adapter, private)


# The policy


POLICY = 'protected = ["production"]\n[[trust]]\nnames = "acme/*"\nkeys = ["ada.pub"]\n'


@pytest.fixture
def registry(tmp_path: Path, keys: tuple[Path, Path]) -> Registry:
    """One that trusts ada with `acme/*`, and protects `production`."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "ada.pub").write_bytes(keys[1].read_bytes())
    (home / "policy.toml").write_text(POLICY)
    return Registry(home)


def _ref(text: str) -> AdapterRef:
    return AdapterRef.parse(text)


def test_an_unsigned_adapter_under_a_trusted_name_is_not_resolved(registry: Registry, tmp_path: Path) -> None:
    (registry.root / "policy.toml").unlink()
    adapter = registry.add(open_adapter(write_package(tmp_path / "p", name="captain")), name="acme/captain")
    registry.add(adapter, name="other/captain")
    (registry.root / "policy.toml").write_text(POLICY)
    for text in ("acme/captain", adapter.digest, str(adapter.path)):
        with pytest.raises(SignatureInvalid, match="no adapter.sig"):
            registry.resolve(_ref(text))
    assert registry.resolve(_ref("other/captain"))
    assert registry.open(_ref("acme/captain"))


def test_a_signed_one_is(registry: Registry, signed: Adapter, tmp_path: Path) -> None:
    registry.add(open_adapter(write_package(tmp_path / "unsigned", name="captain")), name="free/captain")
    kept = registry.add(signed, name="acme/captain")  # the same content: the signature joins it
    for text in ("acme/captain", kept.digest, str(kept.path)):
        assert registry.resolve(_ref(text)).digest == signed.digest


def test_a_policy_that_cannot_be_read_lets_nothing_pass(registry: Registry, signed: Adapter) -> None:
    registry.add(signed, name="acme/captain")
    for text in ("trust = 1", "[[trust]]\nnames = 'acme/*'\nkeys = ['ada.pub']\nextra = 1", "{"):
        (registry.root / "policy.toml").write_text(text)
        with pytest.raises(UsageError, match="nothing is trusted"):
            registry.resolve(_ref("acme/captain"))
    (registry.root / "policy.toml").write_text('[[trust]]\nnames = "*"\nkeys = ["gone.pub"]\n')
    with pytest.raises(UsageError, match=r"gone\.pub"):
        registry.resolve(_ref("acme/captain"))


def test_a_protected_alias_needs_a_signature_and_a_passed_probe(
    registry: Registry, signed: Adapter, tmp_path: Path
) -> None:
    registry.add(signed, name="acme/captain")
    registry.add(signed, name="free/captain")
    with pytest.raises(SignatureInvalid, match="no key is trusted with free/captain"):
        registry.promote(_ref("free/captain"), "production")
    with pytest.raises(ProbeMismatch, match="has not passed here"):
        registry.promote(_ref("acme/captain"), "production")

    def fails(adapter: Adapter) -> None:
        raise ProbeMismatch("it answers otherwise")

    with pytest.raises(ProbeMismatch, match="otherwise"):
        registry.promote(_ref("acme/captain"), "production", prove=fails)
    assert [move.revision for move in registry.history("acme/captain")] == ["main"]
    assert registry.promote(_ref("acme/captain"), "production", prove=lambda adapter: None).after == signed.digest
    registry.promote(_ref("acme/captain"), "canary")  # not protected
    with pytest.raises(UsageError, match="protected"):
        registry.remove("acme/captain", "production")
    with pytest.raises(UsageError, match="protected"):
        registry.add(signed, name="acme/captain", revision="production")


def test_the_verbs(home: Path, tmp_path: Path) -> None:
    package = str(write_package(tmp_path / "p"))
    key = str(tmp_path / "key")
    run("keygen", key, home=home)
    assert run_any("verify", package, "--key", f"{key}.pub", home=home).returncode == 4
    digest = run("sign", package, "--key", key, home=home).stdout.strip()
    run("add", package, "--name", "crew/captain", home=home)
    told = json.loads(run("inspect", "crew/captain", "--json", home=home).stdout)
    assert (told["names"], told["signed_by"]) == (["crew/captain@main"], PublicKey.read(tmp_path / "key.pub").hint)
    assert (told["probe_passed"], told["proof_passed_here"]) == (False, False)
    assert run("verify", package, "--key", f"{key}.pub", home=home).stdout.strip() == digest


def test_the_same_content_from_someone_else_replaces_neither_signature_nor_manifest(
    registry: Registry, signed: Adapter, tmp_path: Path
) -> None:
    """The digest covers what serving reads: what else the manifest says is the signature's to vouch for."""
    registry.add(signed, name="acme/captain")
    folder = write_package(tmp_path / "evil", name="captain")
    manifest = json.loads((folder / "adapterhub.json").read_text())
    manifest["license"] = "WTFPL"
    (folder / "adapterhub.json").write_text(json.dumps(manifest))
    other = open_adapter(folder)
    assert other.digest == signed.digest
    registry.add(other, name="evil/captain")
    kept = registry.resolve(_ref("acme/captain"))
    assert kept.manifest.license == "apache-2.0"
    assert verify(kept, [PublicKey.read(registry.root / "ada.pub")])


def test_a_signature_of_another_manifest_than_the_one_kept_does_not_join_it(
    registry: Registry, signed: Adapter, tmp_path: Path
) -> None:
    folder = write_package(tmp_path / "renamed", name="other")
    registry.add(open_adapter(folder), name="free/captain")
    with pytest.raises(Conflict, match="would not cover"):
        registry.add(signed, name="acme/captain")


def test_a_key_on_an_unknown_curve_is_no_key(tmp_path: Path) -> None:
    path = tmp_path / "k.pub"
    der = bytes.fromhex("3019301306072a8648ce3d020106082a8648ce3d03017f03020004")
    body = base64.b64encode(der).decode()
    path.write_text(f"-----BEGIN PUBLIC KEY-----\n{body}\n-----END PUBLIC KEY-----\n")
    with pytest.raises(UsageError, match="cannot be read as a public key"):
        PublicKey.read(path)


def test_a_signature_of_other_files_is_refused_at_add(registry: Registry, signed: Adapter, tmp_path: Path) -> None:
    """It needs no key, and a name without a policy is no exception."""
    folder = write_package(tmp_path / "next", name="captain", seed=3)
    (folder / "adapter.sig").write_bytes((signed.path / "adapter.sig").read_bytes())
    with pytest.raises(SignatureInvalid, match="is not what was signed"):
        registry.add(open_adapter(folder), name="free/captain")
    assert registry.list() == []


def test_an_adopters_probe_is_signed(tmp_path: Path) -> None:
    folder = write_package(tmp_path / "p")
    answer = {"prompt": "Hi", "prompt_tokens": [1], "tokens": [2], "gaps": [0.5], "top_tokens": [2], "top_logits": [1]}
    (folder / "probe.json").write_text(json.dumps({"dtype": "float32", "answers": [answer]}))
    private, public = make_key(tmp_path / "key")
    sign(open_adapter(folder), private)
    assert verify(open_adapter(folder), [PublicKey.read(public)])
    (folder / "probe.json").write_text(json.dumps({"dtype": "float32", "answers": [answer | {"tokens": [3]}]}))
    with pytest.raises(SignatureInvalid, match=r"probe\.json is not what was signed"):
        verify(open_adapter(folder), [PublicKey.read(public)])
