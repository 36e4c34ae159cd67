"""Which model a tab talks to: the picker, filled from the API, and the card of what is picked."""

from __future__ import annotations

from typing import Any

import gradio as gr

from adapterhub.errors import AdapterHubError
from serve.chat_client import Loss, PageClient, ServedModel
from serve.page_lines import escape

_DIGEST_SHOWN = len("sha256:") + 12


def model_picker(*, elem_id: str, label: str = "Adapter") -> Any:
    """A dropdown of models, empty until the page is open."""
    picker = gr.Dropdown(choices=[], value=None, label=label, elem_id=elem_id, filterable=True, interactive=True)
    # Gradio's own check forgets the choices when the server restarts; the API judges the name anyway. Replaced in the
    # object, because Gradio writes a .pyi file beside the source of every subclass.
    picker.preprocess = _picked
    return picker


def _picked(payload: Any) -> str | None:
    return str(payload) if payload else None


class Models:
    """The handlers behind a picker and its card; a failure is told in the card."""

    def __init__(self, client: PageClient) -> None:
        self._client = client

    async def opened(self, key: str | None, picked: str | None, request: gr.Request) -> tuple[Any, str]:
        """The picker and the card of a fresh page, or after a key was typed: `?adapter=NAME`, else the base."""
        return await self._filled(key, picked or request.query_params.get("adapter"))

    async def refreshed(self, key: str | None) -> Any:
        """The choices of today; the choice stays."""
        try:
            return gr.update(choices=_choices(await self._client.models(key)))
        except AdapterHubError:
            return gr.skip()  # asking will say it

    async def card(self, key: str | None, picked: str | None) -> str:
        try:
            found = {model.name: model for model in await self._client.models(key)}
        except AdapterHubError as error:
            return trouble(str(error))
        return card_text(found[picked]) if picked in found else _not_here(picked)

    async def _filled(self, key: str | None, wanted: str | None) -> tuple[Any, str]:
        try:
            models = await self._client.models(key)
        except AdapterHubError as error:
            return gr.skip(), trouble(str(error))
        found = {model.name: model for model in models}
        picked = wanted if wanted in found else next(iter(found), None)
        card = card_text(found[picked]) if picked else trouble("the server has no model.")
        if wanted and wanted != picked:
            card = f"{_not_here(wanted)}\n\n{card}"
        return gr.update(choices=_choices(models), value=picked), card


def _choices(models: list[ServedModel]) -> list[tuple[str, str]]:
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
