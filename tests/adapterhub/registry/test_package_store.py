"""An address is its bytes, damage stays where it is, and several processes may collect at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packages import write_package
from road import run, run_any

from adapterhub.adapter import Adapter, AdapterRef
from adapterhub.errors import AdapterHubError, Conflict, DigestMismatch, InvalidRef
from adapterhub.files import is_held
from adapterhub.package.bundle import write_bundle
from adapterhub.package.layout import open_adapter
from adapterhub.package.signing import make_key, sign
from adapterhub.registry import package_store
from adapterhub.registry.registry import Registry

STORE_OF_FORMAT_1 = Path(__file__).parents[2] / "fixtures" / "store_of_format_1"
PROBE = {
    "dtype": "float32",
    "answers": [
        {"prompt": "Hi", "prompt_tokens": [1], "tokens": [2], "gaps": [0.5], "top_tokens": [2], "top_logits": [1.25]}
    ],
}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "home")


@pytest.fixture
def adapters(registry: Registry, tmp_path: Path) -> list[Adapter]:
    packages = [write_package(tmp_path / f"p{seed}", name=f"name{seed}", seed=seed) for seed in range(2)]
    return [registry.add(open_adapter(package)) for package in packages]


def _damage(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def test_a_package_under_the_name_of_another_is_not_that_one(registry: Registry, adapters: list[Adapter]) -> None:
    first, second = adapters
    shutil.rmtree(first.path)
    shutil.copytree(second.path, first.path)
    for text in (first.digest, f"name0@{first.digest}", "name0"):
        with pytest.raises(DigestMismatch, match="expected the package of its name"):
            registry.resolve(AdapterRef.parse(text))
    with pytest.raises(DigestMismatch):
        registry.promote("name0", "production")
    assert registry.resolve(second.digest).digest == second.digest


def test_the_right_package_takes_the_place_of_another(
    registry: Registry, adapters: list[Adapter], tmp_path: Path
) -> None:
    first, second = adapters
    shutil.rmtree(first.path)
    shutil.copytree(second.path, first.path)
    registry.add(open_adapter(tmp_path / "p0"))
    assert registry.resolve("name0").digest == first.digest


def test_damage_in_one_package_does_not_spread_to_the_next(
    registry: Registry, adapters: list[Adapter], tmp_path: Path
) -> None:
    """All share the template, one file on disk."""
    _damage(adapters[0].path / "chat_template.jinja")
    new = registry.add(open_adapter(write_package(tmp_path / "p9", name="new", seed=9)))
    assert registry.resolve("new").digest == new.digest
    for name in ("name0", "name1"):  # they shared it before
        with pytest.raises(DigestMismatch):
            registry.resolve(name)
    for number, name in enumerate(("name0", "name1")):
        registry.add(open_adapter(tmp_path / f"p{number}"))
        assert registry.resolve(name)


def test_verify_all_names_what_is_damaged_and_lost(registry: Registry, adapters: list[Adapter], tmp_path: Path) -> None:
    assert list(registry.verify_all()) == []
    sound = registry.add(open_adapter(write_package(tmp_path / "p9", name="sound", seed=9)))
    registry.promote("name0", "production")
    _damage(adapters[0].path / "adapter_model.safetensors")
    shutil.rmtree(adapters[1].path)
    (registry.root / "names" / "torn.jsonl").write_text("{}\n")
    (registry.root / "objects" / ("0" * 64)).write_text("other bytes")
    found = {finding.what: finding for finding in registry.verify_all()}
    assert set(found) == {adapters[0].digest, adapters[1].digest, "names of torn", "0" * 64}
    assert found[adapters[0].digest].names == ("name0@main", "name0@production")
    assert "sha256" in found[adapters[0].digest].why
    assert found[adapters[1].digest].names == ("name1@main",)
    assert registry.resolve("sound").digest == sound.digest


@pytest.mark.parametrize("damaged", ["adapter.sig", "adapterhub.json"])
def test_what_only_a_signature_covers_is_verified_and_replaced(
    registry: Registry, tmp_path: Path, damaged: str
) -> None:
    folder = write_package(tmp_path / "signed", name="signed", seed=9)
    sign(open_adapter(folder), make_key(tmp_path / "key")[0])
    path = registry.add(open_adapter(folder)).path / damaged
    sound = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(sound.replace(b"apache-2.0", b"apache-2.1") if damaged == "adapterhub.json" else sound[:-90])
    (finding,) = registry.verify_all()
    assert finding.names == ("signed@main",)
    registry.add(open_adapter(folder))
    assert path.read_bytes() == sound
    assert list(registry.verify_all()) == []


def test_verify_all_on_the_command_line(tmp_path: Path) -> None:
    home = tmp_path / "home"
    digest = run("add", str(write_package(tmp_path / "p", name="captain")), home=home).stdout.strip()
    assert "1 packages verified" in run("verify", "--all", home=home).stderr
    _damage(Registry(home).store.folder(digest) / "README.md")  # not in the digest, and no package's
    assert run_any("verify", "--all", home=home).returncode == 0
    _damage(Registry(home).store.folder(digest) / "chat_template.jinja")
    done = run_any("verify", "--all", home=home)
    assert done.returncode == 4
    assert done.stdout == f"{digest}  captain@main\n"
    assert "1 damaged or lost" in done.stderr
    for wrong in (["verify"], ["verify", "captain", "--all"], ["verify", "--all", "--probe"]):
        assert run_any(*wrong, home=home).returncode == 2


def test_an_ambiguous_beginning_of_a_digest_is_refused(registry: Registry, tmp_path: Path) -> None:
    from adapterhub.registry.name_log import Move, now

    first, second = f"sha256:{'ab' * 31}00", f"sha256:{'ab' * 31}11"
    with registry.log.locked():
        for digest in (first, second, first):
            registry.log.append(
                "captain", [Move(at=now(), by="x", act="add", revision="main", before=None, after=digest)]
            )
    with pytest.raises(InvalidRef, match=r"captain@sha256:abababab is ambiguous.*Give more digits"):
        registry.resolve("captain@sha256:abababab")
    with pytest.raises(AdapterHubError, match="not in"):  # unambiguous, and not stored
        registry.resolve(f"captain@{first}")


def test_an_imported_file_does_not_move_a_name_that_others_use(
    registry: Registry, adapters: list[Adapter], tmp_path: Path
) -> None:
    bundle = tmp_path / "other.zip"
    other = open_adapter(write_package(tmp_path / "other", name="name0", seed=7))
    write_bundle(other, bundle)
    with pytest.raises(Conflict, match=r"calls itself name0, which points to .* Give --name"):
        registry.import_bundle(bundle)
    assert registry.resolve("name0").digest == adapters[0].digest
    assert registry.import_bundle(bundle, name="name0").digest == other.digest  # asked for
    assert registry.import_bundle(bundle).digest == other.digest  # it points there already
    registry.remove("name0")
    assert registry.import_bundle(bundle).digest == other.digest  # free


def test_two_that_collect_at_once_both_finish(registry: Registry, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom adapterhub.registry.registry import Registry\n"
        "print('begins', flush=True)\nsys.stdin.readline()\n"
        "print(*Registry(Path(sys.argv[1])).gc(grace_s=0).packages)\n"
    )
    wanted = set()
    for seed in range(30):
        adapter = registry.add(open_adapter(write_package(tmp_path / f"p{seed}", name="x", seed=seed)))
        wanted.add(adapter.digest)
        registry.remove("x")
    command = [sys.executable, "-c", code, str(registry.root)]
    both = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ)
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    told = [set(process.communicate()[0].split()) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert told[0] | told[1] == wanted
    assert not told[0] & told[1]


def test_a_package_that_another_process_collects_meanwhile(
    registry: Registry, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("name0", "name1"):
        registry.remove(name)
    others: list[tuple[str, ...]] = []

    def collected(path: Path) -> bool:
        if not others:
            others.append(())
            others[0] = Registry(registry.root).gc(grace_s=0).packages
        return is_held(path)

    monkeypatch.setattr(package_store, "is_held", collected)
    assert registry.gc(grace_s=0).packages == ()
    assert set(others[0]) == {adapter.digest for adapter in adapters}


def test_a_probe_of_whoever_adopts_it_joins_a_package_that_has_none(registry: Registry, tmp_path: Path) -> None:
    plain = open_adapter(write_package(tmp_path / "plain"))
    assert registry.add(plain).probe is None
    adopted = write_package(tmp_path / "adopted")
    (adopted / "probe.json").write_text(json.dumps(PROBE))
    kept = registry.add(open_adapter(adopted))
    assert kept.digest == plain.digest
    assert kept.probe is not None
    (adopted / "probe.json").write_text(json.dumps(PROBE).replace("1.25", "9.5"))
    assert registry.add(open_adapter(adopted)).probe == kept.probe  # the first stays


def test_a_probe_that_passed_is_that_one_and_no_other(registry: Registry, tmp_path: Path) -> None:
    folder = write_package(tmp_path / "p")
    (folder / "probe.json").write_text(json.dumps(PROBE))
    kept = registry.add(open_adapter(folder))
    (folder / "probe.json").write_text(json.dumps(PROBE).replace("1.25", "9.5"))
    registry.record_probe(open_adapter(folder))
    assert not registry.probe_passed(kept)
    registry.record_probe(kept)
    assert registry.probe_passed(kept)


@pytest.fixture
def old(tmp_path: Path) -> Registry:
    """A store that 0.1.0 wrote: two packages of format 1, whose first was `captain` before the second."""
    return Registry(shutil.copytree(STORE_OF_FORMAT_1, tmp_path / "old"))


OLD_DIGESTS = (
    "sha256:ed14ee2992d1402599cad0af9981674ba8a1bcfa0d0b1861a6ada81f2489b212",
    "sha256:e465cc206d542c8af3dac2f96a4c8fe3535ad22dcd074c4d5bdea6533552b410",
)


def test_a_store_of_format_1_opens_under_its_old_digests(old: Registry) -> None:
    assert list(old.verify_all()) == []
    assert [(entry.revision, entry.digest) for entry in old.list()] == [
        ("main", OLD_DIGESTS[1]),
        ("production", OLD_DIGESTS[1]),
    ]
    for digest in OLD_DIGESTS:
        adapter = old.resolve(digest)
        assert (adapter.digest, adapter.manifest.format, adapter.manifest.chat.stop) == (digest, 1, ["###"])
        assert adapter.probe is not None
    assert old.rollback("captain", "production").after == OLD_DIGESTS[0]
    assert old.promote(f"captain@{OLD_DIGESTS[1]}", "canary").after == OLD_DIGESTS[1]
    assert old.gc(grace_s=0).packages == ()


def test_a_store_of_format_1_takes_packages_of_both_formats(old: Registry, tmp_path: Path) -> None:
    adapter = old.add(open_adapter(write_package(tmp_path / "new", name="captain")))
    assert old.resolve("captain").digest == adapter.digest not in OLD_DIGESTS
    again = shutil.copytree(old.store.folder(OLD_DIGESTS[0]), tmp_path / "again")
    assert old.add(open_adapter(again)).digest == OLD_DIGESTS[0]


def test_a_package_of_format_1_that_answers_otherwise_is_no_silent_success(old: Registry, tmp_path: Path) -> None:
    """The digest of format 1 leaves out the stop strings."""
    other = shutil.copytree(old.store.folder(OLD_DIGESTS[0]), tmp_path / "other")
    path = other / "adapterhub.json"
    path.write_text(path.read_text().replace('"###"', '"the"'))
    assert open_adapter(other).digest == OLD_DIGESTS[0]
    with pytest.raises(Conflict, match="another 'chat'"):
        old.add(open_adapter(other), name="other")


def test_packages_of_format_2_that_stop_otherwise_are_two(registry: Registry, tmp_path: Path) -> None:
    packages = [write_package(tmp_path / str(number)) for number in range(2)]
    path = packages[1] / "adapterhub.json"
    path.write_text(path.read_text().replace('"stop": []', '"stop": ["###"]'))
    kept = [registry.add(open_adapter(package), name="same") for package in packages]
    assert kept[0].digest != kept[1].digest
    assert registry.resolve("same").manifest.chat.stop == ["###"]
