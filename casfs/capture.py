"""What an action left in its sandbox: declared outputs into the store, and a report of everything else.

Files enter the store by a hard link where scratch is on the store's file
system (the scratch is removed afterwards, so the link is the only name left
but the blob's), else by reflink or copy. The sandbox's processes must have
ended: nobody may write into a file that has become a blob.

Works on two views of the same tree: `merged`, as the action saw it, says what
is there; `upper` has the files the action wrote. One thread per sandbox.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

from store.digest import Digest, DigestFunction
from store.entries import DirectoryEntry, Entry, FileEntry, SymlinkEntry, check_target, printable, split_path
from store.errors import BadName
from store.ingest import Ingest, Transfer
from store.manifest_text import path_order
from store.repository import Store
from store.scan import describe_kind
from store.treebuilder import TreeBuilder

_OPAQUE = "user.overlay.opaque"
_XATTR_PREFIX = "user.overlay."


@dataclass(frozen=True, slots=True)
class Output:
    """A declared output that was there: a file and a directory have a digest, a symbolic link a target."""

    path: bytes
    kind: Literal["file", "directory", "symlink"]
    digest: Digest | None
    executable: bool = False
    target: bytes | None = None

    @property
    def entry(self) -> Entry:
        """It as an entry of its directory."""
        name = self.path.rpartition(b"/")[2]
        if self.digest is None:
            return SymlinkEntry(name, self.target or b"")
        if self.kind == "directory":
            return DirectoryEntry(name, self.digest)
        return FileEntry(name, self.digest, self.executable)


@dataclass(slots=True)
class Captured:
    """What came of a run.

    `missing` are declared outputs that are not there, `skipped` paths in
    outputs that can't be stored, with the reason; `deleted` are inputs that
    are gone, `unexpected` files that were written and belong to no output.
    `root` is a tree with the outputs at their paths.
    """

    root: Digest
    outputs: list[Output] = field(default_factory=list)
    missing: list[bytes] = field(default_factory=list)
    skipped: list[tuple[bytes, str]] = field(default_factory=list)
    deleted: list[bytes] = field(default_factory=list)
    unexpected: list[bytes] = field(default_factory=list)


def check_output_paths(paths: Iterable[bytes]) -> list[bytes]:
    """The paths in order, each once. Raises BadName for one that is absolute, leaves the tree, or is in another."""
    checked = sorted({path.rstrip(b"/") or path for path in paths}, key=path_order)
    for path in checked:
        split_path(path, "output")
    for one, other in pairwise(checked):
        if other.startswith(one + b"/"):
            raise BadName(f"output {printable(other)} is inside of output {printable(one)}: name the outer one only")
    return checked


def find_symlink_above(top: Path, path: bytes) -> bytes | None:
    """The first directory on the way to `path` that is a symbolic link, or None."""
    components = path.split(b"/")
    for depth in range(1, len(components)):
        parent = b"/".join(components[:depth])
        if os.path.islink(os.path.join(os.fsencode(top), parent)):
            return parent
    return None


def capture(
    store: Store, upper: Path, merged: Path, lower: Path, paths: Sequence[bytes], function: DigestFunction
) -> Captured:
    """Bring the outputs at `paths` (of `check_output_paths`) into the store, durably.

    Raises StoreError (NoSpace) if the store can't take them, OSError.
    """
    with store.ingest() as ingest:
        builder = TreeBuilder(store.index, ingest, function)
        taking = _Taking(upper, merged, function, ingest, builder, _transfer(store, upper))
        for path in paths:
            taking.take(path)
        root = builder.add_paths((output.path, output.entry) for output in taking.outputs)
        builder.finish(root)
    captured = Captured(root, taking.outputs, taking.missing, taking.skipped)
    _report_changes(upper, lower, set(paths), captured)
    return captured


def _transfer(store: Store, upper: Path) -> Transfer:
    same = os.stat(upper).st_dev == os.stat(store.layout.tmp).st_dev
    return Transfer.HARDLINK if same else Transfer.AUTO


class _Taking:
    """The state of one capture."""

    def __init__(
        self,
        upper: Path,
        merged: Path,
        function: DigestFunction,
        ingest: Ingest,
        builder: TreeBuilder,
        transfer: Transfer,
    ) -> None:
        self._upper, self._merged = os.fsencode(upper), os.fsencode(merged)
        self._function, self._ingest, self._builder, self._transfer = function, ingest, builder, transfer
        self.outputs: list[Output] = []
        self.missing: list[bytes] = []
        self.skipped: list[tuple[bytes, str]] = []

    def take(self, path: bytes) -> None:
        """One declared output."""
        link = find_symlink_above(Path(os.fsdecode(self._merged)), path)
        if link is not None:
            self.skipped.append((path, f"it is behind the symbolic link {printable(link)}"))
            return
        place = os.path.join(self._merged, path)
        try:
            mode = os.lstat(place).st_mode
        except (FileNotFoundError, NotADirectoryError):
            self.missing.append(path)
            return
        if stat.S_ISDIR(mode):
            digest = self._take_directory(path)
            self.outputs.append(Output(path, "directory", digest))
            return
        entry = self._take_entry(path, mode)
        if isinstance(entry, FileEntry):
            self.outputs.append(Output(path, "file", entry.digest, entry.executable))
        elif isinstance(entry, SymlinkEntry):
            self.outputs.append(Output(path, "symlink", None, target=entry.target))

    def _take_directory(self, top: bytes) -> Digest:
        """A directory and all below, from the leaves up; a tree may be deeper than Python's stack."""
        found: list[tuple[bytes, list[Entry], list[bytes]]] = []
        pending = [top]
        while pending:
            path = pending.pop()
            entries: list[Entry] = []
            children: list[bytes] = []
            found.append((path, entries, children))
            for name, mode in self._list(path):
                inner = path + b"/" + name
                if stat.S_ISDIR(mode):
                    children.append(inner)
                elif (entry := self._take_entry(inner, mode)) is not None:
                    entries.append(entry)
            pending.extend(children)
        digests: dict[bytes, Digest] = {}
        for path, entries, children in reversed(found):
            entries.extend(DirectoryEntry(child.rpartition(b"/")[2], digests.pop(child)) for child in children)
            digests[path] = self._builder.add_directory(entries)
        return digests[top]

    def _list(self, path: bytes) -> list[tuple[bytes, int]]:
        try:
            with os.scandir(os.path.join(self._merged, path)) as listing:
                return sorted((item.name, item.stat(follow_symlinks=False).st_mode) for item in listing)
        except OSError as error:
            self.skipped.append((path, f"it can't be read: {error.strerror}"))
            return []

    def _take_entry(self, path: bytes, mode: int) -> FileEntry | SymlinkEntry | None:
        name = path.rpartition(b"/")[2]
        place = os.path.join(self._merged, path)
        if stat.S_ISLNK(mode):
            target = os.readlink(place)
            check_target(target, printable(path))
            return SymlinkEntry(name, target)
        if not stat.S_ISREG(mode):
            self.skipped.append((path, f"it is a {describe_kind(mode)}"))
            return None
        return FileEntry(name, self._take_file(path, place), bool(mode & 0o100))

    def _take_file(self, path: bytes, place: bytes) -> Digest:
        written = os.path.join(self._upper, path)
        try:
            status = os.lstat(written)
        except (FileNotFoundError, NotADirectoryError):
            status = None
        if status is None or not stat.S_ISREG(status.st_mode):
            # An input that the action left as it was: known already, so nothing is copied for long.
            return self._ingest.add_file(place, self._function)
        _make_plain(written, status.st_mode)
        return self._ingest.add_file(written, self._function, transfer=self._transfer)


def _make_plain(path: bytes, mode: int) -> None:
    """Let the owner read a file, and take overlayfs's notes off it: the file itself becomes the blob."""
    if not mode & 0o400:
        os.chmod(path, mode & 0o777 | 0o400)
    for name in os.listxattr(path, follow_symlinks=False):
        if name.startswith(_XATTR_PREFIX):
            with suppress(OSError):
                os.removexattr(path, name, follow_symlinks=False)


def _report_changes(upper: Path, lower: Path, outputs: set[bytes], captured: Captured) -> None:
    """Fill in what was deleted and what was written beside the outputs."""
    for path, mode, device in _walk(os.fsencode(upper), captured):
        if stat.S_ISCHR(mode) and device == 0:
            captured.deleted.append(path)
        elif stat.S_ISDIR(mode):
            captured.deleted.extend(_hidden_below(os.fsencode(upper), os.fsencode(lower), path))
        elif not _is_declared(path, outputs):
            captured.unexpected.append(path)
    captured.deleted.sort()
    captured.unexpected.sort()


def _is_declared(path: bytes, outputs: set[bytes]) -> bool:
    components = path.split(b"/")
    return any(b"/".join(components[:depth]) in outputs for depth in range(1, len(components) + 1))


def _walk(top: bytes, captured: Captured) -> Iterator[tuple[bytes, int, int]]:
    """Path, mode and device number of everything below `top`."""
    pending = [b""]
    while pending:
        prefix = pending.pop()
        try:
            with os.scandir(os.path.join(top, prefix)) as listing:
                items = [(prefix + item.name, item.stat(follow_symlinks=False)) for item in listing]
        except OSError as error:
            captured.skipped.append((prefix.rstrip(b"/"), f"it can't be read: {error.strerror}"))
            continue
        for path, status in items:
            yield path, status.st_mode, status.st_rdev
            if stat.S_ISDIR(status.st_mode):
                pending.append(path + b"/")


def _hidden_below(upper: bytes, lower: bytes, path: bytes) -> list[bytes]:
    """What a directory that replaced one of the inputs hides of it."""
    try:
        if os.getxattr(os.path.join(upper, path), _OPAQUE) != b"y":
            return []
        names = os.listdir(os.path.join(lower, path))
    except OSError:
        return []
    return [path + b"/" + name for name in names if not os.path.lexists(os.path.join(upper, path, name))]
