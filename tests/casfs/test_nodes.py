"""Node ids follow from the tree alone: the preorder ranks of a plain enumeration. No mount is needed for this."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from casfs.tree import ROOT, NodeId, NoSuchNode, NotADirectory, ProjectedTree
from store.digest import DigestFunction
from store.entries import DirectoryEntry, Entry, FileEntry, SymlinkEntry
from store.repository import Store
from store.treebuilder import TreeBuilder

Shape = dict[bytes, "Shape | bool"]
"""A directory: names to directories, True for a file, False for a symbolic link."""


class Expected(NamedTuple):
    """What a plain walk says of a node."""

    id: int
    parent: int
    path: bytes
    name: bytes
    shape: Shape | bool


def enumerate_nodes(shape: Shape | bool, first: int, parent: int, path: bytes, name: bytes) -> Iterator[Expected]:
    """Every node with its rank, a directory before what is in it, in order of name."""
    yield Expected(first, parent, path, name, shape)
    following = first + 1
    if isinstance(shape, dict):
        for child in sorted(shape):
            for node in enumerate_nodes(shape[child], following, first, path + b"/" + child if path else child, child):
                yield node
                following = node.id + 1


@pytest.fixture(scope="module")
def node_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """One for all examples: their trees don't meet."""
    with Store.open(tmp_path_factory.mktemp("nodes") / "store") as store:
        yield store


def project(store: Store, shape: Shape) -> ProjectedTree:
    """The shape as an interned tree."""

    def add(builder: TreeBuilder, directory: Shape) -> list[Entry]:
        entries: list[Entry] = []
        for name, kind in directory.items():
            if isinstance(kind, dict):
                entries.append(DirectoryEntry(name, builder.add_directory(add(builder, kind))))
            elif kind:
                entries.append(FileEntry(name, DigestFunction.BLAKE3.of(name), False))
            else:
                entries.append(SymlinkEntry(name, b"target"))
        return entries

    with store.ingest() as ingest:
        builder = TreeBuilder(store.index, ingest, DigestFunction.BLAKE3)
        return ProjectedTree(store.index, builder.finish(builder.add_directory(add(builder, shape))))


LEAVES: Shape = {b"%05d" % number: number % 3 != 0 for number in range(300)}
"""More entries than there are between two waypoints of the index."""
TWINS: Shape = {b"twin%d" % number: {b"a": {b"leaf": True}, b"b": False} for number in range(70)}
"""The same subtree again and again: interned once, with ids of its own at each place."""

names = st.binary(min_size=1, max_size=6).filter(lambda name: name not in (b".", b"..") and not {0, 47} & set(name))
shapes = st.recursive(st.booleans(), lambda inner: st.dictionaries(names, inner, max_size=5), max_leaves=30).flatmap(
    lambda inner: st.dictionaries(names, st.one_of(st.just(inner), st.booleans()), max_size=5)
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(shape={})
@example(shape={b"empty": {}, b"late": True})
@example(shape=LEAVES | {b"00100": TWINS, b"00299": LEAVES})
@example(shape=TWINS)
@given(shape=shapes)
def test_every_way_to_a_node_agrees_with_a_plain_enumeration(node_store: Store, shape: Shape) -> None:
    expected = list(enumerate_nodes(shape, ROOT, ROOT, b"", b""))
    for tree in (project(node_store, shape), project(node_store, shape)):
        # The second time from the end, in a tree that has remembered nothing yet.
        for node in expected:
            check_node(tree, node, expected)
        expected.reverse()
    assert tree.totals()[0] == len(expected)


def check_node(tree: ProjectedTree, node: Expected, expected: list[Expected]) -> None:
    found = tree.get_node(NodeId(node.id))
    assert found.id == node.id
    assert tree.path_of(found.id) == node.path
    assert tree.parent_of(found.id) == node.parent
    if node.id != ROOT:
        assert found.entry is not None and found.entry.name == node.name
        looked_up = tree.lookup(NodeId(node.parent), node.name)
        assert looked_up == found
    if not isinstance(node.shape, dict):
        with pytest.raises(NotADirectory):
            tree.lookup(found.id, b"x")
        with pytest.raises(NotADirectory):
            list(tree.list_directory(found.id, 0))
        return
    assert found.nlink == 2 + sum(isinstance(child, dict) for child in node.shape.values())
    assert tree.lookup(found.id, b"no such name") is None
    check_listing(tree, found.id, sorted(node.shape))


def check_listing(tree: ProjectedTree, directory: NodeId, names: list[bytes]) -> None:
    """The listing, and what follows after each of its cookies."""
    listed = list(tree.list_directory(directory, 0))
    assert [name for _, name, _ in listed] == names
    for position in {0, 1, 62, 63, 64, 65, len(listed) - 1} & set(range(len(listed))):
        cookie = listed[position][0]
        assert list(tree.list_directory(directory, cookie)) == listed[position + 1 :]
    for _, name, node in listed[:100]:
        assert tree.lookup(directory, name) == node


@pytest.mark.parametrize("number", [0, -1, 1 << 40, (1 << 64) - 1])
def test_an_id_that_no_node_has_is_refused(store: Store, number: int) -> None:
    tree = project(store, {b"a": True, b"b": {b"c": True}})
    for ask in (tree.get_node, tree.path_of, tree.parent_of, lambda node: list(tree.list_directory(node, 0))):
        with pytest.raises(NoSuchNode):
            ask(NodeId(number))
    with pytest.raises(NoSuchNode):
        tree.lookup(NodeId(number), b"a")
    with pytest.raises(NoSuchNode):
        tree.get_node(NodeId(5))


def test_names_that_no_entry_can_have_are_not_found(store: Store) -> None:
    tree = project(store, {b"n" * 255: True})
    assert tree.lookup(ROOT, b"n" * 255) is not None
    for name in (b"n" * 254, b"n" * 256, b"n" * 5000, b".", b"..", b""):
        assert tree.lookup(ROOT, name) is None


def test_what_is_remembered_is_bounded_and_forgetting_changes_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("casfs.tree._CACHED_NODES", 8)
    monkeypatch.setattr("casfs.tree._CACHED_DIRECTORIES", 4)
    shape: Shape = {b"%03d" % number: {b"leaf": True} for number in range(100)}
    tree = project(store, shape)
    for node in enumerate_nodes(shape, ROOT, ROOT, b"", b""):
        assert tree.get_node(NodeId(node.id)).id == node.id
        assert tree.lookup(ROOT, b"050") is not None
    assert len(tree._nodes) <= 8
    assert len(tree._directories) <= 5


def test_another_process_gives_the_same_ids(tmp_path: Path) -> None:
    """A store is opened anew: what a first daemon told the kernel holds for the next one."""
    shape: Shape = {b"a": TWINS, b"b": LEAVES, b"c": True}
    with Store.open(tmp_path / "store") as store:
        first = project(store, shape)
        paths = {first.path_of(NodeId(number)): number for number in range(1, first.totals()[0] + 1)}
    with Store.open(tmp_path / "store") as store:
        again = project(store, shape)
        for path, number in paths.items():
            node = again.get_node(ROOT)
            for name in path.split(b"/") if path else []:
                below = again.lookup(node.id, name)
                assert below is not None
                node = below
            assert node.id == number
