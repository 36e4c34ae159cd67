"""HTML from the page's templates (serve/ui/templates): every value is escaped, unless it is Markup."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

_TEMPLATES = Environment(
    loader=PackageLoader("serve.ui"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def render(name: str, **values: object) -> Markup:
    """Return the HTML of the template `name`, filled with `values`."""
    return Markup(_TEMPLATES.get_template(f"{name}.html").render(values))  # noqa: S704 -- autoescape is on
