"""One blob on its way in, from whoever has its bytes a piece at a time.

`Ingest.begin` makes one. The bytes are hashed and written as they come, so
nothing is held in memory whole. What they are compared with in the end is a
*claim*: a digest, a hash whose function nobody said, or nothing at all. One
thread at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from store.digest import Digest, DigestFunction
from store.errors import DigestMismatch
from store.hashing import CHUNK, hasher_for
from store.layout import Layout
from store.sessions import translated


class Claim(Protocol):
    """What is said of the bytes before they come."""

    def update(self, data: bytes | memoryview, size: int) -> None:
        """Take the next bytes; `size`: of all with these. Raises DigestMismatch as soon as there are too many."""
        ...

    def settle(self, size: int) -> Digest:
        """That was all, of so many bytes: what they are. Raises DigestMismatch."""
        ...


class Anything:
    """Nothing is said but the function."""

    def __init__(self, function: DigestFunction, size: int = CHUNK) -> None:
        """`size`: how many bytes are likely."""
        self._function = function
        self._hasher = hasher_for(function, size)

    def update(self, data: bytes | memoryview, size: int) -> None:
        """Hash them."""
        self._hasher.update(data)

    def settle(self, size: int) -> Digest:
        """Whatever they are."""
        return Digest(self._function, self._hasher.digest(), size)


class Exactly:
    """They have this digest."""

    def __init__(self, digest: Digest) -> None:
        self._digest = digest
        self._found = Anything(digest.function, digest.size)

    def update(self, data: bytes | memoryview, size: int) -> None:
        """Hash them, unless there are too many."""
        if size > self._digest.size:
            raise DigestMismatch(
                f"there are over {self._digest.size} bytes, which {self._digest} has; nothing was stored"
            )
        self._found.update(data, size)

    def settle(self, size: int) -> Digest:
        """The digest, if that is true."""
        found = self._found.settle(size)
        if found != self._digest:
            raise DigestMismatch(f"the bytes offered as {self._digest} are {found}; nothing was stored")
        return found


class Hashed:
    """They have this hash, by one function or another: all are reckoned, as nothing tells which before the end."""

    def __init__(self, hash_: bytes, size: int = CHUNK) -> None:
        """`size`: how many bytes are likely."""
        self._hash = hash_
        self._found = [Anything(function, size) for function in DigestFunction]

    def update(self, data: bytes | memoryview, size: int) -> None:
        """Hash them by each function."""
        for found in self._found:
            found.update(data, size)

    def settle(self, size: int) -> Digest:
        """The digest whose hash it is."""
        found = [found.settle(size) for found in self._found]
        for digest in found:
            if digest.hash == self._hash:
                return digest
        raise DigestMismatch(
            f"the bytes offered as {self._hash.hex()} are {' and '.join(map(str, found))}; nothing was stored"
        )


class Writer:
    """Takes bytes until `finish`, which compares them with what was claimed, or `discard`."""

    def __init__(self, layout: Layout, path: str, claim: Claim, hold: Callable[[Digest, str], None]) -> None:
        """`hold` takes over the finished file at `path`. Raises NoSpace or StoreUnusable."""
        self.size = 0
        """Bytes taken so far."""
        self._layout = layout
        self._path = path
        self._claim = claim
        self._hold = hold
        with translated(layout, "adding a stream"):
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, data: bytes | memoryview) -> None:
        """Take the next bytes. Raises DigestMismatch as soon as there are more than claimed, NoSpace."""
        self._claim.update(data, self.size + len(data))
        with translated(self._layout, "adding a stream"):
            write_all(self._file, data)
        self.size += len(data)

    def finish(self) -> Digest:
        """That was all: hold the blob for the next flush. Raises DigestMismatch; nothing is kept then."""
        os.close(self._file)
        self._file = -1
        try:
            digest = self._claim.settle(self.size)
        except DigestMismatch:
            self.discard()
            raise
        self._hold(digest, self._path)
        return digest

    def discard(self) -> None:
        """Forget what was taken; harmless when repeated, but not after `finish`."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        discard(self._path)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of it, however many calls that takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def discard(path: str) -> None:
    """Remove a file that may be gone already."""
    with suppress(FileNotFoundError):
        os.unlink(path)
