"""The shapes of requests and replies, field by field as Hub clients send and expect them. Holds no logic.

Requests ignore fields they do not know: clients add some with every version.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from pydantic.alias_generators import to_camel

_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Size = Annotated[int, Field(ge=0)]
"""bytes"""


def iso_time(time_s: int) -> str:
    """Seconds since 1970 as the Hub writes times."""
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


class Shape(BaseModel):
    """Fields are spelt in camel case on the way."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True)


# Requests


class RepoName(Shape):
    name: str
    organization: str | None = None
    type: str | None = None


class CreateRepo(RepoName):
    visibility: Literal["public", "private"] | None = None
    private: bool = False
    """the older way to say it"""


class Settings(Shape):
    visibility: Literal["public", "private"] | None = None
    private: bool | None = None
    gated: Literal["auto", "manual", False] | None = None


class MoveRepo(Shape):
    from_repo: str
    to_repo: str
    type: str | None = None


class DuplicateRepo(Shape):
    repository: str
    visibility: Literal["public", "private"] | None = None


class SquashBranch(Shape):
    message: str = Field(default="Super-squash branch using huggingface_hub", max_length=1000)


class LfsDeletions(Shape):
    sha: list[_Sha256] = Field(max_length=1000)
    rewrite_history: bool = True


class LfsFilesBatch(Shape):
    deletions: LfsDeletions


class NewBranch(Shape):
    starting_point: str | None = None


class NewTag(Shape):
    tag: str


class Card(Shape):
    content: str


class PreuploadFile(Shape):
    path: str
    size: _Size


class Preupload(Shape):
    files: list[PreuploadFile] = Field(max_length=256)
    git_ignore: str | None = Field(default=None, max_length=100_000)


class LfsObject(Shape):
    oid: _Sha256
    size: _Size


class LfsBatch(Shape):
    operation: Literal["upload"]
    transfers: list[str] = ["basic"]
    objects: list[LfsObject] = Field(max_length=1000)


class LfsPart(Shape):
    part_number: int
    etag: str


class LfsParts(Shape):
    oid: _Sha256
    parts: list[LfsPart] = Field(max_length=10_000)


class CommitHeader(Shape):
    summary: str = Field(min_length=1, max_length=1000)
    description: str = Field(default="", max_length=100_000)
    parent_commit: str | None = Field(default=None, pattern=r"^[A-Fa-f0-9]{5,40}$")


class CommitFile(Shape):
    path: str
    content: str
    encoding: Literal["base64", "utf-8"] = "utf-8"


class CommitLfsFile(Shape):
    path: str
    algo: Literal["sha256"] = "sha256"
    oid: _Sha256
    size: _Size | None = None


class CommitPath(Shape):
    path: str


class HeaderLine(Shape):
    key: Literal["header"]
    value: CommitHeader


class FileLine(Shape):
    key: Literal["file"]
    value: CommitFile


class LfsFileLine(Shape):
    key: Literal["lfsFile"]
    value: CommitLfsFile


class DeletedFileLine(Shape):
    key: Literal["deletedFile"]
    value: CommitPath


class DeletedFolderLine(Shape):
    key: Literal["deletedFolder"]
    value: CommitPath


ChangeLine = FileLine | LfsFileLine | DeletedFileLine | DeletedFolderLine
COMMIT_LINE: TypeAdapter[HeaderLine | ChangeLine] = TypeAdapter(
    Annotated[HeaderLine | ChangeLine, Field(discriminator="key")]
)
"""One line of a commit request"""


# Replies


class OrgReply(Shape):
    name: str


class AccessToken(Shape):
    display_name: str
    role: str


class WhoamiAuth(Shape):
    type: str = "access_token"
    access_token: AccessToken


class Whoami(Shape):
    type: str = "user"
    name: str
    fullname: str
    orgs: list[OrgReply]
    auth: WhoamiAuth


class RepoUrl(Shape):
    url: str
    name: str


class SettingsReply(Shape):
    private: bool
    gated: Literal["auto", "manual", False]


class DuplicateReply(Shape):
    url: str
    files_copy_pending: bool = False


class LfsFile(Shape):
    file_oid: str
    """sha256"""
    filename: str
    oid: str
    """git id of the pointer"""
    pushed_at: str
    ref: str | None
    size: int


class SiblingLfs(Shape):
    sha256: str
    size: int
    pointer_size: int


class Sibling(Shape):
    rfilename: str
    size: int | None = None
    blob_id: str | None = None
    lfs: SiblingLfs | None = None


class BaseModelName(Shape):
    id: str


class BaseModels(Shape):
    relation: str
    models: list[BaseModelName]


class Model(Shape):
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


class TreeLfs(Shape):
    oid: str
    size: int
    pointer_size: int


class TreeFile(Shape):
    type: Literal["file"] = "file"
    path: str
    oid: str
    size: int
    lfs: TreeLfs | None = None


class TreeFolder(Shape):
    type: Literal["directory"] = "directory"
    path: str
    oid: str
    size: int = 0


class Ref(Shape):
    name: str
    ref: str
    target_commit: str


class Refs(Shape):
    branches: list[Ref]
    tags: list[Ref]
    converts: list[Ref] = []
    pull_requests: list[Ref] = []


class CommitAuthor(Shape):
    user: str


class CommitWords(Shape):
    title: str
    message: str


class CommitItem(Shape):
    id: str
    title: str
    message: str
    date: str
    authors: list[CommitAuthor]
    formatted: CommitWords | None = None


class CardFault(Shape):
    message: str


class CardReport(Shape):
    errors: list[CardFault] = []
    warnings: list[CardFault] = []


class PreuploadAnswer(Shape):
    path: str
    upload_mode: Literal["lfs", "regular"]
    should_ignore: bool = False
    oid: str | None
    """content id of the file as it is now"""


class PreuploadReply(Shape):
    files: list[PreuploadAnswer]


class LfsAction(Shape):
    href: str
    header: dict[str, str] = {}


class LfsActions(Shape):
    upload: LfsAction
    verify: LfsAction


class LfsFault(Shape):
    code: int
    message: str


class LfsAnswer(Shape):
    oid: str
    size: int
    actions: LfsActions | None = None
    """None: the repository has the object"""
    error: LfsFault | None = None


class LfsReply(Shape):
    transfer: str = "basic"
    objects: list[LfsAnswer]


class XetToken(Shape):
    access_token: str
    exp: int
    cas_url: str


class XorbReply(BaseModel):
    was_inserted: bool


class ShardReply(BaseModel):
    result: int
    """0: known before, 1: taken in"""


class CommitReply(Shape):
    success: bool = True
    commit_oid: str
    commit_url: str
    pull_request_url: str | None = None
