"""Read-only HTML pages: the list of adapters, and one repository with its card, files, base and history.

All content is untrusted: the templates escape every value, HTML in a model card is shown as text, and the
Content-Security-Policy forbids scripts, images and any other resource.
"""

from __future__ import annotations

import re
import time
from itertools import islice
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from jinja2 import Environment, PackageLoader
from markdown_it import MarkdownIt
from markupsafe import Markup

from adapterhub.hubserver.routes.dependencies import FILES, READ, Caller, HubDep, HubServices, VisibleRepo, can_see
from adapterhub.hubserver.storage.cards import CARD_NAME
from adapterhub.hubserver.storage.catalog import RepoQuery
from adapterhub.hubserver.storage.commit import RepoCommit
from adapterhub.hubserver.storage.store import DEFAULT_BRANCH, Repo
from adapterhub.units import format_bytes
from adapterhub.version import __version__

router = APIRouter()
_PAGE_SIZE = 100
_CHANGES = ["POST", "PUT", "PATCH", "DELETE"]
_NUM_COMMITS = 20
_YAML_HEAD = re.compile(r"\A\ufeff?---[ \t]*\r?\n.*?^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_TEMPLATES = Environment(
    loader=PackageLoader("adapterhub.hubserver"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


@router.api_route("/", methods=READ)
def list_page(
    request: Request,
    hub: HubDep,
    caller: Caller,
    search: str = "",
    base: str = "",
    skip: Annotated[int, Query(ge=0)] = 0,
) -> Response:
    """Return the list of adapters to a browser, and the server's name and version as JSON to any other client."""
    if "text/html" not in request.headers.get("accept", ""):
        identity = {
            "server": "adapterhub",
            "version": __version__,
            "speaks": "Hugging Face Hub API, models and data sets",
        }
        return JSONResponse(identity)
    tags = (f"base_model:{base}",) if base else ()
    query = RepoQuery(tags, search=search or None, limit=_PAGE_SIZE, skip=skip)
    page = hub.catalog.page(query, can_see=lambda repo: can_see(caller, repo))
    models = [
        {
            "id": repo.id,
            "base": ", ".join(hub.catalog.facts_at(commit).base_models),
            "changed": _minute(commit.time_s),
        }
        for repo, commit in page.models
    ]
    more = request.url.include_query_params(skip=page.next_skip).query if page.next_skip is not None else None
    return _page("adapters.html", title="Adapters", models=models, search=search, base=base, next=more and f"?{more}")


@router.api_route("/api/{rest:path}", methods=[*READ, *_CHANGES])
@router.api_route(FILES, methods=_CHANGES)
def unknown() -> None:
    """Answer 404, not 405, to unknown routes: clients that try a newer protocol fall back only after a 404."""
    raise HTTPException(404)


@router.api_route(FILES, methods=READ)
def repository_page(request: Request, repo: VisibleRepo, hub: HubDep, revision: str = DEFAULT_BRANCH) -> HTMLResponse:
    """Return the page of a repository at a revision: its card, files, base and history."""
    commit = hub.store.commit_at(repo, revision)
    facts = hub.catalog.facts_at(commit)
    return _page(
        "repository.html",
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
            {"sha": one.sha, "title": one.title, "author": one.author, "changed": _minute(one.time_s)}
            for one in islice(hub.store.history(repo, revision), _NUM_COMMITS)
        ],
    )


def _page(template: str, **values: object) -> HTMLResponse:
    return HTMLResponse(_TEMPLATES.get_template(template).render(values), headers=_HEADERS)


def _card(hub: HubServices, commit: RepoCommit) -> Markup | None:
    entry = commit.files.get(CARD_NAME)
    if entry is None:
        return None
    text = hub.catalog.metadata_bytes(entry).decode("utf-8", "replace")
    # Safe as markup: markdown-it escapes HTML in the text, and leaves links to scripts as text.
    return Markup(_MARKDOWN.render(_YAML_HEAD.sub("", text, count=1)))  # noqa: S704


def _files(repo: Repo, commit: RepoCommit) -> list[dict[str, str]]:
    return [
        {"path": path, "size": format_bytes(entry.size), "href": f"/{repo.id}/resolve/{commit.sha}/{quote(path)}"}
        for path, entry in commit.files.items()
    ]


def _minute(time_s: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(time_s))
