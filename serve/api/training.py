"""HTTP routes below /v1/training, for admin keys."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Header
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from adapterhub.feedback.improvement import Improvement, Method
from adapterhub.feedback.store import actor_of
from adapterhub.strict import Strict
from serve.api.route import ApiRoute
from serve.training.candidates import CandidatePipeline
from serve.training.runs import TrainingRun, TrainingRuns

Authorization = Annotated[str | None, Header()]


class RecipeBody(Strict):
    """A recipe to plan or to run."""

    recipe: str = Field(min_length=1, max_length=100_000)
    """Recipe as TOML."""


class ImproveBody(Strict):
    """An adapter to improve from feedback, and how."""

    adapter: str = Field(min_length=1, max_length=500)
    method: Method = Method.dpo
    steps: int = Field(Improvement.steps, ge=1, le=10_000)
    all_adapters: bool = False
    """Whether feedback about other adapters is used, too."""


def training_routes(runs: TrainingRuns, candidates: CandidatePipeline | None = None) -> APIRouter:
    """Return the routes. Without `candidates`, there is none for improving, publishing and promoting."""
    router = APIRouter(prefix="/v1/training", route_class=ApiRoute)

    @router.get("/recipes")
    async def recipes() -> Response:
        """List the shipped recipes."""
        return JSONResponse({"data": await runs.recipes()})

    @router.post("/plan")
    async def plan(body: RecipeBody) -> Response:
        """Plan a run without starting it."""
        return JSONResponse(await runs.plan(body.recipe))

    @router.get("/runs")
    async def list_runs() -> Response:
        """List the training runs."""
        found = await asyncio.to_thread(runs.all)
        return JSONResponse({"data": [_summary(run) for run in found]})

    @router.post("/runs")
    async def start(body: RecipeBody) -> Response:
        """Start a training run."""
        return JSONResponse(_summary(await runs.start(body.recipe)), status_code=201)

    @router.get("/runs/{name}")
    async def get(name: str) -> Response:
        """Return a training run."""
        return JSONResponse(_whole(await asyncio.to_thread(runs.get, name)))

    @router.post("/runs/{name}/stop")
    async def stop(name: str) -> Response:
        """Ask a training run once to stop after its step, with a checkpoint; asking again changes nothing."""
        return JSONResponse(_summary(await runs.stop(name)))

    @router.post("/runs/{name}/kill")
    async def kill(name: str) -> Response:
        """Kill a training run; the steps since its last checkpoint are lost."""
        return JSONResponse(_summary(await runs.kill(name)))

    @router.post("/runs/{name}/resume")
    async def resume(name: str) -> Response:
        """Resume a training run from its last checkpoint."""
        return JSONResponse(_summary(await runs.resume(name)))

    if candidates is not None:
        _add_candidates(router, candidates)
    return router


def _add_candidates(router: APIRouter, candidates: CandidatePipeline) -> None:
    @router.post("/improve")
    async def improve(body: ImproveBody) -> Response:
        """Train a candidate for an adapter from feedback."""
        improvement = Improvement(body.method, body.steps, all_adapters=body.all_adapters)
        run = await candidates.improve(body.adapter, improvement)
        return JSONResponse(_summary(run), status_code=201)

    @router.post("/runs/{name}/publish")
    async def publish(name: str, authorization: Authorization = None) -> Response:
        """Publish the adapter of a completed run."""
        return JSONResponse({"name": await candidates.publish(name, by=actor_of(authorization))}, status_code=201)

    @router.post("/runs/{name}/promote")
    async def promote(name: str, authorization: Authorization = None) -> Response:
        """Promote the candidate of a completed run."""
        return JSONResponse({"name": await candidates.promote(name, by=actor_of(authorization))})


def _summary(run: TrainingRun) -> dict[str, Any]:
    return {
        "id": run.id,
        "status": run.status,
        "is_stopping": run.is_stopping,
        "created": run.created,
        "num_steps": len(run.steps),
        "loss": run.steps[-1].loss if run.steps else None,
        "improves": run.improves,
        "output": str(run.output) if run.output else None,
        "message": run.message,
    }


def _whole(run: TrainingRun) -> dict[str, Any]:
    return {
        **_summary(run),
        "recipe": run.recipe,
        "steps": [step.model_dump(exclude={"event"}) for step in run.steps],
        "held_out": [{"step": measured.step, "loss": measured.loss} for measured in run.measured],
        "sampled": [sampled.model_dump(exclude={"event"}) for sampled in run.sampled],
        "evaluations": [evaluation.model_dump() for evaluation in run.end.evaluations] if run.end else [],
    }
