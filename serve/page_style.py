"""How the page looks, its keys, and what it may load: nothing from another host."""

from __future__ import annotations

from typing import Any

import gradio as gr

_SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]

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
        body_text_color_subdued_dark="*neutral_400",
        block_label_text_color="*neutral_700",
        block_info_text_color="*neutral_600",
        input_placeholder_color="*neutral_600",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
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
.top { min-height: 42px; align-items: center; }
#title h1 { font-size: 1.35rem; margin: 0; letter-spacing: -0.01em; }
#api-key { max-width: 320px; }

#chat { height: calc(100dvh - 210px) !important; min-height: 300px; }
#chat, #chat .bubble-wrap { border: none !important; background: transparent !important; }
#chat .message-wrap { max-width: 860px; margin: 0 auto; }
#chat .placeholder { text-align: center; }
#chat .message { font-size: 1rem; line-height: 1.6; color: var(--body-text-color); }
#chat .bot.message { background: transparent; border: none; box-shadow: none; padding-left: 0; padding-right: 0; }
#chat .user.message { background: var(--neutral-100); border-color: transparent; box-shadow: none; }
.dark #chat .user.message { background: var(--neutral-700); }
#chat .message-buttons .icon-button-wrapper { border: none; box-shadow: none; background: transparent; }
#chat .thought-group { border: none; background: transparent; padding: 0; margin: 0; }
#chat .thought-group .title { padding: 0; opacity: 1; }
#chat .prose, #chat .prose * { opacity: 1; }
body:not(.dark) #chat .token.punctuation { color: #5b6675; }
body:not(.dark) #chat .token.string { color: #3f6212; }
#chat .thought-group .title .prose * { font-size: 0.8125rem; color: var(--body-text-color-subdued); opacity: 1; }
#chat .thought-group .content .prose * { font-size: 0.875rem; color: var(--body-text-color); opacity: 1; }

.composer { max-width: 860px; width: 100%; margin: 0 auto; align-items: flex-end; gap: 8px !important; }
.composer button { height: 46px; }
.composer textarea { min-height: 46px !important; font-size: 1rem; padding: 11px 14px !important; }

#card { font-size: 0.875rem; }
#card table { width: 100%; border: none; border-collapse: collapse; margin: 0; }
#card thead { display: none; }
#card tr { background: transparent; border: none; }
#card td { border: none; padding: 2px 0; vertical-align: top; overflow-wrap: anywhere; word-break: normal; }
#card td:first-child { width: 5.5rem; color: var(--body-text-color-subdued); }
#hint { color: var(--body-text-color-subdued); font-size: 0.8125rem; }

@media (max-width: 700px) {
    .gradio-container > .fillable { padding: 8px 12px !important; }
    .chat-side { gap: 8px !important; }
    #chat { height: calc(100dvh - 396px) !important; min-height: 240px; }
}
"""

ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">
<rect width="16" height="16" rx="4" fill="#0f766e"/>
<path d="M4 11.5h8M8 11V6" stroke="white" stroke-width="2"/><circle cx="8" cy="4.5" r="1.8" fill="white"/>
</svg>"""

HEAD = """
<script>
addEventListener("keydown", (event) => {
    const stop = document.querySelector("button#stop");
    if (event.key === "Escape" && stop) {
        stop.click();
    } else if (event.key.toLowerCase() === "k" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        document.querySelector("#picker input")?.focus();
    } else if (event.key === "Enter" && !event.shiftKey && stop && event.target.closest?.("#box")) {
        // One answer at a time: the text waits in the box.
        event.preventDefault();
        event.stopImmediatePropagation();
    }
}, true);
</script>
"""
