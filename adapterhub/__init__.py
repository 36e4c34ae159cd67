"""Train, package, publish and serve LoRA adapters on one NF4 base: the Python API (docs/python.md).

Importing this loads nothing else: each name below is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from adapterhub.version import __version__

if TYPE_CHECKING:
    from adapterhub.adapter import Adapter, AdapterRef
    from adapterhub.bases.loading import load_base
    from adapterhub.errors import AdapterHubError
    from adapterhub.hub.client import Hub
    from adapterhub.package.layout import open_adapter
    from adapterhub.packer import pack
    from adapterhub.registry.registry import Registry
    from serve.llm import LLM
    from train.run import train

__all__ = [
    "LLM",
    "Adapter",
    "AdapterHubError",
    "AdapterRef",
    "Hub",
    "Registry",
    "__version__",
    "load_base",
    "open_adapter",
    "pack",
    "train",
]

_MODULES = {
    "LLM": "serve.llm",
    "Adapter": "adapterhub.adapter",
    "AdapterHubError": "adapterhub.errors",
    "AdapterRef": "adapterhub.adapter",
    "Hub": "adapterhub.hub.client",
    "Registry": "adapterhub.registry.registry",
    "load_base": "adapterhub.bases.loading",
    "open_adapter": "adapterhub.package.layout",
    "pack": "adapterhub.packer",
    "train": "train.run",
}
"""Where each name is defined (PEP 562)."""


def __getattr__(name: str) -> Any:
    """Import the module that defines `name`, once. Raises AttributeError for a name that is not public."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, for completion in a shell or a notebook."""
    return sorted(__all__)
