"""Interned directories: lookups, listings, and the ranks that node ids are made of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from store.compare import compare_trees
from store.digest import DigestFunction
from store.entries import DirectoryEntry, Entry, FileEntry, path_order
from store.importing import ScanOptions
from store.index import View
from store.repository import Store
from store.treebuilder import TreeBuilder
from store.trees import WAYPOINT_EVERY, Directory, Row, entry_at, find_directory, find_entry, list_entries, walk

BLAKE3 = DigestFunction.BLAKE3
NAMES = st.sampled_from([b"a", b"b", b"ab", b"a-b", b"a.b", b"\xff", b"n" * 255, b"0"])
Tree = dict[bytes, "int | Tree"]
TREES: st.SearchStrategy[Tree] = st.dictionaries(NAMES, st.deferred(lambda: st.integers(0, 3) | TREES), max_size=4)
SHARED_STORE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)


def _items(tree: Tree, prefix: bytes = b"") -> Iterator[tuple[bytes, Entry | None]]:
    for name, what in tree.items():
        if isinstance(what, dict):
            yield prefix + name, None
            yield from _items(what, prefix + name + b"/")
        else:
            yield prefix + name, FileEntry(name, BLAKE3.of(b"%d" % what), bool(what % 2))


def _build(store: Store, tree: Tree) -> Directory:
    with store.ingest() as ingest:
        builder = TreeBuilder(store.index, ingest, BLAKE3)
        return builder.finish(builder.add_paths(sorted(_items(tree), key=lambda item: path_order(item[0]))))


def _ranked(view: View, directory: int, rank: int, prefix: bytes) -> Iterator[tuple[int, bytes]]:
    """The preorder ranks of everything below a directory, by the rule."""
    for row in list_entries(view, directory):
        child = rank + 1 + row.offset
        yield child, prefix + row.entry.name
        if row.id:
            yield from _ranked(view, row.id, child, prefix + row.entry.name + b"/")


def _path_of(view: View, root: Directory, rank: int) -> bytes:
    """From a rank back to its path, by descending."""
    directory, at, path = root.id, 0, b""
    while at != rank:
        row = entry_at(view, directory, rank - at - 1)
        assert row is not None
        at += 1 + row.offset
        path += b"/" + row.entry.name
        directory = row.id
    return path.removeprefix(b"/")


@SHARED_STORE
@given(TREES)
def test_ranks_count_the_walk_and_lead_back(store: Store, tree: Tree) -> None:
    root = _build(store, tree)
    with store.index.view() as view:
        walked = [path for path, _ in walk(view, root)]
        assert walked == sorted((path for path, _ in _items(tree)), key=path_order)
        assert list(_ranked(view, root.id, 0, b"")) == list(enumerate(walked, 1))
        assert root.nodes == 1 + len(walked)
        assert [_path_of(view, root, rank) for rank in range(1, root.nodes)] == walked
        assert entry_at(view, root.id, root.nodes - 1) is None


@SHARED_STORE
@given(TREES, TREES)
def test_two_trees_differ_where_their_paths_do(store: Store, old: Tree, new: Tree) -> None:
    before, after = dict(_items(old)), dict(_items(new))
    expected = {
        path
        for path in before.keys() | after.keys()
        if (path in before) != (path in after) or before[path] != after[path]
    }
    with_trees = _build(store, old), _build(store, new)
    with store.index.view() as view:
        found = list(compare_trees(view, *with_trees))
    assert [difference.path for difference in found] == sorted(expected, key=path_order)
    for path, one, other in found:
        assert one is None or path in before
        assert other is None or path in after
        assert isinstance(one, DirectoryEntry) == (path in before and before[path] is None)


def test_comparing_looks_only_where_trees_differ(store: Store) -> None:
    shared: Tree = {b"%d" % number: {b"x": 1} for number in range(200)}
    old, new = _build(store, {b"same": shared, b"d": {b"f": 1}}), _build(store, {b"same": shared, b"d": {b"f": 2}})
    looked: list[bytes] = []

    class Counting(View):
        def scan(self, table, start=b"", prefix=b""):  # type: ignore[no-untyped-def]
            looked.append(prefix)
            return super().scan(table, start, prefix)

    with store.index.view() as view:
        counting = Counting(view._txn, view._dbs, view._thread)
        assert [difference.path for difference in compare_trees(counting, old, new)] == [b"d/f"]
        assert list(compare_trees(counting, old, old)) == []
    assert len(looked) == 4


def _wide(store: Store, count: int) -> Directory:
    return _build(store, {b"%05d" % number: {b"x": 1} if number % 3 == 0 else 1 for number in range(count)})


def test_listings_resume_at_every_offset(store: Store) -> None:
    root = _wide(store, 3 * WAYPOINT_EVERY + 5)
    with store.index.view() as view:
        rows = list(list_entries(view, root.id))
        for position, row in enumerate(rows):
            assert list(list_entries(view, root.id, row.offset)) == rows[position:]
        for row in rows[::10]:
            for offset in range(row.offset, row.offset + row.nodes):
                assert entry_at(view, root.id, offset) == row
            rest = list(list_entries(view, root.id, row.offset + 1))
            assert rest == [later for later in rows if later.offset > row.offset]


def test_finding_an_offset_in_a_wide_directory_reads_few_rows(store: Store) -> None:
    root = _wide(store, 5000)
    read = 0

    class Counting(View):
        def scan(self, table, start=b"", prefix=b""):  # type: ignore[no-untyped-def]
            nonlocal read
            for row in super().scan(table, start, prefix):
                read += 1
                yield row

    with store.index.view() as view:
        counting = Counting(view._txn, view._dbs, view._thread)
        assert entry_at(counting, root.id, root.nodes - 2) is not None
    assert read <= WAYPOINT_EVERY + 1


def test_lookups_find_names_and_only_names(store: Store, sample_tree: Path) -> None:
    root = store.importer.from_directories([(b"", sample_tree)], ScanOptions())
    with store.index.view() as view:
        rows: dict[bytes, Row] = {row.entry.name: row for row in list_entries(view, root.id)}
        for name, row in rows.items():
            assert find_entry(view, root.id, name) == row
        for name in (b"", b"README", b"README.txt\0", b"x" * 256, b"x" * 10_000):
            assert find_entry(view, root.id, name) is None


def test_equal_directories_are_interned_once(store: Store) -> None:
    root = _build(store, {b"a": {b"x": 1}, b"b": {b"x": 1}})
    with store.index.view() as view:
        one, other = list_entries(view, root.id)
        assert one.id == other.id
        summary = find_directory(view, root.digest)
    assert summary == root
    assert (root.nodes, root.files, root.bytes, root.subdirectories) == (5, 2, 2, 2)
