"""The Train tab: a form for a recipe, its plan, and the progress of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from adapterhub.errors import AdapterHubError
from serve.ui.client import PageClient
from serve.ui.model_picker import QUIET, choices_of, trouble
from serve.ui.recipe_form import FIELDS, Field, read_fields, with_field
from serve.ui.render.conversation import escape
from serve.ui.render.tables import note_html
from serve.ui.render.training import plan_html, run_html
from serve.ui.script import save_file
from serve.ui.sign_in import key_of
from serve.ui.tabs.improve import ImproveBox

_POLL_S = 1.0
_SLOW = QUIET | {"show_progress": "minimal"}
"""Options of events that take the server seconds."""


class TrainTab:
    """The tab's widgets and handlers, drawn inside the current `gr.Tab`.

    The server keeps the state of a run and the page reads it, so a reload loses nothing. `compared` is the picker of
    the tab `compare` of `tabs`, where the adapter of a finished run is shown beside its base.
    """

    def __init__(self, client: PageClient, tab: Any, *, tabs: Any, compared: Any) -> None:
        self._client = client
        with gr.Row(elem_classes="train-columns"):
            with gr.Column(scale=1, min_width=300):
                self._improve = ImproveBox(client)
                self._draw_recipe()
            with gr.Column(scale=1, min_width=300):
                self._draw_run()
        self._recipes = gr.State({})
        self._timer = gr.Timer(_POLL_S, active=False)
        opened = [self._shipped, self._recipes, self._runs, self._start, self._plan, self._improve.begin, self._message]
        tab.select(self._opened, [self._shipped], opened, **QUIET)
        self._connect_recipe()
        self._connect_run(tab)
        self._try.click(self._tried, [self._runs], [self._done, tabs, compared], **_SLOW)

    def _draw_recipe(self) -> None:
        self._shipped = gr.Dropdown([], value=None, label="Start from", interactive=True, elem_id="recipe")
        self._shipped.preprocess = lambda payload: payload
        with gr.Row(elem_classes="fields"):
            self._fields = [_draw_field(field) for field in FIELDS]
        self._toml = gr.Textbox(label="Recipe (TOML)", lines=14, max_lines=30, elem_id="toml", elem_classes="code")
        self._command = gr.Markdown(elem_id="command")
        with gr.Row(elem_classes="small-buttons"):
            self._plan = gr.Button("Plan", size="md", min_width=90, elem_id="plan-run")
            self._start = gr.Button("Start training", variant="primary", size="md", min_width=130, elem_id="start-run")
            self._save = gr.Button("Save recipe", size="md", min_width=110)
        self._message = gr.Markdown(elem_classes="said")

    def _draw_run(self) -> None:
        self._runs = gr.Dropdown([], value=None, label="Run", interactive=True, elem_id="run")
        self._runs.preprocess = lambda payload: payload
        self._run = gr.HTML(elem_id="run-state", padding=False)
        with gr.Row(elem_classes="small-buttons", elem_id="run-actions"):
            self._stop = gr.Button("Stop the run", variant="stop", interactive=False, min_width=100, size="md")
            self._resume = gr.Button("Resume", interactive=False, min_width=100, size="md")
            self._try = gr.Button("Compare", variant="primary", interactive=False, size="md")
            self._promote = gr.Button("Promote", interactive=False, min_width=100, size="md")
        self._done = gr.Markdown(elem_classes="said")
        self._planned = gr.HTML(elem_id="plan", padding=False)

    def _connect_recipe(self) -> None:
        filled = [self._toml, *self._fields, self._command, self._message]
        self._shipped.input(self._chosen, [self._shipped, self._recipes], filled, **QUIET)
        # Gradio reports keys but no paste: pasted text is read when the box loses focus.
        typed = [self._toml.input, self._toml.blur]
        gr.on(typed, self._read, [self._toml], [*self._fields, self._command, self._message], **QUIET)
        for field, widget in zip(FIELDS, self._fields, strict=True):
            others = [self._widget(field.instead_of)] if field.instead_of else []
            changed = [self._toml, self._command, *others]
            widget.input(self._setting(field), [self._toml, widget], changed, **QUIET)
        self._plan.click(self._make_plan, [self._toml], [self._planned], **_SLOW)
        self._save.click(
            None, [self._toml], None, js=save_file("recipe.toml", "application/toml"), api_visibility="private"
        )

    def _connect_run(self, tab: Any) -> None:
        shown = [self._run, self._stop, self._resume, self._try, self._promote, self._timer]
        self._improve.connect(tab, self._runs).then(self._show, [self._runs], shown, **QUIET)
        self._promote.click(self._promoted, [self._runs], [self._done], **_SLOW)
        started = self._start.click(self._begin, [self._toml], [self._runs, self._message], **_SLOW)
        started.then(self._show, [self._runs], shown, **QUIET)
        self._runs.input(self._show, [self._runs], shown, **QUIET)
        self._timer.tick(self._show, [self._runs], shown, **QUIET)
        for button, act in ((self._stop, "stop"), (self._resume, "resume")):
            button.click(self._acting(act), [self._runs], [self._done], **QUIET).then(
                self._show, [self._runs], shown, **QUIET
            )

    async def _opened(self, shipped: str | None, request: gr.Request) -> tuple[Any, ...]:
        """List the recipes and runs, and enable the buttons where the key may train."""
        key = key_of(request)
        try:
            recipes = {one["name"]: one["toml"] for one in (await self._client.get("training/recipes", key))["data"]}
            runs = (await self._client.get("training/runs", key))["data"]
        except AdapterHubError as error:
            off = (gr.update(interactive=False),) * 3
            return gr.skip(), gr.skip(), gr.skip(), *off, trouble(str(error))
        on = (gr.update(interactive=True),) * 3
        return gr.update(choices=list(recipes), value=shipped), recipes, gr.update(choices=_choices(runs)), *on, ""

    def _chosen(self, name: str, recipes: dict[str, str]) -> tuple[Any, ...]:
        toml = recipes.get(name, "")
        return toml, *self._read(toml)

    def _read(self, toml: str) -> tuple[Any, ...]:
        """Return the form's fields, the command, and the error in the text."""
        try:
            fields = read_fields(toml)
        except AdapterHubError as error:
            return (*(gr.skip() for _ in FIELDS), gr.skip(), trouble(str(error)))
        return (*fields, _command(fields[0]), "")

    def _widget(self, key: str) -> Any:
        return next(widget for field, widget in zip(FIELDS, self._fields, strict=True) if field.key == key)

    def _setting(self, field: Field) -> Callable[..., Any]:
        def changed(toml: str, value: Any) -> tuple[Any, ...]:
            command = _command(value) if field.key == "name" else gr.skip()
            emptied = (None,) if field.instead_of else ()
            try:
                return (with_field(toml or "", field, value), command, *emptied)
            except AdapterHubError:  # the text is not TOML, which `_read` reports
                return (gr.skip(), gr.skip(), *(gr.skip() for _ in emptied))

        return changed

    async def _make_plan(self, toml: str, request: gr.Request) -> str:
        try:
            return plan_html(await self._client.post("training/plan", key_of(request), recipe=toml))
        except AdapterHubError as error:
            return note_html(str(error))

    async def _begin(self, toml: str, request: gr.Request) -> tuple[Any, str]:
        key = key_of(request)
        try:
            run = await self._client.post("training/runs", key, recipe=toml)
            runs = (await self._client.get("training/runs", key))["data"]
        except AdapterHubError as error:
            return gr.skip(), trouble(str(error))
        return gr.update(choices=_choices(runs), value=run["id"]), ""

    def _acting(self, act: str) -> Callable[..., Any]:
        async def acted(run: str, request: gr.Request) -> str:
            try:
                await self._client.post(f"training/runs/{run}/{act}", key_of(request))
            except AdapterHubError as error:
                return trouble(str(error))
            return ""

        return acted

    async def _show(self, name: str | None, request: gr.Request) -> tuple[Any, ...]:
        """Show the run, and poll it every second while it is running."""
        off = (gr.update(interactive=False),) * 4
        if not name:
            return "", *off, gr.Timer(active=False)
        try:
            run = await self._client.get(f"training/runs/{name}", key_of(request))
        except AdapterHubError as error:
            return note_html(str(error)), *off, gr.Timer(active=False)
        status = run["status"]
        state = "stopping" if run.get("is_stopping") else status
        may = (gr.update(interactive=state in states) for states in (("running",), ("stopped", "failed"), ("done",)))
        promote = gr.update(interactive=status == "done" and bool(run.get("improves")))
        return run_html(run), *may, promote, gr.Timer(active=status == "running")

    async def _promoted(self, run: str, request: gr.Request) -> str:
        try:
            promoted = await self._client.post(f"training/runs/{run}/promote", key_of(request))
        except AdapterHubError as error:
            return trouble(str(error))
        return f"✓ {escape(promoted['name'])} points to the candidate now."

    async def _tried(self, run: str, request: gr.Request) -> tuple[str, Any, Any]:
        """Publish the run's adapter, and open the Compare tab with it and the adapter it started from."""
        key = key_of(request)
        try:
            published = await self._client.post(f"training/runs/{run}/publish", key)
            models = await self._client.models(key)
            improves = (await self._client.get(f"training/runs/{run}", key)).get("improves")
        except AdapterHubError as error:
            return trouble(str(error)), gr.skip(), gr.skip()
        before = improves if improves in [model.name for model in models] else models[0].name
        picked = gr.update(choices=choices_of(models), value=[before, published["name"]])
        return "", gr.Tabs(selected="compare"), picked


def _draw_field(field: Field) -> Any:
    if field.is_number:
        return gr.Number(None, label=field.label, min_width=120, elem_id=f"field-{field.key}")
    return gr.Textbox(label=field.label, min_width=200, elem_id=f"field-{field.key}")


def _choices(runs: list[dict[str, Any]]) -> list[str]:
    return [run["id"] for run in runs]


def _command(name: str | None) -> str:
    called = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name or "recipe")
    return f"The same on the command line:\n```\nadapterhub train {called}.toml\n```"
