"""The errors of the hub server: the HTTP status of each, and the error code that Hub clients read.

HubServerError (an AdapterHubError)
  InvalidName           400  an unsafe path, repository name or ref name
  InvalidCard           400  a model card whose YAML header cannot be parsed
  UploadMismatch        400  bytes that differ from the announced object
    UploadGone          400  an upload in parts that was finished or dropped
  InvalidToken          401  an unknown token
  TokenRequired         401  a request that needs a token and has none
  WriteForbidden        403  a user without write access
  InvalidUploadTicket   403  a forged or expired upload URL
  RepoNotFound          404  a repository that does not exist, or that the user cannot see (RepoNotFound)
    RepoNeedsToken      401  the same, for a request without a token (RepoNotFound)
  RevisionNotFound      404  an unknown branch, tag or commit (RevisionNotFound)
  EntryNotFound         404  an unknown file or folder at a commit (EntryNotFound)
  AccessNotGranted      403  a gated repository to which the user has no access (GatedRepo)
    AccessNeedsToken    401  the same, for a request without a token (GatedRepo)
  DiscussionNotFound    404  an unknown discussion or pull request
  AlreadyExists         409  a name that is taken
  MergeConflict         409  a pull request and its base that changed the same files
  StaleParent           412  a branch that has moved past the expected parent commit
  TooLarge              413  a body above the limit
    QuotaExceeded       413  an upload above the quota of its repository or owner
  StoreBusy             503  a repository or an upload that another request has locked
"""

from __future__ import annotations

from adapterhub.errors import AdapterHubError

WRONG_CREDENTIALS = "Invalid credentials in Authorization header"
"""The text by which Hub clients distinguish an invalid token from a repository that does not exist."""


class HubServerError(AdapterHubError):
    """Base class of the hub server's errors; `headers` are added to the error response."""

    http_status, code = 400, "hub_refusal"
    hub_code: str | None = None
    """Value of the `X-Error-Code` header."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.headers: dict[str, str] = {"X-Error-Code": self.hub_code} if self.hub_code else {}


class InvalidName(HubServerError):
    """An unsafe path, repository name or ref name."""


class InvalidCard(HubServerError):
    """A model card whose YAML header cannot be parsed."""


class UploadMismatch(HubServerError):
    """Uploaded bytes that differ from the announced object."""


class UploadGone(UploadMismatch):
    """An upload in parts that was finished or dropped."""


class InvalidToken(HubServerError):
    """An unknown token."""

    http_status = 401

    def __init__(self) -> None:
        super().__init__(WRONG_CREDENTIALS)


class TokenRequired(HubServerError):
    """A request that needs a token and has none."""

    http_status = 401


class WriteForbidden(HubServerError):
    """A user without write access."""

    http_status = 403


class InvalidUploadTicket(HubServerError):
    """A forged or expired upload URL."""

    http_status = 403


class RepoNotFound(HubServerError):
    """A repository that does not exist, or that the user cannot see."""

    http_status, hub_code = 404, "RepoNotFound"


class RepoNeedsToken(RepoNotFound):
    """A repository that does not exist or is private, for a request without a token."""

    http_status = 401


class RevisionNotFound(HubServerError):
    """An unknown branch, tag or commit."""

    http_status, hub_code = 404, "RevisionNotFound"


class EntryNotFound(HubServerError):
    """A file that a commit does not have; the commit is sent along, so that clients can cache the answer."""

    http_status, hub_code = 404, "EntryNotFound"

    def __init__(self, message: str, *, commit_sha: str) -> None:
        super().__init__(message)
        self.headers["X-Repo-Commit"] = commit_sha


class AccessNotGranted(HubServerError):
    """A gated repository to which the user has no access."""

    http_status, hub_code = 403, "GatedRepo"


class AccessNeedsToken(AccessNotGranted):
    """A gated repository, for a request without a token."""

    http_status = 401


class DiscussionNotFound(HubServerError):
    """An unknown discussion or pull request."""

    http_status = 404


class AlreadyExists(HubServerError):
    """A name that is taken."""

    http_status = 409


class MergeConflict(HubServerError):
    """A pull request and its target branch that changed the same files."""

    http_status = 409


class StaleParent(HubServerError):
    """A branch that has moved past the expected parent commit."""

    http_status = 412


class TooLarge(HubServerError):
    """A body above the limit."""

    http_status = 413


class QuotaExceeded(TooLarge):
    """An upload above the quota of its repository or owner."""


class StoreBusy(HubServerError):
    """A repository or an upload that another request has locked."""

    http_status = 503
