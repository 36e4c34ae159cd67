"""Schemas of the Hub API: requests and responses, field by field.

Requests ignore unknown fields, because clients add fields with every version.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from pydantic.alias_generators import to_camel

_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Size = Annotated[int, Field(ge=0)]
"""Size, in bytes."""


def iso_time(time_s: int) -> str:
    """Return a time, given in seconds since 1970, in the Hub's format."""
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


class HubSchema(BaseModel):
    """Base class of the schemas: field names are in camel case in JSON."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True)


# Requests


class RepoName(HubSchema):
    """The name, owner and type of a repository."""

    name: str
    organization: str | None = None
    type: str | None = None


class CreateRepo(RepoName):
    """Request to create a repository."""

    visibility: Literal["public", "private"] | None = None
    private: bool = False
    """Older form of `visibility`."""


class Settings(HubSchema):
    """Request to change the settings of a repository."""

    visibility: Literal["public", "private"] | None = None
    private: bool | None = None
    gated: Literal["auto", "manual", False] | None = None


class MoveRepo(HubSchema):
    """Request to move a repository."""

    from_repo: str
    to_repo: str
    type: str | None = None


class DuplicateRepo(HubSchema):
    """Request to copy a repository."""

    repository: str
    visibility: Literal["public", "private"] | None = None


class SquashBranch(HubSchema):
    """Request to squash a branch."""

    message: str = Field(default="Super-squash branch using huggingface_hub", max_length=1000)


class LfsDeletions(HubSchema):
    """The LFS objects to delete permanently."""

    sha: list[_Sha256] = Field(max_length=1000)
    rewrite_history: bool = True


class LfsFilesBatch(HubSchema):
    """Request to delete LFS objects permanently."""

    deletions: LfsDeletions


class NewBranch(HubSchema):
    """Request to create a branch."""

    starting_point: str | None = None


class NewTag(HubSchema):
    """Request to create a tag."""

    tag: str


class Card(HubSchema):
    """Request to check a model card."""

    content: str


class PreuploadFile(HubSchema):
    """Path and size of a file to upload."""

    path: str
    size: _Size


class Preupload(HubSchema):
    """Request for the upload modes of files."""

    files: list[PreuploadFile] = Field(max_length=256)
    git_ignore: str | None = Field(default=None, max_length=100_000)


class LfsObject(HubSchema):
    """The sha256 and size of an LFS object."""

    oid: _Sha256
    size: _Size


class LfsBatch(HubSchema):
    """Request for the upload URLs of LFS objects."""

    operation: Literal["upload"]
    transfers: list[str] = ["basic"]
    objects: list[LfsObject] = Field(max_length=1000)


class LfsPart(HubSchema):
    """A part of an LFS object that was uploaded."""

    part_number: int
    etag: str


class LfsParts(HubSchema):
    """Request to finish an upload in parts."""

    oid: _Sha256
    parts: list[LfsPart] = Field(max_length=10_000)


class CommitHeader(HubSchema):
    """Message and expected parent of a commit."""

    summary: str = Field(min_length=1, max_length=1000)
    description: str = Field(default="", max_length=100_000)
    parent_commit: str | None = Field(default=None, pattern=r"^[A-Fa-f0-9]{5,40}$")


class CommitFile(HubSchema):
    """A file that the commit request carries."""

    path: str
    content: str
    encoding: Literal["base64", "utf-8"] = "utf-8"


class CommitLfsFile(HubSchema):
    """A file that was uploaded by LFS or Xet."""

    path: str
    algo: Literal["sha256"] = "sha256"
    oid: _Sha256
    size: _Size | None = None


class CommitPath(HubSchema):
    """The path of a file or folder to delete."""

    path: str


class HeaderLine(HubSchema):
    """The line of a commit request with the commit header."""

    key: Literal["header"]
    value: CommitHeader


class FileLine(HubSchema):
    """The line of a commit request that adds a file."""

    key: Literal["file"]
    value: CommitFile


class LfsFileLine(HubSchema):
    """The line of a commit request that adds an uploaded file."""

    key: Literal["lfsFile"]
    value: CommitLfsFile


class DeletedFileLine(HubSchema):
    """The line of a commit request that deletes a file."""

    key: Literal["deletedFile"]
    value: CommitPath


class DeletedFolderLine(HubSchema):
    """The line of a commit request that deletes a folder."""

    key: Literal["deletedFolder"]
    value: CommitPath


ChangeLine = FileLine | LfsFileLine | DeletedFileLine | DeletedFolderLine
COMMIT_LINE: TypeAdapter[HeaderLine | ChangeLine] = TypeAdapter(
    Annotated[HeaderLine | ChangeLine, Field(discriminator="key")]
)
"""Validator of one line of a commit request."""


# Responses


class OrgReply(HubSchema):
    """A team of the user."""

    name: str


class AccessToken(HubSchema):
    """Name and role of the token."""

    display_name: str
    role: str


class WhoamiAuth(HubSchema):
    """How the request was authenticated."""

    type: str = "access_token"
    access_token: AccessToken


class Whoami(HubSchema):
    """The user of the token."""

    type: str = "user"
    name: str
    fullname: str
    orgs: list[OrgReply]
    auth: WhoamiAuth


class RepoUrl(HubSchema):
    """URL and name of a new repository."""

    url: str
    name: str


class SettingsReply(HubSchema):
    """The settings after a change."""

    private: bool
    gated: Literal["auto", "manual", False]


class DuplicateReply(HubSchema):
    """URL of a copied repository."""

    url: str
    files_copy_pending: bool = False


class LfsFile(HubSchema):
    """An LFS object of a repository."""

    file_oid: str
    """The object's sha256, in hex."""
    filename: str
    oid: str
    """The git blob id of the LFS pointer."""
    pushed_at: str
    ref: str | None
    size: int


class SiblingLfs(HubSchema):
    """LFS data of a file."""

    sha256: str
    size: int
    pointer_size: int


class Sibling(HubSchema):
    """A file in the description of a repository."""

    rfilename: str
    size: int | None = None
    blob_id: str | None = None
    lfs: SiblingLfs | None = None


class BaseModelName(HubSchema):
    """The id of a base model."""

    id: str


class BaseModels(HubSchema):
    """The base models of a model, and its relation to them."""

    relation: str
    models: list[BaseModelName]


class Model(HubSchema):
    """The description of a repository."""

    id: str
    model_id: str
    author: str
    sha: str
    private: bool
    gated: Literal["auto", "manual", False] = False
    disabled: bool = False
    created_at: str
    last_modified: str
    tags: list[str]
    library_name: str | None = Field(alias="library_name")
    pipeline_tag: str | None = Field(alias="pipeline_tag")
    card_data: dict[str, Any] | None = None
    base_models: BaseModels | None = None
    config: dict[str, Any] | None = None
    used_storage: int | None = None
    siblings: list[Sibling] | None = None


class TreeLfs(HubSchema):
    """LFS data of a file in a tree listing."""

    oid: str
    size: int
    pointer_size: int


class TreeFile(HubSchema):
    """A file in a tree listing."""

    type: Literal["file"] = "file"
    path: str
    oid: str
    size: int
    lfs: TreeLfs | None = None


class TreeFolder(HubSchema):
    """A folder in a tree listing."""

    type: Literal["directory"] = "directory"
    path: str
    oid: str
    size: int = 0


class Ref(HubSchema):
    """A branch, tag or pull request."""

    name: str
    ref: str
    target_commit: str


class Refs(HubSchema):
    """All refs of a repository."""

    branches: list[Ref]
    tags: list[Ref]
    converts: list[Ref] = []
    pull_requests: list[Ref] = []


class CommitAuthor(HubSchema):
    """The author of a commit."""

    user: str


class FormattedCommit(HubSchema):
    """Title and message of a commit."""

    title: str
    message: str


class CommitItem(HubSchema):
    """A commit in the history."""

    id: str
    title: str
    message: str
    date: str
    authors: list[CommitAuthor]
    formatted: FormattedCommit | None = None


class CardFault(HubSchema):
    """A fault in a model card."""

    message: str


class CardReport(HubSchema):
    """The faults of a model card."""

    errors: list[CardFault] = []
    warnings: list[CardFault] = []


class PreuploadFileReply(HubSchema):
    """The upload mode of a file."""

    path: str
    upload_mode: Literal["lfs", "regular"]
    should_ignore: bool = False
    oid: str | None
    """Content id of the file in the repository; None if there is no such file."""


class PreuploadReply(HubSchema):
    """The upload modes of files."""

    files: list[PreuploadFileReply]


class LfsAction(HubSchema):
    """A URL of the LFS protocol."""

    href: str
    header: dict[str, str] = {}


class LfsActions(HubSchema):
    """The URLs to upload and verify an object."""

    upload: LfsAction
    verify: LfsAction


class LfsFault(HubSchema):
    """The reason why an object cannot be uploaded."""

    code: int
    message: str


class LfsObjectReply(HubSchema):
    """The upload URLs of an object, or an error."""

    oid: str
    size: int
    actions: LfsActions | None = None
    """Upload URLs; None if the repository already has the object."""
    error: LfsFault | None = None


class LfsReply(HubSchema):
    """The upload URLs of a batch of objects."""

    transfer: str = "basic"
    objects: list[LfsObjectReply]


class XetToken(HubSchema):
    """URL and token for Xet uploads."""

    access_token: str
    exp: int
    cas_url: str


class XorbReply(BaseModel):
    """Response to a xorb."""

    was_inserted: bool


class ShardReply(BaseModel):
    """Response to a shard."""

    result: int
    """0 if the shard was known before, 1 if it was stored."""


class CommitReply(HubSchema):
    """Response to a commit."""

    success: bool = True
    commit_oid: str
    commit_url: str
    pull_request_url: str | None = None
