"""Style and content security policy of the page: it loads nothing from another host."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import gradio as gr

_STATIC = files("serve.ui").joinpath("static")
CSS = _STATIC.joinpath("page.css").read_text(encoding="utf-8")
ICON = _STATIC.joinpath("icon.svg").read_text(encoding="utf-8")

_SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]

LATEX = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
"""Delimiters of formulas. A single dollar is none: it is money more often than mathematics."""

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
"""Content-Security-Policy of every reply of the page.

An answer may hold a picture whose address carries the conversation to another host: the browser must not fetch it.
"""


def theme() -> Any:
    """Return Gradio's theme with the visitor's own fonts and colors with a contrast ratio of at least 4.5."""
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
