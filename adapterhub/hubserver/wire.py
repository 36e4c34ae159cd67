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


class _Shape(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True)


# Requests


class RepoName(_Shape):
    name: str
    organization: str | None = None
    type: str | None = None


class CreateRepo(RepoName):
    visibility: Literal["public", "private"] | None = None
    private: bool = False
    """the older way to say it"""


class Settings(_Shape):
    visibility: Literal["public", "private"] | None = None
    private: bool | None = None


class NewBranch(_Shape):
    starting_point: str | None = None


class NewTag(_Shape):
    tag: str


class Card(_Shape):
    content: str


class PreuploadFile(_Shape):
    path: str
    size: _Size


class Preupload(_Shape):
    files: list[PreuploadFile] = Field(max_length=256)


class LfsObject(_Shape):
    oid: _Sha256
    size: _Size


class LfsBatch(_Shape):
    operation: Literal["upload"]
    objects: list[LfsObject] = Field(max_length=1000)


class CommitHeader(_Shape):
    summary: str = Field(min_length=1, max_length=1000)
    description: str = Field(default="", max_length=100_000)
    parent_commit: str | None = Field(default=None, pattern=r"^[A-Fa-f0-9]{5,40}$")


class CommitFile(_Shape):
    path: str
    content: str
    encoding: Literal["base64", "utf-8"] = "utf-8"


class CommitLfsFile(_Shape):
    path: str
    algo: Literal["sha256"] = "sha256"
    oid: _Sha256
    size: _Size | None = None


class CommitPath(_Shape):
    path: str


class HeaderLine(_Shape):
    key: Literal["header"]
    value: CommitHeader


class FileLine(_Shape):
    key: Literal["file"]
    value: CommitFile


class LfsFileLine(_Shape):
    key: Literal["lfsFile"]
    value: CommitLfsFile


class DeletedFileLine(_Shape):
    key: Literal["deletedFile"]
    value: CommitPath


class DeletedFolderLine(_Shape):
    key: Literal["deletedFolder"]
    value: CommitPath


ChangeLine = FileLine | LfsFileLine | DeletedFileLine | DeletedFolderLine
COMMIT_LINE: TypeAdapter[HeaderLine | ChangeLine] = TypeAdapter(
    Annotated[HeaderLine | ChangeLine, Field(discriminator="key")]
)
"""One line of a commit request"""


# Replies


class OrgReply(_Shape):
    name: str


class AccessToken(_Shape):
    display_name: str
    role: str


class WhoamiAuth(_Shape):
    type: str = "access_token"
    access_token: AccessToken


class Whoami(_Shape):
    type: str = "user"
    name: str
    fullname: str
    orgs: list[OrgReply]
    auth: WhoamiAuth


class RepoUrl(_Shape):
    url: str
    name: str


class SettingsReply(_Shape):
    private: bool


class SiblingLfs(_Shape):
    sha256: str
    size: int
    pointer_size: int


class Sibling(_Shape):
    rfilename: str
    size: int | None = None
    blob_id: str | None = None
    lfs: SiblingLfs | None = None


class BaseModelName(_Shape):
    id: str


class BaseModels(_Shape):
    relation: str
    models: list[BaseModelName]


class Model(_Shape):
    id: str
    model_id: str
    author: str
    sha: str
    private: bool
    gated: bool = False
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


class TreeLfs(_Shape):
    oid: str
    size: int
    pointer_size: int


class TreeFile(_Shape):
    type: Literal["file"] = "file"
    path: str
    oid: str
    size: int
    lfs: TreeLfs | None = None


class TreeFolder(_Shape):
    type: Literal["directory"] = "directory"
    path: str
    oid: str
    size: int = 0


class Ref(_Shape):
    name: str
    ref: str
    target_commit: str


class Refs(_Shape):
    branches: list[Ref]
    tags: list[Ref]
    converts: list[Ref] = []
    pull_requests: list[Ref] = []


class CommitAuthor(_Shape):
    user: str


class CommitItem(_Shape):
    id: str
    title: str
    message: str
    date: str
    authors: list[CommitAuthor]


class CardFault(_Shape):
    message: str


class CardReport(_Shape):
    errors: list[CardFault] = []
    warnings: list[CardFault] = []


class PreuploadAnswer(_Shape):
    path: str
    upload_mode: Literal["lfs", "regular"]
    should_ignore: bool = False
    oid: str | None
    """content id of the file as it is now"""


class PreuploadReply(_Shape):
    files: list[PreuploadAnswer]


class LfsAction(_Shape):
    href: str
    header: dict[str, str] = {}


class LfsActions(_Shape):
    upload: LfsAction
    verify: LfsAction


class LfsFault(_Shape):
    code: int
    message: str


class LfsAnswer(_Shape):
    oid: str
    size: int
    actions: LfsActions | None = None
    """None: the repository has the object"""
    error: LfsFault | None = None


class LfsReply(_Shape):
    transfer: str = "basic"
    objects: list[LfsAnswer]


class XetToken(_Shape):
    access_token: str
    exp: int
    cas_url: str


class XorbReply(BaseModel):
    was_inserted: bool


class ShardReply(BaseModel):
    result: int
    """0: known before, 1: taken in"""


class CommitReply(_Shape):
    success: bool = True
    commit_oid: str
    commit_url: str
