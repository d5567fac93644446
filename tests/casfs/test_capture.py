"""What a command left becomes trees with the right digests, without a copy where the disk is one."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from casfs.capture import Captured, capture, check_output_paths
from casfs.scratch import remove_tree
from store.digest import Digest, DigestFunction
from store.entries import DirectoryEntry, FileEntry, SymlinkEntry
from store.errors import BadName
from store.importing import ScanOptions
from store.layout import blob_path
from store.repository import Store
from store.treebuilder import TreeBuilder
from store.trees import find_directory, walk

Capture = Callable[..., Captured]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """An upper layer with nothing below it: so it is what the action saw, too."""
    path = tmp_path / "upper"
    path.mkdir()
    return path


@pytest.fixture
def take(store: Store, written: Path) -> Capture:
    """Capture these paths of `written`."""

    def run(*paths: bytes, function: DigestFunction = DigestFunction.BLAKE3) -> Captured:
        with store.ingest() as ingest:
            builder = TreeBuilder(store.index, ingest, function)
            nothing = builder.finish(builder.add_directory([])).digest
        return capture(store, written, written, nothing, check_output_paths(paths))

    return run


def test_paths_are_sorted_cleaned_and_must_not_lie_in_each_other() -> None:
    assert check_output_paths([b"b", b"a/", b"b", b"a.c"]) == sorted([b"a", b"a.c", b"b"])
    for bad in ([b"a", b"a/b"], [b"a/b/c", b"a.b", b"a"], [b"/a"], [b".."], [b"a/../b"], [b"."], [b""], [b"a//b"]):
        with pytest.raises(BadName):
            check_output_paths(bad)


@pytest.mark.parametrize("function", list(DigestFunction))
def test_a_directory_gets_the_digest_a_manifest_of_it_has(
    store: Store, written: Path, take: Capture, sample_tree: Path, function: DigestFunction
) -> None:
    expected = store.importer.from_directories([(b"", sample_tree)], ScanOptions(function=function)).digest
    os.rename(sample_tree, written / "made")
    captured = take(b"made", function=function)
    assert [(output.path, output.digest) for output in captured.outputs] == [(b"made", expected)]
    assert (captured.missing, captured.skipped, captured.unexpected, captured.deleted) == ([], [], [], [])


def test_outputs_are_a_tree_at_their_paths(store: Store, written: Path, take: Capture) -> None:
    (written / "a/b").mkdir(parents=True)
    (written / "a/b/file").write_bytes(b"1")
    (written / "a/run").write_bytes(b"2")
    (written / "a/run").chmod(0o700)
    (written / "d/empty").mkdir(parents=True)
    (written / "link").symlink_to("/nowhere")
    captured = take(b"a/b/file", b"a/run", b"d", b"link", b"gone")
    assert captured.missing == [b"gone"]
    with store.index.view() as view:
        root = find_directory(view, captured.root)
        assert root is not None
        found = dict(walk(view, root))
    assert isinstance(found[b"a/b/file"], FileEntry) and not found[b"a/b/file"].executable
    assert isinstance(found[b"a/run"], FileEntry) and found[b"a/run"].executable
    assert isinstance(found[b"d/empty"], DirectoryEntry)
    assert isinstance(found[b"link"], SymlinkEntry) and found[b"link"].target == b"/nowhere"


def test_a_file_becomes_the_blob_itself(store: Store, written: Path, take: Capture) -> None:
    (written / "big").write_bytes(b"x" * (1 << 20))
    inode = (written / "big").stat().st_ino
    (output,) = take(b"big").outputs
    assert output.digest is not None
    with open(store.blobs.open(output.digest), "rb") as blob:
        status = os.fstat(blob.fileno())
    assert (status.st_ino, status.st_mode & 0o7777) == (inode, 0o444)


@pytest.fixture
def inputs(store: Store, tmp_path: Path) -> Digest:
    """A tree that an action had, in the store."""
    place = tmp_path / "inputs"
    (place / "d/e").mkdir(parents=True)
    (place / "d/e/file").write_bytes(b"input")
    (place / "run").write_bytes(b"program")
    (place / "run").chmod(0o755)
    return store.importer.from_directories([(b"", place)], ScanOptions()).digest


def test_inputs_that_are_outputs_are_not_read(store: Store, written: Path, tmp_path: Path, inputs: Digest) -> None:
    merged = tmp_path / "merged"
    (merged / "d/e").mkdir(parents=True)
    # No overlay would show that: whoever reads it is found out.
    (merged / "d/e/file").write_bytes(b"read!")
    (merged / "run").write_bytes(b"read!")
    (written / "d").mkdir()

    def digests() -> dict[bytes, Digest | None]:
        return {one.path: one.digest for one in capture(store, written, merged, inputs, [b"d/e/file", b"run"]).outputs}

    function = DigestFunction.BLAKE3
    known = {b"d/e/file": function.of(b"input"), b"run": function.of(b"program")}
    assert digests() == known
    # What a directory shows that was moved, or made anew, may be from anywhere.
    for name, value in (("opaque", b"y"), ("redirect", b"/elsewhere")):
        os.setxattr(written / "d", f"user.overlay.{name}", value)
        assert digests() == {**known, b"d/e/file": function.of(b"read!")}
        os.removexattr(written / "d", f"user.overlay.{name}")
    # One that isn't here has to be brought in by reading it.
    (store.layout.blobs / blob_path(known[b"run"])).unlink()
    assert digests() == {**known, b"run": function.of(b"read!")}


def test_what_cannot_be_stored_is_named_and_the_rest_is_kept(written: Path, take: Capture) -> None:
    (written / "d").mkdir()
    (written / "d/file").write_bytes(b"1")
    os.mkfifo(written / "d/fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(written / "d/socket"))
        captured = take(b"d", b"d.x")
    assert [output.path for output in captured.outputs] == [b"d"]
    assert sorted(captured.skipped) == [(b"d/fifo", "it is a FIFO"), (b"d/socket", "it is a socket")]


def test_notes_of_overlayfs_do_not_get_into_blobs(store: Store, written: Path, take: Capture) -> None:
    (written / "file").write_bytes(b"1" * 100_000)
    os.setxattr(written / "file", "user.overlay.origin", b"note")
    (output,) = take(b"file").outputs
    assert output.digest is not None
    with open(store.blobs.open(output.digest), "rb") as blob:
        assert os.listxattr(blob.fileno()) == []


def test_a_tree_deeper_than_the_stack_is_kept(written: Path, take: Capture) -> None:
    path = os.fsencode(written)
    for _ in range(1100):
        path += b"/d"
        os.mkdir(path)
    try:
        assert [output.kind for output in take(b"d").outputs] == ["directory"]
    finally:
        remove_tree(written)
    assert not written.exists()
