"""From what a person writes (a manifest's name, a digest, a path in one) to what the index has."""

from __future__ import annotations

import argparse
import os
import re
from typing import NamedTuple

from store.digest import Digest
from store.entries import DirectoryEntry, Entry, SymlinkEntry, printable
from store.errors import BadInput, BadName, NotFound
from store.index import View
from store.repository import Store
from store.trees import Directory, Row, find_directory, find_entry
from tools.commands import complete

_SYMLINKS_MOST = 40
"""As many as the kernel follows in one path."""

_DIGEST_AND_PATH = re.compile(r"([^/:]*:[^/]*/[^/]*)(?:/(.*))?", re.DOTALL)
"""Whether it is a right digest is `Digest.parse`'s to say: no manifest's name has a colon."""


class MissingPath(NotFound):
    """A manifest has no such path."""


class Root(NamedTuple):
    """A tree that was named; `name` is its manifest's, None where a digest was given."""

    name: str | None
    directory: Directory

    @property
    def label(self) -> str:
        """What to call it in a message."""
        return self.name or str(self.directory.digest)


def add_manifest_argument(parser: argparse.ArgumentParser, name: str = "manifest", **options: str) -> argparse.Action:
    """An argument that takes a manifest's name or a root's digest."""
    action = parser.add_argument(
        name,
        metavar=options.pop("metavar", name.upper()),
        help=options.pop("help", "a manifest's name, or the digest of a root: blake3:HEX/SIZE"),
        **options,  # type: ignore[arg-type]
    )
    complete(action, "manifest")
    return action


def get_root(store: Store, text: str) -> Root:
    """The tree of a manifest's name or a root's digest.

    A root that is only in the store as Directory messages is interned. Raises
    MissingManifest, MissingBlob, BadDigest, BadTree.
    """
    if ":" not in text:
        manifest = store.manifests.get(text)
        return Root(text, _get_directory(store, manifest.root))
    return Root(None, _get_directory(store, Digest.parse(text)))


def _get_directory(store: Store, root: Digest) -> Directory:
    with store.index.view() as view:
        directory = find_directory(view, root)
    if directory is not None and directory.digest.size != root.size:
        raise BadInput(f"{root} names a wrong size: the directory with that hash has {directory.digest.size} bytes")
    return directory or store.importer.from_messages(root)


def split_tree_path(text: str) -> tuple[str, bytes]:
    """``NAME/PATH`` or ``DIGEST/PATH`` as the manifest and the path in it (empty for its root)."""
    if match := _DIGEST_AND_PATH.fullmatch(text):
        return match[1], _clean(match[2] or "")
    manifest, _, path = text.partition("/")
    return manifest, _clean(path)


def _clean(path: str) -> bytes:
    parts = [part for part in os.fsencode(path).split(b"/") if part and part != b"."]
    if b".." in parts:
        raise BadName(f"{path!r}: a path in a manifest has no '..'")
    return b"/".join(parts)


class Found(NamedTuple):
    """What a path leads to: `row` is None for the root itself, `directory` 0 for what is no directory."""

    path: bytes
    row: Row | None
    directory: int

    @property
    def entry(self) -> Entry | None:
        """The entry, or None for the root."""
        return None if self.row is None else self.row.entry


def get_path(view: View, root: Root, path: bytes, *, follow: bool) -> Found:
    """What is at a path of a tree.

    Symbolic links on the way are followed as long as they lead to places in
    the tree, and with `follow` one at the end, too. Raises MissingPath, BadInput for a link that leads out or
    around in circles.
    """
    wanted = [part for part in reversed(path.split(b"/")) if part]
    trail: list[Found] = [Found(b"", None, root.directory.id)]
    followed = 0
    while wanted:
        name = wanted.pop()
        if name == b".":
            continue
        if name == b"..":
            if len(trail) == 1:
                raise BadInput(f"{printable(path)} of {root.label} leads out of it, through a symbolic link")
            trail.pop()
            continue
        here = trail[-1]
        if not here.directory:
            raise MissingPath(f"{root.label} has no {printable(path)}: {printable(here.path)} is not a directory")
        row = find_entry(view, here.directory, name)
        where = here.path + b"/" + name if here.path else name
        if row is None:
            raise MissingPath(f"{root.label} has no {printable(path)}{_where_it_ends(where, path)}")
        if (follow or wanted) and isinstance(row.entry, SymlinkEntry):
            followed += 1
            if followed > _SYMLINKS_MOST:
                raise BadInput(f"{printable(path)} of {root.label}: too many symbolic links")
            if row.entry.target.startswith(b"/"):
                raise BadInput(
                    f"{printable(where)} of {root.label} is a symbolic link to {printable(row.entry.target)}, "
                    "which is not in it"
                )
            wanted.extend(part for part in reversed(row.entry.target.split(b"/")) if part)
            continue
        trail.append(Found(where, row, row.id if isinstance(row.entry, DirectoryEntry) else 0))
    return trail[-1]


def _where_it_ends(where: bytes, path: bytes) -> str:
    return "" if where == path else f": there is no {printable(where)}"
