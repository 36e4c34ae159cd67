"""HTTP routes for feedback: votes, thumbs, corrections, battles and ratings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from adapterhub.feedback.ratings import RatingMethod, rate, ratings_dict
from adapterhub.feedback.store import Feedback, FeedbackStore, owner_of
from adapterhub.strict import Strict
from serve.api.route import ApiRoute

Authorization = Annotated[str | None, Header()]


class BattleBody(Strict):
    """Models that may take part in a battle."""

    models: list[Annotated[str, Field(max_length=500)]] | None = Field(None, max_length=1000)
    """Names of served models; None for all."""


def feedback_routes(store: FeedbackStore, served: Callable[[list[str] | None], list[str]]) -> APIRouter:
    """Return the routes. `served` checks names of models, or returns all that are served.

    POST /v1/arena/battles returns both names: a page must hide them until the vote.
    """
    router = APIRouter(prefix="/v1", route_class=ApiRoute)

    @router.post("/feedback")
    async def add(body: Feedback, authorization: Authorization = None) -> Response:
        """Store feedback on an answer."""
        kept = await asyncio.to_thread(store.add, body, owner=owner_of(authorization))
        return JSONResponse(vars(kept), status_code=201)

    @router.get("/feedback")
    async def mine(authorization: Authorization = None) -> Response:
        """List the feedback sent with this key."""
        rows = await asyncio.to_thread(store.rows, owner_of(authorization))
        return JSONResponse({"data": [vars(kept) | (given.model_dump() if given else {}) for kept, given in rows]})

    @router.delete("/feedback")
    async def delete_all(authorization: Authorization = None) -> Response:
        """Delete all feedback sent with this key."""
        return _deleted(await asyncio.to_thread(store.delete, owner_of(authorization)))

    @router.delete("/feedback/{name}")
    async def delete(name: str, authorization: Authorization = None) -> Response:
        """Delete one feedback sent with this key."""
        return _deleted(await asyncio.to_thread(store.delete, owner_of(authorization), name))

    @router.get("/feedback/counts")
    async def counts() -> Response:
        """Count the feedback of each kind."""
        return JSONResponse(await asyncio.to_thread(store.counts))

    @router.post("/arena/battles")
    async def begin(body: BattleBody) -> Response:
        """Start a battle between two models."""
        models = served(body.models)
        battle = await asyncio.to_thread(store.begin_battle, models)
        return JSONResponse({"battle": battle.id, "a": battle.a, "b": battle.b}, status_code=201)

    @router.get("/ratings")
    async def ratings(
        method: RatingMethod = "bt", orderings: Annotated[int, Query(ge=1, le=10_000)] = 1000
    ) -> Response:
        """Rate the models by all votes."""

        def work() -> dict[str, Any]:
            return ratings_dict(rate(store.pairwise_votes(), method, orderings=orderings))

        return JSONResponse(await asyncio.to_thread(work))

    return router


def _deleted(count: int) -> Response:
    return JSONResponse({"deleted": count})
