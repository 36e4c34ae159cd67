"""Pages to look at: which adapters there are, and one of them with card, files, base and history. Changes nothing.

Everything shown was written by strangers: text is escaped, HTML in cards is shown and not obeyed, and the browser is
told to load and run nothing.
"""

from __future__ import annotations

import re
import time
from itertools import islice
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from jinja2 import Environment
from markdown_it import MarkdownIt
from markupsafe import Markup

from adapterhub import __version__
from adapterhub.hubserver.routes.dependencies import FILES, READ, Caller, Hub, HubHere, Visible, can_see
from adapterhub.hubserver.storage.cards import CARD_NAME
from adapterhub.hubserver.storage.catalog import Query as ModelQuery
from adapterhub.hubserver.storage.commits import Commit
from adapterhub.hubserver.storage.store import DEFAULT_BRANCH, Repo

router = APIRouter()
_PAGE = 100
_CHANGES = ["POST", "PUT", "PATCH", "DELETE"]
_COMMITS = 20
_HEAD = re.compile(r"\A\ufeff?---[ \t]*\r?\n.*?^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_LAYOUT = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2024; }
a { color: #0b5cad; } h1 { overflow-wrap: anywhere; } small, .quiet { color: #5b6570; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .3rem .6rem .3rem 0; }
tr + tr td { border-top: 1px solid #e3e6e9; } .number { text-align: right; }
code, pre { font: 14px ui-monospace, monospace; }
pre { background: #f5f6f7; padding: .8rem; overflow: auto; }
.card { border-left: 3px solid #e3e6e9; padding-left: 1rem; }
.tag { background: #eef1f4; border-radius: 3px; padding: 0 .4rem; margin-right: .3rem; display: inline-block; }
@media (prefers-color-scheme: dark) { body { background: #16191d; color: #e6e8ea; } a { color: #7db7f5; }
pre, .tag { background: #22272d; } tr + tr td, .card { border-color: #343b43; } }
</style></head><body>
"""
_ENVIRONMENT = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
_LIST = _ENVIRONMENT.from_string(
    _LAYOUT
    + """<h1>Adapters</h1>
<form><input name="search" value="{{ search }}" aria-label="part of a name" placeholder="part of a name">
<input name="base" value="{{ base }}" aria-label="base model" placeholder="base model"> <button>Find</button></form>
<table>
{% for model in models %}
<tr><td><a href="/{{ model.id }}">{{ model.id }}</a>
<td>{{ model.base }}<td class="number"><small>{{ model.changed }}</small></tr>
{% else %}
<tr><td class="quiet">none that everybody may see</tr>
{% endfor %}
</table>
{% if next %}<p><a href="{{ next }}">more</a>{% endif %}
</body></html>"""
)
_ONE = _ENVIRONMENT.from_string(
    _LAYOUT
    + """<p><a href="/">all adapters</a>
<h1>{{ title }}</h1>
<p>{% for tag in tags %}<span class="tag">{{ tag }}</span>{% endfor %}
<p>{% if bases %}Base: {{ bases | join(", ") }}{{ " (" ~ relation ~ ")" if relation }}. {% endif %}
{% if gated %}Files are for those who were granted access. {% endif %}
At <code>{{ sha[:12] }}</code>; revisions:
{% for name in revisions %}<a href="?revision={{ name | urlencode }}">{{ name }}</a> {% endfor %}
<pre>adapterhub pull {{ title }}@{{ sha[:12] }} --hub {{ hub }}
hf download {{ title }}{{ " --repo-type dataset" if is_dataset }} --revision {{ sha }}</pre>
{% if card %}<h2>Card</h2><div class="card">{{ card }}</div>{% endif %}
<h2>Files</h2><table>
{% for file in files %}
<tr><td><a href="{{ file.href }}">{{ file.path }}</a><td class="number">{{ file.size }}</tr>
{% endfor %}
</table>
<h2>History</h2><table>
{% for commit in commits %}
<tr><td><a href="?revision={{ commit.sha }}"><code>{{ commit.sha[:12] }}</code></a><td>{{ commit.title }}
<td>{{ commit.author }}
<td class="number"><small>{{ commit.changed }}</small></tr>
{% endfor %}
</table>
</body></html>"""
)


@router.api_route("/", methods=READ)
def list_page(
    request: Request,
    hub: HubHere,
    caller: Caller,
    search: str = "",
    base: str = "",
    skip: Annotated[int, Query(ge=0)] = 0,
) -> Response:
    """The list for browsers; programs are told who answers."""
    if "text/html" not in request.headers.get("accept", ""):
        identity = {
            "server": "adapterhub",
            "version": __version__,
            "speaks": "Hugging Face Hub API, models and data sets",
        }
        return JSONResponse(identity)
    tags = (f"base_model:{base}",) if base else ()
    query = ModelQuery(tags, search=search or None, limit=_PAGE, skip=skip)
    page = hub.catalog.page(query, can_see=lambda repo: can_see(caller, repo))
    models = [
        {
            "id": repo.id,
            "base": ", ".join(hub.catalog.facts_at(commit).base_models),
            "changed": _day(commit.time_s),
        }
        for repo, commit in page.models
    ]
    more = request.url.include_query_params(skip=page.next_skip).query if page.next_skip is not None else None
    return _page(_LIST.render(title="Adapters", models=models, search=search, base=base, next=more and f"?{more}"))


@router.api_route("/api/{rest:path}", methods=[*READ, *_CHANGES])
@router.api_route(FILES, methods=_CHANGES)
def unknown() -> None:
    """No repository's page. Clients that try a newer protocol go on only after a 404, not after a 405."""
    raise HTTPException(404)


@router.api_route(FILES, methods=READ)
def one_page(request: Request, repo: Visible, hub: HubHere, revision: str = DEFAULT_BRANCH) -> HTMLResponse:
    """Card, files, base and history of a repository at a revision."""
    commit = hub.store.commit_at(repo, revision)
    facts = hub.catalog.facts_at(commit)
    return _page(
        _ONE.render(
            title=repo.repo_id.full_name,
            is_dataset=repo.repo_id.kind == "dataset",
            hub=(hub.public_url or str(request.base_url)).rstrip("/"),
            tags=facts.tags,
            bases=facts.base_models,
            relation=facts.relation,
            gated=repo.gated,
            sha=commit.sha,
            revisions=[*repo.branches, *repo.tags],
            card=_card(hub, commit),
            files=_files(repo, commit),
            commits=[
                {"sha": one.sha, "title": one.title, "author": one.author, "changed": _day(one.time_s)}
                for one in islice(hub.store.history(repo, revision), _COMMITS)
            ],
        )
    )


def _page(html: str) -> HTMLResponse:
    return HTMLResponse(html, headers=_HEADERS)


def _card(hub: Hub, commit: Commit) -> Markup | None:
    entry = commit.files.get(CARD_NAME)
    if entry is None:
        return None
    text = hub.catalog.describing_bytes(entry).decode("utf-8", "replace")
    # Safe to pass on: HTML in the text is escaped, and links to scripts are left as text.
    return Markup(_MARKDOWN.render(_HEAD.sub("", text, count=1)))  # noqa: S704


def _files(repo: Repo, commit: Commit) -> list[dict[str, str]]:
    return [
        {"path": path, "size": f"{entry.size:,}", "href": f"/{repo.id}/resolve/{commit.sha}/{quote(path)}"}
        for path, entry in commit.files.items()
    ]


def _day(time_s: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(time_s))
