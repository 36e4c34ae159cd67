"""Every way the hub says no, with its HTTP status and the code a Hub client switches on. Knows no routes.

Refusal (an AdapterHubError)                                        400
  BadName          a path, repository or ref name that is not safe  400
  BadCard          the YAML head of a README that cannot be read    400
  UploadMismatch   bytes that are not the object that was announced 400
    UploadEnded    its parts are gone: it was finished or dropped   400
  InvalidToken     a token nobody here has                          401
  LoginNeeded      this needs a token                               401
  NoWriteRight     known, but may not write here                    403
  UploadRefused    a forged or expired upload address               403
  RepoMissing      no such repository, or not for this user         404   RepoNotFound
    RepoHidden     the same, said to somebody without a token       401   RepoNotFound
  RevisionMissing  no such branch, tag or commit                    404   RevisionNotFound
  EntryMissing     no such file or folder at that commit            404   EntryNotFound
  AccessNotGranted a gated repository, and nobody let the user in   403   GatedRepo
    AccessNotGrantedToAnybody   the same, without a token           401   GatedRepo
  DiscussionMissing  no discussion or pull request of this number   404
  AlreadyExists    the name is taken                                409
  MergeConflict    both sides changed the same files                409
  StaleParent      somebody else committed first                    412
  TooLarge         more bytes than allowed                          413
    QuotaExceeded  more than the repository or its owner may keep   413
  StoreBusy        a repository or an upload is locked by another   503
"""

from __future__ import annotations

from adapterhub.errors import AdapterHubError

WRONG_CREDENTIALS = "Invalid credentials in Authorization header"
"""The exact text by which clients tell a wrong token from a missing repository."""


class Refusal(AdapterHubError):
    """Base of the hub's refusals; `headers` are added to the error response."""

    http_status, code = 400, "hub_refusal"
    hub_code: str | None = None
    """value of the `X-Error-Code` header"""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.headers: dict[str, str] = {"X-Error-Code": self.hub_code} if self.hub_code else {}


class BadName(Refusal):
    pass


class BadCard(Refusal):
    pass


class UploadMismatch(Refusal):
    pass


class UploadEnded(UploadMismatch):
    pass


class InvalidToken(Refusal):
    http_status = 401

    def __init__(self) -> None:
        super().__init__(WRONG_CREDENTIALS)


class LoginNeeded(Refusal):
    http_status = 401


class NoWriteRight(Refusal):
    http_status = 403


class UploadRefused(Refusal):
    http_status = 403


class RepoMissing(Refusal):
    http_status, hub_code = 404, "RepoNotFound"


class RepoHidden(RepoMissing):
    http_status = 401


class RevisionMissing(Refusal):
    http_status, hub_code = 404, "RevisionNotFound"


class EntryMissing(Refusal):
    """Carries the commit it was looked for at, so that clients can remember the absence."""

    http_status, hub_code = 404, "EntryNotFound"

    def __init__(self, message: str, *, commit_sha: str) -> None:
        super().__init__(message)
        self.headers["X-Repo-Commit"] = commit_sha


class AccessNotGranted(Refusal):
    http_status, hub_code = 403, "GatedRepo"


class AccessNotGrantedToAnybody(AccessNotGranted):
    http_status = 401


class DiscussionMissing(Refusal):
    http_status = 404


class AlreadyExists(Refusal):
    http_status = 409


class MergeConflict(Refusal):
    http_status = 409


class StaleParent(Refusal):
    http_status = 412


class TooLarge(Refusal):
    http_status = 413


class QuotaExceeded(TooLarge):
    pass


class StoreBusy(Refusal):
    http_status = 503
