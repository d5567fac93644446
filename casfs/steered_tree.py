"""A tree that can be changed: the one that was mounted, with changes over it.

What is changed is a *directory's entry*; the directory itself keeps its node
id, so whatever the kernel holds of other places stays right. What is put
somewhere has new node ids, never used before: a file that is open goes on being
the old one, and a new open finds the new one.

    segments   ids 1… are the mounted tree; each thing put somewhere has the next
               range of ids: one for a file, all of an interned subtree's nodes
    altered    directory id → its entries that differ from what its segment has

Any thread may read or change it.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, bisect_right, insort
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import NamedTuple

from casfs.changes import Change
from casfs.errors import BadChange
from casfs.tree import ROOT, Node, NodeId, NoSuchNode, NotADirectory, ProjectedTree, shown
from store.entries import (
    DirectoryEntry,
    Entry,
    printable,
    split_path,
)
from store.index import Index
from store.trees import Directory, get_directory

_PARENTS_MOST = 1 << 12
_ADDED = 1 << 40
"""Listings: cookies from here on are those of names that the segment doesn't have; a tree has fewer nodes."""


class Stale(NamedTuple):
    """An entry that the kernel may have cached, and the first id of what was put there before, if that is gone now."""

    parent: NodeId
    name: bytes
    retired: NodeId | None


class _Leaf:
    """A segment of one node that is no directory."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def get_node(self, node_id: NodeId) -> Node:
        return self.node

    def lookup(self, parent: NodeId, name: bytes) -> Node | None:
        raise NotADirectory(f"node {parent}")

    def list_directory(self, node_id: NodeId, cookie: int) -> Iterator[tuple[int, bytes, Node]]:
        raise NotADirectory(f"node {node_id}")

    def path_of(self, node_id: NodeId) -> bytes:
        return b""

    def parent_of(self, node_id: NodeId) -> NodeId:
        return node_id


class _Segment(NamedTuple):
    """Nodes `first` to `end` - 1; where its root is put: the entry `name` of `parent`."""

    first: NodeId
    end: NodeId
    tree: ProjectedTree | _Leaf
    parent: NodeId
    name: bytes


@dataclass(slots=True)
class _Altered:
    """What differs in a directory: by name a node, or None for what is gone; new names have a cookie each."""

    entries: dict[bytes, Node | None] = field(default_factory=dict)
    added: dict[bytes, int] = field(default_factory=dict)
    links: int = 0
    mtime_ns: int = 0


class _Before(NamedTuple):
    """One entry of a directory as it was."""

    altered: _Altered
    name: bytes
    had: bool
    entry: Node | None
    cookie: int | None
    links: int
    mtime_ns: int

    def restore(self) -> None:
        altered, name = self.altered, self.name
        if self.had:
            altered.entries[name] = self.entry
        else:
            altered.entries.pop(name, None)
        if self.cookie is None:
            altered.added.pop(name, None)
        else:
            altered.added[name] = self.cookie
        altered.links, altered.mtime_ns = self.links, self.mtime_ns


class _Step(NamedTuple):
    """What is needed to undo a step, and what it makes stale."""

    first: NodeId
    cookie: int
    now: int
    """Nanoseconds since the epoch."""
    before: list[_Before]
    made: list[NodeId]
    """Directories in which nothing differed before."""
    stale: list[Stale]


class SteeredTree:
    """A tree and the changes made to it so far. Implements `casfs.tree.Tree`."""

    def __init__(self, index: Index, base: ProjectedTree, empty: Directory) -> None:
        """`empty` is the interned directory without entries: what parents of new paths are made of."""
        self._index = index
        self._empty = empty
        nodes, _ = base.totals()
        self._next = NodeId(ROOT + nodes)
        self._cookies = _ADDED
        self._totals = base.totals
        self._firsts = [ROOT]
        self._segments = {ROOT: _Segment(ROOT, self._next, base, ROOT, b"")}
        self._altered: dict[NodeId, _Altered] = {}
        self._altered_ids: list[NodeId] = []
        """The keys of that, in order."""
        self._parents: dict[bytes, NodeId] = {}
        """Directories that changes were made in, by path: until a directory goes, these stay what they are."""
        self._base_end = self._next
        self._looked_up: Counter[NodeId] = Counter()
        """By first id of what was put somewhere: how many of the kernel's lookups in it aren't forgotten yet."""
        self._retired: dict[NodeId, bool] = {}
        """First ids of what was taken away; true once the kernel was told so."""
        self._lock = threading.Lock()
        """Held while anything above is read or changed: nobody sees half of a step."""
        self.dropped: deque[NodeId] = deque()
        """First ids of what nobody can ask for any more."""

    def totals(self) -> tuple[int, int]:
        """Those of the tree as it was mounted."""
        return self._totals()

    def get_node(self, node_id: NodeId) -> Node:
        """See `ProjectedTree`."""
        with self._lock:
            return self._adjust(self._segment_of(node_id).tree.get_node(node_id))

    def lookup(self, parent: NodeId, name: bytes) -> Node | None:
        """See `ProjectedTree`. For the kernel: what is found counts as looked up until `forget`."""
        with self._lock:
            node = self._lookup(parent, name)
            if node is not None:
                self._count(node.id)
            return node

    def list_directory(self, node_id: NodeId, cookie: int) -> Iterator[tuple[int, bytes, Node]]:
        """See `ProjectedTree`; names that came by a change are last, in the order in which they came."""
        with self._lock:
            segment = self._segment_of(node_id)
            altered = self._altered.get(node_id)
            if altered is None:
                altered = _Altered()
            if cookie < _ADDED:
                for after, name, found in segment.tree.list_directory(node_id, cookie):
                    node = altered.entries.get(name, found)
                    if node is not None:
                        yield after, name, self._adjust(node)
            elif not self._adjust(segment.tree.get_node(node_id)).directory:
                raise NotADirectory(f"node {node_id}")
            for name, serial in sorted(altered.added.items(), key=itemgetter(1)):
                node = altered.entries.get(name)
                if serial > cookie and node is not None:
                    yield serial, name, self._adjust(node)

    def list_plus(self, node_id: NodeId, cookie: int) -> Iterator[tuple[int, bytes, Node]]:
        """The same, for a listing that counts as a lookup of each name, which it does when the next one is asked for.

        So the one for which the listing had no more room isn't counted.
        """
        for item in self.list_directory(node_id, cookie):
            yield item
            self._count(item[2].id)

    def path_of(self, node_id: NodeId) -> bytes:
        """The path of a node, or where it was last. Raises NoSuchNode."""
        with self._lock:
            segment = self._segment_of(node_id)
            parts = [segment.tree.path_of(node_id)]
            while segment.first != ROOT:
                parts.append(segment.name)
                parent = segment.parent
                try:
                    segment = self._segment_of(parent)
                except NoSuchNode:
                    break  # what it was in is gone, too
                parts.append(segment.tree.path_of(parent))
            return b"/".join(part for part in reversed(parts) if part)

    def parent_of(self, node_id: NodeId) -> NodeId:
        """See `ProjectedTree`."""
        with self._lock:
            segment = self._segment_of(node_id)
            return segment.parent if node_id == segment.first else segment.tree.parent_of(node_id)

    def next_id(self) -> NodeId:
        """What the next thing that is put somewhere begins with."""
        return self._next

    def firsts_since(self, node_id: NodeId) -> list[NodeId]:
        """The first ids of what was put somewhere from that id on."""
        with self._lock:
            return self._firsts[bisect_left(self._firsts, node_id) :]

    def forget(self, node_id: NodeId, lookups: int) -> None:
        """The kernel has let go of a node, which so many lookups have given it.

        What was taken away is dropped when all lookups in it are forgotten: until then something may be open, or be
        about to be opened, whatever the kernel says of the name.
        """
        if node_id < self._base_end:
            return
        with self._lock:
            first = self._segment_of(node_id).first
            self._looked_up[first] -= lookups
            self._drop_unused(first)

    def apply(self, changes: Sequence[Change]) -> list[Stale]:
        """All of the changes, in their order, or none. Returns what the kernel must be told of.

        Raises BadChange naming the one that can't be made, BadName, MissingTree.
        """
        with self._lock:
            step = _Step(self._next, self._cookies, time.time_ns(), [], [], [])
            try:
                for change in changes:
                    self._apply(change, step)
            except BaseException:
                self._undo(step)
                raise
            # Each once, though a step may take something away and then what it was in.
            stale = list(dict.fromkeys(step.stale))
            for _, _, retired in stale:
                if retired is not None:
                    self._retired.setdefault(retired, False)
        return stale

    def tell(self, first: NodeId) -> None:
        """The kernel was told that this was taken away: it doesn't look it up any more."""
        with self._lock:
            if first in self._retired:
                self._retired[first] = True
                self._drop_unused(first)

    # Below here: under the lock.

    def _segment_of(self, node_id: NodeId) -> _Segment:
        at = bisect_right(self._firsts, node_id)
        if at:
            segment = self._segments[self._firsts[at - 1]]
            if node_id < segment.end:
                return segment
        raise NoSuchNode(f"node {node_id}")

    def _lookup(self, parent: NodeId, name: bytes) -> Node | None:
        altered = self._altered.get(parent)
        if altered is not None and name in altered.entries:
            node = altered.entries[name]
        else:
            node = self._segment_of(parent).tree.lookup(parent, name)
        return None if node is None else self._adjust(node)

    def _adjust(self, node: Node) -> Node:
        altered = self._altered.get(node.id)
        if altered is None:
            return node
        return node._replace(nlink=node.nlink + altered.links, mtime_ns=altered.mtime_ns)

    def _undo(self, step: _Step) -> None:
        for before in reversed(step.before):
            before.restore()
        for directory in step.made:
            self._forget_altered(directory, directory + 1)
        while self._firsts[-1] >= step.first:
            del self._segments[self._firsts.pop()]
        self._next, self._cookies = step.first, step.cookie
        self._parents.clear()

    def _apply(self, change: Change, step: _Step) -> None:
        """One change."""
        *above, name = split_path(change.path, change.kind)
        path = b"/".join(above)
        parent = self._parents.get(path)
        if parent is None:
            if len(self._parents) >= _PARENTS_MOST:
                self._parents.clear()
            parent = self._parents[path] = self._find_parent(change, above, step)
        old = self._lookup(parent, name)
        if old is not None and change.kind == "add":
            raise BadChange(f"can't add {printable(change.path)}: it is there already; 'replace' takes its place")
        if old is None and change.kind != "add":
            raise BadChange(f"can't {change.kind} {printable(change.path)}: it isn't there")
        self._put(parent, name, change.entry, old, step)
        if old is not None and old.directory:
            self._parents.clear()

    def _find_parent(self, change: Change, above: list[bytes], step: _Step) -> NodeId:
        """The directory a change is made in; to add something, what is missing of it is made."""
        parent = ROOT
        for depth, component in enumerate(above):
            node = self._lookup(parent, component)
            if node is None and change.kind == "add":
                node = self._put(parent, component, DirectoryEntry(component, self._empty.digest), None, step)
            if node is None or not node.directory:
                where = printable(b"/".join(above[: depth + 1]))
                why = f"there is no {where}" if node is None else f"{where} is not a directory"
                raise BadChange(f"can't {change.kind} {printable(change.path)}: {why}")
            parent = node.id
        return parent

    def _put(self, parent: NodeId, name: bytes, entry: Entry | None, old: Node | None, step: _Step) -> Node | None:
        node = None if entry is None else self._graft(parent, name, entry)
        altered = self._altered.get(parent)
        if altered is None:
            altered = self._altered[parent] = _Altered()
            insort(self._altered_ids, parent)
            step.made.append(parent)
        step.before.append(_before(altered, name))
        is_new = old is None and name not in altered.entries
        altered.entries[name] = node
        if node is None:
            if altered.added.pop(name, None) is not None:
                del altered.entries[name]
        elif is_new:
            self._cookies += 1
            altered.added[name] = self._cookies
        altered.links += (node is not None and node.directory > 0) - (old is not None and old.directory > 0)
        altered.mtime_ns = step.now
        retired = old.id if old is not None and old.id in self._segments else None
        if old is not None and old.directory:
            step.stale.extend(self._put_below(old))
        step.stale.append(Stale(parent, name, retired))
        return node

    def _put_below(self, directory: Node) -> Iterator[Stale]:
        """What was put somewhere below a directory that goes: it can't be reached any more either."""
        pending = [(directory.id, directory.id + directory.nodes)]
        while pending:
            first, end = pending.pop()
            low, high = bisect_left(self._altered_ids, first), bisect_left(self._altered_ids, end)
            for parent in self._altered_ids[low:high]:
                for name, node in self._altered[parent].entries.items():
                    segment = self._segments.get(node.id) if node is not None else None
                    if segment is not None and segment.first not in self._retired:
                        yield Stale(parent, name, segment.first)
                        pending.append((segment.first, segment.end))

    def _graft(self, parent: NodeId, name: bytes, entry: Entry) -> Node:
        """Give an entry the next ids."""
        first = self._next
        tree: ProjectedTree | _Leaf
        if isinstance(entry, DirectoryEntry):
            with self._index.view() as view:
                directory = get_directory(view, entry.digest)
            tree, nodes = ProjectedTree(self._index, directory, first), directory.nodes
        else:
            mode, size, mtime_ns = shown(entry)
            tree, nodes = _Leaf(Node(first, mode, size, mtime_ns, 1, entry)), 1
        self._next = NodeId(first + nodes)
        self._segments[first] = _Segment(first, self._next, tree, parent, name)
        self._firsts.append(first)  # the greatest so far
        return tree.get_node(first)

    def _count(self, node_id: NodeId) -> None:
        if node_id >= self._base_end:
            self._looked_up[self._segment_of(node_id).first] += 1

    def _drop_unused(self, first: NodeId) -> None:
        if not self._retired.get(first) or self._looked_up[first]:
            return
        del self._retired[first], self._looked_up[first]
        segment = self._segments[first]
        self._remove_segment(first)
        if isinstance(segment.tree, ProjectedTree):
            self._forget_altered(first, segment.end)
        self.dropped.append(first)

    def _forget_altered(self, first: int, end: int) -> None:
        """What differs in the directories with ids from `first` on, below `end`."""
        low, high = bisect_left(self._altered_ids, first), bisect_left(self._altered_ids, end)
        for node_id in self._altered_ids[low:high]:
            del self._altered[node_id]
        del self._altered_ids[low:high]

    def _remove_segment(self, first: NodeId) -> None:
        del self._segments[first]
        del self._firsts[bisect_right(self._firsts, first) - 1]


def _before(altered: _Altered, name: bytes) -> _Before:
    entries = altered.entries
    return _Before(
        altered, name, name in entries, entries.get(name), altered.added.get(name), altered.links, altered.mtime_ns
    )
