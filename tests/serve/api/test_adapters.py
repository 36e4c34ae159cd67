"""The adapters a server's machine keeps, over HTTP."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_bench import Bench, run
from openai.types import Model
from packages import FINGERPRINT, write_package

from adapterhub.adapter import Adapter, AdapterRef
from adapterhub.errors import Conflict
from adapterhub.package.layout import open_adapter
from adapterhub.registry.registry import Registry
from serve.api import adapters as routes_adapters
from serve.api.auth import ApiKeys
from serve.client import ServedModel

ZIP = {"content-type": "application/zip"}


def test_what_is_kept_is_listed_with_what_is_served(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        rows = (await b.client.get("/v1/adapters")).json()["data"]
        assert [row["name"] for row in rows] == ["captain", "captain2", "poet", "spare"]
        served = {row["name"]: row["loaded_as"] for row in rows}
        assert served == {"captain": "captain", "captain2": None, "poet": "poet", "spare": None}
        assert rows[0]["rank"] == 4
        some = (await b.client.get("/v1/adapters", params={"search": "CAPT"})).json()["data"]
        assert [row["name"] for row in some] == ["captain", "captain2"]
        assert (await b.client.get("/v1/adapters", params={"base": "elsewhere"})).json()["data"] == []

    run(tmp_path, test)


def test_an_adapter_that_is_served_under_two_names_is_listed_as_its_own(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        await b.services.catalog.load("favourite", AdapterRef.parse("captain"))
        await b.services.catalog.load("other", AdapterRef.parse("spare"))
        rows = (await b.client.get("/v1/adapters")).json()["data"]
        served = {row["name"]: row["loaded_as"] for row in rows}
        assert served == {"captain": "captain", "captain2": None, "poet": "poet", "spare": "other"}

    run(tmp_path, test)


def test_one_is_inspected_and_verified_by_name(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        found = (await b.client.get("/v1/adapters/inspect", params={"ref": "spare"})).json()
        assert (found["license"], found["has_probe"]) == (
            found["licence"],
            found["has_proof"],
        )  # old names stay a version
        assert found["base"]["fingerprint"] == FINGERPRINT
        assert found["lora"]["rank"] == 4
        whole = await b.client.post("/v1/adapters/verify", json={"ref": "spare"})
        assert whole.json()["digest"] == found["digest"]
        for weights in (tmp_path / "home" / "adapters").rglob("adapter_model.safetensors"):
            weights.chmod(0o644)
            weights.write_bytes(weights.read_bytes()[:-4] + b"\1\2\3\4")
        torn = await b.client.post("/v1/adapters/verify", json={"ref": "spare"})
        assert torn.status_code == 422
        assert torn.json()["error"]["code"] == "adapter_digest_mismatch"

    run(tmp_path, test)


def test_license_is_answered_in_both_spellings(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        inspected = (await b.client.get("/v1/adapters/inspect", params={"ref": "spare"})).json()
        listed = (await b.client.get("/v1/adapters")).json()["data"][0]
        model = (await b.client.get("/v1/models/captain")).json()
        for answer in (inspected, listed, model):
            assert (answer["license"], answer["licence"]) == ("apache-2.0", "apache-2.0")

    run(tmp_path, test)


@pytest.mark.parametrize("key", ["license", "licence"])
def test_license_of_a_server_of_this_and_of_earlier_versions(key: str) -> None:
    model = Model.model_validate({"id": "captain", "created": 1, "object": "model", "owned_by": "x", key: "mit"})
    assert ServedModel.read(model).license == "mit"


def test_clients_choose_no_paths_and_fetch_nothing_by_reading(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        for ref in ("/etc", "./spare", "../x"):
            refused = await b.client.get("/v1/adapters/inspect", params={"ref": ref})
            assert refused.status_code == 400
        assert (await b.client.get("/v1/adapters/inspect", params={"ref": "owner/far"})).status_code == 404
        assert (await b.client.post("/v1/adapters/pull", json={"ref": "owner/far"})).status_code == 400

    run(tmp_path, test)


def test_acting_needs_an_admin_key(tmp_path: Path) -> None:
    asking, admin = ({"authorization": f"Bearer {key}"} for key in ("ask", "rule"))

    async def test(b: Bench) -> None:
        assert (await b.client.get("/v1/adapters")).status_code == 401
        assert (await b.client.get("/v1/adapters", headers=asking)).status_code == 200
        body = {"ref": "spare"}
        assert (await b.client.post("/v1/adapters/verify", json=body, headers=asking)).status_code == 403
        assert (await b.client.post("/v1/adapters/verify", json=body, headers=admin)).status_code == 200
        assert (await b.client.post("/v1/adapters/upload", content=b"x", headers={**ZIP, **asking})).status_code == 403

    run(tmp_path, test, ApiKeys(asking=("ask",), admin=("rule",)))


def _zipped(folder: Path) -> bytes:
    return Path(shutil.make_archive(str(folder), "zip", folder)).read_bytes()


def test_an_uploaded_zip_is_kept_only_when_it_is_whole(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        package = write_package(tmp_path / "fresh", name="fresh", seed=41)
        good = _zipped(package)
        (package / "adapter_model.safetensors").write_bytes(b"torn")
        torn = await b.client.post("/v1/adapters/upload", headers=ZIP, content=_zipped(package))
        assert torn.status_code == 422
        assert torn.json()["error"]["code"] == "adapter_digest_mismatch"
        assert (await b.client.post("/v1/adapters/upload", headers=ZIP, content=b"no zip")).status_code == 422
        assert "fresh" not in await _names(b)
        kept = await b.client.post("/v1/adapters/upload", headers=ZIP, content=good)
        assert (kept.status_code, kept.json()["name"]) == (201, "fresh")
        assert "fresh" in await _names(b)
        loaded = {"lora_name": "fresh", "lora_path": kept.json()["digest"]}
        assert (await b.client.post("/v1/load_lora_adapter", json=loaded)).status_code == 200
        assert not [path for path in (tmp_path / "home").iterdir() if path.name.startswith((".pull", ".bundle"))]

    run(tmp_path, test)


def test_an_upload_moves_nobody_s_name(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        before = (await b.client.get("/v1/adapters/inspect", params={"ref": "spare"})).json()["digest"]
        other = _zipped(write_package(tmp_path / "other", name="spare", seed=42))
        refused = await b.client.post("/v1/adapters/upload", headers=ZIP, content=other)
        assert refused.status_code == 409
        assert "?name=" in refused.json()["error"]["message"]
        assert (await b.client.get("/v1/adapters/inspect", params={"ref": "spare"})).json()["digest"] == before
        for _ in range(2):  # the same again changes nothing
            kept = await b.client.post("/v1/adapters/upload", headers=ZIP, params={"name": "spare2"}, content=other)
            assert (kept.status_code, kept.json()["name"]) == (201, "spare2")
        bad = await b.client.post("/v1/adapters/upload", headers=ZIP, params={"name": "../x"}, content=other)
        assert bad.status_code == 400

    run(tmp_path, test)


def test_an_upload_that_another_overtakes(tmp_path: Path) -> None:
    first = open_adapter(write_package(tmp_path / "first", name="fresh", seed=41))
    zipped = tmp_path / "second.zip"
    zipped.write_bytes(_zipped(write_package(tmp_path / "second", name="fresh", seed=42)))

    class Overtaken(Registry):
        def add(self, adapter: Adapter, **given: Any) -> Adapter:
            Registry(self.root).add(first)
            return super().add(adapter, **given)

    registry = Overtaken(tmp_path / "home")
    with pytest.raises(Conflict, match="Another process moved it"):
        routes_adapters._stored(registry, zipped, None, by=None)
    assert registry.resolve(AdapterRef.parse("fresh")).digest == first.digest


def test_an_upload_nobody_trusted_signed(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        (tmp_path / "home" / "policy.toml").write_text('[[trust]]\nnames = "acme/*"\nkeys = []\n')
        unsigned = _zipped(write_package(tmp_path / "fresh", name="fresh", seed=41))
        refused = await b.client.post(
            "/v1/adapters/upload", headers=ZIP, params={"name": "acme/fresh"}, content=unsigned
        )
        assert refused.status_code == 422
        assert refused.json()["error"]["code"] == "adapter_signature_invalid"
        assert "acme/fresh" not in await _names(b)

    run(tmp_path, test)


def test_an_adapter_nobody_trusted_signed_is_inspected(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        (tmp_path / "home" / "policy.toml").write_text('[[trust]]\nnames = "*"\nkeys = []\n')
        assert (await b.client.get("/v1/adapters/inspect", params={"ref": "spare"})).status_code == 200
        assert (await b.client.get("/v1/adapters/diff", params={"a": "spare", "b": "poet"})).status_code == 200
        assert (await b.client.post("/v1/adapters/verify", json={"ref": "spare"})).status_code == 200
        loaded = await b.client.post("/v1/load_lora_adapter", json={"lora_name": "spare", "lora_path": "spare"})
        assert loaded.status_code == 422

    run(tmp_path, test)


def test_an_upload_beyond_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes_adapters, "MAX_BYTES", 1000)

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"\0" * 100

    async def test(b: Bench) -> None:
        said = await b.client.post("/v1/adapters/upload", headers=ZIP, content=b"\0" * 1001)
        unsaid = await b.client.post("/v1/adapters/upload", headers=ZIP, content=endless())
        assert (said.status_code, unsaid.status_code) == (413, 413)

    run(tmp_path, test)


async def _names(b: Bench) -> list[str]:
    return [row["name"] for row in (await b.client.get("/v1/adapters")).json()["data"]]


def test_an_alias_is_promoted_rolled_back_and_remembered(tmp_path: Path) -> None:
    asking, admin = ({"authorization": f"Bearer {key}"} for key in ("ask", "rule"))

    async def test(b: Bench) -> None:
        async def post(act: str, headers: dict[str, str] = admin, **body: str) -> httpx.Response:
            return await b.client.post(f"/v1/adapters/{act}", json=body, headers=headers)

        first = (await post("promote", ref="spare", alias="stable")).json()["after"]
        b.registry.add(open_adapter(write_package(tmp_path / "next", name="spare", seed=43)))
        assert (await post("promote", asking, ref="spare", alias="stable")).status_code == 403
        stale = await post("promote", ref="spare", alias="stable", expect="sha256:" + "0" * 64)
        assert stale.status_code == 409
        assert first in stale.json()["error"]["message"]
        moved = (await post("promote", ref="spare", alias="stable", expect=first)).json()
        assert (moved["before"], moved["act"]) == (first, "promote")
        assert moved["after"] != first
        found = (await b.client.get("/v1/adapters/inspect", params={"ref": "spare@stable"}, headers=asking)).json()
        assert found["digest"] == moved["after"]
        assert (await post("rollback", name="spare", alias="stable")).json()["after"] == first
        assert (await post("promote", ref="spare", alias="main")).status_code == 400
        assert (await post("rollback", name="spare", alias="none")).status_code == 404
        told = await b.client.get("/v1/adapters/history", params={"name": "spare"}, headers=asking)
        acts = [(move["act"], move["revision"]) for move in told.json()["data"]]
        assert acts == [
            ("add", "main"), ("promote", "stable"), ("add", "main"), ("promote", "stable"), ("rollback", "stable"),
        ]  # fmt: skip
        assert told.json()["data"][-1]["by"].startswith("key ")
        assert "rule" not in told.text
        assert "spare@stable" in [
            row["name"] for row in (await b.client.get("/v1/adapters", headers=asking)).json()["data"]
        ]

    run(tmp_path, test, ApiKeys(asking=("ask",), admin=("rule",)))


def test_two_adapters_are_compared_layer_by_layer(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        found = (await b.client.get("/v1/adapters/diff", params={"a": "captain", "b": "poet"})).json()
        (layer,) = found["layers"]
        assert layer["distance"] > 0
        same = (await b.client.get("/v1/adapters/diff", params={"a": "poet", "b": "poet"})).json()
        assert [layer["distance"] for layer in same["layers"]] == [0]
        assert (await b.client.get("/v1/adapters/diff", params={"a": "poet", "b": "/etc"})).status_code == 400
        assert (await b.client.get("/v1/adapters/diff", params={"a": "poet", "b": "none"})).status_code == 404

    run(tmp_path, test)
