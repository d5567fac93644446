"""Bringing bytes into the store: hash, make durable, publish, remember.

The durability rule (ARCHITECTURE.md has the argument):

    1. The bytes are written to ``tmp/<session>/`` and hashed there, or hashed
       in memory and then written: what is hashed is what is published.
    2. They are made durable (fsync each, or one syncfs for a large batch).
    3. Each file is renamed to its final name. From here on it is published.
    4. The names are made durable (fsync of the directories, or syncfs).
    5. One index transaction gives every blob its row.

A crash before 3 leaves litter in ``tmp/``, which the next start of any casfs
removes, as the session's lock is free then. A crash between 3 and 5 leaves
whole files without rows, which are hashed at their first use.

Threads may share a session: `add_*` run in parallel, `flush` alone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

from store import kernel
from store.blobs import MODE, MODE_EXECUTABLE, BlobRow, Blobs, find_row, pack_row, touch, unpack_row
from store.digest import Digest, DigestFunction
from store.entries import Stamp
from store.errors import DigestMismatch, MissingBlob, NoSpace, StoreUnusable
from store.hashing import CHUNK, hash_descriptor, hasher_for
from store.index import Change, Index, Table
from store.layout import Layout, blob_path
from store.stamps import find_stamp, is_settled, put_stamps

SMALL = 256 << 10
"""Files up to this size are read into memory, hashed and written; larger ones are cloned or copied first."""
_SYNCFS_FROM = 16
"""From this many new blobs on one syncfs is cheaper than an fsync each (ARCHITECTURE.md has the numbers)."""
_FLUSH_BLOBS = 4096
_FLUSH_BYTES = 1 << 30


class Transfer(Enum):
    """How a host file's bytes get into the store."""

    AUTO = "auto"
    """Reflink where the file system can, else copy_file_range."""
    HARDLINK = "hardlink"
    """One more name for the same file, which becomes read-only; asked for, never chosen."""


class _Pending(NamedTuple):
    digest: Digest
    path: Path
    executable: bool


class Ingest:
    """One session of adding blobs. A context manager: leaving it normally flushes, with an error discards.

    What `add_*` return is a promise until `flush` returns.
    """

    def __init__(self, layout: Layout, index: Index, blobs: Blobs) -> None:
        self._index = index
        self._blobs = blobs
        self._layout = layout
        self._lock = threading.Lock()
        self._directory, self._session_lock = _open_session(layout.tmp)
        self._serial = 0
        self._pending: dict[bytes, _Pending] = {}
        self._pending_bytes = 0
        self._seen: dict[bytes, Callable[[], Digest]] = {}
        self._seen_executable: set[bytes] = set()
        self._stamps: list[tuple[Stamp, Digest]] = []
        self.new_blobs = 0
        self.new_bytes = 0

    def __enter__(self) -> Ingest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.flush()
        finally:
            self.close()

    def close(self) -> None:
        """Discard what was not flushed."""
        shutil.rmtree(self._directory, ignore_errors=True)
        os.close(self._session_lock)

    def add_bytes(self, data: bytes, function: DigestFunction, *, executable: bool = False) -> Digest:
        """Add a blob that is in memory."""
        digest = function.of(data)
        if not self._note_seen(digest, lambda: self.add_bytes(data, function, executable=executable), executable):
            self._write(digest, data, executable)
        return digest

    def add_stream(self, stream: BinaryIO, function: DigestFunction, expected: Digest | None = None) -> Digest:
        """Add what a stream has until its end; it is written to disk as it comes.

        Raises DigestMismatch if it isn't `expected`; nothing is kept then.
        """
        path = self._new_path()
        hasher = hasher_for(function, expected.size if expected else CHUNK)
        size = 0
        try:
            with _translated(self._layout, "adding a stream"), open(path, "xb", buffering=0) as out:
                while chunk := stream.read(CHUNK):
                    hasher.update(chunk)
                    _write_all(out.fileno(), chunk)
                    size += len(chunk)
            digest = Digest(function, hasher.digest(), size)
            if expected is not None and digest != expected:
                raise DigestMismatch(f"the bytes offered as {expected} are {digest}; nothing was stored")
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        self._hold(_Pending(digest, path, False))
        return digest

    def add_file(
        self,
        path: str | bytes | Path,
        function: DigestFunction,
        *,
        transfer: Transfer = Transfer.AUTO,
        expected: Digest | None = None,
    ) -> Digest:
        """Add a regular file of the host, as it is now.

        An unchanged file (same device, inode, size, mtime and ctime as when it
        was last added) is not read again. Raises DigestMismatch if the content
        is not `expected`, OSError if it can't be read.
        """
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            status = os.fstat(source)
            executable = bool(status.st_mode & 0o100)
            stamp = Stamp.of(status)
            settled = is_settled(stamp)

            def again() -> Digest:
                return self.add_file(path, function, transfer=transfer, expected=expected)

            with self._index.view() as view:
                digest = find_stamp(view, stamp, function)
            if digest is None or not self._note_seen(digest, again, executable):
                if stamp.size <= SMALL and transfer is Transfer.AUTO:
                    data = _read_all(source, stamp.size)
                    digest = function.of(data)
                    _check(digest, expected, path)
                    if not self._note_seen(digest, again, executable):
                        self._write(digest, data, executable)
                else:
                    digest = self._transfer(source, path, function, transfer, executable, expected)
                if settled and transfer is Transfer.AUTO and Stamp.of(os.fstat(source)) == stamp:
                    with self._lock:
                        self._stamps.append((stamp, digest))
            else:
                _check(digest, expected, path)
            return digest
        finally:
            os.close(source)

    def _note_seen(self, digest: Digest, again: Callable[[], Digest], executable: bool) -> bool:
        """Whether the blob is in the store or on its way; remembers to touch it at the flush."""
        key = digest.key
        with self._lock:
            if key in self._pending:
                if executable and not self._pending[key].executable:
                    self._pending[key] = self._pending[key]._replace(executable=True)
                return True
        with self._index.view() as view:
            row = find_row(view, digest)
        if row is None:
            return False
        with self._lock:
            self._seen[key] = again
            if executable and not row.executable:
                self._seen_executable.add(key)
        return True

    def _new_path(self) -> Path:
        with self._lock:
            self._serial += 1
            return self._directory / str(self._serial)

    def _write(self, digest: Digest, data: bytes, executable: bool) -> None:
        path = self._new_path()
        with _translated(self._layout, f"writing blob {digest}"):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                _write_all(descriptor, data)
            finally:
                os.close(descriptor)
        self._hold(_Pending(digest, path, executable))

    def _transfer(
        self,
        source: int,
        name: str | bytes | Path,
        function: DigestFunction,
        transfer: Transfer,
        executable: bool,
        expected: Digest | None,
    ) -> Digest:
        """Clone, copy or link into tmp, and hash what arrived there."""
        path = self._new_path()
        try:
            with _translated(self._layout, f"adding {os.fsdecode(name)}"):
                if transfer is Transfer.HARDLINK:
                    os.link(name, path, follow_symlinks=False)
                    target = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                else:
                    target = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                try:
                    if transfer is Transfer.AUTO:
                        kernel.clone_or_copy(source, target)
                    digest = hash_descriptor(target, function)
                finally:
                    os.close(target)
            _check(digest, expected, name)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        self._hold(_Pending(digest, path, executable))
        return digest

    def _hold(self, pending: _Pending) -> None:
        key = pending.digest.key
        with self._lock:
            if key in self._pending:
                pending.path.unlink()
                return
            self._pending[key] = pending
            self._pending_bytes += pending.digest.size

    @property
    def is_full(self) -> bool:
        """Whether enough is pending for a flush to be worth its price."""
        return len(self._pending) + len(self._seen) >= _FLUSH_BLOBS or self._pending_bytes >= _FLUSH_BYTES

    def flush(self) -> None:
        """Publish what was added, durably. No `add_*` may run meanwhile.

        Raises NoSpace or StoreUnusable; nothing of the batch is then promised.
        """
        # More than one round only when a collection removed a blob between its being seen and being touched.
        for _ in range(16):
            with _translated(self._layout, "publishing blobs"):
                vanished = self._flush_once()
            if not vanished:
                return
            for again in vanished:
                again()
        raise MissingBlob("blobs keep vanishing while they are added: is something deleting them?")

    def _flush_once(self) -> list[Callable[[], Digest]]:
        pending, self._pending, self._pending_bytes = self._pending, {}, 0
        seen, self._seen = self._seen, {}
        made_executable, self._seen_executable = self._seen_executable, set()
        stamps, self._stamps = self._stamps, []
        if not (pending or seen or stamps):
            return []
        with self._index.view() as view:
            fresh = []
            for item in pending.values():
                if find_row(view, item.digest) is None:
                    fresh.append(item)
                else:
                    # Another process was first; its file stays, as mounts may have it open.
                    item.path.unlink()
        many = len(fresh) >= _SYNCFS_FROM
        for item in fresh:
            os.chmod(item.path, MODE_EXECUTABLE if item.executable else MODE)
            if not many:
                _fsync(item.path)
        if many:
            kernel.syncfs(self._blobs.directory)
        now = int(time.time())
        with self._blobs.publishing():
            shards = {self._publish(item) for item in fresh}
            if many:
                kernel.syncfs(self._blobs.directory)
            else:
                for shard in shards:
                    _fsync(shard)
            made_executable.intersection_update(seen)
            for key in made_executable:
                self._make_executable(key)

            def work(change: Change) -> list[bytes]:
                for digest, _, executable in fresh:
                    change.put(Table.BLOBS, digest.key, pack_row(BlobRow(digest.size, now, executable)))
                absent = touch(change, [key for key in seen if key not in pending], now)
                for key in made_executable:
                    if (value := change.get(Table.BLOBS, key)) is not None:
                        change.put(Table.BLOBS, key, pack_row(unpack_row(value)._replace(executable=True)))
                put_stamps(change, stamps)
                return absent

            absent = self._index.update(work)
        self.new_blobs += len(fresh)
        self.new_bytes += sum(item.digest.size for item in fresh)
        return [seen[key] for key in absent]

    def _publish(self, item: _Pending) -> Path:
        """Give a durable file its final name; returns the shard's directory."""
        target = self._layout.blobs / blob_path(item.digest)
        try:
            os.rename(item.path, target)
        except FileNotFoundError:
            _make_shard(target.parent, self._layout.blobs)
            os.rename(item.path, target)
        return target.parent

    def _make_executable(self, key: bytes) -> None:
        """A blob that was only data is a program too now: a hard-link checkout needs the bits."""
        path = blob_path(Digest.from_key(key, 0))
        try:
            os.chmod(path, MODE_EXECUTABLE, dir_fd=self._blobs.directory)
        except FileNotFoundError:
            return  # lost behind our back; `Blobs.open` says so when it is needed


def _open_session(tmp: Path) -> tuple[Path, int]:
    """A new directory below `tmp`, and a descriptor whose lock says that the session lives.

    The name begins with the time in nanoseconds: collections spare what was
    touched since the oldest living session began.
    """
    while True:
        directory = tmp / f"{time.time_ns()}-{secrets.token_hex(4)}"
        try:
            os.mkdir(directory, 0o700)
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            if not tmp.is_dir():
                raise StoreUnusable(f"{tmp} is missing: this is not a whole store") from None
            continue  # a cleaner took the directory before it was locked
        except PermissionError as error:
            raise StoreUnusable(f"can't write in {tmp}: {error.strerror}") from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(f"the disk of {tmp} is full") from error
            if error.errno == errno.EROFS:
                raise StoreUnusable(f"can't write in {tmp}: {error.strerror}") from error
            raise
        fcntl.flock(lock, fcntl.LOCK_EX)
        if directory.exists():
            return directory, lock
        os.close(lock)


def living_sessions(layout: Layout, *, clean: bool) -> list[int]:
    """When each living ingest session began, in nanoseconds since the epoch.

    With `clean`, what dead ones left behind is removed.
    """
    began = []
    for directory in layout.tmp.iterdir():
        try:
            lock = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if clean:
                shutil.rmtree(directory, ignore_errors=True)
        except BlockingIOError:
            began.append(int(directory.name.partition("-")[0]))
        finally:
            os.close(lock)
    return began


def _make_shard(shard: Path, top: Path) -> None:
    """Make a shard's directory durably."""
    shard.mkdir(parents=True, exist_ok=True)
    for made in (shard, *shard.parents):
        if made == top.parent:
            return
        _fsync(made)


def _check(digest: Digest, expected: Digest | None, name: str | bytes | Path) -> None:
    if expected is not None and digest != expected:
        raise DigestMismatch(f"{os.fsdecode(name)} is {digest}, not {expected}; nothing was stored")


def _read_all(descriptor: int, size: int) -> bytes:
    """The whole content; `size` is what it probably is. A byte more is asked for, to see the end at once."""
    data = os.read(descriptor, size + 1)
    if len(data) == size:
        return data
    parts = [data]
    while parts[-1]:
        parts.append(os.read(descriptor, CHUNK))
    return b"".join(parts)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _translated(layout: Layout, doing: str) -> Iterator[None]:
    """Map what the disk says to the store's own errors."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"{doing}: the disk of {layout.root} is full") from error
        if error.errno == errno.EROFS:
            raise StoreUnusable(f"{doing}: {layout.root} is on a read-only file system") from error
        raise
