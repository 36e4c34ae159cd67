"""The page's JavaScript (static/page.js), and the calls to it that Gradio's events make in the browser."""

from __future__ import annotations

from importlib.resources import files

_SCRIPT = files("serve.ui").joinpath("static", "page.js").read_text(encoding="utf-8")

# In braces, so that its names stay its own: what others may call is in `window.adapterhub`.
HEAD = f"<script>\n{{\n{_SCRIPT}}}\n</script>"
"""HTML for the page's head."""


def _call(function: str) -> str:
    """Return the `js=` of an event that calls `adapterhub.FUNCTION` with the values of its inputs."""
    return f"(...inputs) => adapterhub.{function}(...inputs)"


KEEP = _call("keepConversation")
"""Inputs: the current conversation's id, its messages. Output: the list of conversations."""
LIST = _call("listConversations")
OPEN = _call("openConversation")
"""Input: a conversation's id. Outputs: the id and the messages of the conversation to show."""
NEW = _call("newConversation")
"""Outputs: as OPEN, of an empty conversation."""
DELETE = _call("deleteConversation")
"""Input: a conversation's id. Output: the list of conversations."""
SAVE_AS_JSON = _call("saveAsJson")
"""Inputs: the messages, the system prompt."""
SAVE_AS_MARKDOWN = _call("saveAsMarkdown")
"""Inputs: the messages, the system prompt."""
OPEN_IF_WIDE = _call("openIfWide")
KEEP_IN_ADDRESS = _call("keepInAddress")
"""Input: the adapter's name, kept as `?adapter=NAME`."""


def save_file(name: str, media_type: str) -> str:
    """Return the `js=` of an event that saves the text of its input as a file."""
    return f"(text) => adapterhub.saveFile({name!r}, {media_type!r}, text)"
