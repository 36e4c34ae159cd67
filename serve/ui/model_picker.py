"""Model pickers, filled from the API, and the card of the picked model."""

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
"""Options of events whose handlers return at once."""


def model_picker(*, elem_id: str, label: str = "Adapter", **options: Any) -> Any:
    """Draw a dropdown of models, which is empty until the page is open."""
    picker = gr.Dropdown(choices=[], value=None, label=label, elem_id=elem_id, interactive=True, **options)
    # Gradio's own check forgets the choices when the server restarts; the API checks the name anyway. Replaced on the
    # object, because Gradio writes a .pyi file beside the source of every subclass.
    picker.preprocess = _picked
    return picker


def _picked(payload: Any) -> str | list[str] | None:
    if isinstance(payload, list):
        return [str(name) for name in payload]
    return str(payload) if payload else None


class Models:
    """The handlers of a picker and its card; the card shows errors."""

    def __init__(self, client: PageClient) -> None:
        self._client = client

    async def opened(self, picked: str | None, request: gr.Request) -> tuple[Any, str]:
        """Fill the picker and the card of a new page: with `?adapter=NAME`, else with the base."""
        wanted = picked or request.query_params.get("adapter")
        try:
            models = await self._client.models(key_of(request))
        except AdapterHubError as error:
            return gr.skip(), trouble(str(error))
        found = {model.name: model for model in models}
        name = wanted if wanted in found else next(iter(found), None)
        card = card_text(found[name]) if name else trouble("the server lists no model: check its log.")
        if wanted and wanted != name:
            card = f"{_not_here(wanted)}\n\n{card}"
        return gr.update(choices=choices_of(models), value=name), card

    async def refreshed(self, request: gr.Request) -> Any:
        """Return the current choices; the picked one stays."""
        return await self._with_choices(request, base=True)

    async def adapters(self, request: gr.Request) -> Any:
        """Return the current choices without the base."""
        return await self._with_choices(request, base=False)

    async def several(self, picked: list[str] | None, request: gr.Request) -> Any:
        """Return the current choices; where none is picked yet, pick the base and the first adapter."""
        try:
            models = await self._client.models(key_of(request))
        except AdapterHubError:
            return gr.skip()  # the request for an answer reports the error
        first = [model.name for model in models[:2]]
        return gr.update(choices=choices_of(models), value=picked or first)

    async def card(self, picked: str | None, request: gr.Request) -> str:
        """Return the card of the picked model."""
        try:
            found = {model.name: model for model in await self._client.models(key_of(request))}
        except AdapterHubError as error:
            return trouble(str(error))
        return card_text(found[picked]) if picked in found else _not_here(picked)

    async def _with_choices(self, request: gr.Request, *, base: bool) -> Any:
        try:
            models = await self._client.models(key_of(request))
        except AdapterHubError:
            return gr.skip()  # the request for an answer reports the error
        return gr.update(choices=choices_of([model for model in models if base or not model.is_base]))


def choices_of(models: list[ServedModel]) -> list[tuple[str, str]]:
    """Return (label, name) of each model, as a dropdown takes them."""
    return [(f"{model.name} (base)" if model.is_base else model.name, model.name) for model in models]


def _not_here(name: str | None) -> str:
    return trouble(f"this server has no adapter {name}: pick another.")


def trouble(message: str) -> str:
    """Return a warning as Markdown."""
    return f"⚠ {escape(message)}"


def card_text(model: ServedModel) -> str:
    """Return the API's facts about a model as Markdown."""
    if model.is_base:
        rows = [("base model", model.root or model.name), ("fingerprint", (model.fingerprint or "")[:_DIGEST_SHOWN])]
        return f"The base model alone, without an adapter.\n\n{_table(rows)}"
    method = f"{model.method}, rank {model.rank}" if model.method else ""
    rows = [
        ("base", model.parent or ""),
        ("method", method),
        ("license", model.license or "not stated"),
        ("digest", (model.digest or "")[:_DIGEST_SHOWN]),
    ]
    return _table(rows) + "".join(_loss(loss) for loss in model.losses)


def _loss(loss: Loss) -> str:
    losses = f"{loss.base:.3f} for the base, **{loss.adapter:.3f}** with the adapter"
    return f"\n\nHeld-out loss on {escape(loss.data)}: {losses}."


def _table(rows: list[tuple[str, str]]) -> str:
    filled = [f"| {label} | {escape(value)} |" for label, value in rows if value]
    return "\n".join(["| | |", "|---|---|", *filled])
