"""Interning the few new directories of a tree: the same as any other way, or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from store import interning
from store.digest import Digest, DigestFunction
from store.directory import encode_directory
from store.entries import DirectoryEntry, FileEntry
from store.errors import BadTree
from store.interning import intern_few
from store.layout import blob_path
from store.repository import Store
from store.trees import find_directory, walk

SHA256 = DigestFunction.SHA256


class Messages:
    """Directory messages in a store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def add(self, **below: Digest | bytes) -> Digest:
        """A directory with these subdirectories, and files with these contents, which need not be in the store."""
        return self.add_raw(encode_directory([_entry(name, what) for name, what in sorted(below.items())]))

    def add_raw(self, message: bytes) -> Digest:
        with self._store.ingest() as ingest:
            return ingest.add_bytes(message, SHA256)


def _entry(name: str, what: Digest | bytes) -> DirectoryEntry | FileEntry:
    if isinstance(what, Digest):
        return DirectoryEntry(name.encode(), what)
    return FileEntry(name.encode(), SHA256.of(what), executable=False)


@pytest.fixture
def messages(store: Store) -> Messages:
    return Messages(store)


def paths_of(store: Store, root: Digest) -> list[str]:
    with store.index.view() as view:
        directory = find_directory(view, root)
        assert directory is not None
        return [path.decode() for path, _ in walk(view, directory)]


def test_a_directory_at_two_depths_is_interned_before_both(store: Store, messages: Messages) -> None:
    shared = messages.add(f=b"1")
    root = messages.add(a=messages.add(deep=messages.add(shared=shared)), shared=shared, top=b"2")
    directory = intern_few(store.index, store.blobs, root)
    assert directory is not None and (directory.nodes, directory.files, directory.subdirectories) == (8, 3, 2)
    expected = ["a", "a/deep", "a/deep/shared", "a/deep/shared/f", "shared", "shared/f", "top"]
    assert paths_of(store, root) == expected
    assert intern_few(store.index, store.blobs, root) == directory


def test_only_what_is_new_is_read(store: Store, messages: Messages) -> None:
    known = messages.add(x=messages.add(y=b"y"))
    assert intern_few(store.index, store.blobs, known) is not None
    (store.layout.blobs / blob_path(known)).unlink()
    assert intern_few(store.index, store.blobs, messages.add(known=known, new=messages.add(z=b"z"))) is not None


def test_a_tree_of_which_much_is_new_is_left_to_others(
    store: Store, messages: Messages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interning, "_FEW", 3)
    root = messages.add(**{f"d{number}": messages.add(f=b"%d" % number) for number in range(3)})
    assert intern_few(store.index, store.blobs, root) is None
    assert store.importer.from_messages(root).files == 3
    assert intern_few(store.index, store.blobs, root) is not None


def test_what_is_missing_is_left_to_who_can_fetch(store: Store, messages: Messages) -> None:
    root = messages.add(gone=SHA256.of(b"no such message"))
    assert intern_few(store.index, store.blobs, root) is None
    assert intern_few(store.index, store.blobs, SHA256.of(b"neither")) is None


def test_broken_messages_are_refused(store: Store, messages: Messages) -> None:
    broken = messages.add_raw(b"\xff\xff no message")
    with pytest.raises(BadTree, match=f"directory {broken}"):
        intern_few(store.index, store.blobs, messages.add(below=broken))


def test_it_is_there_when_the_store_is_opened_again(tmp_path: Path) -> None:
    with Store.open(tmp_path / "again") as store:
        messages = Messages(store)
        root = messages.add(d=messages.add(f=b"f"), e=SHA256.of(b""))
        assert intern_few(store.index, store.blobs, root) is not None
    with Store.open(tmp_path / "again") as store:
        assert paths_of(store, root) == ["d", "d/f", "e"]
