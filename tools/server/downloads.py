"""Blobs on their way out: found, brought in from a source where they are missing, opened once and read.

An open descriptor outlives the blob's removal, so a download that has begun
gets to its end whatever a collection does meanwhile.

"Quick" is what never waits for a disk: bytes that are in the page cache
(RWF_NOWAIT). What would wait raises WouldWait, and is asked for again from a
thread that may. Threads may share `Downloads`; a `Reader` is used by one at a time.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from typing import Protocol

from store.blobs import Blobs
from store.digest import Digest
from store.errors import BadDigest, MissingBlob
from store.hydration import Hydrator
from store.layout import blob_path
from store.presence import Name, Presence, WouldWait, as_digest, as_name
from tools.server.compression import compress_stream

PIECE = 256 << 10
"""Bytes read at a time. With a mebibyte a read of 4 MiB costs the server 7.7 ms of CPU and not 5.4, in page faults."""
_HEAD_MOST = 16
_READING = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def no_head(size: int) -> bytes:
    """Nothing."""
    return b""


class Reader(Protocol):
    """Bytes on their way to a client; to be closed."""

    @property
    def left(self) -> int | None:
        """How many there are still, if that is known."""
        ...

    def read(self, *, may_wait: bool = True, head: Callable[[int], bytes] = no_head) -> bytes:
        """The next piece, or none at the end. Without `may_wait` raises WouldWait where a disk is needed.

        `head` says what is to stand before so many bytes of a piece (a few bytes
        of framing, say): joined here, it costs no copy of the piece.
        """
        ...

    def close(self) -> None: ...


class PlainReader:
    """A part of a file as it is. Takes the descriptor over."""

    def __init__(self, descriptor: int, offset: int, end: int) -> None:
        self.descriptor = descriptor
        self._offset = offset
        self._end = end

    @property
    def left(self) -> int:
        """Up to the end it was given."""
        return self._end - self._offset

    def read(self, *, may_wait: bool = True, head: Callable[[int], bytes] = no_head) -> bytes:
        """The next piece."""
        size = min(PIECE, self._end - self._offset)
        if size <= 0:
            return b""
        before = head(size)
        data = (_read if may_wait else _read_now)(self.descriptor, size, self._offset, before)
        count = len(data) - len(before)
        if not count:
            raise MissingBlob("the blob's file ended early: something has cut it short")
        self._offset += count
        return data if count == size else head(count) + data[len(before) :]

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class CompressedReader:
    """What another reader reads, as zstd."""

    def __init__(self, reader: Reader, size: int) -> None:
        """`size`: of all that it will read."""
        self._reader = reader
        self._pieces = compress_stream(self._plain(), size)
        self.left: int | None = None
        """Nobody knows before it is compressed."""

    def _plain(self) -> Iterator[bytes]:
        while data := self._reader.read():
            yield data

    def read(self, *, may_wait: bool = True, head: Callable[[int], bytes] = no_head) -> bytes:
        """The next piece. Never quick: it costs more than reading."""
        if not may_wait:
            raise WouldWait
        data = next(self._pieces, b"")
        return head(len(data)) + data if data else b""

    def close(self) -> None:
        """Close what is read."""
        self._reader.close()


class Downloads:
    """The way out of one store."""

    def __init__(self, blobs: Blobs, presence: Presence, hydrator: Hydrator, *, only_here: bool = False) -> None:
        """`only_here`: what neither the store nor its cold tier has can't come from anywhere."""
        self._only_here = only_here
        self._blobs = blobs
        self._presence = presence
        self._hydrator = hydrator

    def open(self, digest: Digest) -> int:
        """A descriptor of the blob, which counts as used now; the caller closes it. Raises MissingBlob."""
        name = as_name(digest)
        if not self._presence.find_absent((name,)):
            try:
                return self._blobs.open(digest, verified=not digest.is_empty_blob)
            except MissingBlob:
                self._presence.forget(name)
        # In the cold tier, in another source, or nowhere: then this says so.
        self._hydrator.fetch(digest).result()
        return self._blobs.open(digest)

    def bring(self, names: Sequence[Name]) -> None:
        """Have all that is missing come from the sources at once, as far as they have it."""
        try:
            absent = self._presence.find_absent(names)
        except BadDigest:
            return  # whoever reads them says so of the one that is none
        wait([self._hydrator.fetch(as_digest(name)) for name in dict.fromkeys(absent)])

    def open_quick(self, digest: Digest) -> int:
        """The same without waiting. Raises WouldWait, and MissingBlob where that is sure."""
        if digest.is_empty_blob:
            raise WouldWait
        if self._presence.find_absent((as_name(digest),), may_wait=False):
            if self._only_here:
                raise MissingBlob(f"no blob {digest} in the store, nor in any of its sources")
            raise WouldWait
        descriptor = self._open_present(digest)
        if os.fstat(descriptor).st_size != digest.size:
            os.close(descriptor)
            raise WouldWait
        return descriptor

    def read_quick(self, digest: Digest) -> bytes:
        """A whole blob, of at most a piece, without waiting. Raises WouldWait."""
        descriptor = self.open_quick(digest)
        try:
            size = min(digest.size, PIECE)
            data = _read_now(descriptor, size, 0)
        finally:
            os.close(descriptor)
        if len(data) != size:
            raise WouldWait  # the page cache has only its beginning
        return data

    def read_here(self, name: Name) -> bytes | None:
        """A whole blob of one to a piece's bytes, if it is known to be here. Raises WouldWait, BadDigest."""
        vouched = self._presence.vouch(name)
        return None if vouched is None else self._read_present(self._blobs.directory_of(name[0]), name, vouched)

    def _open_present(self, digest: Digest) -> int:
        try:
            return os.open(blob_path(digest), _READING, dir_fd=self._blobs.directory)
        except OSError as error:
            raise WouldWait from error

    def read(self, digest: Digest) -> bytes:
        """A whole blob, which fits in memory. Raises MissingBlob."""
        descriptor = self.open(digest)
        try:
            parts = []
            left = digest.size
            while left and (data := os.read(descriptor, left)):
                parts.append(data)
                left -= len(data)
            return parts[0] if len(parts) == 1 else b"".join(parts)
        finally:
            os.close(descriptor)

    def read_all_present(self, names: Sequence[Name]) -> list[bytes]:
        """Whole blobs of one function that were just found here, a piece at most each, without waiting.

        Raises WouldWait. The names are good ones, as what isn't is not found.
        """
        if not names:
            return []
        directory = self._blobs.directory_of(names[0][0])
        return [self._read_present(directory, name) if name[2] else b"" for name in names]

    def _read_present(self, directory: int, name: Name, vouched: set[Name] | None = None) -> bytes:
        """A whole blob that was found, or is `vouched` for, without waiting; `directory`: of its function.

        Raises WouldWait.
        """
        _, hash_, size = name
        buffer = _buffers.piece
        try:
            descriptor = os.open(f"{hash_[:2]}/{hash_}", _READING, dir_fd=directory)
            try:
                # More than it has: so a file that is longer is noticed, too.
                count = os.preadv(descriptor, (buffer,), 0, os.RWF_NOWAIT if _can_read_now else 0)
                if count == size and vouched is not None:
                    self._presence.note_open(name, descriptor, vouched)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise WouldWait from error
        if count != size:
            raise WouldWait
        return bytes(buffer[:size])


def is_cached(descriptor: int, offset: int, size: int) -> bool:
    """Whether a part of a file is in the page cache, as far as its two ends tell."""
    flags = os.RWF_NOWAIT if _can_read_now else 0
    try:
        return all(os.preadv(descriptor, _one_byte, at, flags) for at in (offset, offset + size - 1))
    except BlockingIOError:
        return False
    except OSError:
        # A file system that can't tell, which is found out once.
        return bool(_read_now(descriptor, 1, offset))


_one_byte = [bytearray(1)]
"""For what nobody looks at."""


def warm(descriptor: int, offset: int, size: int) -> None:
    """Read a part of a file into the page cache."""
    for at in range(offset, offset + size, PIECE):
        os.preadv(descriptor, [_buffers.piece[: min(PIECE, offset + size - at)]], at)


_can_read_now = True


class _Buffers(threading.local):
    """A buffer a thread: a new one for each piece would be cleared first, a page fault for each page."""

    def __init__(self) -> None:
        self.piece = memoryview(bytearray(_HEAD_MOST + PIECE))


_buffers = _Buffers()


def _read(descriptor: int, size: int, offset: int, head: bytes = b"", flags: int = 0) -> bytes:
    """At most a piece of a file, behind `head`."""
    start = len(head)
    buffer = _buffers.piece[: start + size]
    buffer[:start] = head
    count = os.preadv(descriptor, [buffer[start:]], offset, flags)
    return bytes(buffer[: start + count])


def _read_now(descriptor: int, size: int, offset: int, head: bytes = b"") -> bytes:
    """The same of what is in the page cache. Raises WouldWait."""
    global _can_read_now  # noqa: PLW0603 - of the file system, learned once
    if _can_read_now:
        try:
            return _read(descriptor, size, offset, head, os.RWF_NOWAIT)
        except BlockingIOError:
            raise WouldWait from None
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            _can_read_now = False
    return _read(descriptor, size, offset, head)
