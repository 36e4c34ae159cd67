"""How the page looks, and what it may load: nothing from another host."""

from __future__ import annotations

from typing import Any

import gradio as gr

_SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]

LATEX = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
"""a single dollar is money more often than mathematics"""

CONTENT_POLICY = "; ".join(
    (
        "default-src 'self'",
        # Gradio starts from inline scripts and compiles the js= of its events.
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "media-src 'self' data: blob:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "frame-src 'none'",
        "frame-ancestors 'self'",
        "base-uri 'self'",
        "form-action 'self'",
    )
)
"""An answer may hold a picture whose address tells the conversation to another host: the browser must not fetch it."""


def theme() -> Any:
    """Fonts of the visitor's own machine, and colours with a contrast of 4.5 or more."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_lg,
        font=_SANS,
        font_mono=_MONO,
    ).set(
        color_accent="*primary_700",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_info_text_color="*neutral_600",
        input_placeholder_color="*neutral_600",
        input_placeholder_color_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_text_color="white",
        button_large_text_weight="500",
        link_text_color="*primary_800",
        link_text_color_dark="*primary_300",
    )


# Gradio's own class names carry a hash of each release: only ids, our classes and its stable names are used.
CSS = """
.gradio-container { padding: 0 !important; }
.gradio-container > .fillable { width: 100%; max-width: 1360px !important; padding: 12px 24px !important; }
.dark { --color-accent: var(--primary-400); }
body { --dim: var(--neutral-600); --marked: #fde68a; --held-out: #b45309; }
body.dark { --dim: var(--neutral-300); --marked: #713f12; --held-out: #fbbf24; }
.top { min-height: 42px; align-items: center; flex-wrap: nowrap !important; }
#title h1 { font-size: 1.35rem; margin: 0; letter-spacing: -0.01em; display: flex; align-items: center; gap: 10px; }
#title h1::before { content: ""; width: 26px; height: 26px; background: url("/favicon.ico") center / contain; }
#sign-out { text-align: right; font-size: 0.875rem; }
.small-buttons, .line, .votes { gap: 8px !important; flex-wrap: wrap !important; }
.line { align-items: flex-end; }
.line button { margin-bottom: 12px; white-space: nowrap; }
.small-buttons button { flex: 0 1 auto !important; font-weight: 500; }
.said { font-size: 0.875rem; }
/* Nothing to say takes no room, but stays where a screen reader listens. */
.block.said:not(:has(.md:not(:empty))) { height: 0; border: 0; padding: 0; margin-top: calc(-1 * var(--layout-gap)); }
.trouble { font-size: 0.875rem; }

.chat-main { height: calc(100dvh - 138px); min-height: 420px; flex-wrap: nowrap !important; }
#chat { flex: 1 1 0 !important; height: auto !important; min-height: 200px; }
#chat, #chat .bubble-wrap { border: none !important; background: transparent !important; }
#chat .message-wrap { max-width: 900px; margin: 0 auto; }
#chat .placeholder { text-align: center; }
#chat .message { font-size: 1rem; line-height: 1.6; color: var(--body-text-color); }
#chat .bot.message { background: transparent; border: none; box-shadow: none; padding-left: 0; padding-right: 0; }
#chat .user.message { background: var(--neutral-100); border-color: transparent; box-shadow: none; }
.dark #chat .user.message { background: var(--neutral-700); }
#chat .icon-button-wrapper { border: none; box-shadow: none; background: transparent; }
#chat .thought-group { border: none; background: transparent; padding: 0; margin: 0; }
#chat .thought-group .title { padding: 0; opacity: 1; }
#chat .prose, #chat .prose * { opacity: 1; }
#chat .extra-feedback-options { display: none !important; }
body:not(.dark) #chat .token.punctuation { color: #5b6675; }
body:not(.dark) #chat .token.string { color: #3f6212; }
#chat .thought-group .title .prose * { font-size: 0.8125rem; color: var(--body-text-color-subdued); opacity: 1; }
#chat .thought-group .content .prose * { font-size: 0.875rem; color: var(--body-text-color); opacity: 1; }

.composer { max-width: 860px; width: 100%; margin: 0 auto; align-items: flex-end; gap: 8px !important; }
.composer.wide { max-width: none; }
.composer, .composer > * { flex-wrap: nowrap !important; }
.composer button { height: 48px; }
.composer textarea { min-height: 46px !important; font-size: 1rem; padding: 11px 14px !important; }
.chat-main > .said, #correcting { max-width: 860px; width: 100%; margin: 0 auto; }

#card { font-size: 0.875rem; }
#card table { width: 100%; border: none; border-collapse: collapse; margin: 0; }
#card thead { display: none; }
#card tr { background: transparent; border: none; }
#card td { border: none; padding: 2px 0; vertical-align: top; overflow-wrap: anywhere; word-break: normal; }
#card td:first-child { width: 5.5rem; color: var(--body-text-color-subdued); }
#hint { color: var(--body-text-color-subdued); font-size: 0.8125rem; }

.asking { align-items: flex-start; flex-wrap: wrap !important; }
.asking-settings { min-width: min(240px, 100%) !important; }
.panels > .column { border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg); padding: 16px; }
.panel-head h2, #plan h2 { margin: 0; font-size: 1rem; }
#plan :is(h2, .scroll, ul) { margin-top: 20px; }
.panel-head p { margin: 2px 0 0; font-size: 0.8125rem; color: var(--body-text-color-subdued); }
.panel-text { min-height: 3rem; line-height: 1.6; }
.panel-more:empty { display: none; }
.counted { font-size: 0.8125rem; color: var(--body-text-color-subdued); margin: 0 0 4px; }
.tokens { font: 0.8125rem/1.7 var(--font-mono); white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.tokens mark { background: var(--marked); color: inherit; border-radius: 3px; text-decoration: underline dotted; }
.sample { margin: 8px 0; padding: 10px 12px; border-radius: 8px; background: var(--background-fill-secondary); }
.masked { color: var(--dim); }
.votes button { flex: 1 1 0; }

table.plain { border-collapse: collapse; width: 100%; font-size: 0.875rem; }
.html-container { padding: 0 !important; }
table.plain caption { text-align: left; color: var(--body-text-color-subdued); padding-bottom: 6px; }
.prose table.plain { margin: 0; }
.gradio-container .prose table.plain, .gradio-container .prose table.plain :is(tr, td, th) { border: none; }
.gradio-container .prose table.plain :is(th, td) { text-align: left; padding: 7px 16px 7px 0; vertical-align: top; }
.gradio-container .prose table.plain :is(th, td) { border-bottom: 1px solid var(--border-color-primary); }
table.plain thead th { color: var(--body-text-color-subdued); font-weight: 500; white-space: nowrap; }
table.plain tbody th { font-weight: 600; }
table.facts tbody th { font-weight: 400; color: var(--body-text-color-subdued); width: 9rem; }
table.facts td { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
.plot { width: 100%; min-width: 520px; max-width: 760px; height: auto; display: block; }
.plot text { font: 13px var(--font); fill: var(--body-text-color); }
.plot .grid { stroke: var(--border-color-primary); stroke-width: 1; }
.plot .interval { stroke: var(--primary-600); stroke-width: 3; stroke-linecap: round; }
.plot circle { fill: var(--primary-700); }
.plot polyline { fill: none; stroke: var(--primary-600); stroke-width: 2.5; stroke-linejoin: round; }
.plot polyline.held-out { stroke: var(--held-out); stroke-dasharray: 7 5; }
.dark .plot :is(circle) { fill: var(--primary-300); }
.dark .plot :is(.interval, .trained) { stroke: var(--primary-400); }
.run { font-size: 0.9375rem; }
.status { padding: 2px 10px; border-radius: 99px; background: var(--background-fill-secondary); font-weight: 600; }
.code textarea { font: 0.8125rem/1.6 var(--font-mono) !important; }
.fields { gap: 8px !important; }

@media (max-width: 700px) {
    html body .gradio-container > .fillable { padding: 8px 12px !important; }
    .tab-container button { padding: 0 7px !important; font-size: 0.875rem !important; }
    .chat-columns { flex-direction: column; gap: 8px !important; }
    .chat-side { display: contents !important; }
    .chat-main { order: 1; }
    .chat-side > :not(:first-child) { order: 2; }
    .chat-main { height: calc(100dvh - 220px); min-height: 400px; min-width: 0 !important; }
    .votes button { flex-basis: 45%; }
}
"""

ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">
<rect width="16" height="16" rx="4" fill="#0f766e"/>
<path d="M4 11.5h8M8 11V6" stroke="white" stroke-width="2"/><circle cx="8" cy="4.5" r="1.8" fill="white"/>
</svg>"""
