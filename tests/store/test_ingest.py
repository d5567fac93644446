"""Adding blobs: what is published, with which bytes and mode, and what a failure leaves."""

from __future__ import annotations

import errno
import io
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from store import ingest as ingesting
from store import kernel
from store.digest import Digest, DigestFunction
from store.errors import BadInput, DigestMismatch, NoSpace
from store.ingest import SMALL, Transfer
from store.layout import blob_path
from store.repository import Store

BLAKE3 = DigestFunction.BLAKE3
SIZES = pytest.mark.parametrize("size", [0, 1, SMALL, SMALL + 1, 5 << 20])


def _path(store: Store, digest: Digest) -> Path:
    return store.layout.blobs / blob_path(digest)


def _old(path: Path) -> Path:
    """Its stamp is settled: it may be believed the next time."""
    os.utime(path, (1_000_000_000, 1_000_000_000.5))
    return path


@pytest.mark.parametrize("function", DigestFunction)
@SIZES
def test_files_streams_and_memory_become_the_same_blob(
    store: Store, tmp_path: Path, size: int, function: DigestFunction
) -> None:
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    with store.ingest() as ingest:
        digests = {
            ingest.add_file(tmp_path / "file", function),
            ingest.add_stream(io.BytesIO(data), function),
            ingest.add_bytes(data, function),
        }
    assert digests == {function.of(data)}
    assert _path(store, *digests).read_bytes() == data
    assert _path(store, *digests).stat().st_mode & 0o777 == 0o444
    assert ingest.new_blobs == 1
    assert os.listdir(store.layout.tmp) == []


def test_nothing_is_published_before_the_flush(store: Store) -> None:
    with store.ingest() as ingest:
        digest = ingest.add_bytes(b"data", BLAKE3)
        assert not store.blobs.has(digest)
        ingest.flush()
        assert store.blobs.has(digest)


def test_an_error_discards_what_was_not_flushed(store: Store) -> None:
    ingest = store.ingest()
    digest = ingest.add_bytes(b"data", BLAKE3)
    ingest.__exit__(RuntimeError, RuntimeError("on purpose"), None)
    assert not store.blobs.has(digest)
    assert os.listdir(store.layout.tmp) == []


@SIZES
def test_bytes_with_another_digest_than_offered_are_refused(store: Store, tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_bytes(bytes(size))
    expected = BLAKE3.of(b"something else")
    with store.ingest() as ingest:
        with pytest.raises(DigestMismatch, match="nothing was stored"):
            ingest.add_file(tmp_path / "file", BLAKE3, expected=expected)
        with pytest.raises(DigestMismatch, match="nothing was stored"):
            ingest.add_stream(io.BytesIO(bytes(size)), BLAKE3, expected)
    assert not store.blobs.has(expected)
    assert list(store.blobs.files()) == []


def test_a_stream_that_breaks_off_leaves_nothing(store: Store) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if data := super().read(4):
                return data
            raise ConnectionResetError

    with store.ingest() as ingest:
        with pytest.raises(ConnectionResetError):
            ingest.add_stream(Broken(b"only a part"), BLAKE3)
        assert os.listdir(next(store.layout.tmp.iterdir())) == []


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("between", [False, True])
def test_a_blob_is_executable_once_one_of_its_files_is(store: Store, first: bool, between: bool) -> None:
    with store.ingest() as ingest:
        digest = ingest.add_bytes(b"run", BLAKE3, executable=first)
        if between:
            ingest.flush()
        ingest.add_bytes(b"run", BLAKE3, executable=not first)
    assert _path(store, digest).stat().st_mode & 0o777 == 0o555


def test_an_unchanged_file_is_not_read_again_and_a_changed_one_is(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    _old(path)
    # The change time can't be set: it has to grow old by itself.
    threading.Event().wait(0.15)
    with store.ingest() as ingest:
        first = ingest.add_file(path, BLAKE3)
    with monkeypatch.context() as patch, store.ingest() as ingest:
        patch.setattr(ingesting, "_read_all", lambda *_: pytest.fail("it was read"))
        assert ingest.add_file(path, BLAKE3) == first
    path.write_bytes(b"behind")
    _old(path)
    with store.ingest() as ingest:
        assert ingest.add_file(path, BLAKE3) == BLAKE3.of(b"behind")


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "link"])
def test_only_regular_files_are_added(store: Store, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "it"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("/etc/passwd")
    else:
        path = Path("/dev/zero")
    with store.ingest() as ingest, pytest.raises((BadInput, OSError)):
        ingest.add_file(path, BLAKE3)


def test_a_hard_link_is_the_same_file_and_read_only(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"shared")
    with store.ingest() as ingest:
        digest = ingest.add_file(path, BLAKE3, transfer=Transfer.HARDLINK)
    assert _path(store, digest).samefile(path)
    assert path.stat().st_mode & 0o777 == 0o444


def test_a_hard_link_to_another_file_system_is_refused_by_name(store: Store) -> None:
    with store.ingest() as ingest, pytest.raises(BadInput, match=r"can't hard-link '/proc/version'"):
        ingest.add_file("/proc/version", BLAKE3, transfer=Transfer.HARDLINK)


def test_files_whose_size_the_kernel_does_not_know_are_read_to_their_end(store: Store) -> None:
    with store.ingest() as ingest:
        digest = ingest.add_file("/proc/version", BLAKE3)
    assert _path(store, digest).read_bytes() == Path("/proc/version").read_bytes()


def test_threads_may_add_while_another_flushes(store: Store) -> None:
    with store.ingest() as ingest, ThreadPoolExecutor(4) as pool:

        def add(number: int) -> Digest:
            if number % 50 == 0:
                ingest.flush()
            return ingest.add_bytes(b"%d" % (number % 300), BLAKE3)

        digests = set(pool.map(add, range(1000)))
    assert len(digests) == 300
    assert store.blobs.missing(digests) == []
    assert len(list(store.blobs.files())) == 300


@pytest.mark.parametrize("blobs", [3, 40])
@pytest.mark.parametrize("step", ["sync", "rename", "row"])
def test_a_full_disk_at_any_step_of_a_flush_changes_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, blobs: int, step: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    renamed: list[str] = []

    def rename_one(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        assert dst_dir_fd == store.blobs.directory
        if renamed:
            full()
        (store.layout.blobs / target).parent.mkdir(parents=True, exist_ok=True)
        renamed.append(source)
        os.link(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        os.unlink(source, dir_fd=src_dir_fd)

    ingest = store.ingest()
    for number in range(blobs):
        ingest.add_bytes(b"%d" % number, BLAKE3)
    with monkeypatch.context() as patch:
        if step == "sync":
            patch.setattr(kernel, "fsync_path", full)
            patch.setattr(kernel, "syncfs", full)
        elif step == "rename":
            patch.setattr(os, "rename", rename_one)
        else:
            patch.setattr(store.index, "update", full)
        with pytest.raises(NoSpace, match="is full"):
            ingest.flush()
    ingest.close()
    assert list(store.blobs.files()) == []
    assert os.listdir(store.layout.tmp) == []
    with store.ingest() as ingest:
        digest = ingest.add_bytes(b"0", BLAKE3)
    assert store.blobs.has(digest)


def test_many_blobs_cost_two_syncs_not_one_each(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(kernel, "fsync_path", lambda path: calls.append("fsync"))
    monkeypatch.setattr(kernel, "syncfs", lambda descriptor: calls.append("syncfs"))
    with store.ingest() as ingest:
        for number in range(500):
            ingest.add_bytes(b"%d" % number, BLAKE3)
    assert calls == ["syncfs", "syncfs"]
