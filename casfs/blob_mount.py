"""Fetching below the kernel engine: the last data-only layer, a FUSE file system of blobs by their names.

Overlayfs looks a file's bytes up when it is first opened: in the blob
directory, and what isn't there, here. A lookup here fetches the blob into the
blob directory and then says ESTALE, upon which the kernel begins the whole open
again, and now finds the blob where it belongs. So nothing is ever read through
this file system, neither once nor later; and it needs no passthrough, nor any
of the two levels that file systems may be stacked.

    /          directories 00 … ff, as in the blob directory of one digest function
    /ab/<hash> never shown: ENOENT where nothing is known of it, else as above

A failed fetch is EIO and forgotten: the next open asks again. When this
process is gone, a lookup of what is missing is ENOTCONN at once.

The session runs in a thread of its own; everything here may be called from any.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from casfs.fusemount import make_unattached
from casfs.session import Session
from casfs.tree import FIXED_MTIME_NS, ROOT, Node, NodeId, NoSuchNode, NotADirectory, NotYet
from store.digest import Digest, DigestFunction
from store.entries import FileEntry, ReferenceEntry, printable
from store.layout import hash_of_name
from store.repository import Store

_DIRECTORY = stat.S_IFDIR | 0o555
_SHARDS = 256
_END_SECONDS = 2.0


class _Names:
    """The tree that the session serves. Implements `casfs.tree.Tree`."""

    def __init__(self, store: Store, function: DigestFunction) -> None:
        self._store = store
        self._function = function
        # A name has no size, and a digest has one. Single operations of a dict are atomic.
        self.expected: dict[bytes, tuple[int, bytes]] = {}

    def lookup(self, parent: NodeId, name: bytes) -> Node | None:
        """A directory, or None. Raises NotYet for a blob that is being fetched now."""
        if parent == ROOT:
            try:
                number = int(name, 16) if len(name) == 2 and name == name.lower() else _SHARDS
            except ValueError:
                return None
            return self.get_node(NodeId(ROOT + 1 + number)) if 0 <= number < _SHARDS else None
        if not ROOT < parent <= ROOT + _SHARDS:
            raise NoSuchNode(f"node {parent}")
        hash_ = hash_of_name(f"{parent - ROOT - 1:02x}", os.fsdecode(name))
        if hash_ is None:
            return None
        size, path = self.expected.get(hash_) or (self._store.blobs.size_on_disk(self._function, hash_), b"")
        if size is None:
            return None
        digest = Digest(self._function, hash_, size)
        if self._store.blobs.is_verified(digest) and self._store.blobs.has_file(digest):
            raise NoSuchNode(f"{digest} is where it belongs")
        raise NotYet(self._store.hydrator.fetch(digest), f"open {printable(path)}")

    def get_node(self, node_id: NodeId) -> Node:
        """A directory. Raises NoSuchNode."""
        if not ROOT <= node_id <= ROOT + _SHARDS:
            raise NoSuchNode(f"node {node_id}")
        return Node(node_id, _DIRECTORY, 0, FIXED_MTIME_NS, 2, None, 1)

    def list_directory(self, node_id: NodeId, cookie: int) -> Iterator[tuple[int, bytes, Node]]:
        """The directories, in the root; nothing else is ever shown."""
        for number in range(cookie, _SHARDS) if node_id == ROOT else ():
            yield number + 1, b"%02x" % number, self.get_node(NodeId(ROOT + 1 + number))

    def path_of(self, node_id: NodeId) -> bytes:
        """Its name."""
        return b"" if node_id == ROOT else b"%02x" % (node_id - ROOT - 1)

    def parent_of(self, node_id: NodeId) -> NodeId:
        """The root."""
        return ROOT

    def totals(self) -> tuple[int, int]:
        """Nodes, and bytes of none."""
        return 1 + _SHARDS, 0


class _NoContents:
    """Nothing here is opened. Implements `casfs.session.Opener`."""

    def open_now(self, entry: FileEntry | ReferenceEntry) -> NoReturn:
        raise NotADirectory("no file is shown here")

    open = open_now


class BlobMount:
    """A data-only layer that fetches blobs of one digest function; `close` ends it."""

    def __init__(self, store: Store, function: DigestFunction) -> None:
        """Raises MissingCapability where this process can't make FUSE file systems."""
        self._names = _Names(store, function)
        self._device, self._mount = make_unattached()
        self._session = Session(self._device, self._names, _NoContents(), passthrough=False)
        try:
            self._session.begin()
        except BaseException:
            os.close(self._mount)
            os.close(self._device)
            raise
        self._thread = threading.Thread(target=self._session.run, name="blob mount", daemon=True)
        self._thread.start()
        # The directories are looked up now, all at once, and remembered by the kernel.
        root = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._mount)
        try:
            os.listdir(root)
        finally:
            os.close(root)

    @property
    def layer(self) -> int:
        """A descriptor of its root, for `casfs.overlay.stack`."""
        return self._mount

    def expect(self, missing: Iterable[tuple[bytes, Digest]]) -> None:
        """Blobs that will be asked for, each with a path where it is needed, for the log."""
        for path, digest in missing:
            self._names.expected[digest.hash] = digest.size, path

    def upcalls(self) -> dict[str, int]:
        """Counts of requests by opcode."""
        counts: dict[str, int] = self._session.statistics()["upcalls"]
        return counts

    def statistics(self) -> dict[str, Any]:
        """What the session counted, as `casfs stats` shows it of a mount."""
        return {**self._session.statistics(), "engine": "kernel"}

    def wait(self) -> None:
        """Until the last mount that has it below is gone; none can be made any more."""
        os.close(self._mount)
        self._mount = -1
        self._thread.join()

    def close(self) -> None:
        """Let go of it. Mounts that have it below keep it until they are gone."""
        if self._mount >= 0:
            os.close(self._mount)
            self._mount = -1
        # It ends by itself with the last mount; closing the device under a reader would do no good.
        self._thread.join(_END_SECONDS)
        if not self._thread.is_alive():
            os.close(self._device)
