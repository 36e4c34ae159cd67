"""The Chat tab: its widgets, and the handlers and scripts that they are connected to."""

from __future__ import annotations

from typing import Any

import gradio as gr

from serve.ui.client import PageClient
from serve.ui.feedback import CORRECT
from serve.ui.model_picker import QUIET, Models, model_picker
from serve.ui.script import (
    DELETE,
    KEEP,
    KEEP_IN_ADDRESS,
    LIST,
    NEW,
    OPEN,
    OPEN_IF_WIDE,
    SAVE_AS_JSON,
    SAVE_AS_MARKDOWN,
)
from serve.ui.style import LATEX
from serve.ui.tabs.chat_handlers import ChatHandlers, Widgets

CONCURRENT_ANSWERS = 64
"""Answers that stream at once. Gradio's default is 1; the engine batches and queues them."""
_HINT = "**Enter** sends, **Shift+Enter** starts a line, **Esc** stops, **Ctrl+K** opens the model picker."
_PLACEHOLDER = "### Ask something\nSwitch the adapter at any time: the picked one gives the next answer."


def chat_tab(blocks: Any, client: PageClient) -> None:
    """Draw the tab inside the current `gr.Tab` and connect it."""
    with gr.Row(elem_classes="chat-columns"):
        with gr.Column(scale=1, min_width=280, elem_classes="chat-side"):
            side = _draw_models() | _draw_conversations() | _draw_settings()
        with gr.Column(scale=4, min_width=300, elem_classes="chat-main"):
            chat = _draw_chat() | _draw_composer()
    widgets = Widgets(**side, **chat, corrected_at=gr.State(None))
    _connect_models(blocks, widgets, Models(client))
    _connect_conversations(blocks, widgets)
    _connect_chat(widgets, ChatHandlers(client, widgets))


def _draw_models() -> dict[str, Any]:
    picker = model_picker(elem_id="picker", filterable=True)
    with gr.Accordion("About", open=False, elem_id="about") as about:
        card = gr.Markdown(elem_id="card")
    with gr.Accordion("Mix two adapters", open=False, elem_id="mix"):
        partner = model_picker(elem_id="partner", label="Together with")
        scale = gr.Slider(-1.0, 2.0, value=0.5, step=0.05, label="Scale of the first", elem_id="scale")
        partner_scale = gr.Slider(-1.0, 2.0, value=0.5, step=0.05, label="Scale of the second")
    return {
        "picker": picker,
        "about": about,
        "card": card,
        "partner": partner,
        "scale": scale,
        "partner_scale": partner_scale,
    }


def _draw_conversations() -> dict[str, Any]:
    with gr.Accordion("Conversations", open=False, elem_id="conversations"):
        kept = gr.Dropdown([], value=None, label="Kept in this browser", elem_id="kept", interactive=True)
        with gr.Row(elem_classes="small-buttons"):
            fresh = gr.Button("New", size="sm", min_width=90, elem_id="new-chat")
            forget = gr.Button("Delete", size="sm", min_width=90)
        with gr.Row(elem_classes="small-buttons"):
            as_json = gr.Button("Save as JSON", size="sm", min_width=90)
            as_markdown = gr.Button("Save as Markdown", size="sm", min_width=90)
    # Gradio would check the choice against those it was built with; these come from the browser.
    kept.preprocess = lambda payload: payload
    return {"kept": kept, "fresh": fresh, "forget": forget, "as_json": as_json, "as_markdown": as_markdown}


def _draw_settings() -> dict[str, Any]:
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        drawn = {
            "system": gr.Textbox(label="System prompt", lines=2, max_lines=8, elem_id="system"),
            "temperature": gr.Slider(0.0, 2.0, value=0.7, step=0.05, label="Temperature", elem_id="temperature"),
            "top_p": gr.Slider(0.05, 1.0, value=0.9, step=0.05, label="Top-p", elem_id="top-p"),
            "max_tokens": gr.Slider(1, 2048, value=256, step=1, label="Max tokens", elem_id="max-tokens"),
            "seed": gr.Number(None, label="Seed (empty: a new one for each answer)", precision=0, elem_id="seed"),
        }
        gr.Markdown(_HINT, elem_id="hint")
    return drawn


def _draw_chat() -> dict[str, Any]:
    chat = gr.Chatbot(
        elem_id="chat",
        label="Conversation",
        show_label=False,
        height="100%",
        editable="user",
        buttons=["copy", "copy_all"],  # without this there is a share button that uploads
        feedback_options=["Like", "Dislike", CORRECT],
        latex_delimiters=LATEX,
        layout="bubble",
        placeholder=_PLACEHOLDER,
    )
    with gr.Group(visible=False, elem_id="correcting") as correcting:
        wording = gr.Textbox(label="What it should have said", lines=3, max_lines=12, elem_id="wording")
        with gr.Row(elem_classes="small-buttons"):
            save_wording = gr.Button("Save correction", variant="primary", size="sm", min_width=90)
            drop_wording = gr.Button("Cancel", size="sm", min_width=90)
    return {
        "chat": chat,
        "correcting": correcting,
        "wording": wording,
        "save_wording": save_wording,
        "drop_wording": drop_wording,
        "said": gr.Markdown(elem_id="said", elem_classes="said"),
    }


def _draw_composer() -> dict[str, Any]:
    with gr.Row(elem_classes="composer"):
        box = gr.Textbox(
            elem_id="box",
            label="Message",
            show_label=False,
            container=False,
            placeholder="Write a message",
            lines=1,
            max_lines=8,
            scale=1,
        )
        send = gr.Button("Send", variant="primary", elem_id="send", scale=0, min_width=88)
        stop = gr.Button(
            "Stop", variant="stop", elem_id="stop", elem_classes="stop", scale=0, min_width=88, visible=False
        )
    return {"box": box, "send": send, "stop": stop}


def _connect_models(blocks: Any, on: Widgets, models: Models) -> None:
    blocks.load(models.opened, [on.picker], [on.picker, on.card], **QUIET)
    blocks.load(None, None, [on.about], js=OPEN_IF_WIDE, api_visibility="private")
    on.picker.focus(models.refreshed, None, [on.picker], **QUIET)
    on.picker.input(models.card, [on.picker], [on.card], **QUIET)
    on.picker.input(None, [on.picker], None, js=KEEP_IN_ADDRESS, api_visibility="private")
    on.partner.focus(models.adapters, None, [on.partner], **QUIET)


def _connect_conversations(blocks: Any, on: Widgets) -> None:
    here = {"api_visibility": "private"}
    gr.on([blocks.load, on.kept.focus], None, None, [on.kept], js=LIST, **here)
    on.as_json.click(None, [on.chat, on.system], None, js=SAVE_AS_JSON, **here)
    on.as_markdown.click(None, [on.chat, on.system], None, js=SAVE_AS_MARKDOWN, **here)


def _connect_chat(on: Widgets, handlers: ChatHandlers) -> None:
    here = {"api_visibility": "private"}
    quiet = here | {"outputs": on.drawn, "show_progress": "hidden"}
    # Gradio loses an event that joins its queue at the moment the previous one leaves it. So only answers are queued,
    # and asking again is always possible.
    at_once = quiet | {"queue": False}
    asking = quiet | {"concurrency_limit": CONCURRENT_ANSWERS, "trigger_mode": "multiple"}
    kept = here | {"fn": None, "inputs": [on.kept, on.chat], "outputs": [on.kept], "js": KEEP}
    gr.on([on.box.submit, on.send.click], handlers.send, on.asked, **asking).then(**kept)
    on.chat.retry(handlers.retry, on.asked, **asking).then(**kept)
    on.chat.edit(handlers.edit, on.asked, **asking).then(**kept)
    on.chat.undo(handlers.undo, {on.chat}, **at_once).then(**kept)
    on.chat.clear(handlers.clear, set(), **at_once).then(None, None, [on.kept], js="() => null", **here)
    on.stop.click(handlers.stop, {on.chat}, **at_once)
    turned = at_once | {"inputs": [on.kept, on.chat]}
    on.kept.input(handlers.leave, js=OPEN, **turned)
    on.fresh.click(handlers.leave, js=NEW, **turned).then(None, None, [on.kept], js="() => null", **here)
    on.forget.click(None, [on.kept], [on.kept], js=DELETE, **here).then(handlers.leave, js=NEW, **turned)
    liking = at_once | {"outputs": [on.said, on.wording, on.corrected_at]}
    # The box opens after its text is there: a text that arrives later would replace what was typed meanwhile.
    on.chat.like(handlers.liked, {on.chat, on.system, on.corrected_at}, **liking).then(
        handlers.show_correction, {on.corrected_at}, **(at_once | {"outputs": [on.correcting]})
    )
    wording = {on.chat, on.system, on.wording, on.corrected_at}
    saving = at_once | {"outputs": [on.said, on.correcting, on.wording, on.chat]}
    on.save_wording.click(handlers.save_wording, wording, **saving).then(**kept)
    on.drop_wording.click(handlers.drop_wording, set(), **(at_once | {"outputs": [on.correcting, on.wording]}))
