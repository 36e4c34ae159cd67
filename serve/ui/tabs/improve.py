"""The part of the Train tab that starts a run from feedback: the adapter to improve, the method, the steps."""

from __future__ import annotations

import asyncio
import shlex
from typing import Any

import gradio as gr

from adapterhub.errors import AdapterHubError
from adapterhub.feedback.improvement import Improvement, Method
from serve.ui.client import PageClient
from serve.ui.model_picker import QUIET, choices_of, model_picker, trouble
from serve.ui.render.conversation import escape
from serve.ui.sign_in import key_of

_SLOW = QUIET | {"show_progress": "minimal"}


class ImproveBox:
    """The widgets and handlers, drawn inside the current layout."""

    def __init__(self, client: PageClient) -> None:
        self._client = client
        with gr.Accordion("Improve an adapter from feedback", open=False, elem_id="improve"):
            self._adapter = model_picker(elem_id="improved", label="Adapter to improve")
            self._method = gr.Radio([one.value for one in Method], value=Improvement.method.value, label="Method")
            self._steps = gr.Number(Improvement.steps, label="Steps", precision=0, minimum=1, elem_id="improve-steps")
            self._all = gr.Checkbox(label="Use the feedback about other adapters, too", elem_id="improve-all")
            self._counts = gr.Markdown(elem_classes="said", elem_id="feedback-counts")
            self._command = gr.Markdown(elem_id="improve-command")
            self.begin = gr.Button("Improve", variant="primary", size="md", scale=0, min_width=130)
            self._message = gr.Markdown(elem_classes="said", elem_id="improve-said")

    def connect(self, tab: Any, runs: Any) -> Any:
        """Connect the handlers. Return the event that picks the started run in `runs`, the picker of runs."""
        opened = [self._adapter, self._counts]
        tab.select(self._opened, [self._adapter], opened, **QUIET)
        self._adapter.focus(self._opened, [self._adapter], opened, **QUIET)
        asked = [self._adapter, self._method, self._steps, self._all]
        gr.on([one.input for one in asked], _command, asked, [self._command], **QUIET)
        return self.begin.click(self._begin, asked, [runs, self._message], **_SLOW)

    async def _opened(self, picked: str | None, request: gr.Request) -> tuple[Any, str]:
        key = key_of(request)
        try:
            models, counts = await asyncio.gather(self._client.models(key), self._client.get("feedback/counts", key))
        except AdapterHubError as error:
            return gr.skip(), trouble(str(error))
        counted = ", ".join(f"{count} {escape(what.replace('_', ' '))}" for what, count in counts.items() if count)
        adapters = [model for model in models if not model.is_base]
        return gr.update(choices=choices_of(adapters), value=picked), f"Feedback so far: {counted or 'none'}."

    async def _begin(
        self, adapter: str | None, method: str, steps: int | None, all_adapters: bool, request: gr.Request
    ) -> tuple[Any, str]:
        if not adapter:
            return gr.skip(), trouble("no adapter is picked: pick the adapter to improve first.")
        key = key_of(request)
        body = {"adapter": adapter, "method": method, "steps": int(steps or Improvement.steps)}
        body |= {"all_adapters": all_adapters}
        try:
            run = await self._client.post("training/improve", key, **body)
            runs = (await self._client.get("training/runs", key))["data"]
        except AdapterHubError as error:
            return gr.skip(), trouble(str(error))
        return gr.update(choices=[one["id"] for one in runs], value=run["id"]), ""


def _command(adapter: str | None, method: str, steps: int | None, all_adapters: bool) -> str:
    if not adapter:
        return ""
    count = int(steps or Improvement.steps)
    command = shlex.join(["adapterhub", "improve", adapter, "--method", method, "--steps", str(count)])
    command += " --all-adapters" if all_adapters else ""
    return f"The same on the command line:\n```\n{command}\n```"
