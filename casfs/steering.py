"""Changing what a mount shows while programs use it: paths point elsewhere, subtrees come and go.

`Steering` applies changes to the tree of a session (`casfs.steered_tree`) and
tells the kernel which entries it must ask for again. A notification takes the
lock of the directory in the kernel, as a lookup or a listing under way does:
what was answered before the change is in the kernel's cache by then, and is
dropped. So once `remap` has returned nothing stale is seen.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from casfs.changes import Change, digests_of
from casfs.steered_tree import Stale, SteeredTree
from casfs.tree import NodeId, ProjectedTree
from store.entries import DirectoryEntry
from store.leases import Lease
from store.repository import Store
from store.treebuilder import TreeBuilder

_SHARED_MOST = 64
"""So many blobs of small steps share a lease: one for each would take longer than the rest of such a step. They are let
go together, when the last of them is gone."""


class Steerable(Protocol):
    """What steering needs of a session."""

    def use_tree(self, tree: SteeredTree) -> None:
        """Answer from that tree from now on, which has the same nodes, and tell it what the kernel forgets."""

    def invalidate_entry(self, parent: NodeId, name: bytes) -> bool:
        """Have the kernel drop a cached name, of something or of nothing; False where it had none."""

    def invalidate_inode(self, node_id: NodeId) -> None:
        """Have the kernel drop cached attributes and listings."""


@contextmanager
def not_collecting() -> Iterator[None]:
    """While a large step makes its objects, which all stay, the interpreter needn't look for garbage among them.

    That is for the whole process, so a step in another thread may end it early: no harm.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Steering:
    """Changes what a session shows. Any thread may call, but none of the session's."""

    def __init__(self, store: Store, base: ProjectedTree, session: Steerable, place: str) -> None:
        """`place` is for the leases' text: who holds them."""
        self._store = store
        self._base = base
        self._session = session
        self._place = place
        self._turn = threading.Lock()
        # Under the turn:
        self._tree: SteeredTree | None = None
        self._leases: dict[NodeId, Lease] = {}
        self._users: dict[str, int] = {}
        """By lease: how many of what was put somewhere is held by it."""
        self._shared: Lease | None = None
        self._room = 0

    def remap(self, changes: Sequence[Change]) -> int:
        """Make all changes in one step, or none; returns how many nodes' names the kernel was told of.

        What is put somewhere is held from collection until it is gone again.
        Raises BadChange, BadName, MissingTree, MissingBlob.
        """
        with self._turn:
            tree = self._begin()
            lease = self._hold(changes)
            before = tree.next_id()
            try:
                stale = tree.apply(changes)
            except BaseException:
                if lease is not None:
                    self._release_unused(lease)
                raise
            if lease is not None:
                self._remember(lease, tree.firsts_since(before))
            told = self._tell(tree, stale)
            self._release_dropped(tree)
        return told

    def _begin(self) -> SteeredTree:
        """The tree that can be changed; until the first change the session's own costs nothing more."""
        if self._tree is None:
            with self._store.ingest() as ingest:
                builder = TreeBuilder(self._store.index, ingest, self._base.digest.function)
                empty = builder.finish(builder.add_directory([]))
            self._tree = SteeredTree(self._store.index, self._base, empty)
            self._session.use_tree(self._tree)
        return self._tree

    def _hold(self, changes: Sequence[Change]) -> Lease | None:
        """A lease on what is put somewhere."""
        digests = digests_of(changes)
        if not digests:
            return None
        # A tree may be large, so it waits for no others to go.
        small = len(digests) <= _SHARED_MOST and not any(isinstance(c.entry, DirectoryEntry) for c in changes)
        if small and self._shared is not None and len(digests) <= self._room:
            self._shared.add(digests)
            self._room -= len(digests)
            return self._shared
        lease = self._store.leases.acquire("remap", digests, self._place)
        self._users[lease.info.id] = 0
        if small:
            self._shared, self._room = lease, _SHARED_MOST - len(digests)
        return lease

    def _remember(self, lease: Lease, firsts: list[NodeId]) -> None:
        self._users[lease.info.id] += len(firsts)
        for first in firsts:
            self._leases[first] = lease

    def _release_unused(self, lease: Lease) -> None:
        if not self._users[lease.info.id]:
            del self._users[lease.info.id]
            if lease is self._shared:
                self._shared = None
            lease.release()

    def _tell(self, tree: SteeredTree, stale: list[Stale]) -> int:
        told = 0
        for parent, name, retired in stale:
            told += self._session.invalidate_entry(parent, name)
            if retired is not None:
                tree.tell(retired)
        for parent in {parent for parent, _, _ in stale}:
            self._session.invalidate_inode(parent)
        return told

    def _release_dropped(self, tree: SteeredTree) -> None:
        while tree.dropped:
            lease = self._leases.pop(tree.dropped.popleft(), None)
            if lease is not None:
                self._users[lease.info.id] -= 1
                self._release_unused(lease)

    def close(self) -> None:
        """Let go of what is held."""
        with self._turn:
            for lease in {lease.info.id: lease for lease in self._leases.values()}.values():
                lease.release()
            self._leases.clear()
            self._users.clear()
            self._shared = None
