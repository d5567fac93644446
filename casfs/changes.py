"""Changes of a mounted tree, and their JSON: what `casfs remap` hands to the daemon. No I/O.

    {"op": "add", "path": "a/b", "file": "blake3:…/12", "executable": false, "mtime_ns": null}
    {"op": "replace", "path": "a/b", "directory": "blake3:…/34"}
    {"op": "add", "path": "link", "symlink": "a/b", "mtime_ns": null}
    {"op": "add", "path": "c", "reference": "/host/file", "stamp": [device, inode, size, mtime_ns, ctime_ns],
     "executable": true}
    {"op": "remove", "path": "a/b"}

Names that are not UTF-8 are written as Python writes them (surrogateescape).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, cast

from casfs.errors import BadChange
from store.digest import Digest
from store.entries import (
    DirectoryEntry,
    Entry,
    FileEntry,
    ReferenceEntry,
    Stamp,
    SymlinkEntry,
    check_stamp,
    check_target,
    printable,
)
from store.errors import BadInput

NOT_STEERABLE = (
    "what this mount shows can't be changed: it is writable, or engine kernel; mount it with --engine passthrough, "
    "native or fuse, and without --writable"
)
"""Of mounts whose layers the kernel keeps: it doesn't notice when those below change."""


class Change(NamedTuple):
    """One change at a path: ``add`` (nothing may be there), ``replace`` (something must) or ``remove``.

    `entry` is what shall be there, of the same name as the path's end; None for ``remove``.
    """

    kind: Literal["add", "replace", "remove"]
    path: bytes
    entry: Entry | None = None


def digests_of(changes: Iterable[Change]) -> set[Digest]:
    """The blobs and trees that are put somewhere: what has to be held from collection."""
    return {change.entry.digest for change in changes if isinstance(change.entry, FileEntry | DirectoryEntry)}


def encode_changes(changes: Iterable[Change]) -> list[dict[str, Any]]:
    """Changes as JSON, for a daemon that makes them."""
    return [_encode(change) for change in changes]


def _encode(change: Change) -> dict[str, Any]:
    encoded: dict[str, Any] = {"op": change.kind, "path": os.fsdecode(change.path)}
    entry = change.entry
    if isinstance(entry, FileEntry):
        return {**encoded, "file": str(entry.digest), "executable": entry.executable, "mtime_ns": entry.mtime_ns}
    if isinstance(entry, DirectoryEntry):
        return {**encoded, "directory": str(entry.digest)}
    if isinstance(entry, SymlinkEntry):
        return {**encoded, "symlink": os.fsdecode(entry.target), "mtime_ns": entry.mtime_ns}
    if isinstance(entry, ReferenceEntry):
        stamp = list(entry.stamp)
        return {**encoded, "reference": os.fsdecode(entry.path), "stamp": stamp, "executable": entry.executable}
    return encoded


def decode_changes(encoded: object) -> list[Change]:
    """The changes again. Raises BadChange for what `encode_changes` doesn't make."""
    try:
        return [_decode(change) for change in cast("list[dict[str, Any]]", encoded)]
    except (KeyError, TypeError, ValueError, BadInput) as error:
        raise BadChange(f"not a list of changes: {error}") from error


def _decode(encoded: dict[str, Any]) -> Change:
    path = os.fsencode(encoded["path"])
    name = path.rpartition(b"/")[2]
    kind = encoded["op"]
    if kind not in ("add", "replace", "remove"):
        raise BadChange(f"{kind!r} is no kind of change: add, replace or remove")
    entry: Entry | None = None
    if "file" in encoded:
        entry = FileEntry(name, Digest.parse(encoded["file"]), bool(encoded["executable"]), encoded["mtime_ns"])
    elif "directory" in encoded:
        entry = DirectoryEntry(name, Digest.parse(encoded["directory"]))
    elif "symlink" in encoded:
        entry = SymlinkEntry(name, os.fsencode(encoded["symlink"]), encoded["mtime_ns"])
        check_target(entry.target, printable(path))
    elif "reference" in encoded:
        stamp = Stamp(*encoded["stamp"])
        check_stamp(stamp)
        entry = ReferenceEntry(name, os.fsencode(encoded["reference"]), stamp, bool(encoded["executable"]))
    if (entry is None) != (kind == "remove"):
        raise BadChange(f"{kind} {printable(path)}: only add and replace have something to put there, and need it")
    return Change(kind, path, entry)
