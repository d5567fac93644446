"""Whether all inputs of an action can be had, without looking twice at what was whole before.

Each interned directory that was found whole is remembered by its id, as long
as nothing is removed from the store (`Presence.generation`); so for an input
root that differs from one before in a few directories, only those are looked
at. Threads may share an `Inputs`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from store.digest import Digest
from store.entries import FileEntry
from store.presence import Finder, Name, as_digest, as_name
from store.repository import Store
from store.trees import Directory, find_directory, get_directory, list_entries

_REMEMBER_MOST = 1_000_000


class Inputs:
    """The input roots of one store."""

    def __init__(self, store: Store, finder: Finder) -> None:
        """`finder` knows what can be had: here, or from an upstream."""
        self._store = store
        self._finder = finder
        self._whole: set[int] = set()
        self._generation = -1

    def open(self, root: Digest) -> Directory:
        """The interned tree; made from its messages where it wasn't. Raises MissingBlob, BadTree."""
        with self._store.index.view() as view:
            directory = find_directory(view, root)
        return directory or self._store.importer.from_messages(root)

    def find_missing(self, root: Digest) -> list[Digest]:
        """The blobs of a tree that can't be had; the others count as used. Raises MissingTree."""
        generation = self._finder.generation()
        if generation != self._generation:
            self._whole, self._generation = set(), generation
        whole = self._whole
        names: dict[Name, None] = {}
        seen: set[int] = set()
        with self._store.index.view() as view:
            pending = [get_directory(view, root).id]
            while pending:
                number = pending.pop()
                if number in whole or number in seen:
                    continue
                seen.add(number)
                for row in list_entries(view, number):
                    if row.id:
                        pending.append(row.id)
                    elif isinstance(row.entry, FileEntry):
                        names[as_name(row.entry.digest)] = None
        missing = self._finder.find_absent(names) if names else []
        if not missing:
            if len(whole) > _REMEMBER_MOST:
                whole.clear()
            whole |= seen
        return [as_digest(name) for name in missing]


def find_missing_messages(store: Store, root: Digest, finder: Finder) -> Sequence[Digest]:
    """The Directory messages of a tree that can't be had, of which at least one is.

    Those below a missing one aren't known.
    """
    from store.directory import decode_directory
    from store.entries import DirectoryEntry
    from store.errors import StoreError

    def below(digest: Digest) -> Iterable[Digest]:
        try:
            with open(store.blobs.open(digest), "rb") as file:
                entries = decode_directory(file.read(), digest.function)
        except StoreError:
            return ()
        return [entry.digest for entry in entries if isinstance(entry, DirectoryEntry)]

    seen = {root}
    pending = [root]
    while pending:
        for digest in below(pending.pop()):
            if digest not in seen:
                seen.add(digest)
                pending.append(digest)
    return [as_digest(name) for name in finder.find_absent([as_name(digest) for digest in seen])]
