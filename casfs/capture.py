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

from casfs.overlay import Family
from casfs.unchanged import Unchanged
from store.digest import Digest, DigestFunction
from store.entries import (
    DirectoryEntry,
    Entry,
    FileEntry,
    SymlinkEntry,
    check_target,
    path_order,
    printable,
    split_path,
)
from store.errors import BadName
from store.ingest import Ingest, Transfer
from store.repository import Store
from store.scan import describe_kind
from store.treebuilder import TreeBuilder
from store.trees import find_path, get_directory, list_entries

_OPAQUE = "user.overlay.opaque"
_XATTR_PREFIX = "user.overlay."
_METACOPY = Family.TRUSTED.value.metacopy


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
class Taken:
    """What came of a run.

    `missing` are declared outputs that are not there, `skipped` paths in
    outputs that can't be stored, with the reason; `deleted` are inputs that
    are gone, `unexpected` files that were written and belong to no output.
    `directories` has the entries of each directory in an output, by digest.
    """

    outputs: list[Output] = field(default_factory=list)
    missing: list[bytes] = field(default_factory=list)
    skipped: list[tuple[bytes, str]] = field(default_factory=list)
    deleted: list[bytes] = field(default_factory=list)
    unexpected: list[bytes] = field(default_factory=list)
    directories: dict[Digest, list[Entry]] = field(default_factory=dict)


@dataclass(slots=True)
class Captured(Taken):
    """The same, with `root`: a tree with the outputs at their paths."""

    root: Digest = field(kw_only=True)


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


def capture(store: Store, upper: Path, merged: Path, inputs: Digest, paths: Sequence[bytes]) -> Captured:
    """Bring the outputs at `paths` (of `check_output_paths`) into the store, durably.

    `inputs` is the root that lay below. Raises StoreError (NoSpace) if the store can't take them, OSError.
    """
    with store.ingest() as ingest:
        builder = TreeBuilder(store.index, ingest, inputs.function)
        captured = Captured(root=inputs)
        _take(store, upper, merged, inputs, paths, ingest, builder, captured)
        captured.root = builder.add_paths((output.path, output.entry) for output in captured.outputs)
        builder.finish(captured.root)
    return captured


def take(store: Store, upper: Path, merged: Path, inputs: Digest, paths: Sequence[bytes], ingest: Ingest) -> Taken:
    """As `capture`, into a session of the caller's, whose flush makes it durable. No tree is made of the outputs."""
    taken = Taken()
    builder = TreeBuilder(store.index, ingest, inputs.function)
    _take(store, upper, merged, inputs, paths, ingest, builder, taken)
    return taken


def _take(
    store: Store,
    upper: Path,
    merged: Path,
    inputs: Digest,
    paths: Sequence[bytes],
    ingest: Ingest,
    builder: TreeBuilder,
    taken: Taken,
) -> None:
    unchanged = Unchanged(store, os.fsencode(upper), inputs)
    taking = _Taking(upper, merged, inputs.function, unchanged, ingest, builder, _transfer(store, upper), taken)
    for path in paths:
        taking.take(path)
    _report_changes(store, upper, inputs, set(paths), taken)


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
        unchanged: Unchanged,
        ingest: Ingest,
        builder: TreeBuilder,
        transfer: Transfer,
        taken: Taken,
    ) -> None:
        self._unchanged = unchanged
        self._taken = taken
        self._upper, self._merged = os.fsencode(upper), os.fsencode(merged)
        self._function, self._ingest, self._builder, self._transfer = function, ingest, builder, transfer
        self._plain: set[bytes] = set()
        """Directories on the way to which there is no symbolic link: many outputs lie in few of them."""

    def take(self, path: bytes) -> None:
        """One declared output."""
        parent = path.rpartition(b"/")[0]
        if parent not in self._plain:
            link = find_symlink_above(Path(os.fsdecode(self._merged)), path)
            if link is not None:
                self._taken.skipped.append((path, f"it is behind the symbolic link {printable(link)}"))
                return
            self._plain.add(parent)
        place = os.path.join(self._merged, path)
        try:
            mode = os.lstat(place).st_mode
        except (FileNotFoundError, NotADirectoryError):
            self._taken.missing.append(path)
            return
        if stat.S_ISDIR(mode):
            digest = self._take_directory(path)
            self._taken.outputs.append(Output(path, "directory", digest))
            return
        entry = self._take_entry(path, mode)
        if isinstance(entry, FileEntry):
            self._taken.outputs.append(Output(path, "file", entry.digest, entry.executable))
        elif isinstance(entry, SymlinkEntry):
            self._taken.outputs.append(Output(path, "symlink", None, target=entry.target))

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
            digests[path] = digest = self._builder.add_directory(entries)
            self._taken.directories[digest] = entries
        return digests[top]

    def _list(self, path: bytes) -> list[tuple[bytes, int]]:
        try:
            with os.scandir(os.path.join(self._merged, path)) as listing:
                return sorted((item.name, item.stat(follow_symlinks=False).st_mode) for item in listing)
        except OSError as error:
            self._taken.skipped.append((path, f"it can't be read: {error.strerror}"))
            return []

    def _take_entry(self, path: bytes, mode: int) -> FileEntry | SymlinkEntry | None:
        name = path.rpartition(b"/")[2]
        place = os.path.join(self._merged, path)
        if stat.S_ISLNK(mode):
            target = os.readlink(place)
            check_target(target, printable(path))
            return SymlinkEntry(name, target)
        if not stat.S_ISREG(mode):
            self._taken.skipped.append((path, f"it is a {describe_kind(mode)}"))
            return None
        return FileEntry(name, self._take_file(path, place), bool(mode & 0o100))

    def _take_file(self, path: bytes, place: bytes) -> Digest:
        written = os.path.join(self._upper, path)
        try:
            status = os.lstat(written)
        except (FileNotFoundError, NotADirectoryError):
            status = None
        if status is None:
            entry = self._unchanged.find(path)
            if entry is not None and self._ingest.add_known(
                entry.digest, lambda: self._ingest.add_file(place, self._function), executable=entry.executable
            ):
                return entry.digest
        if status is None or not stat.S_ISREG(status.st_mode) or _is_without_bytes(written):
            # An input whose bytes the action left as they were, perhaps elsewhere: known already, so nothing is copied
            # for long.
            return self._ingest.add_file(place, self._function)
        _make_plain(written, status.st_mode)
        return self._ingest.add_file(written, self._function, transfer=self._transfer)


def _is_without_bytes(path: bytes) -> bool:
    """Whether only an input's attributes were changed: with `trusted` xattrs overlayfs copies nothing else then."""
    return _METACOPY in os.listxattr(path, follow_symlinks=False)


def _make_plain(path: bytes, mode: int) -> None:
    """Let the owner read a file, and take overlayfs's notes off it: the file itself becomes the blob."""
    if not mode & 0o400:
        os.chmod(path, mode & 0o777 | 0o400)
    for name in os.listxattr(path, follow_symlinks=False):
        if name.startswith(_XATTR_PREFIX):
            with suppress(OSError):
                os.removexattr(path, name, follow_symlinks=False)


def _report_changes(store: Store, upper: Path, inputs: Digest, outputs: set[bytes], taken: Taken) -> None:
    """Fill in what was deleted and what was written beside the outputs."""
    for path, mode, device in _walk(os.fsencode(upper), taken):
        if stat.S_ISCHR(mode) and device == 0:
            taken.deleted.append(path)
        elif stat.S_ISDIR(mode):
            taken.deleted.extend(_hidden_below(store, os.fsencode(upper), inputs, path))
        elif not _is_declared(path, outputs):
            taken.unexpected.append(path)
    taken.deleted.sort()
    taken.unexpected.sort()


def _is_declared(path: bytes, outputs: set[bytes]) -> bool:
    components = path.split(b"/")
    return any(b"/".join(components[:depth]) in outputs for depth in range(1, len(components) + 1))


def _walk(top: bytes, taken: Taken) -> Iterator[tuple[bytes, int, int]]:
    """Path, mode and device number of everything below `top`."""
    pending = [b""]
    while pending:
        prefix = pending.pop()
        try:
            with os.scandir(os.path.join(top, prefix)) as listing:
                items = [(prefix + item.name, item.stat(follow_symlinks=False)) for item in listing]
        except OSError as error:
            taken.skipped.append((prefix.rstrip(b"/"), f"it can't be read: {error.strerror}"))
            continue
        for path, status in items:
            yield path, status.st_mode, status.st_rdev
            if stat.S_ISDIR(status.st_mode):
                pending.append(path + b"/")


def _hidden_below(store: Store, upper: bytes, inputs: Digest, path: bytes) -> list[bytes]:
    """What a directory that replaced one of the inputs hides of it."""
    try:
        if os.getxattr(os.path.join(upper, path), _OPAQUE) != b"y":
            return []
    except OSError:
        return []
    with store.index.view() as view:
        below = find_path(view, get_directory(view, inputs).id, path)
        if below is None or not below.id:
            return []
        names = [row.entry.name for row in list_entries(view, below.id)]
    return [path + b"/" + name for name in names if not os.path.lexists(os.path.join(upper, path, name))]
