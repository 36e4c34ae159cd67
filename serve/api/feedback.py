"""HTTP of feedback: votes, thumbs, corrections, battles and ratings. What is kept is feedback.py's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from adapterhub.feedback.ratings import RatingMethod, rate, ratings_dict
from adapterhub.feedback.store import Feedback, FeedbackStore, owner_of
from serve.api.route import ApiRoute

Authorization = Annotated[str | None, Header()]


class BattleBody(BaseModel):
    model_config = ConfigDict(extra="forbid")
    models: list[Annotated[str, Field(max_length=500)]] | None = Field(None, max_length=1000)
    """None: any that are served"""


def feedback_routes(store: FeedbackStore, served: Callable[[list[str] | None], list[str]]) -> APIRouter:
    """`served` checks the names of models, or gives all there are.

    POST /v1/arena/battles tells both names: a page keeps them to itself until the vote.
    """
    router = APIRouter(prefix="/v1", route_class=ApiRoute)

    @router.post("/feedback")
    async def add(body: Feedback, authorization: Authorization = None) -> Response:
        kept = await asyncio.to_thread(store.add, body, owner=owner_of(authorization))
        return JSONResponse(vars(kept), status_code=201)

    @router.get("/feedback")
    async def mine(authorization: Authorization = None) -> Response:
        rows = await asyncio.to_thread(store.rows, owner_of(authorization))
        return JSONResponse({"data": [{**vars(kept), **given.model_dump()} for kept, given in rows]})

    @router.delete("/feedback")
    async def forget_all(authorization: Authorization = None) -> Response:
        return _deleted(await asyncio.to_thread(store.delete, owner_of(authorization)))

    @router.delete("/feedback/{name}")
    async def forget(name: str, authorization: Authorization = None) -> Response:
        return _deleted(await asyncio.to_thread(store.delete, owner_of(authorization), name))

    @router.get("/feedback/counts")
    async def counts() -> Response:
        return JSONResponse(await asyncio.to_thread(store.counts))

    @router.post("/arena/battles")
    async def begin(body: BattleBody) -> Response:
        models = served(body.models)
        battle = await asyncio.to_thread(store.begin_battle, models)
        return JSONResponse({"battle": battle.id, "a": battle.a, "b": battle.b}, status_code=201)

    @router.get("/ratings")
    async def ratings(
        method: RatingMethod = "bt", orderings: Annotated[int, Query(ge=1, le=10_000)] = 1000
    ) -> Response:
        def work() -> dict[str, Any]:
            return ratings_dict(rate(store.pairwise_votes(), method, orderings=orderings))

        return JSONResponse(await asyncio.to_thread(work))

    return router


def _deleted(count: int) -> Response:
    return JSONResponse({"deleted": count})
