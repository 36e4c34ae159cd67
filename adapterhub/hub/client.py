"""Push and pull through the Hub's own client, against the public Hub or any endpoint.

The only module that imports huggingface_hub. Its exceptions become HubError kinds here.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from adapterhub.adapter import Adapter
from adapterhub.errors import (
    AdapterHubError,
    AdapterNotFound,
    Conflict,
    HubError,
    HubUnavailable,
    NotAuthorized,
    UsageError,
)
from adapterhub.files import expanded, new_folder
from adapterhub.package.layout import check_names, files_of, open_adapter
from adapterhub.package.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi, ModelInfo

PUBLIC_ENDPOINT = "https://huggingface.co"
T = TypeVar("T")
_PAUSES_S = (1.0, 2.0, 4.0)
_NUM_DOWNLOADS = 4
_HUBS_OWN = ".gitattributes"
"""The file that the public Hub adds to each repository."""


@dataclass(frozen=True)
class Listed:
    """An adapter in a Hub's list."""

    name: str
    revision: str
    base: str | None


@dataclass(frozen=True)
class HubAccount:
    """The user of a token, and whether it may push."""

    name: str
    can_write: bool


@dataclass(frozen=True)
class RepoAccess:
    """Who can see a repository, and who can read its files."""

    private: bool
    gated: Literal["auto", "manual"] | None
    """Access to the files on request: granted at once, or by the owner. None: no request is needed."""


@dataclass(frozen=True)
class Commit:
    """A commit on a Hub."""

    id: str
    title: str
    message: str
    """Text after the title."""


@dataclass(frozen=True)
class Hub:
    """A Hub's endpoint and the token used there (None: anonymous). `Hub()` reads both from the environment."""

    endpoint: str = ""
    token: str | None = None

    def __post_init__(self) -> None:
        if not self.endpoint:
            found = Hub.from_environment()
            object.__setattr__(self, "endpoint", found.endpoint)
            object.__setattr__(self, "token", self.token or found.token)

    @classmethod
    def from_environment(cls, endpoint: str | None = None) -> Hub:
        """Read `HF_ENDPOINT` and the Hugging Face token: `HF_TOKEN`, `HF_TOKEN_PATH`, `hf auth login`.

        HF_TOKEN is for HF_ENDPOINT, or for the public Hub if that is not set; the stored login is for the public Hub.
        Another `endpoint` gets neither, so that no token reaches an address that only a lock file or an option named.
        """
        own = (os.environ.get("HF_ENDPOINT") or PUBLIC_ENDPOINT).rstrip("/")
        chosen = endpoint.rstrip("/") if endpoint else own
        token = (os.environ.get("HF_TOKEN") or None) if chosen == own else None
        if token is None and chosen == PUBLIC_ENDPOINT and own == PUBLIC_ENDPOINT:
            from huggingface_hub import get_token

            token = get_token()
        return cls(chosen, token)

    @cached_property
    def _api(self) -> HfApi:
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        from huggingface_hub import HfApi
        from huggingface_hub.utils.logging import set_verbosity_error
        from huggingface_hub.utils.tqdm import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
        set_verbosity_error()  # type: ignore[no-untyped-call]  # it warns that open files are not sent by Xet, which is what we want
        return HfApi(endpoint=self.endpoint, token=self.token or False, library_name="adapterhub")

    def account(self) -> HubAccount | None:
        """Return the token's user, None without a token. Raises NotAuthorized for an unknown token, HubError kinds."""
        if self.token is None:
            return None
        with self._mapped("look up the user of the token"):
            found = self._api.whoami()
        role = (found.get("auth", {}).get("accessToken") or {}).get("role")
        return HubAccount(str(found["name"]), can_write=role != "read")

    def commit_of(self, repo: str, revision: str | None = None) -> str:
        """Return the commit that a branch, tag or commit names now (default: main). Raises HubError kinds."""
        return str(self._model_info(repo, revision).sha)

    def download(self, repo: str, commit: str, folder: Path, *, patterns: Sequence[str]) -> None:
        """Fetch the top-level files that match into `folder`; the client checks sizes and resumes in-call."""
        names = [name for name in self.files(repo, commit) if any(fnmatch(name, pattern) for pattern in patterns)]
        self._fetch(repo, commit, [name for name in names if "/" not in name], folder)

    def _model_info(self, repo: str, revision: str | None) -> ModelInfo:
        """Check access before a download: everyone sees a gated repository, but not its files."""
        with self._mapped(f"find {repo}{f'@{revision}' if revision else ''}", repo):
            info = _retried(lambda: self._api.model_info(repo, revision=revision, timeout=10))
            if info.gated:
                _retried(lambda: self._api.auth_check(repo))
            return info

    def _fetch(self, repo: str, commit: str, names: Sequence[str], folder: Path) -> None:
        def fetch(name: str) -> None:
            _retried(lambda: self._api.hf_hub_download(repo, name, revision=commit, local_dir=folder))

        with self._mapped(f"download {repo}", repo), ThreadPoolExecutor(_NUM_DOWNLOADS) as pool:
            list(pool.map(fetch, names))
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's book-keeping, not content

    def push(self, adapter: Adapter, repo: str, *, private: bool = False, message: str | None = None) -> str:
        """Make main hold exactly a package, as one commit, compare-and-swap on what main was. Returns the commit.

        Raises UsageError for a base that is only a local path, SignatureInvalid for a signature of another package,
        Conflict when another push came first.
        """
        _check_publishable(adapter)
        with self._mapped(f"push to {repo}", repo):
            _retried(lambda: self._api.create_repo(repo, private=private, exist_ok=True))
        return str(self._commit(files_of(adapter.path), repo, message or _title(adapter))[0].oid)

    def propose(self, adapter: Adapter, repo: str, *, message: str | None = None) -> str:
        """Open a pull request after which main holds exactly a package. Returns its URL. Raises as `push`."""
        _check_publishable(adapter)
        commit, _ = self._commit(files_of(adapter.path), repo, message or _title(adapter), create_pr=True)
        return str(commit.pr_url)

    def replace(self, adapter: Adapter, repo: str, *, message: str, parent: str) -> str | None:
        """Make main, now at `parent`, hold exactly a package, under `message`, whose first line is the title.

        Returns the commit, or None if main holds the package already. Raises as `push`; Conflict if main has moved.
        """
        _check_publishable(adapter)
        commit, _ = self._commit(files_of(adapter.path), repo, message, parent=parent)
        return str(commit.oid) if commit.oid != parent else None

    def _commit(
        self, files: Sequence[Path], repo: str, message: str, *, create_pr: bool = False, parent: str | None = None
    ) -> tuple[CommitInfo, str]:
        """Commit a tree that has these files and no others. Return the commit, and its parent (default: main's now)."""
        from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

        names = {path.name for path in files}
        title, _, rest = message.partition("\n")
        with self._mapped(f"push to {repo}", repo), ExitStack() as opened:
            info = _retried(lambda: self._api.model_info(repo, revision=parent))
            there = [one.rfilename for one in info.siblings or ()]
            # Sorted so that the manifest is added with the rest: a commit is atomic, readers see all or nothing.
            # Given as open files: with paths the client insists on Xet, which not every Hub speaks.
            operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
                *(CommitOperationAdd(path.name, opened.enter_context(path.open("rb"))) for path in files),
                *(CommitOperationDelete(name) for name in there if name not in names and name != _HUBS_OWN),
            ]
            # Sent again only when the Hub says to wait: after any other failure the commit may exist.
            commit = _retried(
                lambda: self._api.create_commit(
                    repo,
                    operations,
                    commit_message=title,
                    commit_description=rest.strip(),
                    parent_commit=info.sha,
                    create_pr=create_pr,
                ),
                when=_was_not_taken,
            )
        return commit, str(info.sha)

    def pull(self, repo: str, folder: Path | str, *, revision: str | None = None) -> tuple[Adapter, str]:
        """Fetch one exact revision into `folder`, which appears only when everything is there and verified.

        File names are checked before a byte is fetched. Returns the adapter and its commit. Raises
        AdapterNotFound, PackageError kinds and HubError kinds.
        """
        folder = expanded(folder)
        info = self._model_info(repo, revision)
        commit, names = str(info.sha), [one.rfilename for one in info.siblings or ()]
        if MANIFEST_NAME not in names:
            raise AdapterNotFound(
                f"{repo}@{commit[:12]} at {self.endpoint} has no {MANIFEST_NAME}, so it is not an adapterhub package: "
                "download the folder and adopt it with `adapterhub pack FOLDER --base BASE`."
            )
        check_names(names)
        with new_folder(folder) as temporary:
            self._fetch(repo, commit, names, temporary)
            adapter = open_adapter(temporary)
        return Adapter(folder, adapter.manifest), commit

    def commits(self, repo: str) -> list[Commit]:
        """Return the commits of main, oldest first."""
        with self._mapped(f"list the commits of {repo}", repo):
            found = _retried(lambda: self._api.list_repo_commits(repo))
        return [Commit(one.commit_id, one.title, one.message) for one in reversed(found)]

    def files(self, repo: str, commit: str) -> list[str]:
        with self._mapped(f"list the files of {repo}", repo):
            return list(_retried(lambda: self._api.list_repo_files(repo, revision=commit)))

    def access(self, repo: str) -> RepoAccess:
        """Return who can see a repository and read its files. What the Hub does not tell counts as private."""
        with self._mapped(f"find {repo}", repo):
            info = _retried(lambda: self._api.model_info(repo))
        return RepoAccess(private=info.private is not False, gated=info.gated or None)

    def create(self, repo: str, access: RepoAccess) -> None:
        """Create an empty repository. It is private until its gate is set. Raises Conflict, HubError kinds."""
        with self._mapped(f"create {repo}", repo):
            self._api.create_repo(repo, private=access.private or access.gated is not None)
            if access.gated is not None:
                self._api.update_repo_settings(repo, gated=access.gated)
                self._api.update_repo_settings(repo, private=access.private)

    def restrict(self, repo: str, access: RepoAccess) -> bool:
        """Make a repository at least as private and as gated as `access`. Returns whether that changed it."""
        now = self.access(repo)
        with self._mapped(f"change the settings of {repo}", repo):
            if access.private and not now.private:
                self._api.update_repo_settings(repo, private=True)
            if access.gated is not None and now.gated not in (access.gated, "manual"):
                self._api.update_repo_settings(repo, gated=access.gated)
        return now != self.access(repo)

    def tags(self, repo: str) -> dict[str, str]:
        """Return the tags of a repository, with the commit of each."""
        with self._mapped(f"list the tags of {repo}", repo):
            return {tag.name: tag.target_commit for tag in _retried(lambda: self._api.list_repo_refs(repo)).tags}

    def tag(self, repo: str, name: str, commit: str, *, moves: bool) -> None:
        """Tag a commit; `moves`: the tag exists and is moved."""
        with self._mapped(f"tag {repo}", repo):
            if moves:
                self._api.delete_tag(repo, tag=name)
            self._api.create_tag(repo, tag=name, revision=commit)

    def search(self, *, text: str = "", base: str | None = None, limit: int | None = None) -> list[Listed]:
        """Return the adapters on this Hub, newest first; the Hub does the search.

        `text`: part of the name; `base`: Hub id of the base model; `limit`: None returns all, page by page.
        """
        filters = ["adapterhub"] + ([f"base_model:adapter:{base}"] if base else [])
        with self._mapped("list adapters"):
            found = _retried(
                lambda: list(
                    self._api.list_models(
                        filter=filters, search=text or None, limit=limit, sort="last_modified", full=True
                    )
                )
            )
        return [Listed(model.id, str(model.sha), _base_tag(model.tags or [])) for model in found]

    @contextmanager
    def _mapped(self, act: str, repo: str | None = None) -> Iterator[None]:
        try:
            yield
        except AdapterHubError:
            raise
        except Exception as error:
            mapped = self._map(error, act, repo)
            if mapped is None:
                raise
            raise mapped from error

    def _map(self, error: Exception, act: str, repo: str | None) -> AdapterHubError | None:
        """Map an exception of the client to one of ours; None for one that the Hub did not cause."""
        from huggingface_hub import errors as hf

        if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
            return self._map(error.__cause__, act, repo)  # the client's word for an upload by LFS that failed
        if isinstance(error, ValueError) and str(error).startswith("LFS batch API returned errors:"):
            return HubError(f"cannot {act}: {self.endpoint} refused a file ({str(error).splitlines()[-1][:300]}).")
        who = "with the token given (HF_TOKEN)" if self.token else _without_token(self.endpoint)
        if isinstance(error, hf.GatedRepoError):
            return NotAuthorized(f"cannot {act}: access is gated: ask for it at {self.endpoint}/{repo}.")
        if isinstance(error, hf.RevisionNotFoundError):
            return AdapterNotFound(f"cannot {act}: {repo} exists at {self.endpoint}, but that revision does not.")
        status = _status(error)
        if status == 401 and self.token and "credentials" in str(error).lower():
            return NotAuthorized(
                f"cannot {act}: {self.endpoint} does not know the token in HF_TOKEN. Get a valid one there."
            )
        if isinstance(error, hf.RepositoryNotFoundError):
            return AdapterNotFound(
                f"cannot {act}: {self.endpoint} shows no {repo} {who}; it may be private or misspelt. "
                "Check the name, or set HF_TOKEN."
            )
        if status in (401, 403):
            return NotAuthorized(f"cannot {act} at {self.endpoint} {who}: set HF_TOKEN to one that may do this.")
        if status in (409, 412):
            return Conflict(f"cannot {act}: the repository changed meanwhile. Pull it, review it, push again.")
        if isinstance(error, hf.HFValidationError):
            return UsageError(f"cannot {act}: {error}")
        if status is not None and 400 <= status < 500 and status != 429:
            return HubError(f"cannot {act}: {self.endpoint} answered {status} ({_first_line(error)}).")
        if status is not None or isinstance(error, (hf.HTTPError, hf.FileMetadataError, hf.LocalEntryNotFoundError)):  # type: ignore[attr-defined]
            why = f"status {status}" if status else f"{type(error).__name__}: {_first_line(error)}"
            return HubUnavailable(
                f"cannot {act}: {self.endpoint} is not answering ({why}). Try again later, or use a Hub you can "
                "reach (--hub URL or HF_ENDPOINT)."
            )
        return None


def _without_token(endpoint: str) -> str:
    """Return why there is no token: one in the environment may be for another Hub."""
    if not os.environ.get("HF_TOKEN"):
        return "without a token"
    own = os.environ.get("HF_ENDPOINT") or PUBLIC_ENDPOINT
    return f"without a token (HF_TOKEN is for {own}; set HF_ENDPOINT={endpoint} with the token for this Hub)"


def _check_publishable(adapter: Adapter) -> None:
    """Check a package before anything is sent. Raises UsageError, PackageError kinds."""
    if Path(adapter.manifest.base.id).is_absolute():
        raise UsageError(
            f"{adapter.manifest.name} names a local folder as its base ({adapter.manifest.base.id}), which "
            "no other machine can load. Pull the base by its Hub id and pack the adapter on that."
        )
    check_names(path.name for path in files_of(adapter.path))
    # Imported here: the libraries of signatures are not needed to list adapters.
    from adapterhub.package.signing import check_signed_files

    check_signed_files(adapter)


def _title(adapter: Adapter) -> str:
    return f"{adapter.manifest.name} {adapter.digest}"


def _may_pass(error: BaseException) -> bool:
    """Return whether the Hub is busy or failing, or reset the connection. The client resumes closed ones itself."""
    return _status(error) in (429, 500, 502, 503, 504) or _was_reset(error)


def _was_not_taken(error: BaseException) -> bool:
    """Return whether the Hub answered that it did nothing, so that a retry cannot do it twice."""
    return _status(error) in (429, 503)


def _was_reset(error: BaseException | None) -> bool:
    return error is not None and (isinstance(error, ConnectionResetError) or _was_reset(error.__cause__))


def _retried(ask: Callable[[], T], *, when: Callable[[BaseException], bool] = _may_pass) -> T:
    """Call `ask`, again after a pause while it fails in a way that may pass. The last error is raised.

    The pause is what the Hub asks for (`Retry-After`), at most a minute, else 1, 2 and 4 s.
    """
    for pause_s in _PAUSES_S:
        try:
            return ask()
        except Exception as error:
            if not when(error):
                raise
            time.sleep(_asked_pause_s(error, pause_s))
    return ask()


def _asked_pause_s(error: Exception, default_s: float) -> float:
    asked = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return min(float(asked), 60.0) if asked.isdigit() else default_s


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def _first_line(error: Exception) -> str:
    said = getattr(error, "server_message", None) or str(error)
    return (said.strip().splitlines() or [""])[0][:200]


def _base_tag(tags: list[str]) -> str | None:
    prefix = "base_model:adapter:"
    return next((tag.removeprefix(prefix) for tag in tags if tag.startswith(prefix)), None)
