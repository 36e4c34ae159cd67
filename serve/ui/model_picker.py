"""Which models a tab talks to: the pickers, filled from the API, and the card of what is picked."""

from __future__ import annotations

from typing import Any

import gradio as gr

from adapterhub.errors import AdapterHubError
from serve.client import Loss, ServedModel
from serve.ui.client import PageClient
from serve.ui.render.conversation import escape
from serve.ui.sign_in import key_of

_DIGEST_SHOWN = len("sha256:") + 12

QUIET = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
"""how handlers are connected that answer at once"""


def model_picker(*, elem_id: str, label: str = "Adapter", **options: Any) -> Any:
    """A dropdown of models, empty until the page is open."""
    picker = gr.Dropdown(choices=[], value=None, label=label, elem_id=elem_id, interactive=True, **options)
    # Gradio's own check forgets the choices when the server restarts; the API judges the name anyway. Replaced in the
    # object, because Gradio writes a .pyi file beside the source of every subclass.
    picker.preprocess = _picked
    return picker


def _picked(payload: Any) -> str | list[str] | None:
    if isinstance(payload, list):
        return [str(name) for name in payload]
    return str(payload) if payload else None


class Models:
    """The handlers behind a picker and its card; a failure is told in the card."""

    def __init__(self, client: PageClient) -> None:
        self._client = client

    async def opened(self, picked: str | None, request: gr.Request) -> tuple[Any, str]:
        """The picker and the card of a fresh page: `?adapter=NAME`, else the base."""
        wanted = picked or request.query_params.get("adapter")
        try:
            models = await self._client.models(key_of(request))
        except AdapterHubError as error:
            return gr.skip(), trouble(str(error))
        found = {model.name: model for model in models}
        name = wanted if wanted in found else next(iter(found), None)
        card = card_text(found[name]) if name else trouble("the server has no model.")
        if wanted and wanted != name:
            card = f"{_not_here(wanted)}\n\n{card}"
        return gr.update(choices=choices_of(models), value=name), card

    async def refreshed(self, request: gr.Request) -> Any:
        """The choices of today; the choice stays."""
        return await self._with_choices(request, base=True)

    async def adapters(self, request: gr.Request) -> Any:
        """The choices of today, without the base."""
        return await self._with_choices(request, base=False)

    async def several(self, picked: list[str] | None, request: gr.Request) -> Any:
        """The choices of today; where nothing is picked yet, the base and its first adapters."""
        try:
            models = await self._client.models(key_of(request))
        except AdapterHubError:
            return gr.skip()  # asking will say it
        first = [model.name for model in models[:2]]
        return gr.update(choices=choices_of(models), value=picked or first)

    async def card(self, picked: str | None, request: gr.Request) -> str:
        try:
            found = {model.name: model for model in await self._client.models(key_of(request))}
        except AdapterHubError as error:
            return trouble(str(error))
        return card_text(found[picked]) if picked in found else _not_here(picked)

    async def _with_choices(self, request: gr.Request, *, base: bool) -> Any:
        try:
            models = await self._client.models(key_of(request))
        except AdapterHubError:
            return gr.skip()  # asking will say it
        return gr.update(choices=choices_of([model for model in models if base or not model.is_base]))


def choices_of(models: list[ServedModel]) -> list[tuple[str, str]]:
    return [(f"{model.name} (base)" if model.is_base else model.name, model.name) for model in models]


def _not_here(name: str | None) -> str:
    return trouble(f"there is no adapter {name} here.")


def trouble(message: str) -> str:
    return f"⚠ {escape(message)}"


def card_text(model: ServedModel) -> str:
    """Markdown of what the API tells of a model."""
    if model.is_base:
        rows = [("base model", model.root or model.name), ("fingerprint", (model.fingerprint or "")[:_DIGEST_SHOWN])]
        return f"The base model alone, without an adapter.\n\n{_table(rows)}"
    method = f"{model.method}, rank {model.rank}" if model.method else ""
    rows = [
        ("base", model.parent or ""),
        ("method", method),
        ("licence", model.licence or "not stated"),
        ("digest", (model.digest or "")[:_DIGEST_SHOWN]),
    ]
    return _table(rows) + "".join(_loss(loss) for loss in model.losses)


def _loss(loss: Loss) -> str:
    return f"\n\nHeld-out loss on {escape(loss.data)}: {loss.base:.3f} for the base, **{loss.adapter:.3f}** with it."


def _table(rows: list[tuple[str, str]]) -> str:
    filled = [f"| {label} | {escape(value)} |" for label, value in rows if value]
    return "\n".join(["| | |", "|---|---|", *filled])
