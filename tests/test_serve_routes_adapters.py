"""The adapters a server's machine keeps, over HTTP."""

from __future__ import annotations

from pathlib import Path

from packages import FINGERPRINT
from test_serve_api import Bench, run

from serve.auth import ApiKeys


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


def test_one_is_inspected_and_verified_by_name(tmp_path: Path) -> None:
    async def test(b: Bench) -> None:
        found = (await b.client.get("/v1/adapters/inspect", params={"ref": "spare"})).json()
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

    run(tmp_path, test, ApiKeys(asking=("ask",), admin=("rule",)))
