"""Published blobs: which are there, opening them, and what happens to wrong ones.

The directory is the truth, the index is the memory. A row in BLOBS says that
the blob was verified and is durable; a file without a row (left by a crash, or
put there by Bazel) is hashed before its first use. The blob of no bytes is
always there: its file is made when somebody wants it.

    BLOBS  digest key → size, last use (seconds since the epoch), flags

Threads may share a `Blobs`. Publishing is `store.ingest`'s, removing is
`store.gc`'s; both hold the publication lock, so that neither can remove a file
that the other has just put there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from store.digest import Digest, DigestFunction, empty_hash
from store.errors import CorruptBlob, MissingBlob
from store.hashing import hash_descriptor
from store.index import Change, Index, Table, View
from store.layout import Layout, blob_path, cas_directories, hash_of_name

_ROW = struct.Struct("<QIB")
EXECUTABLE = 1

_READING = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
"""Neither led elsewhere by a symbolic link nor kept waiting by a FIFO, whoever put them there."""

_USE_SECONDS = 3600
"""How exactly it is remembered when a blob was read through a mount."""

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


def is_known(view: View, digest: Digest) -> bool:
    """Whether the index vouches for a blob of that hash and that size."""
    value = view.get(Table.BLOBS, digest.key)
    # Not by `unpack_row`: this is asked for each blob of long questions.
    return value is not None and bool(_ROW.unpack(value)[0] == digest.size)


def find_size(view: View, function: DigestFunction, hash_: bytes) -> int | None:
    """The size of the blob that the index vouches for under that hash, or None."""
    value = view.get(Table.BLOBS, Digest(function, hash_, 0).key)
    return None if value is None else unpack_row(value).size


def put_rows(change: Change, rows: Iterable[tuple[bytes, BlobRow]]) -> None:
    """Give blobs (by digest key) their rows, and keep the sum of their sizes right."""
    added = 0
    for key, row in rows:
        before = change.get(Table.BLOBS, key)
        added += row.size - (0 if before is None else unpack_row(before).size)
        change.put(Table.BLOBS, key, pack_row(row))
    _add_to_total(change, added)


def delete_rows(change: Change, keys: Iterable[bytes]) -> list[bytes]:
    """Take the rows of blobs away; returns the keys that had one."""
    gone, size = [], 0
    for key in keys:
        value = change.get(Table.BLOBS, key)
        if value is not None:
            size += unpack_row(value).size
            change.delete(Table.BLOBS, key)
            gone.append(key)
    if gone:
        _add_to_total(change, -size)
        count_removal(change)
    return gone


_TOTAL = b"bytes of blobs"


def _add_to_total(change: Change, size: int) -> None:
    before = change.get(Table.META, _TOTAL)
    if before is not None:
        change.put(Table.META, _TOTAL, str(int(before) + size).encode())


def total_bytes(index: Index) -> int:
    """The sizes of all blobs with a row, summed up. Counts them only the first time in the life of a store."""
    with index.view() as view:
        value = view.get(Table.META, _TOTAL)
    return int(value) if value is not None else index.update(_count_total)


def _count_total(change: Change) -> int:
    total = sum(unpack_row(value).size for _, value in change.scan(Table.BLOBS))
    change.put(Table.META, _TOTAL, str(total).encode())
    return total


def forget_total(change: Change) -> None:
    """Have it counted again: the rows were changed without it."""
    change.delete(Table.META, _TOTAL)


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
        self._functions: dict[DigestFunction, int] = {}
        self._lock_path = layout.index / "publish.lock"

    @property
    def directory(self) -> int:
        """A descriptor of ``STORE/blobs``, to open `blob_path` names against."""
        return self._directory

    def directory_of(self, function: DigestFunction) -> int:
        """A descriptor of the directory of a function's shards, which is made if need be.

        What `blob_path_in_function` is relative to. Raises OSError.
        """
        known = self._functions.get(function)
        if known is None:
            path = self._layout.blobs / cas_directories()[function]
            path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            known = self._functions.setdefault(function, descriptor)
            if known != descriptor:  # another thread was first
                os.close(descriptor)
        return known

    def close(self) -> None:
        """Close the descriptors; harmless when repeated."""
        while self._functions:
            os.close(self._functions.popitem()[1])
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1

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
        if digest.is_empty_blob:
            return True
        with self._index.view() as view:
            value = view.get(Table.BLOBS, digest.key)
        if value is not None:
            return unpack_row(value).size == digest.size
        if not self.has_file(digest):
            return False
        try:
            self.adopt(digest)
        except (CorruptBlob, MissingBlob):
            return False
        return True

    def has_file(self, digest: Digest) -> bool:
        """Whether a file of the right size has the blob's name; nothing is said of its bytes.

        For the empty blob there is one from now on.
        """
        try:
            status = os.stat(blob_path(digest), dir_fd=self._directory, follow_symlinks=False)
        except OSError:
            return digest.is_empty_blob and self._make_empty(digest)
        return stat.S_ISREG(status.st_mode) and status.st_size == digest.size

    def _make_empty(self, digest: Digest) -> bool:
        """Make the empty blob's file: whole from its first moment on, so it needs neither tmp nor sync."""
        path = self._layout.blobs / blob_path(digest)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE))
        except FileExistsError:
            return True
        except OSError:
            return False
        return True

    def size_on_disk(self, function: DigestFunction, hash_: bytes) -> int | None:
        """The size of the file that has the hash for its name, or None."""
        try:
            path = blob_path(Digest(function, hash_, 0))
            status = os.stat(path, dir_fd=self._directory, follow_symlinks=False)
        except OSError:
            return 0 if hash_ == empty_hash(function) else None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def is_verified(self, digest: Digest) -> bool:
        """Whether the index vouches for the blob: then `open` doesn't have to hash it."""
        with self._index.view() as view:
            return find_row(view, digest) is not None

    def open(self, digest: Digest, directory: int | None = None, *, verified: bool = False) -> int:
        """A descriptor to read the blob from.

        `directory` stands in for ``STORE/blobs`` (the same directory seen
        through another mount). A blob without a row is hashed first, which
        takes as long as reading it; `verified` says that it was just seen to
        have one. Raises MissingBlob or CorruptBlob.
        """
        if not verified and not self.is_verified(digest):
            if digest.is_empty_blob:
                self.has_file(digest)
            # Before the file is opened: what is opened then is what was hashed, or a later publication.
            self.adopt(digest)
        path = blob_path(digest)
        where = self._directory if directory is None else directory
        try:
            descriptor = os.open(path, _READING, dir_fd=where)
        except OSError as error:
            if error.errno == errno.ELOOP:
                self.quarantine(digest)
                raise CorruptBlob(f"blob {digest} was a symbolic link; {self._now_in_quarantine()}") from error
            if error.errno != errno.ENOENT:
                raise
            if digest.is_empty_blob and self.has_file(digest):
                return os.open(path, _READING, dir_fd=where)
            self._note_loss(digest)
            raise MissingBlob(f"no blob {digest} in {self._layout.root}") from None
        status = os.fstat(descriptor)
        if status.st_size != digest.size:
            os.close(descriptor)
            self.quarantine(digest, status)
            raise CorruptBlob(f"blob {digest} had {status.st_size} bytes; {self._now_in_quarantine()}")
        return descriptor

    def adopt(self, digest: Digest) -> None:
        """Hash a blob file that has no row, and give it one.

        Raises MissingBlob if there is no file, CorruptBlob (after putting the
        file into quarantine) if its bytes are others.
        """
        try:
            descriptor = os.open(blob_path(digest), _READING, dir_fd=self._directory)
        except FileNotFoundError:
            raise MissingBlob(f"no blob {digest} in {self._layout.root}") from None
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            self.quarantine(digest)
            raise CorruptBlob(f"blob {digest} was a symbolic link; {self._now_in_quarantine()}") from error
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                self.quarantine(digest, status)
                raise CorruptBlob(f"blob {digest} was not a file; {self._now_in_quarantine()}")
            protect(descriptor, status)
            found = hash_descriptor(descriptor, digest.function)
            if found.hash != digest.hash:
                self.quarantine(digest, status)
                raise CorruptBlob(f"blob {digest} had the bytes of {found}; {self._now_in_quarantine()}")
            if found.size != digest.size:
                raise MissingBlob(f"no blob {digest}: the store has that hash with {found.size} bytes")
            self.make_durable(descriptor, digest)
        finally:
            os.close(descriptor)
        row = BlobRow(digest.size, int(time.time()), bool(status.st_mode & 0o100))

        def work(change: Change) -> None:
            if change.get(Table.BLOBS, digest.key) is None and self.is_same_file(digest, status):
                put_rows(change, [(digest.key, row)])

        with self.publishing():
            self._index.update(work)

    def make_durable(self, descriptor: int, digest: Digest) -> None:
        """What was just found, and its name, may be only in the page cache: before a row says otherwise."""
        os.fsync(descriptor)
        shard = os.open(os.path.dirname(blob_path(digest)), os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory)
        try:
            os.fsync(shard)
        finally:
            os.close(shard)

    def is_same_file(self, digest: Digest, examined: os.stat_result) -> bool:
        """Whether the file that was looked at still has the blob's name."""
        try:
            return os.path.samestat(os.stat(blob_path(digest), dir_fd=self._directory, follow_symlinks=False), examined)
        except OSError:
            return False

    def quarantine(self, digest: Digest, examined: os.stat_result | None = None) -> None:
        """Take a wrong file out of the blob directory and forget its row; nothing is deleted.

        `examined` is the file that was found wrong: if another has the name by
        now, it is left alone, as somebody has just published the right one.
        """
        target = self._layout.quarantine / f"{digest.function.label}-{digest.hash.hex()}-{time.time_ns()}"
        with self.removing():
            if examined is not None and not self.is_same_file(digest, examined):
                return
            self._forget(digest)
            with suppress(FileNotFoundError):
                os.rename(blob_path(digest), target, src_dir_fd=self._directory)

    def _now_in_quarantine(self) -> str:
        return f"it is in {self._layout.quarantine} now; add the file it came from again"

    def _note_loss(self, digest: Digest) -> None:
        """Somebody removed the file behind our back: drop the row, unless the file is back."""
        with self.removing():
            if not self.has_file(digest):
                self._forget(digest)

    def _forget(self, digest: Digest) -> None:
        self._index.update(lambda change: delete_rows(change, [digest.key]))

    def note_used(self, keys: Iterable[bytes]) -> None:
        """Note that blobs are in use now, so that collections and the cold tier spare them a while longer.

        What was noted within the last hour isn't noted again: most calls write nothing.
        """
        now = int(time.time())
        with self._index.view() as view:
            found = [(key, view.get(Table.BLOBS, key)) for key in keys]
        stale = [key for key, value in found if value and unpack_row(value).used < now - _USE_SECONDS]
        if stale:
            self._index.update(lambda change: touch(change, stale, now), lasting=False)

    def missing(self, digests: Iterable[Digest]) -> list[Digest]:
        """Those of the digests that are not here. What has no row but a file is hashed now."""
        digests = list(digests)
        with self._index.view() as view:
            unknown = [d for d in digests if not is_known(view, d)]
        return [d for d in unknown if not self.has(d)]

    def prepare(self, digests: Iterable[Digest]) -> list[Digest]:
        """See that blobs can be used by who won't ask again; returns those that are not here.

        What has no row but a file is hashed, and all count as used now (to the hour).
        """
        stale_before = int(time.time()) - _USE_SECONDS
        unknown, stale = [], []
        with self._index.view() as view:
            get, unpack = view.get, _ROW.unpack
            for digest in digests:
                key = digest.key
                value = get(Table.BLOBS, key)
                size, used, _ = unpack(value) if value else (-1, 0, 0)
                if size != digest.size:
                    unknown.append(digest)
                elif used < stale_before:
                    stale.append(key)
        if stale:
            now = int(time.time())
            self._index.update(lambda change: touch(change, stale, now), lasting=False)
        return [digest for digest in unknown if not self.has(digest)]

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


def protect(descriptor: int, status: os.stat_result) -> None:
    """Take the right to write from a file that was found: nobody writes to a blob."""
    if status.st_mode & 0o222:
        # Where it is another user's, the owner's good will has to do.
        with suppress(PermissionError):
            os.fchmod(descriptor, MODE_EXECUTABLE if status.st_mode & 0o100 else MODE)


_REMOVALS = b"removals"


def count_removal(change: Change) -> None:
    """Move the counter that tells manifests to count their missing blobs again."""
    change.put(Table.META, _REMOVALS, str(removals(change) + 1).encode())


def removals(view: View) -> int:
    """How often blobs have been removed: as long as it stands still, what was complete is complete."""
    return int(view.get(Table.META, _REMOVALS) or 0)
