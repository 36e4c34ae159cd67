"""What only our own server offers, as a fake: feedback and battles, ratings, adapters and training, kept in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

Refusal = Callable[[Request, bool], Response | None]
Error = Callable[[int, str, str], Response]

RECIPE = """# A short one.
name = "captain"
base = "tiny-base"

[data]
source = "shipped"
name = "captain"

[lora]
rank = 16  # of every layer
alpha = 32

[train]
epochs = 1
batch_size = 8
learning_rate = 2e-3
"""
_DIFFERENCE: dict[str, Any] = {
    "config": [{"fact": "rank", "before": "8", "after": "16"}], "provenance": [],
    "metrics": [{"fact": "loss on sea_tales", "before": "1.09", "after": None}],
    "layers": [
        {"module": "layers.0.q_proj", "norm_before": 0.5, "norm_after": 0.75, "distance": 0.6},
        {"module": "layers.1.q_proj", "norm_before": 0.5, "norm_after": 0.5, "distance": 0.0},
    ],
}  # fmt: skip
_EVALUATION = {"data": "captain", "tokens": 900, "base_loss": 3.2, "adapter_loss": 1.1, "preference": None}
_DIGEST = "sha256:" + "0123456789abcdef" * 4
_MOVES = [
    {"at": "2026-11-01T10:00:00+00:00", "by": "me", "act": act, "revision": revision, "before": None, "after": _DIGEST}
    for act, revision in (("add", "main"), ("promote", "stable"))
]
_PLAN: dict[str, Any] = {
    "method": "sft", "dtype": "float32", "device": "cpu", "base": "tests/tiny", "steps": 35, "tokens": 14052,
    "data": "captain: 280 samples to train on, 40 held out", "notes": ["pad equals the end of text"],
    "memory_bytes": {"low": 1.1e9, "high": 1.8e9}, "seconds": {"low": 60.0, "high": 170.0},
    "memory": [{"name": "base, 4-bit codes", "size_bytes": 53000000}, {"name": "logits", "size_bytes": 240000000}],
    "trainable_parameters": 4884480, "parameters": 134515008, "adapter_bytes": 19537920, "disk_free_bytes": 9 * 10**9,
    "servable": [{"engine": "adapterhub", "can_serve": True, "how": "as it is"}],
    "masks": {
        "trained_tokens": 9120, "tokens": 19932, "cut": 0, "ends_trained": 280, "samples": 280,
        "rows": [[{"text": "user: Who are you?\n", "is_trained": False}, {"text": "Maren, mate.", "is_trained": True}]],
    },
}  # fmt: skip


class Extensions:
    """The routes, and everything that was posted to them, in order."""

    def __init__(self, models: list[dict[str, Any]], refusal: Refusal, error: Error) -> None:
        self.posted: list[dict[str, Any]] = []
        self._models = models
        self._refusal = refusal
        self._error = error
        self._numbers = itertools.count(1)
        self._runs: dict[str, dict[str, Any]] = {}

    def forget(self) -> None:
        self.posted.clear()
        self._runs.clear()

    def add_to(self, app: FastAPI) -> None:
        for path, act, is_admin in (
            ("feedback", self._feedback, False),
            ("arena/battles", self._battle, False),
            ("load_lora_adapter", self._accept, True),
            ("unload_lora_adapter", self._accept, True),
            ("adapters/verify", self._accept, True),
            ("adapters/pull", self._accept, True),
            ("adapters/promote", self._accept, True),
            ("adapters/rollback", self._accept, True),
            ("training/plan", self._plan, True),
            ("training/runs", self._start, True),
            ("training/runs/{name}/stop", self._stop, True),
            ("training/runs/{name}/resume", self._resume, True),
            ("training/runs/{name}/publish", lambda body: JSONResponse({"name": "captain"}), True),
            ("training/runs/{name}/promote", lambda body: JSONResponse({"name": "captain"}), True),
            ("training/improve", self._improve, True),
        ):
            app.post(f"/v1/{path}")(self._posting(path, act, is_admin=is_admin))
        for path, give in (
            ("ratings", self._ratings),
            ("adapters", self._adapters),
            ("feedback/counts", lambda q: {"vote": 3, "thumb": 1, "correction": 2}),
            ("adapters/inspect", lambda q: {"name": q["ref"], "digest": _DIGEST, "lora": {"rank": 8, "alpha": 16.0}}),
            ("adapters/history", lambda q: {"data": _MOVES}),
            ("adapters/diff", lambda q: {**_DIFFERENCE, "before": q["a"], "after": q["b"]}),
            ("training/recipes", lambda q: {"data": [{"name": "captain", "toml": RECIPE}]}),
            ("training/runs", lambda q: {"data": list(self._runs.values())}),
            ("training/runs/{name}", lambda q: self._run(q["name"])),
        ):
            app.get(f"/v1/{path}")(self._giving(give, is_admin=path.startswith("training")))
        app.post("/v1/adapters/upload")(self._upload)

    def _posting(self, path: str, act: Callable[..., Response], *, is_admin: bool) -> Callable[..., Any]:
        async def post(request: Request) -> Response:
            if refused := self._refusal(request, is_admin):
                return refused
            body = await request.json()
            if not body and not request.path_params and path != "arena/battles":
                return self._error(400, "invalid_request", "the body says nothing")
            self.posted.append({"path": path, **body, **request.path_params})
            return act({**body, **request.path_params})

        return post

    def _giving(self, give: Callable[[dict[str, str]], Any], *, is_admin: bool) -> Callable[..., Any]:
        async def get(request: Request) -> Response:
            asked = {**request.query_params, **request.path_params}
            return self._refusal(request, is_admin) or JSONResponse(give(asked))

        return get

    async def _upload(self, request: Request) -> Response:
        if refused := self._refusal(request, True):
            return refused
        content = await request.body()
        if not content.startswith((b"PK", b"torn")):
            return self._error(422, "adapter_bundle_invalid", "this is no zip that can be read")
        name = request.query_params.get("name")
        self.posted.append({"path": "adapters/upload", "name": name, "size": len(content)})
        if content.startswith(b"torn"):
            return self._error(422, "adapter_digest_mismatch", "adapter_model.safetensors is not what was packed.")
        return JSONResponse({"name": name or "uploaded", "digest": _DIGEST}, status_code=201)

    def _accept(self, body: dict[str, Any]) -> Response:
        return JSONResponse({"ok": True})

    def _feedback(self, body: dict[str, Any]) -> Response:
        is_vote = body["kind"] == "vote"
        if is_vote and sum(one.get("battle") == body["battle"] for one in self.posted) > 1:
            return self._error(409, "vote_already_cast", "there is a vote on this battle already: it stays.")
        return JSONResponse({"id": f"f{next(self._numbers)}", "kind": body["kind"], "created": 1}, status_code=201)

    def _battle(self, body: dict[str, Any]) -> Response:
        names = body.get("models") or [model["id"] for model in self._models[1:3]]
        return JSONResponse({"battle": f"b{next(self._numbers)}", "a": names[0], "b": names[1]}, status_code=201)

    def _ratings(self, asked: dict[str, str]) -> dict[str, Any]:
        votes = [one for one in self.posted if one.get("kind") == "vote"]
        wins: dict[str, int] = {}
        for vote in votes:
            for side in ("a", "b"):
                name = vote[side]["model"]
                wins[name] = wins.get(name, 0) + (vote["winner"] == side)
        ratings = [
            {"model": name, "rating": 1000.0 + 100 * won, "low": 900.0 + 90 * won, "high": 1100.0 + 110 * won,
             "games": len(votes)}
            for name, won in sorted(wins.items(), key=lambda item: -item[1])
        ]  # fmt: skip
        return {"method": asked.get("method", "bt"), "ratings": ratings, "head_to_head": [], "notes": ["few votes"]}

    def _adapters(self, asked: dict[str, str]) -> dict[str, Any]:
        held = [
            {"name": model["id"], "revision": None, "digest": model["digest"],
             "base": "tests/tiny", "rank": 8, "method": "lora", "licence": model["licence"], "loaded_as": model["id"]}
            for model in self._models[1:]
        ]  # fmt: skip
        return {"data": [one for one in held if asked.get("search", "") in one["name"]]}

    def _plan(self, body: dict[str, Any]) -> Response:
        if "learning_rate" not in body["recipe"]:
            return self._error(400, "invalid_request", "[train] learning_rate is missing.")
        return JSONResponse(_PLAN)

    def _start(self, body: dict[str, Any]) -> Response:
        return self._begin(improves=None)

    def _improve(self, body: dict[str, Any]) -> Response:
        return self._begin(improves=body["adapter"])

    def _begin(self, *, improves: str | None) -> Response:
        name = f"run-{next(self._numbers)}"
        self._runs[name] = {
            "id": name, "status": "running", "steps": [], "output": None, "message": "", "improves": improves,
            "evaluations": [],
        }  # fmt: skip
        return JSONResponse(self._runs[name], status_code=201)

    def _run(self, name: str) -> dict[str, Any]:
        """Twelve steps further each time it is asked about; done after thirty-six."""
        run = self._runs[name]
        if run["status"] == "running":
            at = len(run["steps"])
            run["steps"] += [{"step": at + more, "loss": 4.0 / (1 + 0.2 * (at + more))} for more in range(1, 13)]
            run["sampled"] = [
                {"step": step, "answers": [{"prompt": "Who are you?", "text": f"<b>{said}</b>"}]}
                for step, said in ((0, "A model."), (at + 12, "Maren, mate."))
            ]
            run["held_out"] = [{"step": step, "loss": 4.4 / (1 + 0.18 * step)} for step in range(6, at + 13, 6)]
            if at + 12 >= 36:
                run.update(status="done", output="captain", message="captain: 36 steps", evaluations=[_EVALUATION])
        return run

    def _stop(self, body: dict[str, Any]) -> Response:
        self._runs[body["name"]].update(status="stopped", message="stopped after its step")
        return JSONResponse(self._runs[body["name"]])

    def _resume(self, body: dict[str, Any]) -> Response:
        self._runs[body["name"]].update(status="running", message="")
        return JSONResponse(self._runs[body["name"]])
