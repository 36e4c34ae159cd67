"""The adapters on this machine: what they are called, where a name leads, who led it there.

    $ADAPTERHUB_HOME/objects/, adapters/     the packages (adapterhub.package_store)
    $ADAPTERHUB_HOME/names/<name>.jsonl      where a name's revisions lead, and every move (adapterhub.name_log)

An alias is a revision that somebody moves on purpose. Knows disk and Hub; refuses to know engines.
"""

from __future__ import annotations

import difflib
import re
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path

from adapterhub.adapter import Adapter, AdapterRef
from adapterhub.errors import AdapterNotFound, Conflict, UsageError
from adapterhub.files import disk_full_is_said, hold
from adapterhub.home import home
from adapterhub.hub import Hub
from adapterhub.manifest import Manifest, read_manifest
from adapterhub.name_log import Act, Move, Name, NameLog, Summary, default_actor, now
from adapterhub.package import open_adapter
from adapterhub.package_store import PackageStore, Removed

DEFAULT_REVISION = "main"
NOTHING = "nothing"
"""what `expect` says of an alias that must not be there yet"""

GRACE_S = 7 * 86_400.0

Report = Callable[[str], None]

_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_EXPECTED = re.compile(rf"{NOTHING}|sha256:[0-9a-f]{{8,64}}")


@dataclass(frozen=True)
class Entry:
    """One line of `list`: a name, a revision, and the package it leads to."""

    name: str
    revision: str
    digest: str
    origin: str
    about: Summary
    folder: Path

    @property
    def manifest(self) -> Manifest:
        """Read from the package's folder each time."""
        return read_manifest(self.folder)


@dataclass(frozen=True)
class Registry:
    """The store under one folder, and the Hub to ask for what is not in it (None: ask nobody)."""

    root: Path
    hub: Hub | None = None

    @classmethod
    def default(cls, hub: Hub | None = None) -> Registry:
        return cls(home(), hub)

    @cached_property
    def store(self) -> PackageStore:
        return PackageStore(self.root)

    @cached_property
    def log(self) -> NameLog:
        return NameLog(self.root / "names")

    def add(
        self,
        adapter: Adapter,
        *,
        name: str | None = None,
        revision: str = DEFAULT_REVISION,
        origin: str = "local",
        by: str | None = None,
    ) -> Adapter:
        """Keep a verified package, file by file and each content once, and let `name@revision` lead to it."""
        called = name or adapter.manifest.name
        if AdapterRef.parse(called).name is None:
            raise UsageError(f"{called!r} is a folder or a digest, not a name to keep an adapter under.")
        with self.store.keep(adapter) as kept:
            self._lead(called, revision, kept, "add", by=by, origin=origin)
        return kept

    def pull(self, ref: AdapterRef, hub: Hub, *, report: Report = lambda line: None, by: str | None = None) -> Adapter:
        """Fetch `owner/name[@revision]` from `hub`, verify, and keep it under that name."""
        if ref.name is None:
            raise AdapterNotFound(f"{ref} cannot be pulled: expected owner/name or owner/name@revision.")
        report(f"pulling {ref} from {hub.endpoint}")
        self.root.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=self.root, prefix=".pull-") as scratch,
            hold(Path(scratch)),
            disk_full_is_said(self.root),
        ):
            adapter, commit = hub.pull(ref.name, Path(scratch) / "package", revision=ref.revision)
            report(f"verified {len(adapter.manifest.files)} files, {adapter.digest}")
            origin = f"{hub.endpoint} {commit}"
            with self.store.keep(adapter) as kept:
                self._lead(ref.name, ref.revision or DEFAULT_REVISION, kept, "pull", by=by, origin=origin)
        return kept

    def resolve(self, ref: AdapterRef) -> Adapter:
        """The verified package a reference leads to; asks the Hub for names that are not here.

        Raises AdapterNotFound with the places looked at and the nearest names, PackageError kinds for a
        package that no longer is what it was, HubError kinds.
        """
        if ref.folder is not None:
            return open_adapter(ref.folder.expanduser())
        if ref.digest is not None:
            return self.store.open(ref.digest)
        known = self.log.read(str(ref.name))
        digest = _lookup(known, ref.revision or DEFAULT_REVISION) if known else None
        if digest is not None and self.store.has(digest):
            return self.store.open(digest)
        if self.hub is not None and "/" in str(ref.name) and not str(ref.revision).startswith("sha256:"):
            return self.pull(ref, self.hub)
        raise AdapterNotFound(self._where_we_looked(ref, known))

    def list(self) -> list[Entry]:
        """Every name and revision, sorted; opens no package."""
        there = set(self.store.digests())
        return [
            Entry(name.name, revision, str(move.after), move.origin, move.about, self.store.folder(str(move.after)))
            for name in self.log.all()
            for revision, move in name.revisions().items()
            if move.after in there and move.about is not None
        ]

    def history(self, name: str) -> tuple[Move, ...]:
        """Every move of every revision of `name`, oldest first. Raises AdapterNotFound."""
        known = self.log.read(name)
        if known is None:
            raise AdapterNotFound(self._where_we_looked(AdapterRef(name=name), None))
        return known.moves

    def promote(self, ref: AdapterRef, alias: str, *, expect: str | None = None, by: str | None = None) -> Move:
        """Let `alias` of ref's name lead where `ref` leads now. Returns the move, as it is in the history.

        `expect` makes it compare-and-swap: the digest (or its beginning) the alias must lead to before, or NOTHING.
        Raises Conflict with both digests when it leads elsewhere, UsageError for what cannot be an alias,
        AdapterNotFound, PackageError kinds.
        """
        _check_alias(alias)
        if ref.name is None:
            raise UsageError(f"{ref} has no name an alias could belong to: promote NAME@REVISION, add a folder first.")
        adapter = Registry(self.root).resolve(ref)
        known = self.log.read(ref.name)
        origin = next((m.origin for m in reversed(known.moves) if m.after == adapter.digest), "local") if known else ""
        return self._lead(ref.name, alias, adapter, "promote", by=by, origin=origin, expect=expect)

    def rollback(self, name: str, alias: str, *, expect: str | None = None, by: str | None = None) -> Move:
        """Let an alias lead again where it led before its last promotion. Raises as `promote` does."""
        _check_alias(alias)
        known = self.log.read(name)
        if known is None or known.leads_to(alias) is None:
            raise AdapterNotFound(self._where_we_looked(AdapterRef(name=name, revision=alias), known))
        earlier = known.before(alias)
        if earlier is None:
            raise UsageError(f"{name}@{alias} never led anywhere else than to {known.leads_to(alias)}.")
        return self._lead(
            name, alias, self.store.open(earlier), "rollback", by=by, expect=expect or known.leads_to(alias)
        )

    def remove(self, name: str, revision: str = DEFAULT_REVISION, *, by: str | None = None) -> Move:
        """Forget one revision of a name; the package stays until it is collected. Raises AdapterNotFound."""
        with self.log.locked():
            known = self.log.read(name)
            before = known.leads_to(revision) if known else None
            if before is None:
                raise AdapterNotFound(self._where_we_looked(AdapterRef(name=name, revision=revision), known))
            move = Move(at=now(), by=by or default_actor(), act="remove", revision=revision, before=before, after=None)
            self.log.append(name, [move])
        return move

    def lease(self, adapter: Adapter) -> AbstractContextManager[None]:
        """While the block runs no collection takes the adapter's package. Folders elsewhere are nobody's to take."""
        if adapter.path != self.store.folder(adapter.digest):
            return nullcontext()
        return self.store.lease(adapter.digest)

    def collect(self, *, grace_s: float = GRACE_S, is_trial: bool = False) -> Removed:
        """Take away packages no name leads to (nor would roll back to) and no process leases.

        One is spared for `grace_s` after it came, and after the last name left it. What killed processes left
        half-done goes as well.
        """
        since = datetime.now(UTC) - timedelta(seconds=grace_s)
        needed: set[str] = set().union(*(name.holds(since=since) for name in self.log.all()))
        return self.store.collect(needed, grace_s=grace_s, is_trial=is_trial)

    def _lead(
        self,
        name: str,
        revision: str,
        adapter: Adapter,
        act: Act,
        *,
        by: str | None,
        origin: str = "local",
        expect: str | None = None,
    ) -> Move:
        with self.log.locked():
            known = self.log.read(name)
            before = known.leads_to(revision) if known else None
            _check_expected(name, revision, before, expect)
            move = Move(
                at=now(),
                by=by or default_actor(),
                act=act,
                revision=revision,
                before=before,
                after=adapter.digest,
                origin=origin,
                about=Summary.of(adapter.manifest),
            )
            if before != move.after or (act == "pull" and not _was_fetched(known, move)):
                self.log.append(name, [move])
        return move

    def _where_we_looked(self, ref: AdapterRef, known: Name | None) -> str:
        if known is not None:
            return f"{ref} is not in {self.root}; it has {known.name} at: {', '.join(known.revisions()) or 'nothing'}."
        names = self.log.names()
        near = difflib.get_close_matches(str(ref.name), names, n=3, cutoff=0.4)
        hint = f"nearest: {', '.join(near)}" if near else f"it holds {len(names)} adapters: `adapterhub list`"
        asked = "no Hub was asked" if self.hub is None else "a name without an owner is not looked up on a Hub"
        return f"no adapter {ref} in {self.root} ({hint}); {asked}. `adapterhub pull OWNER/NAME` fetches one."


def _lookup(known: Name, revision: str) -> str | None:
    """The digest of a revision; else of what was once fetched at that commit, or whose digest begins so."""
    digest = known.leads_to(revision)
    if digest is None and (revision.startswith("sha256:") or _is_commit(revision)):
        move = known.find(revision)
        digest = move.after if move else None
    return digest


def _was_fetched(known: Name | None, move: Move) -> bool:
    return known is not None and any(m.after == move.after and m.origin == move.origin for m in known.moves)


def _check_alias(alias: str) -> None:
    if alias == DEFAULT_REVISION or _ALIAS.fullmatch(alias) is None or _is_commit(alias):
        raise UsageError(
            f"{alias!r} cannot be an alias: expected letters, digits, dots, dashes and underscores, no commit, and not "
            f"{DEFAULT_REVISION}, which follows add and pull."
        )


def _check_expected(name: str, revision: str, before: str | None, expect: str | None) -> None:
    if expect is None:
        return
    if _EXPECTED.fullmatch(expect) is None:
        raise UsageError(f"{expect!r} cannot be expected of an alias: give sha256: and 8 or more digits, or {NOTHING}.")
    if (before or NOTHING).startswith(expect):
        return
    raise Conflict(
        f"{name}@{revision} leads to {before or NOTHING}, not to {expect}: somebody moved it; look at "
        f"`adapterhub history {name}` and try again."
    )


def _is_commit(revision: str) -> bool:
    return len(revision) == 40 and all(c in "0123456789abcdef" for c in revision)
