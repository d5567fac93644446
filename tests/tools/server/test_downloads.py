"""Blobs on their way out: what of a file is in the page cache."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from store.digest import DigestFunction
from store.layout import blob_path
from store.presence import WouldWait
from store.repository import Store
from tests.tools.conftest import Casfs
from tests.tools.server.conftest import HTTP, HttpClient, connected, running
from tools.server import downloads
from tools.server.downloads import is_cached
from tools.server.http_cache import SMALL
from tools.server.http_names import CacheName, Kind
from tools.server.http_parts import make_cache
from tools.server.services import Services

SIZE = 1 << 20


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "file").write_bytes(bytes(SIZE))
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    os.fsync(descriptor)
    yield descriptor
    os.close(descriptor)


def test_what_was_just_written_is_in_the_page_cache_and_what_was_dropped_is_not(file: int) -> None:
    assert is_cached(file, 0, SIZE)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        os.preadv(file, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        assert not is_cached(file, 0, SIZE)
    else:
        # As on a file system in memory.
        assert is_cached(file, 0, SIZE)


def test_a_file_system_that_can_not_tell_is_asked_once(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    flags_seen: list[int] = []
    preadv = os.preadv

    def without_nowait(descriptor: int, buffers: Sequence[bytearray], offset: int, flags: int = 0) -> int:
        flags_seen.append(flags)
        if flags:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(downloads, "_can_read_now", True)
    monkeypatch.setattr(os, "preadv", without_nowait)
    assert is_cached(file, 0, SIZE)
    flags_seen.clear()
    assert is_cached(file, 0, SIZE)
    assert flags_seen == [0, 0]


PAGE = 4096


@pytest.fixture
def one_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each file, the page cache has the first page alone: what doesn't wait reads that, and then would wait."""
    preadv = os.preadv

    def read(descriptor: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        if not flags:
            return preadv(descriptor, buffers, offset)
        if offset >= PAGE:
            raise BlockingIOError
        return preadv(descriptor, [buffers[0][: PAGE - offset]], offset)

    monkeypatch.setattr(downloads, "_can_read_now", True)
    monkeypatch.setattr(os, "preadv", read)


@pytest.mark.usefixtures("one_page")
def test_a_blob_of_which_the_page_cache_has_only_the_beginning_comes_whole_or_would_wait(
    store: Store, services: Services
) -> None:
    data = bytes(range(256)) * (SMALL // 256)
    with store.ingest() as ingest:
        digest = ingest.add_bytes(data, DigestFunction.SHA256)
    with pytest.raises(WouldWait):
        services.downloads.read_quick(digest)
    cache = make_cache(store, services, validate=False, most=SMALL)
    name = CacheName("", Kind.CAS, digest.hash)
    with pytest.raises(WouldWait):
        cache.get(name, may_wait=False)
    assert cache.get(name).data == data


def test_what_the_kernel_has_dropped_of_a_blob_is_read_again_for_every_door(casfs: Casfs) -> None:
    data = os.urandom(7 * PAGE)
    with running(casfs, *HTTP) as server, HttpClient(server) as web, connected(server) as client:
        path = web.put_blob(data)
        digest = DigestFunction.SHA256.of(data)
        drop_end(casfs.store / "blobs" / blob_path(digest))
        assert web("GET", path).body == data
        drop_end(casfs.store / "blobs" / blob_path(digest))
        assert client.read(digest) == data


def drop_end(path: Path) -> None:
    """Have the kernel forget all but six pages of a file, if that is on a disk."""
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 6 * PAGE, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)
