"""Blobs on their way out: what of a file is in the page cache."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tools.server import downloads
from tools.server.downloads import is_cached

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
