"""Streams of answers, without a page."""

from __future__ import annotations

import asyncio

import pytest

from serve.client import Answer
from serve.ui.streams import AnswerStreams, StreamEnd


@pytest.mark.parametrize(
    ("end", "show_instead", "drawn"),
    [
        (StreamEnd.LEFT, ["another"], ["another"]),
        (StreamEnd.STOPPED, None, None),
        (StreamEnd.REPLACED, None, "nothing"),
    ],
)
def test_cancelled_stream_is_drawn_once_more_unless_another_replaces_it(
    end: StreamEnd, show_instead: object, drawn: object
) -> None:
    """What it drew before may still be on its way: only the stream's own last drawing comes after that."""

    async def fill(answer: Answer) -> None:
        while True:
            answer.text += "more "
            await asyncio.sleep(0.01)

    async def test() -> None:
        streams, answer = AnswerStreams(), Answer("captain", ())
        seen = 0
        last: object = "nothing"
        async for stream in streams.follow("visitor", [(answer, fill(answer))]):
            if stream.end is None:
                seen += 1
                if seen == 3:
                    assert streams.cancel("visitor", end, show_instead)
            else:
                last = stream.show_instead
                assert stream.is_done
        assert last == drawn
        assert not streams.cancel("visitor", StreamEnd.STOPPED)

    asyncio.run(test())
