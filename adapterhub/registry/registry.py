"""The registry: the adapters on this machine, the names that point to them, and every move of a name.

    $ADAPTERHUB_HOME/objects/, adapters/     the packages (package_store)
    $ADAPTERHUB_HOME/names/<name>.jsonl      what a name's revisions point to, and every move (name_log)
    $ADAPTERHUB_HOME/probes/<digest>.json    which probe of an adapter was replayed here and passed
    $ADAPTERHUB_HOME/training/               a server's runs; gc keeps what an unfinished one starts from
    $ADAPTERHUB_HOME/policy.toml             which names need a signature, and which aliases are protected (policy)

An alias is a revision other than `main` that promote and rollback move. No other module moves a name.
"""

from __future__ import annotations

import difflib
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Literal

from adapterhub.adapter import Adapter, AdapterRef
from adapterhub.errors import (
    AdapterHubError,
    AdapterNotFound,
    Conflict,
    DigestMismatch,
    InvalidManifest,
    InvalidRef,
    UsageError,
)
from adapterhub.files import expanded, hold, make_folder, raise_storage_full, write_atomic
from adapterhub.hub.client import Hub
from adapterhub.package.bundle import opened_bundle
from adapterhub.package.layout import SIGNATURE_NAME, open_adapter
from adapterhub.package.manifest import Manifest, probe_digest, read_manifest
from adapterhub.package.run_record import starts_of_unfinished
from adapterhub.paths import home
from adapterhub.registry.lock_file import Lock, Locked
from adapterhub.registry.name_log import Act, Move, Name, NameLog, Summary, default_actor, now
from adapterhub.registry.package_store import PackageStore, Removed
from adapterhub.registry.policy import Policy
from adapterhub.strict import parse_json

DEFAULT_REVISION = "main"
NOTHING = "nothing"
"""Value of `expect` for a revision that must not exist yet."""

GRACE_S = 7 * 86_400.0

Report = Callable[[str], None]

_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_EXPECTED = re.compile(rf"{NOTHING}|sha256:[0-9a-f]{{8,64}}")


@dataclass(frozen=True)
class Entry:
    """One line of `list`: a name, a revision, and the package that it points to."""

    name: str
    revision: str
    digest: str
    origin: str
    about: Summary
    folder: Path

    @property
    def manifest(self) -> Manifest:
        """The manifest, read from the package's folder each time."""
        return read_manifest(self.folder)


@dataclass(frozen=True)
class Damage:
    """Something damaged or lost in the store."""

    what: str
    """A digest, a log of names, or a file that no package links to."""
    why: str
    names: tuple[str, ...]
    """The names that it makes unusable, with their revisions."""


@dataclass(frozen=True)
class Registry:
    """The store in one folder (default: $ADAPTERHUB_HOME), and the Hub to pull missing adapters from (None: no Hub)."""

    root: Path = field(default_factory=home)
    hub: Hub | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", expanded(self.root))  # a script gives its path as text

    @classmethod
    def default(cls, hub: Hub | None = None) -> Registry:
        """Return the registry in $ADAPTERHUB_HOME."""
        return cls(hub=hub)

    @cached_property
    def store(self) -> PackageStore:
        """The packages."""
        return PackageStore(self.root)

    @cached_property
    def log(self) -> NameLog:
        """The moves of all names."""
        return NameLog(self.root / "names")

    def add(
        self,
        adapter: Adapter,
        *,
        name: str | None = None,
        revision: str = DEFAULT_REVISION,
        origin: str = "local",
        act: Literal["add", "import"] = "add",
        expect: str | None = None,
        by: str | None = None,
    ) -> Adapter:
        """Keep a verified package and point `name@revision` to it. Each content is stored once.

        `expect` makes it compare-and-swap, as in `promote`.

        Raises:
            UsageError: `name` cannot be a name.
            Conflict: the revision does not point where `expect` says.
            SignatureInvalid: the trust policy protects the name, or the signature is of another package.
            AliasProtected: the trust policy protects the revision.
        """
        called = name or adapter.manifest.name
        if AdapterRef.parse(called) != AdapterRef(name=called):
            raise UsageError(
                f"invalid name {called!r}: expected a name, not a folder, a digest or a revision. Give --name NAME."
            )
        self._check_new(adapter, called, revision, act)
        with self.store.keep(adapter) as kept:
            self._move(called, revision, kept, act, by=by, origin=origin, expect=expect)
        return kept

    def pull(
        self, ref: AdapterRef | str, hub: Hub, *, report: Report = lambda line: None, by: str | None = None
    ) -> Adapter:
        """Fetch `owner/name[@revision]` from `hub`, verify it, keep it and point that name to it. Raises as `add`."""
        ref = _parsed(ref)
        if ref.name is None:
            raise AdapterNotFound(f"{ref} cannot be pulled: expected owner/name or owner/name@revision. Give its name.")
        report(f"pulling {ref} from {hub.endpoint}")
        make_folder(self.root)
        with (
            tempfile.TemporaryDirectory(dir=self.root, prefix=".pull-") as scratch,
            hold(Path(scratch)),
            raise_storage_full(self.root),
        ):
            adapter, commit = hub.pull(ref.name, Path(scratch) / "package", revision=ref.revision)
            revision = ref.revision or DEFAULT_REVISION
            self._check_new(adapter, ref.name, revision, "pull")
            report(f"verified {len(adapter.manifest.files)} files, {adapter.digest}")
            origin = f"{hub.endpoint} {commit}"
            with self.store.keep(adapter, is_scratch=True) as kept:
                self._move(ref.name, revision, kept, "pull", by=by, origin=origin)
        return kept

    def import_bundle(self, path: Path, *, name: str | None = None, by: str | None = None) -> Adapter:
        """Keep the package of a bundle under `name`, else under the name that it gives itself.

        That name it only takes when it is free: a file from anywhere must not move a name that others use. Raises
        Conflict for one that points to another adapter, PackageError kinds, and as `add`.
        """
        make_folder(self.root)
        with (
            tempfile.TemporaryDirectory(dir=self.root, prefix=".pull-") as scratch,
            hold(Path(scratch)),
            opened_bundle(path, Path(scratch)) as adapter,
        ):
            if name is None:
                known = self.log.read(adapter.manifest.name)
                target = known.target(DEFAULT_REVISION) if known else None
                if target not in (None, adapter.digest):
                    raise Conflict(
                        f"{path} calls itself {adapter.manifest.name}, which points to {target}: expected a free name. "
                        "Give --name NAME: another one, or this one to move it."
                    )
                return self.add(adapter, origin="bundle", act="import", expect=target or NOTHING, by=by)
            return self.add(adapter, name=name, origin="bundle", act="import", by=by)

    def lock(self, wanted: Mapping[str, AdapterRef]) -> Lock:
        """Return what the names of a deployment point to now. Raises as `resolve`; UsageError for a folder."""
        locked = {}
        for served_as, ref in wanted.items():
            if ref.name is None:
                raise UsageError(f"{ref} has no name, and a lock file lists names. Add it, or pull it, first.")
            digest = self.resolve(ref).digest
            moves = [move for move in self.history(ref.name) if move.after == digest and " " in move.origin]
            endpoint, _, commit = (moves[-1].origin if moves else "local").partition(" ")
            locked[served_as] = Locked(
                name=ref.name, hub=endpoint if commit else None, commit=commit or None, digest=digest
            )
        return Lock(adapters=locked)

    def obtain(self, locked: Locked, hub: Hub | None, *, report: Report = lambda line: None) -> AdapterRef:
        """Pull a locked adapter's commit unless it is stored and sound. Return the reference to exactly that adapter.

        Raises DigestMismatch when the Hub has another adapter at that commit, AdapterNotFound, HubError kinds.
        """
        exact = AdapterRef(name=locked.name, revision=locked.digest)
        known = self.log.read(locked.name)
        is_here = self.store.has(locked.digest) and known and _lookup(known, locked.digest)
        if hub is None or locked.commit is None:
            if not is_here:
                raise AdapterNotFound(f"{locked.name} {locked.digest} is not in {self.root}. Add or import it first.")
        elif not is_here or not self.store.is_sound(locked.digest):
            found = self.pull(AdapterRef(name=locked.name, revision=locked.commit), hub, report=report)
            if found.digest != locked.digest:
                raise DigestMismatch(
                    f"{locked.name}@{locked.commit} at {hub.endpoint} is {found.digest}: expected {locked.digest}, as "
                    "locked. It is not used; write the lock file again to use it."
                )
        return exact

    def watch(self, names: Sequence[str], *, every_s: float = 1.0) -> Iterator[tuple[str, Move]]:
        """Yield each move of these names (of all names if empty) that is made after the call; never ends."""
        seen = {name.name: len(name.moves) for name in self.log.all()}
        while True:
            for called in names or self.log.names():
                found = self.log.read(called)
                moves = found.moves if found else ()
                yield from ((called, move) for move in moves[seen.get(called, 0) :])
                seen[called] = len(moves)
            time.sleep(every_s)

    def resolve(self, ref: AdapterRef | str) -> Adapter:
        """Return the verified package that a reference points to. Names that are not here are pulled from the Hub.

        Raises:
            AdapterNotFound: with the places that were searched, and the nearest names.
            PackageError: the package is damaged.
            SignatureInvalid: the trust policy does not let it be used.
            HubError: the Hub could not be asked.
        """
        ref = _parsed(ref)
        adapter = self.open(ref)
        Policy.read(self.root).check(adapter, ref.name)
        return adapter

    def open(self, ref: AdapterRef | str) -> Adapter:
        """Return the package as `resolve` does, to read and not to use: the trust policy is not checked."""
        ref = _parsed(ref)
        if ref.folder is not None:
            return open_adapter(ref.folder)
        if ref.digest is not None:
            return self.store.open(ref.digest)
        known = self.log.read(str(ref.name))
        digest = _lookup(known, ref.revision or DEFAULT_REVISION) if known else None
        if digest is not None and self.store.has(digest):
            return self.store.open(digest)
        if self.hub is not None and "/" in str(ref.name) and not str(ref.revision).startswith("sha256:"):
            return self.pull(ref, self.hub)
        raise AdapterNotFound(self._where_we_looked(ref, known))

    def verify_all(self) -> Iterator[Damage]:
        """Check every package, name and file of the store. Yield what is damaged or lost; the rest is sound."""
        names: dict[str, list[str]] = {}
        for called in self.log.names():
            try:
                known = self.log.read(called)
            except InvalidManifest as error:
                yield Damage(f"names of {called}", str(error), (called,))
                continue
            if known is None:
                continue
            for revision, move in known.revisions().items():
                names.setdefault(str(move.after), []).append(f"{called}@{revision}")
                if (earlier := known.before(revision)) is not None:
                    names.setdefault(earlier, []).append(f"{called}@{revision} (rollback)")
        for digest in sorted({*self.store.digests(), *names}):
            try:
                self.store.check(digest)
            except (AdapterHubError, OSError) as error:
                if digest in names or self.store.has(digest):  # else another process collected it meanwhile
                    yield Damage(digest, str(error), tuple(names.get(digest, ())))
        for path in self.store.damaged_objects():
            yield Damage(path.name, f"{path} has other bytes than its name states: 'adapterhub gc' deletes it", ())

    def list(self) -> list[Entry]:
        """Return every name and revision, sorted. Opens no package."""
        there = set(self.store.digests())
        return [
            Entry(name.name, revision, str(move.after), move.origin, move.about, self.store.folder(str(move.after)))
            for name in self.log.all()
            for revision, move in name.revisions().items()
            if move.after in there and move.about is not None
        ]

    def history(self, name: str) -> tuple[Move, ...]:
        """Return every move of every revision of `name`, oldest first. Raises AdapterNotFound."""
        known = self.log.read(name)
        if known is None:
            raise AdapterNotFound(self._where_we_looked(AdapterRef(name=name), None))
        return known.moves

    def promote(
        self,
        ref: AdapterRef | str,
        alias: str,
        *,
        expect: str | None = None,
        by: str | None = None,
        prove: Callable[[Adapter], None] | None = None,
    ) -> Move:
        """Point `alias` of ref's name to the adapter that `ref` points to. Return the move, as it is in the history.

        `expect` makes it compare-and-swap: the digest (or its beginning) the alias points to before, or NOTHING.
        `prove` replays the adapter's probe when a protected alias needs one that has not passed here yet.

        Raises:
            Conflict: the alias points elsewhere than `expect` says; the message has both digests.
            UsageError: `alias` cannot be an alias, or `ref` has no name.
            AdapterNotFound, PackageError: there is no such adapter, or it is damaged.
            SignatureInvalid, ProbeMismatch: the trust policy protects the name or the alias.
        """
        _check_alias(alias)
        ref = _parsed(ref)
        if ref.name is None:
            raise UsageError(f"{ref} has no name that an alias could belong to: expected NAME@REVISION. Add it first.")
        adapter = Registry(self.root).resolve(ref)
        with self.lease(adapter):
            if prove is not None and alias in Policy.read(self.root).protected and not self.probe_passed(adapter):
                # Everything but the probe is checked before the base is loaded.
                Policy.read(self.root).check_move(adapter, ref.name, alias, act="promote", has_probe_passed=True)
                prove(adapter)
                self.record_probe(adapter)
            return self._move(ref.name, alias, adapter, "promote", by=by, expect=expect)

    def rollback(self, name: str, alias: str, *, expect: str | None = None, by: str | None = None) -> Move:
        """Point an alias back to where it pointed before its last promotion. Raises as `promote` does."""
        _check_alias(alias)
        known = self.log.read(name)
        if known is None or known.target(alias) is None:
            raise AdapterNotFound(self._where_we_looked(AdapterRef(name=name, revision=alias), known))
        current = known.target(alias)
        _check_expected(name, alias, current, expect)
        earlier = known.before(alias)
        if earlier is None:
            raise UsageError(
                f"cannot roll back {name}@{alias}: it has never pointed anywhere but to {known.target(alias)}. "
                f"Run 'adapterhub history {name}' to see its moves."
            )
        adapter = self.store.open(earlier)
        with self.lease(adapter):
            # `earlier` belongs to `current`: after another move, `expect` could match and `earlier` be wrong.
            return self._move(name, alias, adapter, "rollback", by=by, expect=current)

    def remove(self, name: str, revision: str = DEFAULT_REVISION, *, by: str | None = None) -> Move:
        """Remove one revision of a name. The package stays until it is garbage-collected.

        Raises:
            AdapterNotFound: there is no such revision.
            AliasProtected: the trust policy protects the revision.
        """
        return self._move(name, revision, None, "remove", by=by)

    def record_probe(self, adapter: Adapter, *, by: str | None = None) -> None:
        """Record that the adapter's probe was replayed on this machine and passed."""
        about = {"digest": adapter.digest, "probe": _probe_digest(adapter)}
        record = {"at": now().isoformat(), "by": by or default_actor(), **about}
        write_atomic(self._probe_record(adapter), json.dumps(record, indent=1) + "\n")

    def probe_passed(self, adapter: Adapter) -> bool:
        """Return whether the adapter's probe, this one and no other, was replayed on this machine and passed."""
        path = self._probe_record(adapter)
        if not path.is_file():
            return False
        try:
            return bool(parse_json(path.read_bytes())["probe"] == _probe_digest(adapter))
        except (ValueError, KeyError, TypeError):  # of an earlier version, which did not record the probe
            return False

    def lease(self, adapter: Adapter) -> AbstractContextManager[None]:
        """Keep the package from garbage collection while the block runs. Folders outside the store need no lease."""
        if adapter.path != self.store.folder(adapter.digest):
            return nullcontext()
        return self.store.lease(adapter.digest)

    def gc(self, *, grace_s: float = GRACE_S, dry_run: bool = False) -> Removed:
        """Delete unreferenced packages.

        A package is referenced while a revision points to it or would roll back to it, an unfinished run starts from
        it, or a process has a lease on it. It is kept for `grace_s` seconds after it was added, and after its last
        reference went. Temporary files of processes that died are deleted, too.
        """
        since = datetime.now(UTC) - timedelta(seconds=grace_s)

        def needed() -> set[str]:
            starts = starts_of_unfinished(self.root / "training")
            return starts.union(*(name.references(since=since) for name in self.log.all()))

        return self.store.gc(needed, grace_s=grace_s, dry_run=dry_run)

    def _probe_record(self, adapter: Adapter) -> Path:
        return self.root / "probes" / f"{adapter.digest.removeprefix('sha256:')}.json"

    def check_move(self, adapter: Adapter, name: str, revision: str = DEFAULT_REVISION, *, act: Act = "add") -> None:
        """Check that the trust policy lets `act` point `name@revision` to `adapter`. Raises as `add` does."""
        passed = self.probe_passed(adapter)
        Policy.read(self.root).check_move(adapter, name, revision, act=act, has_probe_passed=passed)

    def _check_new(self, adapter: Adapter, name: str, revision: str, act: Act) -> None:
        """Refuse an adapter before it is stored. One that is stored may have its signature there: `_move` checks it."""
        if (adapter.path / SIGNATURE_NAME).is_file():
            from adapterhub.package.signing import check_signed_files

            check_signed_files(adapter)
        if not self.store.has(adapter.digest):
            self.check_move(adapter, name, revision, act=act)

    def _move(
        self,
        name: str,
        revision: str,
        adapter: Adapter | None,
        act: Act,
        *,
        by: str | None,
        origin: str | None = None,
        expect: str | None = None,
    ) -> Move:
        """Point `name@revision` to a stored adapter (None: to nothing). The only place that writes a move.

        The trust policy is checked under the lock, on the package as it is stored. Without an `origin` it is the one
        the name has had the package from, else `local`.
        """
        with self.log.locked():
            known = self.log.read(name)
            before = known.target(revision) if known else None
            policy = Policy.read(self.root)
            passed = adapter is not None and self.probe_passed(adapter)
            policy.check_move(adapter, name, revision, act=act, has_probe_passed=passed)
            if adapter is None and before is None:
                raise AdapterNotFound(self._where_we_looked(AdapterRef(name=name, revision=revision), known))
            _check_expected(name, revision, before, expect)
            after = adapter.digest if adapter else None
            moves = [move for move in known.moves if move.after == after] if known and adapter else []
            move = Move(
                at=now(),
                by=by or default_actor(),
                act=act,
                revision=revision,
                before=before,
                after=after,
                origin=origin or (moves[-1].origin if moves else "local"),
                about=Summary.of(adapter.manifest) if adapter else None,
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


def _parsed(ref: AdapterRef | str) -> AdapterRef:
    return AdapterRef.parse(ref) if isinstance(ref, str) else ref


def _lookup(known: Name, revision: str) -> str | None:
    """Return the digest of a revision; else of a package fetched at that commit, or whose digest begins so.

    Raises InvalidRef for a beginning that several digests have.
    """
    digest = known.target(revision)
    if digest is None and (revision.startswith("sha256:") or _is_commit(revision)):
        found = known.find(revision)
        if len(found) > 1:
            raise InvalidRef(
                f"{known.name}@{revision} is ambiguous: {', '.join(found)} begin so. Give more digits of the digest."
            )
        digest = found[0] if found else None
    return digest


def _probe_digest(adapter: Adapter) -> str | None:
    return None if adapter.probe is None else probe_digest(adapter.probe)


def _was_fetched(known: Name | None, move: Move) -> bool:
    return known is not None and any(m.after == move.after and m.origin == move.origin for m in known.moves)


def _check_alias(alias: str) -> None:
    if alias == DEFAULT_REVISION or _ALIAS.fullmatch(alias) is None or _is_commit(alias):
        raise UsageError(
            f"invalid alias {alias!r}: expected letters, digits, dots, dashes and underscores, no commit, and not "
            f"{DEFAULT_REVISION!r}, which add and pull move. Choose another alias."
        )


def _check_expected(name: str, revision: str, before: str | None, expect: str | None) -> None:
    if expect is None:
        return
    if _EXPECTED.fullmatch(expect) is None:
        raise UsageError(
            f"invalid --expect {expect!r}: expected sha256:<8 or more hex digits> or {NOTHING!r}. "
            "Run 'adapterhub resolve NAME' to see the digest."
        )
    if not (before or NOTHING).startswith(expect):
        raise Conflict(
            f"{name}@{revision} points to {before or NOTHING}: expected {expect}. Another process moved it; run "
            f"'adapterhub history {name}', then try again."
        )


def _is_commit(revision: str) -> bool:
    return len(revision) == 40 and all(c in "0123456789abcdef" for c in revision)
