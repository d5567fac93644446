"""From entries to interned trees: messages, digests and index rows, in batches.

One `TreeBuilder` per tree, used from one thread. The Directory messages become
blobs through the ingest session it is given; the rows follow once those are
published, so that an interned directory's message is always in the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from store.digest import Digest, DigestFunction
from store.directory import decode_directory, encode_directory
from store.entries import DirectoryEntry, Entry, printable
from store.errors import BadManifest, BadTree
from store.index import Index
from store.ingest import Ingest
from store.trees import Directory, find_directory, intern_directories

_BATCH_ENTRIES = 50_000


class TreeBuilder:
    """Collects directories from the leaves up."""

    def __init__(self, index: Index, ingest: Ingest, function: DigestFunction) -> None:
        self._index = index
        self._ingest = ingest
        self._function = function
        self._batch: list[tuple[Digest, list[Entry]]] = []
        self._batched: set[bytes] = set()
        self._entries = 0

    def add_directory(self, entries: list[Entry]) -> Digest:
        """Add one directory whose subdirectories were added before; returns its digest.

        `entries` is sorted in place and belongs to the builder from now on.
        """
        entries.sort()
        digest = self._ingest.add_bytes(encode_directory(entries), self._function)
        self._put(digest, entries)
        return digest

    def _put(self, digest: Digest, entries: list[Entry]) -> None:
        if digest.key not in self._batched:
            self._batched.add(digest.key)
            self._batch.append((digest, entries))
            self._entries += len(entries) + 1
            if self._entries >= _BATCH_ENTRIES:
                self.flush()

    def flush(self) -> None:
        """Publish the messages and intern what was added."""
        self._ingest.flush()
        batch, self._batch, self._entries = self._batch, [], 0
        with self._index.view() as view:
            new = any(find_directory(view, digest) is None for digest, _ in batch)
        if new:  # else nothing is written, and nobody waits for a sync
            self._index.update(lambda change: intern_directories(change, batch), lasting=False)

    def finish(self, root: Digest) -> Directory:
        """Flush, and return what is known of the root."""
        self.flush()
        with self._index.view() as view:
            directory = find_directory(view, root)
        if directory is None:
            raise BadTree(f"directory {root} was not added")
        return directory

    def add_paths(self, items: Iterable[tuple[bytes, Entry | None]]) -> Digest:
        """Add a whole tree given as paths, and return its root's digest.

        Each item is a relative path and the entry there, whose name is the
        last component; None stands for a directory, needed only for empty
        ones. The order must be that of `path_order`. Raises BadManifest for a
        path that is there twice, or is a file and a directory at once.
        """
        stack: list[tuple[bytes, list[Entry]]] = [(b"", [])]
        previous: bytes | None = None
        for path, entry in items:
            components = path.split(b"/")
            parents = components if entry is None else components[:-1]
            if path == previous and entry is not None:
                raise BadManifest(f"{printable(path)} is there twice")
            previous = path
            depth = 0
            while depth < len(parents) and depth + 1 < len(stack) and stack[depth + 1][0] == parents[depth]:
                depth += 1
            while len(stack) > depth + 1:
                self._close(stack)
            for name in parents[depth:]:
                siblings = stack[-1][1]
                if siblings and siblings[-1].name == name:
                    clash = b"/".join([*(level[0] for level in stack[1:]), name])
                    raise BadManifest(f"{printable(clash)} is a file and a directory at once")
                stack.append((name, []))
            if entry is not None:
                siblings = stack[-1][1]
                if siblings and siblings[-1].name == entry.name:
                    raise BadManifest(f"{printable(path)} is a file and a directory at once")
                siblings.append(entry)
        while len(stack) > 1:
            self._close(stack)
        return self.add_directory(stack[0][1])

    def _close(self, stack: list[tuple[bytes, list[Entry]]]) -> None:
        name, entries = stack.pop()
        stack[-1][1].append(DirectoryEntry(name, self.add_directory(entries)))

    def add_messages(self, root: Digest, read: Callable[[Digest], bytes]) -> None:
        """Add a tree of which the Directory messages are blobs already, as in the Remote Execution API.

        `read` gives a blob's bytes, and raises MissingBlob. What is interned
        is not looked into again. Raises BadTree for a message that is none.
        """
        waiting: list[tuple[Digest, list[Entry]]] = []
        pending = [root]
        entered: set[bytes] = set()
        while pending:
            digest = pending[-1]
            if waiting and waiting[-1][0] == digest:
                # Its subdirectories have been added since it was entered.
                pending.pop()
                self._put(*waiting.pop())
                continue
            if digest.key in entered or self._is_interned(digest):
                pending.pop()
                continue
            entered.add(digest.key)
            try:
                entries = decode_directory(read(digest), digest.function)
            except BadTree as error:
                raise BadTree(f"directory {digest} below {root}: {error}") from error
            waiting.append((digest, entries))
            pending.extend(e.digest for e in reversed(entries) if isinstance(e, DirectoryEntry))

    def _is_interned(self, digest: Digest) -> bool:
        with self._index.view() as view:
            return find_directory(view, digest) is not None
