"""Discussions and pull requests on disk: one JSON file each, in the folder of their repository.

A pull request is a sequence of commits (`refs/pr/N`) on top of its target branch at the time it was opened. A merge is
one commit with all the changes. That it is merged is written with the branch, in `repo.json`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from adapterhub.files import write_atomic
from adapterhub.hubserver.errors import DiscussionNotFound, HubServerError, MergeConflict
from adapterhub.hubserver.names import RepoId
from adapterhub.hubserver.storage.commit import Change, NewCommit, RepoCommit, RepoFile, check_files
from adapterhub.hubserver.storage.diff import FileChange, git_diff
from adapterhub.hubserver.storage.discussion import Discussion, Event
from adapterhub.hubserver.storage.git_ids import lfs_pointer
from adapterhub.hubserver.storage.sized_cache import SizedCache
from adapterhub.hubserver.storage.store import HubStore, Repo

_DIFF_CACHE_BYTES = 16 << 20


class DiscussionStore:
    """All discussions of all repositories of a store."""

    def __init__(self, store: HubStore) -> None:
        self._store = store
        self._diffs = SizedCache[str](_DIFF_CACHE_BYTES)

    def all(self, repo: Repo) -> list[Discussion]:
        """Return all discussions of a repository, newest first."""
        numbers = sorted((int(path.stem) for path in self._folder(repo.repo_id).glob("*.json")), reverse=True)
        return [self.get(repo, number) for number in numbers]

    def get(self, repo: Repo, num: int) -> Discussion:
        """Return one discussion. Raises DiscussionNotFound."""
        try:
            found = Discussion.model_validate_json(self._path(repo.repo_id, num).read_bytes())
        except FileNotFoundError:
            raise DiscussionNotFound(f"{repo.id} has no discussion or pull request {num}.") from None
        return found.as_merged(repo.merged[num]) if num in repo.merged else found

    def open(
        self,
        repo_id: RepoId,
        *,
        author: str,
        title: str,
        description: str,
        is_pull: bool,
        base: str = "main",
        first: tuple[Iterable[Change], NewCommit] | None = None,
    ) -> Discussion:
        """Open a discussion, or a pull request for the branch `base` with `first` as its first commit.

        Raises whatever `HubStore.commit` raises.
        """
        with self._store.locked(repo_id):
            repo = self._store.repo(repo_id)
            start = self._store.commit_at(repo, f"refs/heads/{base}") if is_pull else None
            head = start
            now = int(time.time())
            events = [Event.comment(description, author=author)] if description else []
            if first is not None and start is not None:
                head, repo = self._store.add_commit(repo, start, changes=first[0], new=first[1])
                self._store.save(repo)
                events.append(Event.commit(head))
            numbers = [int(path.stem) for path in self._folder(repo_id).glob("*.json")]
            made = Discussion(
                num=1 + max(numbers, default=0),
                title=title,
                author=author,
                created_s=now,
                status="open" if first is not None or not is_pull else "draft",
                base=base if is_pull else None,
                start=start.sha if start is not None else None,
                head=head.sha if head is not None else None,
                events=tuple(events),
            )
            self._save(repo_id, made)
        return made

    def commit(self, repo_id: RepoId, num: int, *, changes: Iterable[Change], new: NewCommit) -> RepoCommit:
        """Add a commit to a pull request.

        Raises HubServerError if it is not open, and whatever `HubStore.commit` raises.
        """
        with self._store.locked(repo_id):
            repo = self._store.repo(repo_id)
            pull = self._open_pull(repo, num)
            head = self._store.commit_at(repo, f"refs/pr/{num}")
            commit, repo = self._store.add_commit(repo, head, changes=changes, new=new)
            if commit != head:
                self._store.save(repo)
                self._save(repo_id, pull.with_event(Event.commit(commit), head=commit.sha))
        return commit

    def comment(self, repo_id: RepoId, num: int, *, text: str, author: str) -> Event:
        """Add a comment. Raises DiscussionNotFound."""
        event = Event.comment(text, author=author)
        with self._store.locked(repo_id):
            self._save(repo_id, self.get(self._store.repo(repo_id), num).with_event(event))
        return event

    def rename(self, repo_id: RepoId, num: int, *, title: str, author: str) -> Event:
        """Change the title. Raises DiscussionNotFound."""
        with self._store.locked(repo_id):
            found = self.get(self._store.repo(repo_id), num)
            event = Event.create("title-change", author, {"from": found.title, "to": title})
            self._save(repo_id, found.with_event(event, title=title))
        return event

    def edit_comment(self, repo_id: RepoId, num: int, *, event_id: str, text: str | None, author: str) -> Event:
        """Change the text of the author's own comment; None hides it. Raises DiscussionNotFound."""
        with self._store.locked(repo_id):
            found = self.get(self._store.repo(repo_id), num)
            old = next((e for e in found.events if e.id == event_id and e.type == "comment"), None)
            if old is None or old.author != author:
                raise DiscussionNotFound(
                    f"discussion {num} has no comment {event_id} by '{author}': only the author can edit a comment."
                )
            new = old.hidden() if text is None else old.edited(text)
            events = tuple(new if event is old else event for event in found.events)
            self._save(repo_id, found.model_copy(update={"events": events}))
        return new

    def set_status(self, repo_id: RepoId, num: int, *, status: str, author: str, comment: str | None = None) -> Event:
        """Open or close a discussion, with an optional comment.

        Raises DiscussionNotFound, and HubServerError for a merged pull request.
        """
        if status not in ("open", "closed"):
            raise HubServerError(f"invalid status {status!r}: expected 'open' or 'closed'.")
        with self._store.locked(repo_id):
            found = self.get(self._store.repo(repo_id), num)
            if found.status == "merged":
                raise HubServerError(f"pull request {num} is merged: it cannot be opened or closed any more.")
            if comment:
                found = found.with_event(Event.comment(comment, author=author))
            event = Event.create("status-change", author, {"status": status})
            self._save(repo_id, found.with_event(event, status=status))
        return event

    def merge(self, repo_id: RepoId, num: int, *, author: str) -> RepoCommit:
        """Merge a pull request into its target branch as one commit.

        Raises MergeConflict, HubServerError if it is not open, and UploadMismatch if a file was permanently deleted.
        """
        with self._store.locked(repo_id):
            repo = self._store.repo(repo_id)
            pull = self._open_pull(repo, num)
            conflicts = self.conflicts(repo, pull)
            if conflicts:
                raise MergeConflict(
                    f"the pull request and its target branch both changed {', '.join(conflicts[:10])}: "
                    "update the pull request first."
                )
            base = self._store.commit_at(repo, f"refs/heads/{pull.base}")
            files = self._merged_files(repo, pull, base)
            self._store.check_objects(
                repo_id, (entry for path, entry in files.items() if base.files.get(path) != entry)
            )
            title = f"{pull.title} (#{num})"
            merged = RepoCommit.create(files, (base.sha,), author=author, title=title, time_s=int(time.time()))
            self._store.save_commit(repo_id, merged)
            self._store.save(
                repo.model_copy(
                    update={
                        "branches": {**repo.branches, pull.base: merged.sha},
                        "merged": {**repo.merged, num: merged.sha},
                    }
                )
            )
        return merged

    def conflicts(self, repo: Repo, pull: Discussion) -> list[str]:
        """Return the files that the pull request and its target branch changed in different ways."""
        start, theirs = self._files(repo, pull.start), self._files(repo, pull.head)
        ours = self._files(repo, f"refs/heads/{pull.base}")
        return sorted(
            path
            for path in {*start, *theirs, *ours}
            if start.get(path) != theirs.get(path) and ours.get(path) not in (start.get(path), theirs.get(path))
        )

    def diff(self, repo: Repo, pull: Discussion) -> str:
        """Return the changes of a pull request as a git diff; of an LFS file it shows the pointer.

        Its cost and its size are bounded, see `diff`. It is computed once.
        """
        return self._diffs.get((pull.start, pull.head), lambda: self._new_diff(repo, pull))

    def _new_diff(self, repo: Repo, pull: Discussion) -> tuple[str, int]:
        start, head = self._files(repo, pull.start), self._files(repo, pull.head)
        changed = sorted(path for path in {*start, *head} if start.get(path) != head.get(path))
        text = git_diff((FileChange(path, start.get(path), head.get(path)) for path in changed), self._data)
        return text, len(text)

    def _data(self, entry: RepoFile) -> bytes:
        if entry.sha256 is not None:
            return lfs_pointer(entry.sha256, entry.size)
        return self._store.path_of(entry).read_bytes()

    def _merged_files(self, repo: Repo, pull: Discussion, base: RepoCommit) -> dict[str, RepoFile]:
        start, theirs = self._files(repo, pull.start), self._files(repo, pull.head)
        files = dict(base.files)
        for path in {*start, *theirs}:
            if start.get(path) != theirs.get(path):
                files.pop(path, None)
                files |= {path: theirs[path]} if path in theirs else {}
        # The same checks as for any commit: one side may add a file, the other a folder with its name.
        check_files(files)
        return files

    def _files(self, repo: Repo, revision: str | None) -> dict[str, RepoFile]:
        assert revision is not None
        return dict(self._store.commit_at(repo, revision).files)

    def _open_pull(self, repo: Repo, num: int) -> Discussion:
        found = self.get(repo, num)
        if found.base is None or found.status not in ("open", "draft"):
            raise HubServerError(
                f"discussion {num} of {repo.id} is not an open pull request: its status is {found.status}."
            )
        return found

    def _folder(self, repo_id: RepoId) -> Path:
        return self._store.folder(repo_id) / "discussions"

    def _path(self, repo_id: RepoId, num: int) -> Path:
        return self._folder(repo_id) / f"{num}.json"

    def _save(self, repo_id: RepoId, discussion: Discussion) -> None:
        write_atomic(self._path(repo_id, discussion.num), discussion.model_dump_json(indent=1))
