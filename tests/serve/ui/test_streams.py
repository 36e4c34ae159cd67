"""Answers under way, without a page."""

from __future__ import annotations

import asyncio

import pytest

from serve.client import Answer
from serve.ui.streams import Ending, Runs


@pytest.mark.parametrize(
    ("ending", "left_for", "drawn"),
    [(Ending.LEFT, ["another"], ["another"]), (Ending.STOPPED, None, None), (Ending.REPLACED, None, "nothing")],
)
def test_a_run_that_is_ended_draws_once_more_unless_another_draws(
    ending: Ending, left_for: object, drawn: object
) -> None:
    """What it drew before may be on its way still: only the last drawing of its own comes after that."""

    async def fill(answer: Answer) -> None:
        while True:
            answer.text += "more "
            await asyncio.sleep(0.01)

    async def test() -> None:
        runs, answer = Runs(), Answer("captain", ())
        seen = 0
        last: object = "nothing"
        async for run in runs.follow("visitor", [(answer, fill(answer))]):
            if run.ending is None:
                seen += 1
                if seen == 3:
                    assert runs.end("visitor", ending, left_for)
            else:
                last = run.left_for
                assert run.is_done
        assert last == drawn
        assert not runs.end("visitor", Ending.STOPPED)

    asyncio.run(test())
