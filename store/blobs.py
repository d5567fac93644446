"""Published blobs: which are there, opening them, and what happens to wrong ones.

The directory is the truth, the index is the memory. A row in BLOBS says that
the blob was verified and is durable; a file without a row (left by a crash, or
put there by Bazel) is hashed before its first use.

    BLOBS  digest key → size, last use (seconds since the epoch), flags

Threads may share a `Blobs`. Publishing is `store.ingest`'s, removing is
`store.gc`'s; both hold the publication lock, so that neither can remove a file
that the other has just put there.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from store.digest import Digest, DigestFunction
from store.errors import CorruptBlob, MissingBlob
from store.hashing import hash_descriptor
from store.index import Change, Index, Table, View
from store.layout import Layout, blob_path, cas_directories, hash_of_name

_ROW = struct.Struct("<QIB")
EXECUTABLE = 1

MODE = 0o444
MODE_EXECUTABLE = 0o555


class BlobRow(NamedTuple):
    """What the index remembers of a verified blob; `used` in seconds since the epoch."""

    size: int
    used: int
    executable: bool


def pack_row(row: BlobRow) -> bytes:
    """The row's value in BLOBS."""
    return _ROW.pack(row.size, row.used, EXECUTABLE if row.executable else 0)


def unpack_row(value: bytes) -> BlobRow:
    """The inverse of `pack_row`."""
    size, used, flags = _ROW.unpack(value)
    return BlobRow(size, used, bool(flags & EXECUTABLE))


def find_row(view: View, digest: Digest) -> BlobRow | None:
    """What is remembered of a blob, or None. Raises MissingBlob when the sizes contradict each other."""
    value = view.get(Table.BLOBS, digest.key)
    if value is None:
        return None
    row = unpack_row(value)
    if row.size != digest.size:
        raise MissingBlob(
            f"no blob {digest}: the store has that hash with {row.size} bytes; the digest names a wrong size"
        )
    return row


def touch(change: Change, keys: Iterable[bytes], now: int) -> list[bytes]:
    """Note that blobs are in use now; returns the keys of those that have no row."""
    absent = []
    for key in keys:
        value = change.get(Table.BLOBS, key)
        if value is None:
            absent.append(key)
        elif (row := unpack_row(value)).used < now:
            change.put(Table.BLOBS, key, pack_row(row._replace(used=now)))
    return absent


class Blobs:
    """The blob directory of one store."""

    def __init__(self, layout: Layout, index: Index) -> None:
        self._layout = layout
        self._index = index
        self._directory = os.open(layout.blobs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._lock_path = layout.index / "publish.lock"

    @property
    def directory(self) -> int:
        """A descriptor of ``STORE/blobs``, to open `blob_path` names against."""
        return self._directory

    def close(self) -> None:
        """Close the descriptor of the directory."""
        os.close(self._directory)

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Held from the moment a blob gets its name until its row is committed."""
        with self._locked(fcntl.LOCK_SH):
            yield

    @contextmanager
    def removing(self) -> Iterator[None]:
        """Held from the moment a blob loses its row until its file is gone; no publication meanwhile."""
        with self._locked(fcntl.LOCK_EX):
            yield

    @contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, kind)
            yield
        finally:
            os.close(lock)

    def has(self, digest: Digest) -> bool:
        """Whether the blob is here, verified; a file without a row is verified now."""
        with self._index.view() as view:
            if view.get(Table.BLOBS, digest.key) is not None:
                find_row(view, digest)
                return True
        if not self.has_file(digest):
            return False
        try:
            self.adopt(digest)
        except (CorruptBlob, MissingBlob):
            return False
        return True

    def has_file(self, digest: Digest) -> bool:
        """Whether a file of the right size has the blob's name; nothing is said of its bytes."""
        try:
            return os.stat(blob_path(digest), dir_fd=self._directory).st_size == digest.size
        except OSError:
            return False

    def size_on_disk(self, function: DigestFunction, hash_: bytes) -> int | None:
        """The size of the file that has the hash for its name, or None."""
        try:
            return os.stat(blob_path(Digest(function, hash_, 0)), dir_fd=self._directory).st_size
        except OSError:
            return None

    def is_verified(self, digest: Digest) -> bool:
        """Whether the index vouches for the blob: then `open` doesn't have to hash it."""
        with self._index.view() as view:
            return find_row(view, digest) is not None

    def open(self, digest: Digest, directory: int | None = None) -> int:
        """A descriptor to read the blob from.

        `directory` stands in for ``STORE/blobs`` (the same directory seen
        through another mount). A blob without a row is hashed first, which
        takes as long as reading it. Raises MissingBlob or CorruptBlob.
        """
        verified = self.is_verified(digest)
        try:
            descriptor = os.open(
                blob_path(digest), os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory if directory is None else directory
            )
        except FileNotFoundError:
            if verified:
                self._note_loss(digest)
            raise MissingBlob(f"no blob {digest} in {self._layout.root}") from None
        try:
            if not verified:
                self.adopt(digest)
            elif (size := os.fstat(descriptor).st_size) != digest.size:
                self.quarantine(digest)
                raise CorruptBlob(f"blob {digest} had {size} bytes; it is in {self._layout.quarantine} now")
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def adopt(self, digest: Digest) -> None:
        """Hash a blob file that has no row, and give it one.

        Raises MissingBlob if there is no file, CorruptBlob (after putting the
        file into quarantine) if its bytes are others.
        """
        try:
            descriptor = os.open(blob_path(digest), os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory)
        except FileNotFoundError:
            raise MissingBlob(f"no blob {digest} in {self._layout.root}") from None
        try:
            found = hash_descriptor(descriptor, digest.function)
            if found.hash == digest.hash:
                if found.size != digest.size:
                    raise MissingBlob(f"no blob {digest}: the store has that hash with {found.size} bytes")
                status = os.fstat(descriptor)
                # It may be the page cache's only: make it durable before a row says so.
                os.fsync(descriptor)
            else:
                self.quarantine(digest)
                raise CorruptBlob(
                    f"blob {digest} had the bytes of {found}; it is in {self._layout.quarantine} now"
                )
        finally:
            os.close(descriptor)
        row = BlobRow(digest.size, int(time.time()), bool(status.st_mode & 0o100))

        def work(change: Change) -> None:
            if change.get(Table.BLOBS, digest.key) is None and self.has_file(digest):
                change.put(Table.BLOBS, digest.key, pack_row(row))

        with self.publishing():
            self._index.update(work)

    def quarantine(self, digest: Digest) -> None:
        """Take a wrong file out of the blob directory and forget its row; nothing is deleted."""
        with self.removing():
            self._forget([digest.key])
            # Removing waits for publications, so what has the name now is what was looked at,
            # unless somebody replaced it with a right one meanwhile: then it is only lost, not wrong.
            target = self._layout.quarantine / f"{digest.function.label}-{digest.hash.hex()}-{time.time_ns()}"
            try:
                os.rename(blob_path(digest), target, src_dir_fd=self._directory)
            except FileNotFoundError:
                return

    def _note_loss(self, digest: Digest) -> None:
        """Somebody removed the file behind our back: drop the row, unless the file is back."""
        with self.removing():
            if not self.has_file(digest):
                self._forget([digest.key])

    def _forget(self, keys: list[bytes]) -> None:
        def work(change: Change) -> None:
            if any([change.delete(Table.BLOBS, key) for key in keys]):
                count_removal(change)

        self._index.update(work)

    def missing(self, digests: Iterable[Digest]) -> list[Digest]:
        """Those of the digests that the index doesn't know and no file stands for."""
        digests = list(digests)
        with self._index.view() as view:
            unknown = [d for d in digests if view.get(Table.BLOBS, d.key) is None]
        return [d for d in unknown if not self.has(d)]

    def files(self) -> Iterator[tuple[DigestFunction, bytes, os.DirEntry[str]]]:
        """Every blob file on disk: function, hash and directory entry, shard by shard.

        A file whose name is no hash is passed over: it is not ours.
        """
        for function, prefix in cas_directories().items():
            base = self._layout.blobs / prefix
            try:
                shards = sorted(os.listdir(base))
            except FileNotFoundError:
                continue
            for shard in shards:
                try:
                    entries = list(os.scandir(base / shard))
                except (NotADirectoryError, FileNotFoundError):
                    continue
                for entry in sorted(entries, key=lambda e: e.name):
                    hash_ = hash_of_name(shard, entry.name)
                    if hash_ is not None:
                        yield function, hash_, entry


_REMOVALS = b"removals"


def count_removal(change: Change) -> None:
    """Move the counter that tells manifests to count their missing blobs again."""
    change.put(Table.META, _REMOVALS, str(removals(change) + 1).encode())


def removals(view: View) -> int:
    """How often blobs have been removed: as long as it stands still, what was complete is complete."""
    return int(view.get(Table.META, _REMOVALS) or 0)
