"""The Arena tab: two answers without names, one vote, then the names and the ratings of all votes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import gradio as gr
from markupsafe import Markup

from adapterhub.errors import AdapterHubError, Conflict
from adapterhub.feedback.ratings import Rating
from adapterhub.svg_plot import Interval, interval_plot
from serve.client import Answer, Sampling, Turn, to_send
from serve.ui.answer_panels import Panels, Updates
from serve.ui.client import Messages, PageClient, VoteWinner
from serve.ui.model_picker import QUIET, Models, model_picker, trouble
from serve.ui.render.conversation import escape
from serve.ui.render.tables import bullet_list, note_html, rows_table, scrollable
from serve.ui.sign_in import key_of
from serve.ui.streams import AnswerStream, AnswerStreams
from serve.ui.tabs.chat import CONCURRENT_ANSWERS

_WINNERS: tuple[tuple[VoteWinner, str], ...] = (
    ("a", "◀ Left is better"),
    ("tie", "Tie"),
    ("both_bad", "Both are bad"),
    ("b", "Right is better ▶"),
)
_BLIND = ["Left", "Right"]
_TOP_P = 0.9


@dataclass(frozen=True)
class PendingVote:
    """A pair of answers without a vote yet, kept by the page's server: the browser must not know the names."""

    id: str
    messages: Messages
    a: Answer
    b: Answer


class ArenaTab:
    """The tab's widgets and handlers, drawn inside the current `gr.Tab`."""

    def __init__(self, client: PageClient, tab: Any) -> None:
        self._client = client
        self._streams = AnswerStreams()
        self._battle = gr.State(None)
        self._draw(client)
        models = Models(client)
        self._among.focus(models.refreshed, None, [self._among], **QUIET)
        tab.select(self._ratings, [self._method], [self._table], **QUIET)
        self._connect()

    def _draw(self, client: PageClient) -> None:
        with gr.Row(elem_classes="composer wide"):
            self._prompt = gr.Textbox(
                elem_id="arena-prompt",
                label="Question",
                show_label=False,
                container=False,
                placeholder="Ask, read two answers, vote: then the names are shown",
                max_lines=8,
            )
            self._ask = gr.Button("Ask two", variant="primary", scale=0, min_width=110)
        self._message = gr.Markdown(elem_classes="said", elem_id="arena-vote")
        self._panels = Panels(client, 2, prefix="arena")
        with gr.Row(visible=False, elem_classes="votes") as self._votes:
            self._buttons = [(winner, gr.Button(label, size="md", min_width=120)) for winner, label in _WINNERS]
        with gr.Accordion("Settings", open=False, elem_id="arena-settings"):
            self._among = model_picker(
                elem_id="arena-among",
                label="Adapters that take part (none picked: the server picks the most informative pairs)",
                multiselect=True,
            )
            self._temperature = gr.Slider(0.0, 2.0, value=0.7, step=0.05, label="Temperature")
            self._max_tokens = gr.Slider(1, 2048, value=256, step=1, label="Max tokens", elem_id="arena-max-tokens")
        gr.Markdown("## Ratings")
        self._method = gr.Radio(
            [("Bradley-Terry", "bt"), ("Elo", "elo")], value="bt", label="Method", show_label=False, container=False
        )
        self._table = gr.HTML(elem_id="ratings", padding=False)

    def _connect(self) -> None:
        drawn = [*self._panels.outputs, self._battle, self._votes, self._message, self._ask]
        gr.on(
            [self._prompt.submit, self._ask.click],
            self._begin,
            {self._prompt, self._among, self._temperature, self._max_tokens},
            drawn,
            show_progress="hidden",
            api_visibility="private",
            concurrency_limit=CONCURRENT_ANSWERS,
            trigger_mode="multiple",
        )
        panels = self._panels.panels
        heads, actions = [panel.head for panel in panels], [panel.actions for panel in panels]
        voted = [self._message, self._votes, self._battle, *heads, *actions]
        for winner, button in self._buttons:
            button.click(self._voting(winner), [self._battle], voted, **QUIET).then(
                self._ratings, [self._method], [self._table], **QUIET
            )
        self._method.input(self._ratings, [self._method], [self._table], **QUIET)

    async def _begin(self, values: dict[Any, Any], request: gr.Request) -> AsyncGenerator[Updates, None]:
        prompt, key = values[self._prompt] or "", key_of(request)
        if not prompt.strip():
            yield {self._message: trouble("write a question first.")}
            return
        try:
            drawn = await self._client.post("arena/battles", key, **_among(values[self._among]))
        except AdapterHubError as error:
            yield {self._message: trouble(str(error))}
            return
        messages = to_send(None, [Turn("user", prompt)])
        sampling = Sampling(values[self._temperature], int(values[self._max_tokens]), _TOP_P)
        answers = (Answer(drawn["a"]), Answer(drawn["b"]))
        filled = [(answer, self._client.fill(answer, messages, sampling, key=key)) for answer in answers]
        async with aclosing(self._streams.follow(request.session_hash, filled)) as states:
            await anext(states)
            hidden = {self._battle: None, self._votes: gr.update(visible=False), self._message: ""}
            yield self._panels.draw_empty(_BLIND) | hidden | {self._ask: gr.update(interactive=False)}
            async for stream in states:
                is_done = stream.is_done
                battle = str(drawn["battle"])
                yield self._draw_final(stream, battle, messages) if is_done else self._panels.draw_growing(stream)

    def _draw_final(self, stream: AnswerStream, battle: str, messages: Messages) -> Updates:
        """Show both answers, and open the vote when both are complete."""
        drawn = self._panels.draw_final(stream, messages) | {self._ask: gr.update(interactive=True)}
        if any(stream.error(index) for index in range(2)):
            # The error may name the adapter, but there is no vote left for it to bias.
            return drawn | {self._message: trouble("no vote on this pair: an answer is incomplete. Ask again.")}
        # Feedback on one answer would name its adapter.
        drawn |= {panel.actions: gr.update(visible=False) for panel in self._panels.panels}
        return drawn | {
            self._battle: PendingVote(battle, messages, *stream.answers),
            self._votes: gr.update(visible=True),
        }

    def _voting(self, winner: VoteWinner) -> Callable[..., Any]:
        async def vote(battle: PendingVote | None, request: gr.Request) -> tuple[Any, ...]:
            return await self._vote(winner, battle, request)

        return vote

    async def _vote(self, winner: VoteWinner, battle: PendingVote | None, request: gr.Request) -> tuple[Any, ...]:
        closed = (gr.update(visible=False), None)
        unchanged = (gr.skip(),) * 4
        if battle is None:
            return (trouble("this pair has its vote already. Ask again."), *closed, *unchanged)
        body = {"battle": battle.id, "messages": battle.messages, "a": battle.a.wire(), "b": battle.b.wire()}
        try:
            await self._client.post("feedback", key_of(request), kind="vote", **body, winner=winner)
            message = "✓ your vote counts."
        except Conflict as error:
            message = trouble(str(error))
        except AdapterHubError as error:
            return (trouble(str(error)), gr.skip(), gr.skip(), *unchanged)
        open_to_feedback = gr.update(visible=True)
        return (message, *closed, _revealed(battle.a), _revealed(battle.b), open_to_feedback, open_to_feedback)

    async def _ratings(self, method: str, request: gr.Request) -> str:
        try:
            found = await self._client.get("ratings", key_of(request), method=method)
        except AdapterHubError as error:
            return note_html(str(error))
        ratings = [
            Rating(*(one[name] for name in ("model", "rating", "low", "high", "games"))) for one in found["ratings"]
        ]
        if not ratings:
            return "<p>No votes yet.</p>"
        return _plot(ratings) + _table(ratings) + bullet_list(found.get("notes", ()))


def _plot(ratings: list[Rating]) -> Markup:
    values = "; ".join(f"{one.model} {one.rating:.0f}, from {one.low:.0f} to {one.high:.0f}" for one in ratings)
    intervals = [Interval(one.model, one.rating, one.low, one.high) for one in ratings]
    plot = interval_plot(intervals, label=f"Ratings with 95 % intervals: {values}")
    return scrollable(Markup(plot), label="Plot")  # noqa: S704 -- it escapes the names of models


def _among(models: list[str] | None) -> dict[str, list[str]]:
    return {"models": models} if models else {}


def _revealed(answer: Answer) -> str:
    return f"## {escape(answer.name)}\n\n{escape(answer.figures())}"


def _table(ratings: list[Rating]) -> Markup:
    rows = [(one.model, f"{one.rating:.0f}", f"{one.low:.0f} to {one.high:.0f}", one.games) for one in ratings]
    return rows_table(("model", "rating", "95 % interval", "games"), rows, caption="Ratings of all votes")
