"""File systems that can do more (reflinks) or hold less (a full disk) than the usual one."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from casfs.checkout import Mode, check_out
from store import kernel
from store.digest import DigestFunction
from store.errors import NoSpace, StoreError
from store.importing import ScanOptions
from store.layout import blob_path
from store.repository import Store
from tests.conftest import Requirements

BLAKE3 = DigestFunction.BLAKE3
_FS_IOC_FIEMAP = 0xC020660B
_FIEMAP = struct.Struct("=QQLLLL")
_EXTENT = struct.Struct("=QQQQQLLLL")
_SHARED = 0x2000  # FIEMAP_EXTENT_SHARED, linux/fiemap.h


@contextmanager
def _mounted(place: Path, *arguments: str | Path) -> Iterator[Path]:
    place.mkdir()
    subprocess.run(["mount", *arguments, place], check=True, timeout=30)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True, timeout=30)


@pytest.fixture(params=["btrfs", "xfs"])
def cloning_disk(request: pytest.FixtureRequest, tmp_path: Path, requires: Requirements) -> Iterator[Path]:
    """A file system in a file on which files can share blocks."""
    kind = request.param
    requires.loop_devices()
    requires.programs(f"mkfs.{kind}")
    requires.condition(_knows(kind), f"the file system {kind} in this kernel")
    image = tmp_path / "image"
    with open(image, "wb") as file:
        file.truncate(320 << 20)
    subprocess.run([f"mkfs.{kind}", "-q", image], check=True, timeout=60, capture_output=True)
    with _mounted(tmp_path / "disk", "-o", "loop", image) as place:
        yield place


def _knows(kind: str) -> bool:
    if modprobe := shutil.which("modprobe"):
        subprocess.run([modprobe, "-q", kind], check=False, timeout=30)
    return any(line.split()[-1] == kind for line in Path("/proc/filesystems").read_text().splitlines())


def _is_shared(path: Path) -> bool:
    """Whether all blocks of a file are also another's, by FIEMAP."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        query = bytearray(_FIEMAP.pack(0, (1 << 64) - 1, 1, 0, 64, 0) + bytes(64 * _EXTENT.size))
        fcntl.ioctl(descriptor, _FS_IOC_FIEMAP, query)
    finally:
        os.close(descriptor)
    count = _FIEMAP.unpack_from(query)[3]
    extents = [_EXTENT.unpack_from(query, _FIEMAP.size + number * _EXTENT.size) for number in range(count)]
    return bool(extents) and all(extent[5] & _SHARED for extent in extents)


def test_blobs_share_the_blocks_of_the_files_they_came_from(cloning_disk: Path) -> None:
    files = {f"{size}": os.urandom(size) for size in (300_000, 3 << 20, 20_000)}
    with Store.open(cloning_disk / "store") as store, store.ingest() as ingest:
        for name, data in files.items():
            path = cloning_disk / name
            path.write_bytes(data)
            digest = ingest.add_file(path, BLAKE3)
            ingest.flush()
            blob = store.layout.blobs / blob_path(digest)
            assert blob.read_bytes() == data
            # The third is small: it is cloned because the first has shown that cloning works.
            assert _is_shared(blob), f"{name} bytes were copied"
            path.write_bytes(b"changed afterwards")
            assert blob.read_bytes() == data


@pytest.mark.parametrize(("mode", "shared"), [(Mode.REFLINK, True), (Mode.AUTO, True), (Mode.COPY, False)])
def test_a_checkout_shares_blocks_unless_it_shall_copy(cloning_disk: Path, mode: Mode, shared: bool) -> None:
    with Store.open(cloning_disk / "store") as store:
        (cloning_disk / "tree").mkdir()
        (cloning_disk / "tree/file").write_bytes(os.urandom(300_000))
        root = store.importer.from_directories([(b"", cloning_disk / "tree")], ScanOptions()).digest
        (cloning_disk / "tree/file").unlink()
        done = check_out(store, root, cloning_disk / "out", mode=mode)
    assert done.files == 1 and done.copied == (0 if shared else 1)
    assert _is_shared(cloning_disk / "out/file") is shared


def test_where_files_cannot_be_cloned_they_are_copied(tmp_path: Path, store: Store) -> None:
    (tmp_path / "one").write_bytes(b"x" * 1_000_000)
    source, target = os.open(tmp_path / "one", os.O_RDONLY), os.open(tmp_path / "two", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        kernel.clone_or_copy(source, target)
    finally:
        os.close(source)
        os.close(target)
    assert (tmp_path / "two").read_bytes() == b"x" * 1_000_000


@pytest.fixture
def small_disk(tmp_path: Path, requires: Requirements) -> Iterator[Path]:
    """A file system of four megabytes."""
    requires.admin()
    with _mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=4m", "casfs-test") as place:
        yield place


def _fill(disk: Path) -> None:
    with open(disk / "filler", "wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass


@pytest.mark.parametrize("size", [200_000, 3 << 20])
def test_a_full_disk_is_said_clearly_leaves_nothing_and_the_store_works_on(
    small_disk: Path, tmp_path: Path, size: int
) -> None:
    top = tmp_path / "top"
    top.mkdir()
    for number in range(0, 12 << 20, size):
        (top / str(number)).write_bytes(number.to_bytes(8, "big") + os.urandom(size - 8))
    with Store.open(small_disk / "store") as store:
        with pytest.raises(NoSpace, match=r"the disk of .*/small/store is full; make room"):
            store.importer.from_directories([(b"", top)], ScanOptions())
        assert os.listdir(store.layout.tmp) == []
        assert list(store.blobs.files()) == []
        assert store.manifests.list() == []
        with store.ingest() as ingest:
            digest = ingest.add_bytes(b"a little", BLAKE3)
        assert store.blobs.has(digest)
        assert store.verifier.verify().is_clean


def test_a_full_disk_during_a_change_of_the_index_is_said_clearly(small_disk: Path) -> None:
    with Store.open(small_disk / "store") as store:
        lines = [f"l\t{'x' * 200}\t-\tname-{number:06}\n" for number in range(30_000)]
        with pytest.raises(NoSpace, match="is full"):
            store.importer.from_text(["casfs manifest 1 blake3\n", *lines], "text")
        assert os.listdir(store.layout.tmp) == []
        tree = store.importer.from_text(["casfs manifest 1 blake3\n", *lines[:10]], "text")
        assert tree.nodes == 11
        assert store.verifier.verify().is_clean


def test_a_store_on_a_full_disk_can_still_be_opened_and_read(small_disk: Path) -> None:
    with Store.open(small_disk / "store") as store, store.ingest() as ingest:
        digest = ingest.add_bytes(b"data", BLAKE3)
    _fill(small_disk)
    with Store.open(small_disk / "store") as store:
        with open(store.blobs.open(digest), "rb") as file:
            assert file.read() == b"data"
        with pytest.raises(NoSpace), store.ingest() as ingest:
            ingest.add_bytes(b"more", BLAKE3)
        (small_disk / "filler").unlink()
        with store.ingest() as ingest:
            ingest.add_bytes(b"more", BLAKE3)


def test_a_store_cannot_be_made_on_a_full_disk_and_says_so(small_disk: Path) -> None:
    _fill(small_disk)
    with pytest.raises(StoreError, match=r"No space|is full"):
        Store.open(small_disk / "store")


def test_syncing_a_descriptor_that_is_none_is_an_error() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        kernel.syncfs(-1)
