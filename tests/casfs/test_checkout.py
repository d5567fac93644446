"""Checkout: what it writes is the tree, where it writes is only below the target, and an error leaves nothing."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from casfs.checkout import Mode, check_out
from casfs.errors import CheckoutError, MissingCapability
from casfs.tree import FIXED_MTIME_NS
from store.digest import Digest
from store.entries import FileEntry
from store.errors import BadInput, MissingBlob, MissingTree, StaleReference
from store.importing import ScanOptions
from store.kernel import try_clone
from store.layout import blob_path
from store.repository import Store
from store.treebuilder import TreeBuilder
from tests.conftest import Requirements

Shown = dict[bytes, tuple[str, bytes | None, bool]]


def look(top: Path) -> Shown:
    """Every path below a directory: its kind, its bytes or target, whether its owner may execute it."""
    found: Shown = {}
    for directory, directories, files in os.walk(os.fsencode(top)):
        for name in directories + files:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            where = os.path.relpath(path, os.fsencode(top))
            if stat.S_ISLNK(status.st_mode):
                found[where] = ("link", os.readlink(path), False)
            elif stat.S_ISDIR(status.st_mode):
                found[where] = ("directory", None, False)
            else:
                with open(path, "rb") as file:
                    found[where] = ("file", file.read(), bool(status.st_mode & 0o100))
    return found


def add(store: Store, top: Path, **options: bool) -> Digest:
    """The root of a directory's tree, now in the store."""
    return store.importer.from_directories([(b"", top)], ScanOptions(**options)).digest  # type: ignore[arg-type]


def blob_file(store: Store, content: bytes) -> Path:
    """Where the blob of these bytes lies."""
    return store.layout.blobs / blob_path(ScanOptions().function.of(content))


@pytest.mark.parametrize("mode", [Mode.AUTO, Mode.HARDLINK, Mode.COPY])
def test_what_is_checked_out_is_the_tree(store: Store, sample_tree: Path, tmp_path: Path, mode: Mode) -> None:
    told: list[tuple[int, int]] = []
    done = check_out(
        store, add(store, sample_tree), tmp_path / "out", mode=mode, progress=lambda *what: told.append(what)
    )
    shown = look(tmp_path / "out")
    assert shown == look(sample_tree)
    kinds = [kind for kind, _, _ in shown.values()]
    assert (done.files, done.symlinks, done.directories) == (
        kinds.count("file"),
        kinds.count("link"),
        kinds.count("directory") + 1,
    )
    assert done.reflinked + done.hardlinked + done.copied == done.files == sum(files for files, _ in told)
    assert done.bytes == sum(size for _, size in told)
    assert not store.leases.living()


def test_files_can_be_changed_without_changing_the_store(store: Store, sample_tree: Path, tmp_path: Path) -> None:
    check_out(store, add(store, sample_tree), tmp_path / "out")
    status = (tmp_path / "out" / "README.txt").stat()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(status.st_mode) == 0o644 & ~umask
    assert stat.S_IMODE((tmp_path / "out" / "run.sh").stat().st_mode) == 0o755 & ~umask
    assert status.st_nlink == 1
    (tmp_path / "out" / "README.txt").write_text("mine")
    assert store.verifier.verify().is_clean


def test_times_are_fixed_or_the_manifest_s(store: Store, sample_tree: Path, tmp_path: Path) -> None:
    os.utime(sample_tree / "src" / "twin.c", ns=(1, 1_234_567_890_123_456_789))
    os.utime(sample_tree / "links" / "dangling", ns=(1, 987_654_321_000_000_000), follow_symlinks=False)
    check_out(store, add(store, sample_tree), tmp_path / "fixed")
    check_out(store, add(store, sample_tree, keep_mtime=True), tmp_path / "kept")
    for path in (tmp_path / "fixed").rglob("*"):
        assert path.lstat().st_mtime_ns == FIXED_MTIME_NS, path
    assert (tmp_path / "kept" / "src" / "twin.c").stat().st_mtime_ns == 1_234_567_890_123_456_789
    assert (tmp_path / "kept" / "links" / "dangling").lstat().st_mtime_ns == 987_654_321_000_000_000
    assert (tmp_path / "kept" / "src").stat().st_mtime_ns == FIXED_MTIME_NS


def test_a_hard_link_is_the_blob_and_what_can_not_be_one_is_copied(store: Store, tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    # One blob, data at one path and a program at another: it has one mode only.
    for name, mode in (("data", 0o644), ("program", 0o755)):
        (top / name).write_bytes(b"both")
        (top / name).chmod(mode)
    done = check_out(store, add(store, top), tmp_path / "out", mode=Mode.HARDLINK)
    assert (done.hardlinked, done.copied) == (1, 1)
    blob = blob_file(store, b"both")
    linked = [name for name in ("data", "program") if (tmp_path / "out" / name).samefile(blob)]
    assert len(linked) == 1
    assert look(tmp_path / "out") == look(top)


def test_hard_links_to_another_file_system_are_impossible(
    store: Store, sample_tree: Path, tmp_path: Path, requires: Requirements
) -> None:
    here = tmp_path.stat().st_dev
    other = next((d for d in map(Path, ("/dev/shm", "/run", "/tmp")) if d.is_dir() and d.stat().st_dev != here), None)
    requires.condition(other, "a second file system to write to")
    assert other is not None
    target = other / f"casfs-checkout-{os.getpid()}"
    with pytest.raises(MissingCapability, match="--mode copy"):
        check_out(store, add(store, sample_tree), target, mode=Mode.HARDLINK)
    assert not target.exists()


def test_reflinks_are_made_or_named_as_impossible(store: Store, sample_tree: Path, tmp_path: Path) -> None:
    root = add(store, sample_tree)
    with open(sample_tree / "README.txt", "rb") as source, open(tmp_path / "clone", "wb") as clone:
        can = try_clone(source.fileno(), clone.fileno())
    if can:
        done = check_out(store, root, tmp_path / "out", mode=Mode.REFLINK)
        assert done.reflinked == done.files
    else:
        with pytest.raises(MissingCapability, match="btrfs"):
            check_out(store, root, tmp_path / "out", mode=Mode.REFLINK)
        assert not (tmp_path / "out").exists()


def test_files_by_reference_are_copied(store: Store, sample_tree: Path, tmp_path: Path) -> None:
    done = check_out(store, add(store, sample_tree, reference=True), tmp_path / "out", mode=Mode.HARDLINK)
    assert done.hardlinked == 0
    assert look(tmp_path / "out") == look(sample_tree)
    assert (tmp_path / "out" / "README.txt").stat().st_mtime_ns == (sample_tree / "README.txt").stat().st_mtime_ns


@pytest.mark.parametrize("made", [False, True])
def test_stale_references_are_found_before_anything_is_written(
    store: Store, sample_tree: Path, tmp_path: Path, made: bool
) -> None:
    root = add(store, sample_tree, reference=True)
    (sample_tree / "README.txt").write_text("changed")
    (sample_tree / "run.sh").unlink()
    target = tmp_path / "out"
    if made:
        target.mkdir()
    with pytest.raises(StaleReference, match=r"and 1 more like it.*nothing was written"):
        check_out(store, root, target)
    assert target.exists() is made
    assert not made or not list(target.iterdir())


def test_missing_blobs_are_named_before_anything_is_written(store: Store, sample_tree: Path, tmp_path: Path) -> None:
    root = add(store, sample_tree)
    for content in (b"A sample.\n", b"spaces\n", b"number 1\n", b"number 2\n"):
        blob_file(store, content).unlink()
    with pytest.raises(MissingBlob, match=r"README\.txt.*and 1 more; nothing was written"):
        check_out(store, root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_corrupt_blob_is_never_checked_out(store: Store, sample_tree: Path, tmp_path: Path) -> None:
    root = add(store, sample_tree)
    blob = blob_file(store, b"A sample.\n")
    blob.chmod(0o644)
    blob.write_bytes(b"B sample, longer\n")
    with pytest.raises(MissingBlob, match="README"):
        check_out(store, root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_root_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(MissingTree):
        check_out(store, ScanOptions().function.of(b"nothing of ours"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_place_that_can_not_be_used_is_named(store: Store, sample_tree: Path, tmp_path: Path) -> None:
    root = add(store, sample_tree)
    (tmp_path / "link").symlink_to(store.layout.root)
    for target in (
        sample_tree,
        sample_tree / "README.txt",
        tmp_path / "no" / "such",
        store.layout.root,
        store.layout.blobs / "new",
        tmp_path / "link" / "new",
    ):
        with pytest.raises(BadInput, match=target.name):
            check_out(store, root, target)
    assert store.verifier.verify().is_clean


def test_links_lead_no_write_out_of_the_target(store: Store, tmp_path: Path) -> None:
    top, outside = tmp_path / "top", tmp_path / "outside"
    outside.mkdir()
    (top / "z").mkdir(parents=True)
    (top / "a").symlink_to(outside)
    (top / "z" / "file").write_text("x")
    (top / "z" / "up").symlink_to("../../../outside")
    check_out(store, add(store, top), tmp_path / "out")
    assert list(outside.iterdir()) == []
    assert look(tmp_path / "out") == look(top)


class _StoppedError(Exception):
    pass


@pytest.mark.parametrize("made", [False, True])
def test_an_error_on_the_way_removes_what_was_made(store: Store, sample_tree: Path, tmp_path: Path, made: bool) -> None:
    root = add(store, sample_tree)
    target = tmp_path / "out"
    if made:
        target.mkdir()
    seen = []

    def stop(files: int, size: int) -> None:
        seen.append(threading.current_thread())
        if len(seen) == 3:
            assert list(target.iterdir())
            raise _StoppedError

    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(_StoppedError):
        check_out(store, root, target, progress=stop)
    assert target.exists() is made
    assert not made or not list(target.iterdir())
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert not store.leases.living()


def test_what_somebody_else_puts_into_the_target_meanwhile_is_an_error(
    store: Store, sample_tree: Path, tmp_path: Path
) -> None:
    root = add(store, sample_tree)
    target = tmp_path / "out"

    def interfere(files: int, size: int) -> None:
        # Directories are made before the files in them: one that vanishes fails the next file.
        for path in sorted(target.rglob("*"), reverse=True):
            path.unlink() if not path.is_dir() or path.is_symlink() else path.rmdir()

    with pytest.raises(CheckoutError):
        check_out(store, root, target, progress=interfere, workers=1)
    assert not target.exists()


def test_a_tree_deeper_than_python_s_stack_is_written_and_removed(store: Store, tmp_path: Path) -> None:
    function = ScanOptions().function
    with store.ingest() as ingest:
        builder = TreeBuilder(store.index, ingest, function)
        file = FileEntry(b"file", ingest.add_bytes(b"x", function), False)
        deep = b"d/" * 1500
        root = builder.finish(builder.add_paths([(deep + b"file", file)])).digest
    # Nothing else could remove it afterwards, pytest's own clean-up included: so an error has to.
    counted = []

    def stop(files: int, size: int) -> None:
        here = os.open(tmp_path / "out", os.O_RDONLY)
        while names := os.listdir(here):
            below = os.open(names[0], os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
            counted.append(names[0])
            if names[0] == "file":
                break
        os.close(here)
        raise _StoppedError

    with pytest.raises(_StoppedError):
        check_out(store, root, tmp_path / "out", progress=stop)
    assert counted == ["d"] * 1500 + ["file"]
    assert not (tmp_path / "out").exists()
