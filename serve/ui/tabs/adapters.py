"""The Adapters tab: the registry, the served adapters, and the actions that the visitor's key may do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import gradio as gr

from adapterhub.errors import AdapterHubError
from serve.ui.client import PageClient
from serve.ui.model_picker import QUIET, trouble
from serve.ui.render.adapter_history import adapter_diff_html, history_html, short_digest
from serve.ui.render.conversation import escape
from serve.ui.render.tables import facts_table, note_html, rows_table
from serve.ui.sign_in import key_of

_SLOW = QUIET | {"show_progress": "minimal"}
"""Options of events that take the server seconds."""
_ACTIONS = {
    "verify": "adapters/verify",
    "load": "load_lora_adapter",
    "unload": "unload_lora_adapter",
    "promote": "adapters/promote",
    "rollback": "adapters/rollback",
    "pull": "adapters/pull",
    "upload": "adapters/upload",
}
"""Button -> the path below /v1 that it posts to."""


class AdaptersTab:
    """The tab's widgets and handlers, drawn inside the current `gr.Tab`."""

    def __init__(self, client: PageClient, tab: Any) -> None:
        self._client = client
        self._buttons: dict[str, Any] = {}
        with gr.Row(elem_classes="asking"):
            self._search = gr.Textbox(label="Search", placeholder="part of a name", min_width=160, elem_id="search")
            self._base = gr.Textbox(label="Base", placeholder="part of its name", min_width=160, elem_id="search-base")
        self._table = gr.HTML(elem_id="adapters", padding=False)
        with gr.Row(elem_classes="train-columns"):
            with gr.Column(min_width=300):
                self._draw_one()
            with gr.Column(min_width=300):
                self._draw_more()
        listed = [self._table, self._ref, self._a, self._b]
        asked = [self._search, self._base]
        tab.select(self._list, asked, listed, **QUIET)
        tab.select(self._rights, None, [*self._buttons.values(), self._why], **QUIET)
        gr.on([self._search.change, self._base.change], self._list, asked, listed, **QUIET)
        self._ref.input(self._inspect, [self._ref], [self._facts, self._name], **QUIET)
        self._connect(asked, listed)

    def _draw_one(self) -> None:
        self._ref = _adapter_box("Adapter", elem_id="adapter-ref")
        with gr.Row(elem_classes="small-buttons"):
            self._button("verify", "Verify")
            self._history = gr.Button("History", size="md", scale=0, min_width=104)
        with gr.Row(elem_classes="line"):
            self._name = gr.Textbox(label="Served as", min_width=140, elem_id="served-as")
            self._button("load", "Load")
            self._button("unload", "Unload")
        with gr.Row(elem_classes="line"):
            self._alias = gr.Textbox("stable", label="Alias", min_width=140, elem_id="alias")
            self._button("promote", "Promote")
            self._button("rollback", "Roll back")
        self._message = gr.Markdown(elem_classes="said", elem_id="adapters-said")
        self._why = gr.Markdown(elem_classes="said", elem_id="adapters-why")
        self._facts = gr.HTML(elem_id="adapter-facts", padding=False)

    def _draw_more(self) -> None:
        with gr.Accordion("Add an adapter", open=True):
            with gr.Row(elem_classes="line"):
                self._pulled = gr.Textbox(label="From the Hub", placeholder="owner/name[@revision]", min_width=180)
                self._button("pull", "Pull")
            self._file = gr.File(
                label="A packed folder as .zip, verified before it is stored", file_types=[".zip"], height=150
            )
            with gr.Row(elem_classes="line"):
                self._uploaded_as = gr.Textbox(
                    label="Name", placeholder="the package's own", min_width=180, elem_id="uploaded-as"
                )
                self._button("upload", "Upload")
        with gr.Accordion("Diff of two adapters", open=True):
            with gr.Row(elem_classes="line"):
                self._a = _adapter_box("From", elem_id="diff-a", min_width=120)
                self._b = _adapter_box("To", elem_id="diff-b", min_width=120)
                self._compare = gr.Button("Show", size="md", scale=0, min_width=104)
            self._diff = gr.HTML(elem_id="adapter-diff", padding=False)

    def _button(self, act: str, label: str) -> None:
        """Draw a button, disabled until the API confirms that the key may use it."""
        self._buttons[act] = gr.Button(label, interactive=False, scale=0, size="md", min_width=104)

    def _connect(self, asked: list[Any], listed: list[Any]) -> None:
        for act, handler, inputs in (
            ("verify", self._verify, [self._ref]),
            ("load", self._load, [self._ref, self._name]),
            ("unload", self._unload, [self._name]),
            ("promote", self._promote, [self._ref, self._alias]),
            ("rollback", self._rollback, [self._ref, self._alias]),
            ("pull", self._pull, [self._pulled]),
            ("upload", self._upload, [self._file, self._uploaded_as]),
        ):
            click = self._buttons[act].click(handler, inputs, [self._message], **_SLOW)
            click.then(self._list, asked, listed, **QUIET)
        self._history.click(self._show_history, [self._ref], [self._facts], **QUIET)
        self._compare.click(self._show_diff, [self._a, self._b], [self._diff], **_SLOW)

    # Reading

    async def _list(self, search: str, base: str, request: gr.Request) -> tuple[Any, ...]:
        try:
            found = await self._client.get("adapters", key_of(request), search=search, base=base)
        except AdapterHubError as error:
            return note_html(str(error)), *(gr.skip(),) * 3
        entries = found["data"]
        table = rows_table(_COLUMNS, (_row(entry) for entry in entries), caption=f"{len(entries)} adapters")
        choices = gr.update(choices=[entry["name"] for entry in entries])
        return table or "<p>No adapter matches.</p>", choices, choices, choices

    async def _rights(self, request: gr.Request) -> tuple[Any, ...]:
        key = key_of(request)
        reasons = await asyncio.gather(*(self._client.refusal(_ACTIONS[act], key) for act in self._buttons))
        why = "\n".join(f"- {reason}" for reason in sorted({escape(reason) for reason in reasons if reason}))
        return (*(gr.update(interactive=reason is None) for reason in reasons), why)

    async def _inspect(self, ref: str | None, request: gr.Request) -> tuple[str, str]:
        if not ref:
            return "", ""
        shown = await self._shown(self._client.get("adapters/inspect", key_of(request), ref=ref), facts_table)
        return shown, ref.rpartition("/")[2].partition("@")[0]

    async def _show_history(self, ref: str | None, request: gr.Request) -> str:
        name = (ref or "").partition("@")[0]
        return await self._shown(self._client.get("adapters/history", key_of(request), name=name), history_html)

    async def _show_diff(self, a: str, b: str, request: gr.Request) -> str:
        return await self._shown(self._client.get("adapters/diff", key_of(request), a=a, b=b), adapter_diff_html)

    async def _shown(self, asked: Awaitable[Any], draw: Any) -> str:
        try:
            return str(draw(await asked)) or "<p>Nothing to show.</p>"
        except AdapterHubError as error:
            return note_html(str(error))

    # Actions

    async def _verify(self, ref: str, request: gr.Request) -> str:
        return await self._done("adapters/verify", f"{ref} is complete and unchanged.", request, ref=ref)

    async def _load(self, ref: str, name: str, request: gr.Request) -> str:
        body = {"lora_name": name, "lora_path": ref}
        return await self._done("load_lora_adapter", f"{name} is loaded.", request, **body)

    async def _unload(self, name: str, request: gr.Request) -> str:
        return await self._done("unload_lora_adapter", f"{name} is unloaded.", request, lora_name=name)

    async def _promote(self, ref: str, alias: str, request: gr.Request) -> str:
        name = (ref or "").partition("@")[0]
        message = f"{name}@{alias} points to {ref} now."
        return await self._done("adapters/promote", message, request, ref=ref, alias=alias)

    async def _rollback(self, ref: str, alias: str, request: gr.Request) -> str:
        name = (ref or "").partition("@")[0]
        message = f"{name}@{alias} points to what it pointed to before."
        return await self._done("adapters/rollback", message, request, name=name, alias=alias)

    async def _pull(self, ref: str, request: gr.Request) -> str:
        return await self._done("adapters/pull", f"{ref} is pulled.", request, ref=ref)

    async def _upload(self, path: str | None, name: str, request: gr.Request) -> str:
        if not path:
            return trouble("choose a .zip first.")
        try:
            stored = await self._client.send_file(
                "adapters/upload", key_of(request), file=Path(path), name=name.strip()
            )
        except AdapterHubError as error:
            return trouble(str(error))
        return f"✓ verified and stored as {escape(stored['name'])}."

    async def _done(self, path: str, message: str, request: gr.Request, **body: str) -> str:
        if not all(body.values()):
            return trouble("a field is empty: pick an adapter, and fill in the fields beside the button.")
        try:
            await self._client.post(path, key_of(request), **body)
        except AdapterHubError as error:
            return trouble(str(error))
        return f"✓ {escape(message)}"


def _adapter_box(label: str, *, elem_id: str, **options: Any) -> Any:
    """Draw a box for any reference, with the adapters of this machine as choices."""
    drawn = gr.Dropdown(
        [], value=None, label=label, allow_custom_value=True, interactive=True, elem_id=elem_id, **options
    )
    drawn.preprocess = lambda payload: payload
    return drawn


_COLUMNS = ("name", "digest", "base", "rank", "method", "license", "served as")


def _row(entry: dict[str, Any]) -> tuple[Any, ...]:
    middle = (entry.get(name) for name in ("base", "rank", "method"))
    license_name = entry.get("license", entry.get("licence"))
    return (entry["name"], short_digest(entry.get("digest")), *middle, license_name, entry.get("loaded_as"))
