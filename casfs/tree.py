"""What the projected file system is: nodes by id, lookups, listings, attributes.

Every session and engine translates this and adds nothing to it. Answers come
from the index, a few B-tree probes each; nothing is loaded when a tree is
opened, and the caches below are bounded.

Node ids are preorder ranks counted from 1 (`store.trees`): they mean the same
in every process and after a restart, and FORGET needs no bookkeeping. They are
the inode numbers too, so equal files at two paths are different inodes.

Threads may share a tree: the caches are plain dicts used by single operations.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import NamedTuple, NewType, Protocol

from store.entries import DirectoryEntry, Entry, FileEntry, ReferenceEntry, SymlinkEntry
from store.index import Index, View
from store.trees import Directory, Row, entry_at, find_entry, list_entries

NodeId = NewType("NodeId", int)

ROOT = NodeId(1)
"""What the kernel calls the root (FUSE_ROOT_ID)."""

FIXED_MTIME_NS = 946_684_800 * 1_000_000_000
"""2000-01-01T00:00:00Z: the time shown where a manifest records none, so that equal trees look equal."""

_new_tuple = tuple.__new__
"""Makes a named tuple without its constructor's call: a third off a listing's time per entry."""

_CACHED_NODES = 1 << 14
_CACHED_DIRECTORIES = 1 << 14


class Node(NamedTuple):
    """One node of a projected tree. `mode` is an st_mode, sizes are bytes, `entry` is None for the root.

    `directory` is the id of the interned directory (0 for what is none), and
    `nodes` the number of nodes of the subtree.
    """

    id: NodeId
    mode: int
    size: int
    mtime_ns: int
    nlink: int
    entry: Entry | None
    directory: int = 0
    nodes: int = 1


class Tree(Protocol):
    """What a session asks of a file system."""

    def get_node(self, node_id: NodeId) -> Node: ...
    def lookup(self, parent: NodeId, name: bytes) -> Node | None: ...
    def list_directory(self, node_id: NodeId, cookie: int) -> Iterable[tuple[int, bytes, Node]]: ...
    def path_of(self, node_id: NodeId) -> bytes: ...
    def parent_of(self, node_id: NodeId) -> NodeId: ...
    def totals(self) -> tuple[int, int]: ...


class NoSuchNode(Exception):
    """An id that no node of the tree has."""


class NotADirectory(Exception):
    """A lookup or listing in something that is no directory."""


class NotYet(Exception):
    """A lookup that can't be answered now. When `future` has ended well, the kernel shall look again: ESTALE."""

    def __init__(self, future: Future[None], what: str) -> None:
        super().__init__(what)
        self.future = future


class ProjectedTree:
    """An interned tree, served from the index. Implements `Tree`."""

    def __init__(self, index: Index, root: Directory, first: NodeId = ROOT) -> None:
        """`first` is the root's id; the other nodes have the next."""
        self._index = index
        self.digest = root.digest
        """The root's."""
        self._root = Node(
            first, stat.S_IFDIR | 0o555, 0, FIXED_MTIME_NS, 2 + root.subdirectories, None, root.id, root.nodes
        )
        self._totals = (root.nodes, root.bytes)
        self._nodes: dict[NodeId, Node] = {}
        self._directories: dict[NodeId, Node] = {first: self._root}

    def totals(self) -> tuple[int, int]:
        """How many nodes the tree has, and the bytes of all its files."""
        return self._totals

    def lookup(self, parent: NodeId, name: bytes) -> Node | None:
        """The node of that name, or None. Raises NotADirectory, NoSuchNode."""
        directory = self._directories.get(parent) or self._get_directory(parent)
        with self._index.view() as view:
            row = find_entry(view, directory.directory, name)
        if row is None:
            return None
        return self._remember(_node_of(parent, row))

    def get_node(self, node_id: NodeId) -> Node:
        """The node with that id. Raises NoSuchNode."""
        node = self._nodes.get(node_id) or self._directories.get(node_id)
        if node is not None:
            return node
        with self._index.view() as view:
            *_, node = self._descend(view, node_id)
        return self._remember(node)

    def list_directory(self, node_id: NodeId, cookie: int) -> Iterator[tuple[int, bytes, Node]]:
        """The entries after `cookie` (0: all) as (cookie after it, name, node), in order of name.

        Holds a view of the index while it is iterated. Raises NotADirectory,
        NoSuchNode.
        """
        directory = self._directories.get(node_id) or self._get_directory(node_id)
        with self._index.view() as view:
            for row in list_entries(view, directory.directory, cookie):
                # What is listed is often opened next, and then asked for by its id alone.
                node = self._remember(_node_of(node_id, row))
                yield row.offset + node.nodes, row.entry.name, node

    def path_of(self, node_id: NodeId) -> bytes:
        """The path of a node, relative to the root. Raises NoSuchNode."""
        with self._index.view() as view:
            return b"/".join(node.entry.name for node in self._descend(view, node_id) if node.entry is not None)

    def parent_of(self, node_id: NodeId) -> NodeId:
        """The id of the directory a node is in; the root's is its own. Raises NoSuchNode."""
        with self._index.view() as view:
            ids = [node.id for node in self._descend(view, node_id)]
        return ids[-2] if len(ids) > 1 else self._root.id

    def _descend(self, view: View, node_id: NodeId) -> Iterator[Node]:
        """The nodes from the root down to the one with that id."""
        node = self._root
        if not node.id <= node_id < node.id + node.nodes:
            raise NoSuchNode(f"node {node_id}")
        yield node
        while node.id != node_id:
            row = entry_at(view, node.directory, node_id - node.id - 1)
            if row is None:
                raise NoSuchNode(f"node {node_id}")
            node = _node_of(node.id, row)
            yield node

    def _get_directory(self, node_id: NodeId) -> Node:
        node = self.get_node(node_id)
        if not node.directory:
            raise NotADirectory(f"node {node_id}")
        return node

    def _remember(self, node: Node) -> Node:
        cache, limit = (self._directories, _CACHED_DIRECTORIES) if node.directory else (self._nodes, _CACHED_NODES)
        if len(cache) >= limit:
            # Forgetting all is cheaper than an order of use, and what is needed comes back in a few probes.
            cache.clear()
            self._directories[self._root.id] = self._root
        cache[node.id] = node
        return node


def _node_of(parent: NodeId, row: Row) -> Node:
    offset, entry, directory, nodes, subdirectories = row
    node_id = NodeId(parent + 1 + offset)
    mode, size, mtime_ns = shown(entry)
    nlink = 2 + subdirectories if directory else 1
    return _new_tuple(Node, (node_id, mode, size, mtime_ns, nlink, entry, directory, nodes))


def shown(entry: Entry) -> tuple[int, int, int]:
    """What an entry is shown with: st_mode, size in bytes, modification time in nanoseconds since the epoch."""
    if isinstance(entry, FileEntry):
        mode = stat.S_IFREG | (0o555 if entry.executable else 0o444)
        return mode, entry.digest.size, FIXED_MTIME_NS if entry.mtime_ns is None else entry.mtime_ns
    if isinstance(entry, DirectoryEntry):
        return stat.S_IFDIR | 0o555, 0, FIXED_MTIME_NS
    if isinstance(entry, SymlinkEntry):
        mtime_ns = FIXED_MTIME_NS if entry.mtime_ns is None else entry.mtime_ns
        return stat.S_IFLNK | 0o777, len(entry.target), mtime_ns
    return stat.S_IFREG | (0o555 if entry.executable else 0o444), entry.stamp.size, entry.stamp.mtime_ns


def content_key(entry: FileEntry | ReferenceEntry) -> bytes:
    """What two files share exactly if their bytes are one file on the host."""
    if isinstance(entry, FileEntry):
        return entry.digest.key
    return repr(entry.stamp).encode() + entry.path
