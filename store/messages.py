"""Directory messages of one tree, read from the store, and brought in from sources where they are missing.

At the first that is missing all of the tree's are fetched: a level of it at a
time, so that a source is asked for many at once; or, where nothing below the
root is known here, by asking a `TreeSource` for the whole tree, which is one
call. What it sends isn't trusted: a message is kept under the digest that it
has, and what is then still missing is fetched by its own.

Used from one thread.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from store.blobs import Blobs
from store.digest import Digest
from store.directory import decode_directory
from store.entries import DirectoryEntry
from store.errors import BadTree, MissingBlob, StoreError
from store.hydration import Hydrator
from store.index import Index
from store.ingest import Ingest
from store.sources import TreeSource
from store.trees import find_directory

log = logging.getLogger("casfs")

_MESSAGE_MOST = 64 << 20
"""Bytes of one message: it is read into memory."""


class Messages:
    """The messages of the tree with that root."""

    def __init__(
        self,
        root: Digest,
        index: Index,
        blobs: Blobs,
        hydrator: Hydrator,
        trees: Sequence[TreeSource],
        ingest: Ingest,
    ) -> None:
        """What `trees` send goes into `ingest`."""
        self._root = root
        self._index = index
        self._blobs = blobs
        self._hydrator = hydrator
        self._trees = trees
        self._ingest = ingest
        self._fetched = False

    def read(self, digest: Digest) -> bytes:
        """One message. Raises MissingBlob, BadTree."""
        if not digest.size:
            return b""  # the empty blob always exists
        if digest.size > _MESSAGE_MOST:
            raise BadTree(f"directory {digest} is too large for a Directory message")
        try:
            descriptor = self._blobs.open(digest)
        except MissingBlob:
            if self._fetched:
                self._hydrator.fetch(digest).result()
            else:
                self._fetched = True
                self._fetch_all()
            descriptor = self._blobs.open(digest)
        with open(descriptor, "rb") as file:
            return file.read()

    def _fetch_all(self) -> None:
        asked = not self._trees
        seen = {self._root}
        level = [self._root]
        while level:
            self._fetch(level)
            below = [digest for digest in self._below(level) if digest not in seen]
            level = self._unknown(dict.fromkeys(below))
            if not asked and level and len(level) == len(set(below)):
                self._ask_for_tree()
            asked = True
            seen.update(level)

    def _fetch(self, digests: Iterable[Digest]) -> None:
        futures = [self._hydrator.fetch(digest) for digest in digests if not self._blobs.has_file(digest)]
        for future in futures:
            future.result()

    def _below(self, level: Iterable[Digest]) -> Iterable[Digest]:
        for digest in level:
            try:
                entries = decode_directory(self.read(digest), digest.function)
            except BadTree as error:
                raise BadTree(f"directory {digest} below {self._root}: {error}") from error
            yield from (entry.digest for entry in entries if isinstance(entry, DirectoryEntry) and entry.digest.size)

    def _unknown(self, digests: Iterable[Digest]) -> list[Digest]:
        """Those that are not interned, so that they have to be read."""
        with self._index.view() as view:
            return [digest for digest in digests if find_directory(view, digest) is None]

    def _ask_for_tree(self) -> None:
        for source in self._trees:
            try:
                for message in source.read_tree(self._root):
                    self._ingest.add_bytes(message, self._root.function)
                self._ingest.flush()
            except (OSError, StoreError) as error:
                # Level by level it may work.
                log.info("no tree %s at once: %s", self._root, error)
