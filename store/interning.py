"""Interning a tree of which little is new, as nearly every action has one: without a session, with one look a level.

`store.importing` does the same for any tree, and fetches what is missing. Any
thread may call.
"""

from __future__ import annotations

from collections.abc import Mapping

from store.blobs import Blobs
from store.digest import Digest
from store.directory import decode_directory
from store.entries import DirectoryEntry, Entry
from store.errors import BadTree, CorruptBlob, MissingBlob
from store.index import Index
from store.trees import Directory, find_directory, intern_directories

_FEW = 64
"""Directories: reading more may take so long that a collection has to spare them meanwhile, which takes a session."""
_MESSAGE_MOST = 1 << 20


def intern_few(index: Index, blobs: Blobs, root: Digest) -> Directory | None:
    """The tree of Directory messages with that root; None where many are new, or one isn't here or is too large.

    Raises BadTree.
    """
    try:
        new = _read_new(index, blobs, root)
    except (MissingBlob, CorruptBlob):
        return None
    if new is None:
        return None
    batch = _in_order(root, new)
    if batch:
        # Undone by a crash of the machine, it is done again.
        index.update(lambda change: intern_directories(change, batch), lasting=False)
    with index.view() as view:
        return find_directory(view, root)


def _read_new(index: Index, blobs: Blobs, root: Digest) -> dict[Digest, list[Entry]] | None:
    """The entries of each directory that isn't interned; None where those are too many, or one is too large."""
    new: dict[Digest, list[Entry]] = {}
    level = _not_interned(index, {root: None})
    while level:
        if len(new) + len(level) > _FEW or any(digest.size > _MESSAGE_MOST for digest in level):
            return None
        for digest in level:
            try:
                new[digest] = decode_directory(_read(blobs, digest), digest.function)
            except BadTree as error:
                raise BadTree(f"directory {digest} below {root}: {error}") from error
        below = {
            entry.digest: None
            for digest in level
            for entry in new[digest]
            if isinstance(entry, DirectoryEntry) and entry.digest not in new
        }
        level = _not_interned(index, below)
    return new


def _not_interned(index: Index, digests: Mapping[Digest, None]) -> list[Digest]:
    with index.view() as view:
        return [digest for digest in digests if find_directory(view, digest) is None]


def _read(blobs: Blobs, digest: Digest) -> bytes:
    if not digest.size:
        return b""  # the empty blob always exists
    with open(blobs.open(digest), "rb", buffering=0) as file:
        return file.readall()


def _in_order(root: Digest, new: Mapping[Digest, list[Entry]]) -> list[tuple[Digest, list[Entry]]]:
    """The new directories, each after those in it."""
    finished: dict[Digest, list[Entry]] = {}
    pending = [(root, False)]
    while pending:
        digest, below_done = pending.pop()
        if digest in finished or digest not in new:
            continue
        if below_done:
            finished[digest] = new[digest]
            continue
        pending.append((digest, True))
        pending.extend((entry.digest, False) for entry in new[digest] if isinstance(entry, DirectoryEntry))
    return list(finished.items())
